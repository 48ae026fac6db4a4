"""Large arrays in chunks: a norm, an activation, a convolution, and what is added to it.

What is normalised, and what the convolution makes of it on its way, is then there for one chunk
at a time, and the result is written over the array that it is added to. A chunk is a band of rows
of several frames. Where devices hold rows, and where no band height divides the frame, it is one
frame.

The derivative is that of the whole, both ways: a loop's would keep the intermediates of every
chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from .._meshes import varying_as
from . import choose
from .affine import Affine, frame, rows
from .choose import Geometry, Hints
from .conv import causal_conv, pointwise_conv, valid_conv

Activation = Callable[[Array], Array]


class Taps(NamedTuple):
    """The kernel and the bias of a causal, zero-padded convolution."""

    kernel: Float[Array, "kt kh kw i o"]
    bias: Float[Array, " o"]


class Unit(NamedTuple):
    """A norm, a convolution, the arrays that they work on, and what is added to the result.

    The norm takes the first channels of `x`, as many as the kernel has; any others are added to
    the result. Added is `residual` as well. `beside` is a pointwise convolution of `x` that is
    appended to the result, for a later unit to add. With it the result is as wide as `x`, and
    there is no residual.
    """

    affine: Affine
    taps: Taps
    x: Float[Array, "b t h w _c"]
    cache: Float[Array, "b k h w i"] | None
    residual: Float[Array, "b t h w o"] | None = None
    beside: Taps | None = None

    @property
    def channels(self) -> int:
        """Number of channels that are normalised and convolved."""
        return self.taps.kernel.shape[3]

    @property
    def past(self) -> int:
        """Number of frames before its own that a result depends on."""
        return self.taps.kernel.shape[0] - 1

    def joined(self, y: Array, x: Array, residual: Array | None) -> Array:
        """Returns the convolved frames `y` with all that is added and appended to them."""
        if residual is not None:
            y = residual + y
        if x.shape[-1] > self.channels:
            y = x[..., self.channels :] + y
        if self.beside is None:
            return y
        return jnp.concatenate([y, pointwise_conv(x, *self.beside)], axis=-1)

    def output_buffer(self) -> Array:
        """Returns the array that the result is written over, chunk by chunk."""
        if self.residual is not None:
            return self.residual
        if self.beside is not None:
            return self.x
        return jnp.zeros_like(self.x, shape=(*self.x.shape[:-1], self.taps.bias.size))


def whole(act: Activation, unit: Unit) -> tuple[Array, Array | None]:
    """Runs a unit on all pixels at once; returns the result and the cache."""
    normed = act(unit.affine(unit.x[..., : unit.channels])).astype(unit.x.dtype)
    y, cache = causal_conv(normed, *unit.taps, unit.cache)
    return unit.joined(y, unit.x, unit.residual), cache


def in_chunks(act: Activation, unit: Unit) -> tuple[Array, Array | None]:
    """Runs a unit chunk by chunk; equals `whole`, to rounding."""
    return _in_chunks(act, choose.current(), unit)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _in_chunks(act: Activation, hints: Hints, unit: Unit) -> tuple[Array, Array | None]:
    # Derivatives are traced after the context that the hints came from has ended.
    with choose.under(hints):
        height = choose.band_height(unit.x.shape, unit.taps.kernel.shape[1] // 2, hints)
        return by_bands(act, height, unit) if height else by_frames(act, unit)


@_in_chunks.defjvp
def _in_chunks_jvp(act: Activation, hints: Hints, primals: Any, tangents: Any) -> Any:
    with choose.under(hints):
        # Checkpointed, only the arguments are kept for a backward pass. The result of this
        # forward pass is not used, so XLA leaves it out.
        _, tangent = jax.jvp(jax.checkpoint(functools.partial(whole, act)), primals, tangents)
    return _in_chunks(act, hints, *primals), tangent


def by_frames(act: Activation, unit: Unit) -> tuple[Array, Array | None]:
    """Runs a unit frame by frame, in a loop that carries the last normalised frames."""
    count, pinned = unit.x.shape[1], choose.pins_layout(unit.x.shape, choose.current())

    def normed(now: Array, i: Array) -> Array:
        affine = unit.affine.of_frame(i, count)
        return act(affine.in_cells(now[..., : unit.channels])).astype(now.dtype)

    x, past, cache = _caches(normed, unit)

    def step(carry: tuple, i: Array) -> tuple[tuple, None]:
        result, past = carry
        now = frame(x if unit.beside is None else result, i)
        before = jnp.concatenate(past, axis=1) if past else None
        y, seen = causal_conv(normed(now, i), *unit.taps, before)
        y = unit.joined(y, now, None if unit.residual is None else frame(result, i))
        y = with_layout_constraint(y, Layout(tuple(range(y.ndim)))) if pinned else y
        past = () if seen is None else tuple(seen[:, i : i + 1] for i in range(len(past)))
        return (lax.dynamic_update_slice_in_dim(result, y, i, axis=1), past), None

    index = jnp.arange(count, dtype=jnp.int32)
    buffer = unit._replace(x=x).output_buffer()
    (result, _), _ = lax.scan(step, _carry(buffer, past, x), index)
    return lax.optimization_barrier((result, cache))


def _caches(normed: Callable[[Array, Array], Array], unit: Unit) -> tuple[Array, Any, Any]:
    """Returns `x`, the normalised frames before it one by one, and those to cache.

    The cache is made apart, and before a loop may write over `x`. What the loop carries has the
    loop's layout, not that of a result; left to XLA for TPUs, the copies of all caches come last,
    when every one of them is there twice.
    """
    x, past = unit.x, unit.past
    if not past:
        return x, (), None
    index = jnp.arange(x.shape[1], dtype=jnp.int32)
    ends = index[max(0, len(index) - past) :]
    if unit.cache is None:  # The first frame stands in for it.
        ends = jnp.concatenate([index[:1], ends])
    last = list(lax.map(lambda i: normed(frame(x, i), i), ends))
    before = jnp.repeat(last.pop(0), past, axis=1) if unit.cache is None else unit.cache
    cache = jnp.concatenate([before[:, len(last) :], *last], axis=1)
    x, cache = lax.optimization_barrier((x, cache))
    return x, tuple(before[:, i : i + 1] for i in range(past)), cache


def by_bands(act: Activation, height: int, unit: Unit) -> tuple[Array, Array | None]:
    """Runs a unit on bands of `height` rows of all frames.

    The loop carries the last normalised rows of the band above, as the result may be written over
    their source. Each band is read together with the rows below it. The last has none: it is read
    from higher up, and zeros stand in below the frame. The cache is written band by band too, over
    the one before it.
    """
    (b, count, rows_in_all, width, _), past = unit.x.shape, unit.past
    kernel, dtype, margin = unit.taps.kernel, unit.x.dtype, unit.taps.kernel.shape[1] // 2
    beside = kernel.shape[2] // 2
    geometry = Geometry(pads=((0, 0), (beside, beside)))
    # Rows and frames are enlarged before the loop: within it, XLA for TPUs would take a fifth more
    # memory for a steady decode.
    affine = unit.affine.with_rows(count, rows_in_all)

    def normed(source: Array, cache: Array | None, start: Array) -> Array:
        """Returns the normalised rows of a band and of those below it, with their past."""
        first = jnp.minimum(start, rows_in_all - height - margin)
        now = rows(source, first, height + margin)[..., : unit.channels]
        y = act(affine.of_rows(first, height + margin).in_cells(now)).astype(dtype)
        if past and cache is None:
            y = jnp.concatenate([jnp.repeat(y[:, :1], past, axis=1), y], axis=1)
        elif cache is not None:
            y = jnp.concatenate([rows(cache, first, height + margin), y], axis=1)
        y = jnp.pad(y, ((0, 0), (0, 0), (0, margin), (0, 0), (0, 0)))
        return rows(y, start - first, height + margin)

    def step(carry: tuple, i: Array) -> tuple[tuple, None]:
        result, (above, cache) = carry
        start, source = i * height, unit.x if unit.beside is None else result
        y = normed(source, None if unit.cache is None else cache, start)
        y = jnp.concatenate([above, y], axis=2)
        above = y[:, :, height : height + margin]
        if past:
            last = y[:, -past:, margin : margin + height]
            cache = lax.dynamic_update_slice_in_dim(cache, last, start, axis=2)
        y = valid_conv(y, *unit.taps, geometry)
        residual = None if unit.residual is None else rows(result, start, height)
        y = unit.joined(y, rows(source, start, height), residual)
        return (lax.dynamic_update_slice_in_dim(result, y, start, axis=2), (above, cache)), None

    def empty(frames: int, height: int) -> Array:
        return jnp.zeros((b, frames, height, width, unit.channels), dtype)

    cache = empty(past, rows_in_all) if unit.cache is None and past else unit.cache
    carry = _carry(unit.output_buffer(), (empty(past + count, margin), cache), unit.x)
    index = jnp.arange(rows_in_all // height, dtype=jnp.int32)
    (result, (_, cache)), _ = lax.scan(step, carry, index)
    return lax.optimization_barrier((result, cache))


def _carry(result: Array, rest: Any, x: Array) -> tuple[Array, Any]:
    """Returns a loop's carry, of one type from its first step on also within `jax.shard_map`."""
    leaves, structure = jax.tree.flatten((result, rest))
    return jax.tree.unflatten(structure, varying_as(*leaves, x)[:-1])


def frame_by_frame(
    fn: Callable[[Array], Array], x: Float[Array, "b t *rest"]
) -> Float[Array, "b t *rest2"]:
    """Applies a function of single frames to the frames of `x`, of large arrays one by one."""
    if not choose.in_chunks(x.shape, choose.current()):
        return fn(x)
    moved = jnp.moveaxis(x, 1, 0)[:, :, None]
    _, y = lax.scan(lambda _, now: (None, fn(now)[:, 0]), None, moved)
    # One layout for all that read it: XLA for TPUs would else copy it for each.
    return lax.optimization_barrier(jnp.moveaxis(y, 0, 1))


__all__ = ["Taps", "Unit", "by_bands", "by_frames", "frame_by_frame", "in_chunks", "whole"]
