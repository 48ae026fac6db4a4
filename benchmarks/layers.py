"""What the parts of a residual block cost by themselves, forward and backward.

    JAX_PLATFORMS=cpu python benchmarks/layers.py [--shapes 64x96x128 ...] [--frames 9]

A causal convolution of 3x3x3, a spatial norm with its activation, and a group norm, each of
random float32 arrays (height x width x channels). Prints, for each, the milliseconds of a call
and of its gradient by arrays and weights, medians, and the processor's seconds to compile both.
The convolution's gradient does three times the multiplications of its forward pass.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from eqx_cogvae import _layers

LATENTS, GROUPS = 16, 32


def main() -> None:
    """Prints a row for each layer and shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["64x96x128", "32x48x256", "16x24x512"])
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.frames} frames\n")
    print("| layer | shape | forward, ms | compiled in, s | gradient, ms | compiled in, s |")
    print("|---|---|---|---|---|---|")
    for shape in options.shapes:
        height, width, channels = map(int, shape.split("x"))
        x = jax.random.normal(jax.random.key(0), (1, options.frames, height, width, channels))
        for name, layer in _layers_of(channels, x).items():
            cells = [_measured(fn, (layer, x), options.repeats) for fn in (_call, _gradient)]
            row = " | ".join(f"{1e3 * run:.1f} | {compiled:.1f}" for run, compiled in cells)
            print(f"| {name} | {shape} | {row} |", flush=True)


def _layers_of(channels: int, x: jax.Array) -> dict[str, Callable]:
    b, t, h, w, _ = x.shape
    key = jax.random.key(1)
    latents = jax.random.normal(key, (b, 1 + (t - 1) // 4, -(-h // 8), -(-w // 8), LATENTS))
    conv = _layers.CausalConv3d(channels, channels, key=key)
    spatial = _layers.SpatialNorm(channels, LATENTS, GROUPS, key=key)
    group = _layers.GroupNorm(channels, GROUPS, 1e-6)
    return {
        "convolution": eqx.Partial(lambda conv, x: conv(x)[0], conv),
        "spatial norm, SiLU": eqx.Partial(lambda n, z, x: jax.nn.silu(n(x, z)), spatial, latents),
        "group norm, SiLU": eqx.Partial(lambda n, x: jax.nn.silu(n(x)), group),
    }


def _call(layer: Callable, x: jax.Array) -> jax.Array:
    return layer(x)


def _gradient(layer: Callable, x: jax.Array) -> Any:
    loss = lambda pair: jnp.sum(jnp.square(pair[0](pair[1])))  # noqa: E731
    return eqx.filter_grad(loss)((layer, x))


def _measured(fn: Callable, args: tuple, repeats: int) -> tuple[float, float]:
    """Seconds of a call, and the processor's seconds to compile it."""
    begun = time.process_time()
    program = eqx.filter_jit(fn).lower(*args).compile()
    compiled = time.process_time() - begun
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        jax.block_until_ready(program(*args))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:]), compiled


if __name__ == "__main__":
    main()
