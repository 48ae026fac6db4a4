"""Transforms of functions of arrays: a frame batch to a clip, one clip to a batch of them.

Called with concrete arrays, a transform runs a Python loop over calls of one compiled program,
so that its compile time does not depend on the size of the video. Called while tracing, under
`jax.jit`, `jax.grad` or another transform that traces, it becomes a `lax.scan` or `lax.map`.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from .._types import UNHASHABLE, Cache, is_traced

Step = Callable[[Any, Any], tuple[Any, Any]]
"""From a frame batch and a cache, or None, to a result and the next cache."""


class Transform(eqx.Module):
    """A function that compiles what it calls by itself, when it is not being traced."""

    def __hash__(self) -> int:
        raise TypeError(UNHASHABLE)

    @abc.abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function that is held, in some other way."""


def call(fn: Callable, *args: Any) -> Any:
    """`fn(*args)`, compiled where nobody else compiles it."""
    if isinstance(fn, Transform) or is_traced((fn, args)):
        return fn(*args)
    return _jitted(fn, *args)


@eqx.filter_jit
def _jitted(fn: Callable, *args: Any) -> Any:
    return fn(*args)


@eqx.filter_jit(donate="all-except-first")
def jitted_step(step_and_frames: tuple[Step, PyTree[Array]], cache: Cache) -> tuple[Any, Cache]:
    """One step in compiled form; the buffers of `cache` are given away."""
    step, frames = step_and_frames
    return step(frames, cache)


def cut(x: Any, start: int, stop: int, axis: int = 1) -> Any:
    """`x[:, start:stop]`, for which JAX would send the two numbers to the device."""
    if not isinstance(x, jax.Array):
        return x[(slice(None),) * axis + (slice(start, stop),)]
    return lax.slice_in_dim(x, start, min(stop, x.shape[axis]), axis=axis)


def join(pieces: list[PyTree[Array]], axis: int) -> PyTree[Array]:
    """The arrays of PyTrees that are alike, end to end."""
    if len(pieces) == 1:
        return pieces[0]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis), *pieces)


def check_batch_size(size: int) -> None:
    """Raises for anything but a whole number of at least 1."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            f"`size` must be a whole number of at least 1 frame, got {size!r}; the model was "
            "trained with 8 when encoding, 2 when decoding."
        )


__all__ = [
    "Step",
    "Transform",
    "call",
    "check_batch_size",
    "cut",
    "jitted_step",
    "join",
]
