"""Which way of writing a causal 3x3x3 convolution this platform runs fastest.

    python benchmarks/lowerings.py [--shapes 8x480x720x128x128 ...] [--dtype bfloat16] [--gradient]

Each shape is frames x height x width x channels in x channels out, with two frames of the past.
Prints the milliseconds of a call (of its gradient with `--gradient`), the rate, and the
temporaries of the program: as one convolution in 3D, as a sum of one in 2D for each tap in time,
and as one in 2D over frames that hold the channels of all taps; each written in the arrays'
dtype and in float32.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import jax
from jax import lax

from eqx_cogvae._lowering import frames, tpu
from eqx_cogvae._lowering.choose import Geometry, Spec, Thresholds

PADS = ((1, 1), (1, 1))
SHAPES = ["8x480x720x128x128", "8x240x360x256x256", "4x120x180x512x512", "2x60x90x512x512"]


def in_3d(x: jax.Array, kernel: jax.Array, total: str) -> jax.Array:
    """One convolution in 3D."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1, 1),
        ((0, 0), *PADS),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        preferred_element_type=total,
    )


def by_tap(x: jax.Array, kernel: jax.Array, total: str) -> jax.Array:
    """A sum of convolutions in 2D."""
    return tpu.summed(x, kernel, Spec(Geometry(pads=PADS), total, Thresholds()))


def as_channels(x: jax.Array, kernel: jax.Array, total: str) -> jax.Array:
    """One convolution in 2D, with the taps' frames side by side: ours."""
    return frames.channels(x, kernel, Spec(Geometry(pads=PADS), total, Thresholds()))


WAYS = {"in 3D": in_3d, "by tap": by_tap, "as channels": as_channels}


def main() -> None:
    """Prints a row for each shape and way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gradient", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.dtype}\n")
    print("| shape | way | written in | ms | TFLOP/s | temporaries, GiB |")
    print("|---|---|---|---|---|---|", flush=True)
    totals = dict.fromkeys((options.dtype, "float32"))
    shapes = {shape: tuple(map(int, shape.split("x"))) for shape in options.shapes}
    for shape, name, total in itertools.product(shapes, WAYS, totals):
        try:
            row = _measured(shapes[shape], WAYS[name], total, options)
        except jax.errors.JaxRuntimeError as error:  # what a platform lacks is a row of the table
            row = f"{str(error).splitlines()[0][:60]} | | "
        print(f"| {shape} | {name} | {total} | {row} |", flush=True)


def _measured(
    shape: tuple[int, ...], way: Callable, total: str, options: argparse.Namespace
) -> str:
    t, h, w, i, o = shape
    x = jax.random.normal(jax.random.key(0), (1, t + 2, h, w, i), options.dtype)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, i, o), options.dtype)

    def call(x, kernel):
        return way(x, kernel, total).astype(options.dtype)

    def gradient(x, kernel):
        y, pullback = jax.vjp(call, x, kernel)
        return pullback(y)

    fn = gradient if options.gradient else call
    program = jax.jit(fn).lower(x, kernel).compile()
    jax.block_until_ready(program(x, kernel))
    seconds = []
    for _ in range(options.repeats):
        begun = time.perf_counter()
        jax.block_until_ready(program(x, kernel))
        seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds)
    flop = 2 * t * h * w * 27 * i * o * (3 if options.gradient else 1)
    used = program.memory_analysis().temp_size_in_bytes / 2**30
    return f"{1e3 * median:.2f} | {flop / median / 1e12:.1f} | {used:.2f}"


if __name__ == "__main__":
    main()
