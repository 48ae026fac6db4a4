"""Convolves by kernels of 3x3 pixels with 4/9 of the multiplications.

This is Winograd's F(2x2, 3x3), from Lavin & Gray 2016 (https://arxiv.org/abs/1509.09308). Patches
of 4x4 pixels, taken at a stride of 2, are transformed into 16 values. Each of these is multiplied
by a matrix over the channels, and taps in time are added up. The output transform turns the 16
products into 2x2 pixels of the result.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .choose import Spec


def winograd(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "kt 3 3 i o"], spec: Spec
) -> Float[Array, "b t-kt+1 h2 w2 o"]:
    """Returns a 3D convolution, valid in time, with zeros around the frames."""
    x, (h, w) = _padded(x, spec)
    kernels = [_kernel_transform(k, 1) for k in _kernel_transform(kernel, 1)]
    bands = -(-x.size // spec.limits.winograd_band_elements)
    y = _convolved(x, kernels) if bands == 1 else _by_bands(x, kernels, bands)
    return y[:, :, :h, :w]


def _padded(x: Array, spec: Spec) -> tuple[Array, tuple[int, int]]:
    """Returns the padded frames, and the size of the result.

    Odd sides get one more zero, and give one pixel back.
    """
    (above, below), (left, right) = spec.geometry.pads
    h, w = x.shape[2] + above + below - 2, x.shape[3] + left + right - 2
    pads = [(0, 0), (0, 0), (above, below + h % 2), (left, right + w % 2), (0, 0)]
    return jnp.pad(x, pads), (h, w)


def by_kernel(
    x: Float[Array, "b t h w i"], cotangent: Float[Array, "b t2 h2 w2 o"], spec: Spec
) -> Float[Array, "kt 3 3 i o"]:
    """Returns the gradient of `winograd` with respect to its kernel, with as few multiplications.

    The loop takes a few frames, or a few rows of one, at a time. Frames and cotangents are both
    transformed, and multiplied as sixteen matrices over the pixels. The frames that the taps in
    time see are concatenated along channels.
    """
    (b, t, h, w, o), i = cotangent.shape, x.shape[4]
    taps = x.shape[1] - t + 1
    row = b * (w + 2) * taps * i
    most = spec.limits.winograd_piece_elements
    bands, pairs = _cut(-(-h // 2), most // (2 * row))
    rows = 2 * pairs
    steps, frames = _cut(t, most // (rows * row))
    # The padding that fills the last pieces meets cotangents of zero.
    late, low = (0, steps * frames - t), bands * rows - h
    (above, below), (left, right) = spec.geometry.pads
    x = jnp.pad(x, [(0, 0), late, (above, below + low), (left, right + w % 2), (0, 0)])
    cotangent = jnp.pad(cotangent, [(0, 0), late, (0, low), (0, w % 2), (0, 0)])

    def add(total: Array, step: Array) -> tuple[Array, None]:
        first, top = step // bands * frames, step % bands * rows
        start = jnp.zeros_like(first)

        def cut(y: Array, frame: Array, height: int) -> Array:
            sizes = (b, frames, height, *y.shape[3:])
            piece = lax.dynamic_slice(y, (start, frame, top, start, start), sizes)
            return piece.reshape(b * frames, *sizes[2:])

        seen = jnp.concatenate([cut(x, first + i, rows + 2) for i in range(taps)], axis=-1)
        return total + _products(seen, cut(cotangent, first, rows)), None

    total = jnp.zeros_like(x, shape=(4, 4, taps * i, o))
    total, _ = lax.scan(add, total, jnp.arange(steps * bands, dtype=jnp.int32))
    total = total.reshape(4, 4, taps, i, o)
    rows_done = [jnp.stack(_kernel_transform_transpose(row)) for row in total]
    kernel = jnp.stack(_kernel_transform_transpose(rows_done))
    return jnp.moveaxis(kernel, 2, 0)


def _cut(size: int, at_most: int) -> tuple[int, int]:
    """Returns how many pieces `size` is cut into, and their size."""
    pieces = -(-size // max(1, at_most))
    return pieces, -(-size // pieces)


def _products(x: Array, cotangent: Array) -> Array:
    """Returns products `(4, 4, i, o)` summed over all pixels of the frames `(t, h, w, c)`."""
    sums = [_input_transform(row, 2) for row in _input_transform(x, 1)]
    columns = _output_transform_transpose(cotangent, 1)
    others = [_output_transform_transpose(column, 2) for column in columns]
    products = [
        [_over_pixels(*pair) for pair in zip(*row, strict=True)]
        for row in zip(sums, others, strict=True)
    ]
    return jnp.stack([jnp.stack(row) for row in products])


def _over_pixels(x: Array, cotangent: Array) -> Array:
    # XLA copies the operands of dots over several axes, so pixels become one axis.
    x, cotangent = (y.reshape(-1, y.shape[-1]) for y in (x, cotangent))
    return lax.dot_general(x, cotangent, (((0,), (0,)), ((), ())))


def _by_bands(x: Array, kernels: list[list[Array]], bands: int) -> Array:
    """Convolves one band of rows after another; the last may overlap the one before."""
    b, t, h, w, _ = x.shape
    taps, _, o = kernels[0][0].shape
    rows = h // 2 - 1
    band = -(-rows // bands)

    def write_band(y: Array, start: Array) -> tuple[Array, None]:
        first = 2 * jnp.minimum(start, rows - band)
        part = _convolved(lax.dynamic_slice_in_dim(x, first, 2 * band + 2, axis=2), kernels)
        return lax.dynamic_update_slice_in_dim(y, part, first, axis=2), None

    output = jnp.zeros_like(x, shape=(b, t - taps + 1, h - 2, w - 2, o))
    return lax.scan(write_band, output, jnp.arange(0, rows, band, dtype=jnp.int32))[0]


def _convolved(x: Array, kernels: list[list[Array]]) -> Array:
    sums = [_input_transform(row, 3) for row in _input_transform(x, 2)]
    products = [
        [_over_time(*pair) for pair in zip(*row, strict=True)]
        for row in zip(sums, kernels, strict=True)
    ]
    pixels = zip(*map(_output_transform, products), strict=True)
    columns = [_output_transform(column) for column in pixels]
    y = jnp.stack([jnp.stack(column, axis=3) for column in columns], axis=5)
    b, t, h, _, w, _, o = y.shape
    return y.reshape(b, t, 2 * h, 2 * w, o)


def _over_time(x: Array, kernel: Array) -> Array:
    """Convolves along time alone."""
    b, t, h, w, _ = x.shape
    y = lax.conv_general_dilated(
        x.reshape(b, t, h * w, -1),
        kernel[:, None],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(b, -1, h, w, y.shape[-1])


def _input_transform(x: Array, axis: int) -> list[Array]:
    """Applies the input transform along an axis: four sums of every four pixels, two apart."""
    even, odd = _halves(x, axis)
    (d0, d2), (d1, d3) = (
        (lax.slice_in_dim(half, 0, -1, axis=axis), lax.slice_in_dim(half, 1, None, axis=axis))
        for half in (even, odd)
    )
    return [d0 - d2, d1 + d2, d2 - d1, d1 - d3]


def _output_transform_transpose(y: Array, axis: int) -> list[Array]:
    """Applies the transpose of `_output_transform` to every two pixels."""
    even, odd = _halves(y, axis)
    return [even, even + odd, even - odd, -odd]


def _halves(x: Array, axis: int) -> list[Array]:
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    return [lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1)]


def _kernel_transform(k: Array, axis: int) -> list[Array]:
    k0, k1, k2 = (lax.index_in_dim(k, i, axis, keepdims=False) for i in range(3))
    return [k0, (k0 + k1 + k2) / 2, (k0 - k1 + k2) / 2, k2]


def _kernel_transform_transpose(m: Sequence[Array] | Array) -> list[Array]:
    """Applies the transpose of `_kernel_transform`."""
    middle = (m[1] + m[2]) / 2
    return [m[0] + middle, (m[1] - m[2]) / 2, middle + m[3]]


def _output_transform(m: Sequence[Array]) -> list[Array]:
    """Applies the output transform: the two pixels that four products make."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


LOWERINGS = (winograd,)

__all__ = ["LOWERINGS", "by_kernel", "winograd"]
