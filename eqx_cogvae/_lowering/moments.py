"""Computes the moments that a group norm needs, on one device or on parts of frames on several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._types import at_least_float32
from . import choose


def moments(
    x: Float[Array, "b t h w c"], groups: int
) -> tuple[Float[Array, "b 1 1 1 c"], Float[Array, "b 1 1 1 c"]]:
    """Returns mean and variance of each channel's group, over all frames and pixels.

    They are computed in at least float32.
    """
    hints = choose.current_hints()
    return _moments(x, groups, choose.parts(x.shape, hints), choose.is_first_apart(x.shape, hints))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _moments(x: Array, groups: int, parts: tuple[int, int], apart: bool) -> tuple[Array, Array]:
    # Where chunks take the first frame by itself, so do the moments, lest XLA join the frames.
    stretches = [x[:, :1], x[:, 1:]] if apart else [x]
    stretches = list(map(at_least_float32, stretches))
    if parts != (1, 1):
        return _of_parts(stretches, groups, *parts)
    mean = _mean(stretches, groups)
    return mean, _mean([jnp.square(x - mean) for x in stretches], groups)


@_moments.defjvp
def _moments_jvp(groups, parts, apart, primals, tangents):
    # The variance's derivative with respect to the mean is zero. JAX's own rule would sum over all
    # pixels to find that.
    (x,), (x_tangent,) = primals, tangents
    mean, variance = _moments(x, groups, parts, apart)
    x, x_tangent = map(at_least_float32, (x, x_tangent))
    tangent = 2 * _mean([(x - mean) * x_tangent], groups)
    return (mean, variance), (_mean([x_tangent], groups), tangent)


def _mean(stretches: list[Array], groups: int) -> Array:
    """Returns the mean of each channel's group, over all frames and pixels."""
    by_channel = _over_pixels(stretches, height=2, width=3)
    clips, channels = by_channel.shape
    # Groups are formed last: splitting the channels of a large array copies it.
    return _spread(jnp.mean(by_channel.reshape(clips, groups, -1), axis=2), channels)


def _of_parts(stretches: list[Array], groups: int, rows: int, columns: int) -> tuple[Array, Array]:
    """Returns the moments of frames that are cut into `rows` x `columns` parts, one a device.

    Each device computes the moments of its part, and all receive those of all parts. That is one
    exchange. Mean and variance of whole frames would take two each: XLA sums over the rows of
    devices, then over the columns.
    """
    b, _, h, w, c = stretches[0].shape
    parts = rows * columns
    stretches = [x.reshape(b, -1, rows, h // rows, columns, w // columns, c) for x in stretches]
    mean = _over_pixels(stretches, height=3, width=5)
    away = [x - mean[:, None, :, None, :, None] for x in stretches]
    variance = _over_pixels(list(map(jnp.square, away)), height=3, width=5)
    own = jnp.stack([mean, variance]).reshape(2, b, parts, c)
    # In this sum every part has a place of its own.
    mask = np.eye(parts, dtype=bool)[:, :, None]
    means, variances = jnp.sum(jnp.where(mask, own[:, :, None], 0), axis=3).reshape(
        2, b, parts, groups, c // groups
    )
    # The parts are of one size, and so are the groups.
    mean = jnp.mean(means, axis=(1, 3), keepdims=True)
    variance = jnp.mean(variances + jnp.square(means - mean), axis=(1, 3))
    return _spread(mean[:, 0, :, 0], c), _spread(variance, c)


def _over_pixels(stretches: list[Array], height: int, width: int) -> Array:
    """Returns means over all frames, axis 1, and over the axes of height and width."""
    # Rows are averaged first: one float32 sum over millions of pixels loses digits and takes twice
    # as long.
    means = [jnp.mean(jnp.mean(x, axis=width), axis=(1, height)) for x in stretches]
    if len(means) == 1:
        return means[0]
    counts = np.array([x.shape[1] for x in stretches], means[0].dtype)
    return jnp.average(jnp.stack(means), axis=0, weights=counts)


def _spread(by_group: Float[Array, "b g"], channels: int) -> Float[Array, "b 1 1 1 c"]:
    """Returns each channel's value of its group."""
    # A masked sum gives each channel its group's value. Some compilers would fuse `jnp.repeat` into
    # the reader as a gather for every pixel.
    groups = by_group.shape[1]
    mask = np.repeat(np.eye(groups, dtype=bool), channels // groups, axis=1)
    values = jnp.sum(jnp.where(mask, by_group[:, :, None], 0), axis=1)
    return values[:, None, None, None]


__all__ = ["moments"]
