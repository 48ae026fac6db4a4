"""What a preview costs beside the VAE's own decode: seconds, arithmetic and compile time.

    python benchmarks/preview.py [--latents 3 --size 128x192 --dtype float32 --repeats 3]

Weights are random, of the published shapes; no figure depends on their values. Both decode the
same latents in frame batches of 2, in turns, so that other work on the machine slows both alike.
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp

import eqx_cogvae as cv
from eqx_cogvae import preview
from eqx_cogvae._flops import flops


def main() -> None:
    """Times both decoders, and prints a row for each and their ratios."""
    options = _options()
    dtype, (height, width) = jnp.dtype(options.dtype), map(int, options.size.split("x"))
    z = jax.random.normal(jax.random.key(0), (1, options.latents, height // 8, width // 8, 16))
    models = {
        "VAE": cv.VAE(cv.Config.preset(options.model), key=jax.random.key(0), dtype=dtype),
        "preview": preview.Preview(key=jax.random.key(0), dtype=dtype),
    }
    device = jax.devices()[0]
    print(
        f"{options.latents} latents of {options.size}, {options.dtype}, {device.device_kind}, "
        f"jax {jax.__version__}\n"
    )
    first = {name: _seconds(model, z) for name, model in models.items()}
    best = dict(first)
    for _ in range(options.repeats):
        for name, model in models.items():
            best[name] = min(best[name], _seconds(model, z))
    counts = {name: _flop(model, z) for name, model in models.items()}
    print("| decoder | seconds | first call | TFLOP |")
    print("|---|---|---|---|")
    for name in models:
        print(f"| {name} | {best[name]:.3f} | {first[name]:.1f} | {counts[name] / 1e12:.3f} |")
    ratios = best["VAE"] / best["preview"], counts["VAE"] / counts["preview"]
    print(f"\nThe preview is {ratios[0]:.1f} times as fast, with {ratios[1]:.1f} times less to do.")


def _seconds(model: cv.VAE | preview.Preview, z: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(model.decode(z))
    return time.perf_counter() - start


def _flop(model: cv.VAE | preview.Preview, z: jax.Array) -> int:
    """Returns the arithmetic of a whole clip, by direct convolutions on any platform."""
    arrays, static = eqx.partition(model, eqx.is_array)
    whole = lambda arrays, z: cv.framewise(eqx.combine(arrays, static).decode_step, 2)(z)  # noqa: E731
    return flops(jax.make_jaxpr(whole)(arrays, z))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zai-org/CogVideoX-2b")
    parser.add_argument("--latents", type=int, default=3)
    parser.add_argument("--size", default="128x192")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
