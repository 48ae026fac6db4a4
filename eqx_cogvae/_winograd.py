"""Convolutions by kernels of 3x3 pixels with 4/9 of the multiplications.

Winograd's F(2x2, 3x3), from Lavin & Gray 2016 (https://arxiv.org/abs/1509.09308): of every four
pixels a side, two apart, sixteen sums; a product of matrices for each of the sixteen; sums of
these are two pixels a side of the result. Taps in time are added up between the two.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

BAND = 2**24
"""Elements from which on the rows are worked on in bands: the sums are four times as many."""


def winograd_conv(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "kt 3 3 i o"]
) -> Float[Array, "b t-kt+1 h w o"]:
    """A 3D convolution, valid in time, with a zero around the frames.

    Has no fast derivative of its own.
    """
    h, w = x.shape[2:4]
    # Odd sides get one more zero, and give one pixel back.
    x = jnp.pad(x, [(0, 0), (0, 0), (1, 1 + h % 2), (1, 1 + w % 2), (0, 0)])
    kernels = [_of_kernel(k, 1) for k in _of_kernel(kernel, 1)]
    bands = -(-x.size // BAND)
    y = _convolved(x, kernels) if bands == 1 else _by_bands(x, kernels, bands)
    return y[:, :, :h, :w]


def _by_bands(x: Array, kernels: list[list[Array]], bands: int) -> Array:
    """A band of rows after another; the last may do some of the one before again."""
    b, t, h, w, _ = x.shape
    taps, _, o = kernels[0][0].shape
    rows = h // 2 - 1
    band = -(-rows // bands)

    def add(y: Array, start: Array) -> tuple[Array, None]:
        first = 2 * jnp.minimum(start, rows - band)
        part = _convolved(lax.dynamic_slice_in_dim(x, first, 2 * band + 2, axis=2), kernels)
        return lax.dynamic_update_slice_in_dim(y, part, first, axis=2), None

    room = jnp.zeros_like(x, shape=(b, t - taps + 1, h - 2, w - 2, o))
    return lax.scan(add, room, jnp.arange(0, rows, band, dtype=jnp.int32))[0]


def _convolved(x: Array, kernels: list[list[Array]]) -> Array:
    sums = [_of_pixels(row, 3) for row in _of_pixels(x, 2)]
    products = [
        [_over_time(*pair) for pair in zip(*row, strict=True)]
        for row in zip(sums, kernels, strict=True)
    ]
    pixels = zip(*map(_of_products, products), strict=True)
    columns = [_of_products(column) for column in pixels]
    y = jnp.stack([jnp.stack(column, axis=3) for column in columns], axis=5)
    b, t, h, _, w, _, o = y.shape
    return y.reshape(b, t, 2 * h, 2 * w, o)


def _over_time(x: Array, kernel: Array) -> Array:
    """A convolution of frames whose pixels have nothing to do with each other."""
    b, t, h, w, _ = x.shape
    y = lax.conv_general_dilated(
        x.reshape(b, t, h * w, -1),
        kernel[:, None],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(b, -1, h, w, y.shape[-1])


def _of_pixels(x: Array, axis: int) -> list[Array]:
    """The four sums along an axis, of every four pixels from each second one on."""
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    even, odd = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    (d0, d2), (d1, d3) = (
        (lax.slice_in_dim(half, 0, -1, axis=axis), lax.slice_in_dim(half, 1, None, axis=axis))
        for half in (even, odd)
    )
    return [d0 - d2, d1 + d2, d2 - d1, d1 - d3]


def _of_kernel(k: Array, axis: int) -> list[Array]:
    k0, k1, k2 = (lax.index_in_dim(k, i, axis, keepdims=False) for i in range(3))
    return [k0, (k0 + k1 + k2) / 2, (k0 - k1 + k2) / 2, k2]


def _of_products(m: Sequence[Array]) -> list[Array]:
    """The two pixels that four products make."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


__all__ = ["winograd_conv"]
