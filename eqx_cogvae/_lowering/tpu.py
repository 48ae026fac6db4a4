"""Lowers convolutions for TPUs, to run fast or in little memory."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._types import at_least_float32
from .choose import Spec
from .frames import lax_conv2d


def sequential(x: Array, kernel: Array, spec: Spec) -> Array:
    """Convolves as many frames as the kernel has taps in time, tap by tap, into one frame.

    XLA for TPUs pads and copies what it convolves. Here it does so for one frame at a time.
    """
    total = lax_conv2d(x[:, 0], kernel[0], spec)
    for i in range(1, len(kernel)):
        # Without the barrier XLA would copy all the frames before the first convolution.
        frame, total = lax.optimization_barrier((x[:, i], total))
        total = total + lax_conv2d(frame, kernel[i], spec)
    return jnp.expand_dims(total, 1)


def products(x: Array, kernel: Array, spec: Spec) -> Array:
    """Convolves by one matrix product for each tap in time and each row of the kernel.

    The pixels that a kernel's row sees are concatenated along channels. For small arrays XLA for
    TPUs estimates half the cycles of a convolution, and compiles it sooner.
    """
    (taps, down, across, i, o) = kernel.shape
    x = jnp.pad(x, [(0, 0)] * 2 + [*spec.geometry.pads, (0, 0)])
    count, height, width = x.shape[1] - taps + 1, x.shape[2] - down + 1, x.shape[3] - across + 1
    seen = jnp.concatenate([x[:, :, :, j : j + width] for j in range(across)], axis=-1)
    total = jnp.zeros((), spec.accumulator)
    for tap in range(taps):
        for row in range(down):
            part = seen[:, tap : tap + count, row : row + height]
            matrix = kernel[tap, row].reshape(across * i, o)
            total = total + jnp.matmul(part, matrix, preferred_element_type=spec.accumulator)
    return total


def summed(x: Array, kernel: Array, spec: Spec) -> Array:
    """Adds up one 2D convolution of all frames for each tap in time.

    XLA for TPUs fuses the additions into the convolutions. For bands of rows it estimates fewer
    cycles and less memory than for `channels`, and so it does for frames that devices share and
    that cannot be divided into parts.
    """
    taps, b, count = kernel.shape[0], x.shape[0], x.shape[1] - kernel.shape[0] + 1
    total = jnp.zeros((), spec.accumulator)
    for tap in range(taps):
        seen = x[:, tap : tap + count].reshape(b * count, *x.shape[2:])
        total = total + lax_conv2d(seen, kernel[tap], spec)
    return total.reshape(b, count, *total.shape[1:])


def doubled(x: Array, kernel: Array, spec: Spec) -> Array:
    """Doubles by nearest neighbour, then convolves, as one convolution of frames among zeros.

    A pixel among zeros that a square of ones spreads is a doubled one, and the square joins the
    kernel, which grows by one. XLA for TPUs leaves the zeros out, and never holds doubled frames.
    """
    kernel = _sums_of_pairs(_sums_of_pairs(at_least_float32(kernel[0]), 0), 1).astype(x.dtype)
    y = lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        kernel,
        window_strides=(1, 1),
        padding=[(above + 1, below + 1) for above, below in spec.geometry.pads],
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=spec.accumulator,
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _sums_of_pairs(k: Array, axis: int) -> Array:
    """Returns the sums of neighbours along an axis, the first and the last by themselves."""
    zero = jnp.zeros_like(lax.slice_in_dim(k, 0, 1, axis=axis))
    return jnp.concatenate([k, zero], axis) + jnp.concatenate([zero, k], axis)


LOWERINGS = (products, sequential, summed, doubled)

__all__ = ["LOWERINGS", "doubled", "products", "sequential", "summed"]
