"""The error that each dtype makes: a clip encoded, and latents decoded, beside float64.

    JAX_PLATFORMS=cpu python benchmarks/dtypes.py [--model tiny --frames 17 --size 64x96]

Prints the relative error (L2) of the posterior's mean and of the decoded clip, on the platform that
JAX runs on. Weights are those of the checkpoint, rounded to each dtype. The clip is the procedural
one, and what is decoded is its mean in float64.
"""

import argparse
import platform

import jax
import jax.numpy as jnp
import numpy as np

import eqx_cogvae as cv
from eqx_cogvae import video

DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    """Prints a row for each dtype."""
    options = _options()
    height, width = map(int, options.size.split("x"))
    clip = np.asarray(video.procedural_clip(options.frames, height, width), np.float64)
    vae = cv.from_pretrained(options.model)
    # Weights in half precision, in which the tiny ones are stored, are exact in all wider dtypes.
    with jax.enable_x64(True):
        exact = _cast(vae, jnp.float64)
        mean = np.asarray(exact.encode(clip).mean)
        decoded = np.asarray(exact.decode(mean))
    print(
        f"{options.model}, {options.frames} frames of {options.size}, jax {jax.__version__}, "
        f"{jax.default_backend()}, on {platform.machine()}\n"
    )
    print("| dtype | encode | decode |\n|---|---|---|", flush=True)
    for dtype in DTYPES:
        rounded = _cast(vae, jnp.dtype(dtype))
        errors = (
            _distance(rounded.encode(clip.astype(np.float32)).mean, mean),
            _distance(rounded.decode(mean.astype(np.float32)), decoded),
        )
        print(f"| {dtype} | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)


def _cast(vae: cv.VAE, dtype: jnp.dtype) -> cv.VAE:
    return jax.tree.map(lambda x: x.astype(dtype), vae)


def _distance(got: jax.Array, due: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - due) / np.linalg.norm(due))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="as `from_pretrained` takes it")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", default="64x96")
    return parser.parse_args()


if __name__ == "__main__":
    main()
