"""Loops over the chunks of large arrays: frames, or bands of rows of all frames.

Both overwrite the array that the result is added to. Neither is differentiated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._meshes import varying_as
from .affine import frame, rows
from .choose import Geometry
from .conv import valid_conv
from .frames import pinned
from .parts import Edges
from .units import Activation, Unit


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
        y = pinned(y)
        return (lax.dynamic_update_slice_in_dim(result, y, i, axis=1), seen[1:]), None

    index = jnp.arange(count, dtype=jnp.int32)
    buffer = unit._replace(x=x).output_buffer()
    (result, _), _ = lax.scan(step, _carry(buffer, past, unit), index)
    return lax.optimization_barrier((result, cache))


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


__all__ = ["by_bands", "by_frames"]
