"""Convolves frames one by one: convolutions that halve or double height and width."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._meshes import varying_as
from . import choose
from .affine import rows
from .choose import Geometry, Hints
from .conv import conv_shape, valid_conv
from .frames import padded, pinned
from .parts import on_parts
from .units import Taps


def frame_conv(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "kh kw i o"],
    bias: Float[Array, " o"],
    geometry: Geometry,
) -> Float[Array, "b t h2 w2 o"]:
    """Convolves every frame by itself, in chunks if `x` is large."""
    taps, hints = Taps(kernel[None], bias), choose.current_hints()
    if not choose.in_chunks(x.shape, hints):
        return valid_conv(x, *taps, geometry)
    return _in_chunks(geometry, hints, x, taps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _in_chunks(geometry: Geometry, hints: Hints, x: Array, taps: Taps) -> Array:
    # Derivatives are traced after the context that the hints came from has ended.
    with choose.using(hints):
        if not choose.is_first_apart(x.shape, hints):
            return _on_parts(_resized, x, taps, geometry)
        first = pinned(valid_conv(pinned(x[:, :1]), *taps, geometry))
        return jnp.concatenate([first, _on_parts(_resized, x[:, 1:], taps, geometry)], axis=1)


@_in_chunks.defjvp
def _in_chunks_jvp(geometry: Geometry, hints: Hints, primals: Any, tangents: Any) -> Any:
    # The derivative goes frame by frame. That of a loop over bands would add an array of all
    # frames to the cotangent for every band.
    plain = jax.checkpoint(lambda x, taps: _on_parts(_one_by_one, x, taps, geometry))
    with choose.using(hints):
        _, tangent = jax.jvp(plain, primals, tangents)
    return _in_chunks(geometry, hints, *primals), tangent


def _on_parts(convolve: Callable, x: Array, taps: Taps, geometry: Geometry) -> Array:
    """Calls `convolve(x, taps, geometry)` on what each device holds of the frames."""
    run = lambda x, rest: convolve(x, taps, rest)  # noqa: E731
    return on_parts(run, x, taps.kernel.shape, geometry)


def _resized(x: Array, taps: Taps, geometry: Geometry) -> Array:
    """Convolves frames in bands of rows, or if there are none one by one."""
    shape = conv_shape(x.shape, taps.kernel.shape, geometry)
    steps = shape[2] // geometry.scale
    # The elements of a band are those that it reads or writes, whichever are more.
    row = max(x.size, math.prod(shape)) // math.prod((*shape[:2], steps))
    height = choose.band_height((*shape[:2], steps, row, 1), 1, choose.current_hints())
    if not height:
        return _one_by_one(x, taps, geometry)
    return _resized_by_bands(x, taps, geometry, steps, height)


def _one_by_one(x: Array, taps: Taps, geometry: Geometry) -> Array:
    """Convolves frames one after the other."""
    moved = jnp.moveaxis(x, 1, 0)[:, :, None]
    y = lax.map(lambda now: valid_conv(now, *taps, geometry)[:, 0], moved)
    # The barrier fixes one layout for all readers; XLA for TPUs would copy the array for each.
    return lax.optimization_barrier(jnp.moveaxis(y, 0, 1))


def _resized_by_bands(x: Array, taps: Taps, geometry: Geometry, steps: int, height: int) -> Array:
    """Convolves frames in bands of `height` of their `steps`.

    A step is the least that a result can grow by: a row, or two if height is doubled.
    """
    reach, _ = geometry.reach
    inner = geometry.within((reach, (0, 0)))
    stride, scale = geometry.stride, geometry.scale
    read = x.shape[2] - (steps - height) * stride + sum(reach)

    def step(result: Array, i: Array) -> tuple[Array, None]:
        # A band at an edge is read further inside, and padded, so that all bands have one shape.
        start = i * (height * stride) - reach[0]
        first = jnp.clip(start, 0, x.shape[2] - read)
        seen = padded(rows(x, first, read), (reach, (0, 0)))
        seen = rows(seen, start - first + reach[0], read)
        y = valid_conv(seen, *taps, inner)
        return lax.dynamic_update_slice_in_dim(result, y, i * (height * scale), axis=2), None

    shape = conv_shape(x.shape, taps.kernel.shape, geometry)
    (result,) = varying_as(lax.empty(shape, x.dtype), x, *taps)[:1]
    result, _ = lax.scan(step, result, jnp.arange(steps // height, dtype=jnp.int32))
    return lax.optimization_barrier(result)


__all__ = ["frame_conv"]
