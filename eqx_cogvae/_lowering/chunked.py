"""Runs a norm, an activation and a convolution on large arrays in chunks.

Intermediates then exist for one chunk at a time, and the result overwrites the array that it is
added to. A chunk is a band of rows of all frames. If no band height divides the frame, a chunk is
one frame. If devices share frames, each runs the chunks of its part of them.

Derivatives are those of the unchunked function, because differentiating the loop would keep the
intermediates of every chunk.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from .._meshes import varying_as
from . import choose
from .affine import Affine, frame, rows
from .choose import Geometry, Hints
from .conv import causal_conv, conv_shape, on_parts, pointwise_conv, valid_conv
from .frames import padded
from .parts import Edges, Parts

Activation = Callable[[Array], Array]


class Taps(NamedTuple):
    """The kernel and the bias of a causal, zero-padded convolution."""

    kernel: Float[Array, "kt kh kw i o"]
    bias: Float[Array, " o"]


class Unit(NamedTuple):
    """A norm, a convolution, the arrays that they work on, and what is added to the result.

    The first channels of `x`, as many as the kernel takes, are normalised and convolved. The
    remaining channels, and `residual` if it is given, are added to the result. `beside` is a
    pointwise convolution of `x`, whose result is appended as extra channels for a later unit to
    add. The result is then as wide as `x`, and there is no residual.
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
    def geometry(self) -> Geometry:
        """How the kernel is applied."""
        _, kh, kw, *_ = self.taps.kernel.shape
        return Geometry(pads=((kh // 2, kh // 2), (kw // 2, kw // 2)))

    @property
    def past(self) -> int:
        """Number of frames before its own that a result depends on."""
        return self.taps.kernel.shape[0] - 1

    def of_frames(self, start: int, stop: int) -> "Unit":
        """Returns the unit of some of the frames; its cache is still that of the first."""
        return self._replace(
            affine=self.affine.of_frames(start, stop, self.x.shape[1]),
            x=self.x[:, start:stop],
            residual=None if self.residual is None else self.residual[:, start:stop],
        )

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
        return lax.empty((*self.x.shape[:-1], self.taps.bias.size), self.x.dtype)


def unchunked(act: Activation, unit: Unit) -> tuple[Array, Array | None]:
    """Runs a unit on all pixels at once; returns the result and the cache."""
    normed = act(unit.affine(unit.x[..., : unit.channels])).astype(unit.x.dtype)
    y, cache = causal_conv(normed, *unit.taps, unit.cache)
    return unit.joined(y, unit.x, unit.residual), cache


def in_chunks(act: Activation, unit: Unit) -> tuple[Array, Array | None]:
    """Runs a unit chunk by chunk; equals `unchunked`, to rounding."""
    parameters, static = eqx.partition(act, eqx.is_array)
    return _in_chunks(static, choose.current_hints(), parameters, unit)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _in_chunks(
    static: Any, hints: Hints, parameters: Any, unit: Unit
) -> tuple[Array, Array | None]:
    act = eqx.combine(static, parameters)
    # Derivatives are traced after the context that the hints came from has ended.
    with choose.using(hints):
        kernel, shape = unit.taps.kernel.shape, unit.x.shape
        parts = Parts(*choose.parts(shape, hints, kernel[1:3], unit.geometry))
        if parts.number == 1:
            return _by_chunks(act, unit)
        y, cache = _by_chunks_of_parts(act, unit, parts)
        return parts.as_frames(y), None if cache is None else parts.as_frames(cache)


def _by_chunks_of_parts(act: Activation, unit: Unit, parts: Parts) -> tuple[Array, Array | None]:
    """Runs a unit on parts of frames, and returns what becomes of each part."""
    clips = lambda x: None if x is None else parts.as_clips(x)  # noqa: E731
    unit = unit._replace(
        affine=parts.of_affine(unit.affine, unit.x.shape[1:4]),
        x=parts.as_clips(unit.x),
        cache=clips(unit.cache),
        residual=clips(unit.residual),
    )
    edges = _edges(act, unit, parts)
    # The loop may overwrite `x`.
    x, edges = lax.optimization_barrier((unit.x, edges))
    with choose.using(choose.current_hints().of_parts()):
        return _by_chunks(act, unit._replace(x=x), edges)


def _edges(act: Activation, unit: Unit, parts: Parts) -> Edges:
    """Exchanges the normalised pixels around each part, and those of the frames before."""
    shape, dtype = unit.x.shape, unit.x.dtype

    def pixels(axis: int, start: int, count: int) -> Array:
        cut = lambda x: lax.slice_in_dim(x, start, start + count, axis=axis)  # noqa: E731
        now = cut(unit.x)[..., : unit.channels]
        if count:
            affine = unit.affine.of_pixels(axis, start, count, shape)
            now = act(affine.in_cells(now)).astype(dtype)
        before = jnp.repeat(now[:, :1], unit.past, axis=1)
        return jnp.concatenate([before if unit.cache is None else cut(unit.cache), now], axis=1)

    return parts.edges(shape[2:4], unit.geometry.reach, pixels)


def _by_chunks(
    act: Activation, unit: Unit, edges: Edges | None = None
) -> tuple[Array, Array | None]:
    hints, margin = choose.current_hints(), unit.taps.kernel.shape[1] // 2
    if choose.first_apart(unit.x.shape, margin, hints):
        return _first_apart(act, unit, edges)
    height = choose.band_height(unit.x.shape, margin, hints)
    return by_bands(act, height, unit, edges) if height else by_frames(act, unit, edges)


@_in_chunks.defjvp
def _in_chunks_jvp(static: Any, hints: Hints, primals: Any, tangents: Any) -> Any:
    def plain(parameters: Any, unit: Unit) -> tuple[Array, Array | None]:
        return unchunked(eqx.combine(static, parameters), unit)

    with choose.using(hints):
        # The checkpoint keeps only the arguments for a backward pass. Its own result is unused, so
        # XLA removes the convolution that computes it.
        _, tangent = jax.jvp(jax.checkpoint(plain), primals, tangents)
    return _in_chunks(static, hints, *primals), tangent


def _first_apart(act: Activation, unit: Unit, edges: Edges | None) -> tuple[Array, Array | None]:
    """Runs a unit on the first frame, and then on all others."""
    past = unit.past
    of_first, of_rest = (
        None if edges is None else Edges(*(x[:, start:stop] for x in edges))
        for start, stop in ((None, past + 1), (1, None))
    )
    first, cache = _alone(act, unit.of_frames(0, 1), of_first)
    rest = unit.of_frames(1, unit.x.shape[1])._replace(cache=cache)
    rest, cache = _by_chunks(act, rest, of_rest)
    return jnp.concatenate([first, rest], axis=1), cache


def _alone(act: Activation, unit: Unit, edges: Edges | None) -> tuple[Array, Array | None]:
    """Runs a unit on a single frame."""
    x, past = unit.x, unit.past
    normed = act(unit.affine.in_cells(x[..., : unit.channels])).astype(x.dtype)
    before = jnp.repeat(normed, past, axis=1) if unit.cache is None else unit.cache
    seen = jnp.concatenate([before, normed], axis=1)
    geometry = unit.geometry
    if edges is not None:
        seen, geometry = edges.around(seen), geometry.within(edges.sizes)
    y = unit.joined(valid_conv(seen, *unit.taps, geometry), x, unit.residual)
    y = _pinned(y)
    return y, jnp.concatenate([before[:, 1:], normed], axis=1) if past else None


def by_frames(
    act: Activation, unit: Unit, edges: Edges | None = None
) -> tuple[Array, Array | None]:
    """Runs a unit frame by frame, in a loop that carries the last normalised frames.

    If `edges` are given, frames are convolved with those around them, else with zeros.
    """
    count = unit.x.shape[1]
    geometry = unit.geometry if edges is None else unit.geometry.within(edges.sizes)

    def normed(now: Array, i: Array) -> Array:
        affine = unit.affine.of_frame(i, count)
        return act(affine.in_cells(now[..., : unit.channels])).astype(now.dtype)

    def with_edges(now: Array, i: Array | int) -> Array:
        """Returns frame `i` of those before `x` and its own, with the pixels around it."""
        if edges is None:
            return now
        return Edges(*(frame(each, i) for each in edges)).around(now)

    x, past, cache = _caches(normed, unit)
    past = tuple(with_edges(each, i) for i, each in enumerate(past))

    def step(carry: tuple, i: Array) -> tuple[tuple, None]:
        result, past = carry
        now = frame(x if unit.beside is None else result, i)
        seen = (*past, with_edges(normed(now, i), len(past) + i))
        y = valid_conv(jnp.concatenate(seen, axis=1), *unit.taps, geometry)
        y = unit.joined(y, now, None if unit.residual is None else frame(result, i))
        y = _pinned(y)
        return (lax.dynamic_update_slice_in_dim(result, y, i, axis=1), seen[1:]), None

    index = jnp.arange(count, dtype=jnp.int32)
    buffer = unit._replace(x=x).output_buffer()
    (result, _), _ = lax.scan(step, _carry(buffer, past, unit), index)
    return lax.optimization_barrier((result, cache))


def _pinned(x: Array) -> Array:
    """Fixes the layout of huge frames."""
    if not choose.pins_layout(x.shape, choose.current_hints()):
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _caches(normed: Callable[[Array, Array], Array], unit: Unit) -> tuple[Array, Any, Any]:
    """Returns `x`, the normalised frames before it one by one, and those to cache.

    The cache is computed before the loop, which may overwrite `x`. Taking it from the loop's carry
    would make XLA for TPUs copy all caches at the end, when both copies of each exist.
    """
    x, past = unit.x, unit.past
    if not past:
        return x, (), None
    index = jnp.arange(x.shape[1], dtype=jnp.int32)
    ends = index[max(0, len(index) - past) :]
    if unit.cache is None:  # Copies of the first frame stand in for the cache.
        ends = jnp.concatenate([index[:1], ends])
    last = list(lax.map(lambda i: normed(frame(x, i), i), ends))
    before = jnp.repeat(last.pop(0), past, axis=1) if unit.cache is None else unit.cache
    cache = jnp.concatenate([before[:, len(last) :], *last], axis=1)
    x, cache = lax.optimization_barrier((x, cache))
    return x, tuple(before[:, i : i + 1] for i in range(past)), cache


def by_bands(
    act: Activation, height: int, unit: Unit, edges: Edges | None = None
) -> tuple[Array, Array | None]:
    """Runs a unit on bands of `height` rows of all frames.

    The loop carries the last normalised rows of the band above, because the result may overwrite
    their source. A band is read with the `margin` rows below it. The last band is read `margin`
    rows higher up. What surrounds the frames are `edges`, or zeros. The cache is overwritten band
    by band too.
    """
    (b, count, rows_in_all, width, _), past = unit.x.shape, unit.past
    kernel, dtype, margin = unit.taps.kernel, unit.x.dtype, unit.taps.kernel.shape[1] // 2
    side = 0 if edges is None else edges.left.shape[3]
    zeros = kernel.shape[2] // 2 - side
    geometry = Geometry(pads=((0, 0), (zeros, zeros)), band=True)
    # Scale and shift get their rows before the loop. Inside it XLA for TPUs takes more memory.
    affine = unit.affine.with_rows(count, rows_in_all)
    above = below = jnp.zeros((b, past + count, margin, width + 2 * side, unit.channels), dtype)
    if edges is not None and edges.above.shape[2]:
        above, below, *_ = edges

    def put(y: Array, part: Array, frame: int, row: Array | int, column: int) -> Array:
        start = [jnp.asarray(n, jnp.int32) for n in (0, frame, row, column, 0)]
        return lax.dynamic_update_slice(y, part, start)

    def band(source: Array, cache: Array | None, above: Array, start: Array) -> Array:
        """Returns the normalised rows of a band and of those around it, with their past."""
        first = jnp.minimum(start, rows_in_all - height - margin)
        row, seen = margin + first - start, height + margin
        now = rows(source, first, seen)[..., : unit.channels]
        now = act(affine.of_rows(first, seen).in_cells(now)).astype(dtype)
        # Parts are written into one array. Concatenating them would copy each once more.
        shape = (b, past + count, height + 2 * margin, width + 2 * side, unit.channels)
        y = put(lax.empty(shape, dtype), below, 0, seen, 0)
        y = put(y, now, past, row, side)
        if past and cache is None:
            y = put(y, jnp.repeat(now[:, :1], past, axis=1), 0, row, side)
        elif cache is not None:
            y = put(y, rows(cache, first, seen), 0, row, side)
        if side and edges is not None:
            y = put(y, rows(edges.left, first, seen), 0, row, 0)
            y = put(y, rows(edges.right, first, seen), 0, row, side + width)
        return put(y, above, 0, 0, 0)

    def step(carry: tuple, i: Array) -> tuple[tuple, None]:
        result, (above, cache) = carry
        start, source = i * height, unit.x if unit.beside is None else result
        y = band(source, None if unit.cache is None else cache, above, start)
        above = y[:, :, height : height + margin]
        if past:
            last = y[:, -past:, margin : margin + height, side : side + width]
            cache = lax.dynamic_update_slice_in_dim(cache, last, start, axis=2)
        y = valid_conv(y, *unit.taps, geometry)
        residual = None if unit.residual is None else rows(result, start, height)
        y = unit.joined(y, rows(source, start, height), residual)
        return (lax.dynamic_update_slice_in_dim(result, y, start, axis=2), (above, cache)), None

    cache = unit.cache
    if past and cache is None:
        cache = lax.empty((b, past, rows_in_all, width, unit.channels), dtype)
    carry = _carry(unit.output_buffer(), (above, cache), unit)
    index = jnp.arange(rows_in_all // height, dtype=jnp.int32)
    (result, (_, cache)), _ = lax.scan(step, carry, index)
    return lax.optimization_barrier((result, cache))


def _carry(result: Array, rest: Any, unit: Unit) -> tuple[Array, Any]:
    """Returns a loop's carry; within `jax.shard_map` its type is that of every later step."""
    leaves, structure = jax.tree.flatten((result, rest))
    together = varying_as(*leaves, *jax.tree.leaves(unit))
    return jax.tree.unflatten(structure, together[: len(leaves)])


def frame_conv(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "kh kw i o"],
    bias: Float[Array, " o"],
    geometry: Geometry,
) -> Float[Array, "b t h2 w2 o"]:
    """Convolves every frame by itself, in chunks if `x` is large."""
    taps = Taps(kernel[None], bias)
    if not choose.in_chunks(x.shape, choose.current_hints()):
        return valid_conv(x, *taps, geometry)

    return on_parts(lambda x, rest: _resized(x, taps, rest), x, taps.kernel.shape, geometry)


def _resized(x: Array, taps: Taps, geometry: Geometry) -> Array:
    """Convolves frames in bands of rows, or one by one."""
    shape = conv_shape(x.shape, taps.kernel.shape, geometry)
    steps, hints = shape[2] // geometry.scale, choose.current_hints()
    row = max(x.size, math.prod(shape)) // math.prod((*shape[:2], steps, shape[4]))
    sizes = (*shape[:2], steps, row, shape[4])
    if choose.first_apart(sizes, 1, hints):
        first = _pinned(valid_conv(_pinned(x[:, :1]), *taps, geometry))
        return jnp.concatenate([first, _resized(x[:, 1:], taps, geometry)], axis=1)
    height = choose.band_height(sizes, 1, hints)
    if height:
        return _resized_by_bands(x, taps, geometry, steps, height)
    moved = jnp.moveaxis(x, 1, 0)[:, :, None]
    y = lax.map(lambda now: valid_conv(now, *taps, geometry)[:, 0], moved)
    # The barrier fixes one layout for all readers; XLA for TPUs would copy the array for each.
    return lax.optimization_barrier(jnp.moveaxis(y, 0, 1))


def _resized_by_bands(x: Array, taps: Taps, geometry: Geometry, steps: int, height: int) -> Array:
    """Convolves frames in bands, of which each makes `height` of `steps` smallest rows."""
    reach, _ = geometry.reach
    inner = geometry.within((reach, (0, 0)))
    stride, scale = geometry.stride, geometry.scale
    read = x.shape[2] - (steps - height) * stride + sum(reach)

    def step(result: Array, i: Array) -> tuple[Array, None]:
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


__all__ = ["Taps", "Unit", "by_bands", "by_frames", "frame_conv", "in_chunks", "unchunked"]
