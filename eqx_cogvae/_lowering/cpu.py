"""Convolutions as XLA's CPU backend is fast at them, and their gradients.

It has a fast convolution in 2D only, and a slow gradient by the kernel. Other platforms use
`conv2d` as well.
"""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Pads: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
"""Zeros before and behind, of height and of width."""


def conv2d(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "kh kw i o"], stride: int, pads: Pads
) -> Float[Array, "b t h2 w2 o"]:
    """A 2D convolution of every frame."""
    b, t, *_ = x.shape
    # Padded by hand: with padding of its own the gradient by the frames leaves the fast path of
    # XLA's CPU backend for some shapes, and takes thirty times as long.
    y = lax.conv_general_dilated(
        _padded_frames(x, pads),
        kernel,
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(b, t, *y.shape[1:])


def _padded_frames(x: Array, pads: Pads) -> Array:
    return jnp.pad(x.reshape(-1, *x.shape[2:]), [(0, 0), *pads, (0, 0)])


def _taps(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "kt kh kw i o"], stride: int, pads: Pads
) -> Float[Array, "b t-kt+1 h2 w2 o"]:
    """A 3D convolution, valid in time, as a sum of one in 2D for each tap."""
    frames = x.shape[1] - kernel.shape[0] + 1
    parts = (conv2d(x[:, i : i + frames], tap, stride, pads) for i, tap in enumerate(kernel))
    return functools.reduce(jnp.add, parts)


def _forward(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, Any]:
    return _taps(x, kernel, stride, pads), (x, kernel)


def _backward(stride: int, pads: Pads, saved: Any, cotangent: Array) -> tuple[Array, Array]:
    x, kernel = saved
    (by_x,) = jax.vjp(lambda x: _taps(x, kernel, stride, pads), x)[1](cotangent)
    padded = jnp.pad(x, [(0, 0), (0, 0), *pads, (0, 0)])
    if stride > 1:
        padded = _phases(padded, stride)
    taps, *spatial, i, o = kernel.shape
    rows, columns = sizes = tuple(-(-size // stride) for size in spatial)
    by_phase = _kernel_gradient(padded, cotangent, sizes)
    # A strided kernel is a smaller one over the phases of the frame: (rows, columns, phases, o).
    split = by_phase.reshape(taps, *sizes, stride, stride, i, o).swapaxes(2, 3)
    merged = split.reshape(taps, rows * stride, columns * stride, i, o)
    return by_x, merged[:, : spatial[0], : spatial[1]]


# XLA's CPU backend makes of the gradient by the kernel a convolution whose window is the frame,
# at a tenth of the speed of the products here.
taps_conv = jax.custom_vjp(_taps, nondiff_argnums=(2, 3))
taps_conv.defvjp(_forward, _backward)


def doubling_conv_by_phases(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "b t 2*h 2*w o"]:
    """Nearest doubling, then a 3x3 convolution, as four of 2x2 on the small grid."""

    # A large pixel sees two small ones per axis: the even phase the pair that ends at its own
    # pixel with taps (k0, k1 + k2), the odd phase the pair that begins there, (k0 + k1, k2).
    def pair(k: Array, axis: int) -> list[Array]:
        k0, k1, k2 = jnp.split(k, 3, axis)
        return [jnp.concatenate(p, axis) for p in ((k0, k1 + k2), (k0 + k1, k2))]

    b, t, h, w, _ = x.shape
    kernels = [phase for rows in pair(kernel, 0) for phase in pair(rows, 1)]
    y = taps_conv(x, jnp.concatenate(kernels, axis=-1)[None], 1, ((1, 1), (1, 1)))
    quads = jnp.split(y, 4, axis=-1)
    shifted = [quads[2 * i + j][:, :, i : i + h, j : j + w] for i in (0, 1) for j in (0, 1)]
    y = jnp.stack(shifted, axis=3).reshape(b, t, h, 2, 2, w, -1)
    return y.swapaxes(4, 5).reshape(b, t, 2 * h, 2 * w, -1)


def _phases(x: Array, stride: int) -> Array:
    """Each `stride` x `stride` square of pixels as one of so many more channels."""
    b, t, h, w, c = x.shape
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -h % stride), (0, -w % stride), (0, 0)])
    x = x.reshape(b, t, -(-h // stride), stride, -(-w // stride), stride, c).swapaxes(3, 4)
    return x.reshape(*x.shape[:4], stride * stride * c)


def _kernel_gradient(x: Array, cotangent: Array, sizes: tuple[int, ...]) -> Array:
    """Of a valid convolution by its kernel, `(taps, *sizes, i, o)`.

    With the rows of a frame end to end, what a tap sees of it is one stretch, so that each tap
    is a product of matrices. Frame by frame, for the stretches to stay in the processor's cache,
    and in loops: a product for each tap, written out, takes three times as long to compile.
    """
    (b, t, h, w, o), width, i = cotangent.shape, x.shape[3], x.shape[4]
    rows, columns = sizes
    taps = x.shape[1] - t + 1
    # What is read past a row's end meets zeros.
    cotangent = jnp.pad(cotangent, [(0, 0)] * 3 + [(0, width - w), (0, 0)])
    length = h * width - columns + 1
    x, cotangent = (y.reshape(*y.shape[:2], -1, y.shape[-1]) for y in (x, cotangent))
    late, down, right = np.indices((taps, rows, columns), np.int32).reshape(3, -1)
    starts = (late, down * np.int32(width) + right)

    def stretch(y: Array, frame: Array, start: Array) -> Array:
        at = (jnp.zeros_like(frame), frame, start, jnp.zeros_like(frame))
        seen = lax.dynamic_slice(y, at, (b, 1, length, y.shape[-1]))
        return seen.reshape(b * length, -1)  # dots over several axes have their operands copied

    def add_frame(total: Array, frame: Array) -> tuple[Array, None]:
        reaching = stretch(cotangent, frame, jnp.zeros_like(frame))

        def product(tap: tuple[Array, Array]) -> Array:
            seen = stretch(x, frame + tap[0], tap[1])
            return lax.dot_general(seen, reaching, (((0,), (0,)), ((), ())))

        return total + lax.map(product, starts), None

    total = jnp.zeros_like(x, shape=(late.size, i, o))
    total, _ = lax.scan(add_frame, total, jnp.arange(t, dtype=jnp.int32))
    return total.reshape(taps, rows, columns, i, o)


__all__ = ["Pads", "conv2d", "doubling_conv_by_phases", "taps_conv"]
