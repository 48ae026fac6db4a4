"""Computes the moments that a group norm needs, on one device or on parts of frames on several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import choose


def moments(
    x: Float[Array, "b t h w c"], groups: int
) -> tuple[Float[Array, "b 1 1 1 c"], Float[Array, "b 1 1 1 c"]]:
    """Returns mean and variance of each channel's group, over all frames and pixels."""
    return _moments(x, groups, choose.parts(x.shape, choose.current_hints()))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _moments(x: Array, groups: int, parts: tuple[int, int]) -> tuple[Array, Array]:
    if parts != (1, 1):
        return _of_parts(x, groups, *parts)
    mean = _mean(x, groups)
    return mean, _mean(jnp.square(x - mean), groups)


@_moments.defjvp
def _moments_jvp(groups, parts, primals, tangents):
    # The variance's derivative with respect to the mean is zero. JAX's own rule would sum over all
    # pixels to find that.
    (x,), (x_tangent,) = primals, tangents
    mean, variance = _moments(x, groups, parts)
    return (mean, variance), (_mean(x_tangent, groups), 2 * _mean((x - mean) * x_tangent, groups))


def _mean(x: Array, groups: int) -> Array:
    """Returns the mean of each channel's group, over all frames and pixels."""
    by_channel = _over_pixels(x, height=2, width=3)
    # Groups are formed last: splitting the channels of a large array copies it.
    return _spread(jnp.mean(by_channel.reshape(x.shape[0], groups, -1), axis=2), x.shape[4])


def _of_parts(x: Array, groups: int, rows: int, columns: int) -> tuple[Array, Array]:
    """Returns the moments of frames that are cut into `rows` x `columns` parts, one a device.

    Each device computes the moments of its part, and all receive those of all parts. That is one
    exchange. Mean and variance of whole frames would take two each: XLA sums over the rows of
    devices, then over the columns.
    """
    (b, t, h, w, c), parts = x.shape, rows * columns
    x = x.reshape(b, t, rows, h // rows, columns, w // columns, c)
    mean = _over_pixels(x, height=3, width=5)
    away = x - mean[:, None, :, None, :, None]
    variance = _over_pixels(jnp.square(away), height=3, width=5)
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


def _over_pixels(x: Array, height: int, width: int) -> Array:
    """Returns means over all frames, axis 1, and over the axes of height and width."""
    # Rows are averaged first: one float32 sum over millions of pixels loses digits and takes twice
    # as long.
    return jnp.mean(jnp.mean(x, axis=width), axis=(1, height))


def _spread(by_group: Float[Array, "b g"], channels: int) -> Float[Array, "b 1 1 1 c"]:
    """Returns each channel's value of its group."""
    # A masked sum gives each channel its group's value. Some compilers would fuse `jnp.repeat` into
    # the reader as a gather for every pixel.
    groups = by_group.shape[1]
    mask = np.repeat(np.eye(groups, dtype=bool), channels // groups, axis=1)
    values = jnp.sum(jnp.where(mask, by_group[:, :, None], 0), axis=1)
    return values[:, None, None, None]


__all__ = ["moments"]
