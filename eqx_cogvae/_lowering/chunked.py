"""Runs a norm, an activation and a convolution on large arrays in chunks.

Intermediates then exist for one chunk at a time, and the result overwrites the array that it is
added to. A chunk is a band of rows of all frames. The first frame of a clip is processed by itself
if the others then have bands. If no band height divides the frame, a chunk is one frame. If devices
share frames, each runs the chunks of its part of them.

Derivatives are those of the unchunked function, because differentiating the loop would keep the
intermediates of every chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from . import choose
from .choose import Hints
from .conv import causal_conv, valid_conv
from .frames import pinned
from .loops import by_bands, by_frames
from .parts import Edges, Parts
from .units import Activation, Unit


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
        if not choose.is_first_apart(unit.x.shape, hints):
            return _on_parts(_by_chunks, act, unit)
        first, cache = _on_parts(_alone, act, unit.of_frames(0, 1))
        rest = unit.of_frames(1, unit.x.shape[1])._replace(cache=cache)
        rest, cache = _on_parts(_by_chunks, act, rest)
        return jnp.concatenate([first, rest], axis=1), cache


@_in_chunks.defjvp
def _in_chunks_jvp(static: Any, hints: Hints, primals: Any, tangents: Any) -> Any:
    def plain(parameters: Any, unit: Unit) -> tuple[Array, Array | None]:
        return unchunked(eqx.combine(static, parameters), unit)

    with choose.using(hints):
        # The checkpoint keeps only the arguments for a backward pass. Its own result is unused, so
        # XLA removes the convolution that computes it.
        _, tangent = jax.jvp(jax.checkpoint(plain), primals, tangents)
    return _in_chunks(static, hints, *primals), tangent


def _on_parts(run: Callable, act: Activation, unit: Unit) -> tuple[Array, Array | None]:
    """Calls `run` with the unit. If devices share its frames, their parts are its clips."""
    hints, kernel = choose.current_hints(), unit.taps.kernel.shape
    parts = Parts(*choose.parts(unit.x.shape, hints, kernel[1:3], unit.geometry))
    if parts.number == 1:
        return run(act, unit, None)
    clips = lambda x: None if x is None else parts.as_clips(x)  # noqa: E731
    unit = unit._replace(
        affine=parts.of_affine(unit.affine, unit.x.shape[:4]),
        x=parts.as_clips(unit.x),
        cache=clips(unit.cache),
        residual=clips(unit.residual),
    )
    # A loop may overwrite `x`.
    x, edges = lax.optimization_barrier((unit.x, _edges(act, unit, parts)))
    with choose.using(hints.of_parts()):
        y, cache = run(act, unit._replace(x=x), edges)
    return parts.as_frames(y), None if cache is None else parts.as_frames(cache)


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


def _by_chunks(act: Activation, unit: Unit, edges: Edges | None) -> tuple[Array, Array | None]:
    """Runs a unit on bands of all frames, or if there are none frame by frame."""
    margin = unit.taps.kernel.shape[1] // 2
    height = choose.band_height(unit.x.shape, margin, choose.current_hints())
    return by_bands(act, height, unit, edges) if height else by_frames(act, unit, edges)


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
    y = pinned(y)
    return y, jnp.concatenate([before[:, 1:], normed], axis=1) if past else None


__all__ = ["in_chunks", "unchunked"]
