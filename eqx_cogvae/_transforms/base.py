"""Transforms of functions of arrays: a frame batch to a clip, one clip to a batch of them.

Called with concrete arrays, a transform runs a Python loop over calls of one compiled program,
so that its compile time does not depend on the size of the video. Called while tracing, under
`jax.jit`, `jax.grad` or another transform that traces, it becomes a `lax.scan` or `lax.map`.
"""

import abc
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from .._types import Cache, hashed, is_traced

Step = Callable[[Any, Any], tuple[Any, Any]]
"""From a frame batch and a cache, or None, to a result and the next cache."""


class Transform(eqx.Module):
    """A function that compiles what it calls by itself, when it is not being traced."""

    def __hash__(self) -> int:
        return hashed(self)

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


def jitted_step(
    step_and_frames: tuple[Step, Any], cache: Cache, ahead: bool = False
) -> tuple[Any, Cache]:
    """Calls one step in compiled form, and gives away the buffers of `cache`.

    With `ahead` it returns before the device is done, and `cache` stays the caller's.
    """
    arguments = _arguments(step_and_frames, cache)
    if ahead:
        return _keeping_program(*arguments)
    with warnings.catch_warnings():
        # A cache of another shape than the next one's cannot be written over.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        try:
            return jax.block_until_ready(_donating_program(*arguments))
        except jax.errors.JaxRuntimeError as error:
            if (own := own_message(error)) is None:
                raise
            raise RuntimeError(own) from error


def traced_step(
    step_and_frames: tuple[Step, Any], cache: Cache, ahead: bool = False
) -> jax.stages.Traced:
    """Traces the program that `jitted_step` runs, without running it.

    Arrays may be `jax.ShapeDtypeStruct`s. Compiled, the program is found in JAX's persistent
    cache by a later call.
    """
    program = _keeping_program if ahead else _donating_program
    return program.trace(*_arguments(step_and_frames, cache))


def own_message(error: Exception) -> str | None:
    """Returns the line that `eqx.error_if` says amid a traceback, or None if it is not from it."""
    _, within, own = " ".join(str(error).split()).partition("EquinoxRuntimeError: ")
    return own.partition(" -----")[0] if within else None


def _arguments(step_and_frames: tuple[Step, Any], cache: Cache) -> tuple[Any, ...]:
    kinds = jax.Array | np.ndarray | jax.ShapeDtypeStruct
    arrays, rest = eqx.partition(step_and_frames, lambda x: isinstance(x, kinds))
    leaves, treedef = jax.tree.flatten(rest)
    return arrays, cache, treedef, tuple(leaves)


def _frame_batch(
    arrays: PyTree, cache: Cache, treedef: Any, leaves: tuple[Any, ...]
) -> tuple[Any, Cache]:
    step, frames = eqx.combine(arrays, jax.tree.unflatten(treedef, leaves))
    return step(frames, cache)


# Not by `eqx.filter_jit`, which waits for the device, and lowers no arrays that are shapes only.
_donating_program = jax.jit(_frame_batch, static_argnums=(2, 3), donate_argnums=1)
# Without donation, as a CPU would be done with such a program before the call returns.
_keeping_program = jax.jit(_frame_batch, static_argnums=(2, 3))


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


def check_batch_size(size: int, first: int | None = None) -> None:
    """Raises `ValueError` unless each is a whole number of at least 1; `first` may be None."""
    for name, value in (("size", size), ("first", 1 if first is None else first)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"`{name}` must be a whole number of at least 1 frame, got {value!r}; the model "
                "was trained with 8 when encoding, 2 when decoding."
            )


def continued(cache: Cache) -> Cache:
    """Returns a cache that says that the next batch is no clip's first, whatever its size.

    A batch's size alone does not tell: diffusers takes every odd batch for a clip's first. The
    model's caches have a method for it; others pass as they are.
    """
    known = lambda node: hasattr(node, "continued")  # noqa: E731
    return jax.tree.map(
        lambda node: node.continued() if known(node) else node, cache, is_leaf=known
    )


__all__ = [
    "Step",
    "Transform",
    "call",
    "check_batch_size",
    "continued",
    "cut",
    "jitted_step",
    "join",
    "own_message",
    "traced_step",
]
