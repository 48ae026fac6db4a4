"""What crossing between torch and JAX costs, beside the decode that it surrounds.

    python benchmarks/conversion.py [--latents HxW] [--repeats N]

Converts a clip of 49x480x720 in bfloat16 to JAX and back, in each layout that torch may have it
in; times a decode of the default configuration, random weights, three latent frames of the size
asked for, and scales it to the clip by its pixels. Prints milliseconds, medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch

import eqx_cogvae as cv
from eqx_cogvae.diffusers import to_jax, to_torch

CLIP = (1, 3, 49, 480, 720)
LATENT_FRAMES = 3


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", default="8x12")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    height, width = map(int, options.latents.split("x"))
    decode, pixels = _decode_seconds(height, width)
    whole = decode * CLIP[2] * CLIP[3] * CLIP[4] / pixels
    print(f"decode of {pixels:,} pixels {decode:.2f} s; scaled to {CLIP}: {whole:.0f} s")
    video = torch.rand(CLIP).to(torch.bfloat16)
    layouts = {
        "contiguous": video,
        "channels_last_3d": video.contiguous(memory_format=torch.channels_last_3d),
    }
    for name, clip in layouts.items():
        there = _median(lambda clip=clip: jax.block_until_ready(to_jax(clip)), options.repeats)
        array = to_jax(clip)
        back = _median(lambda array=array: to_torch(array), options.repeats)
        copied = _median(lambda array=array: to_torch(array).contiguous(), options.repeats)
        share = 100 * (there + copied) / whole
        print(
            f"{name}: to JAX {1e3 * there:.2f} ms, back {1e3 * back:.2f} ms, back and made "
            f"contiguous {1e3 * copied:.2f} ms; there and back contiguous: {share:.3f}% of a decode"
        )


def _decode_seconds(height: int, width: int) -> tuple[float, int]:
    vae = cv.VAE(cv.Config(), key=jax.random.key(0), dtype=jnp.bfloat16)
    latents = jax.random.normal(jax.random.key(1), (1, LATENT_FRAMES, height, width, 16))
    _, frames, height, width, _ = jax.block_until_ready(vae.decode(latents)).shape
    return _median(lambda: jax.block_until_ready(vae.decode(latents)), 2), frames * height * width


def _median(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
