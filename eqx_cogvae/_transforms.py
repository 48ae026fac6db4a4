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
from jax.core import Tracer
from jaxtyping import Array, PyTree, Shaped

from ._config import frame_batches
from ._types import Cache

Step = Callable[[Any, Any], tuple[Any, Any]]
"""From a frame batch and a cache, or None, to a result and the next cache."""


class Transform(eqx.Module):
    """A function that compiles what it calls by itself, when it is not being traced."""

    @abc.abstractmethod
    def __call__(self, *args: Any) -> Any:
        """Calls the function that is held, in some other way."""


class Framewise(Transform):
    """See `framewise`."""

    step: Step
    size: int = eqx.field(static=True)

    def __check_init__(self):
        check_batch_size(self.size)

    def __call__(self, x: Shaped[Array, "b t *rest"]) -> PyTree[Shaped[Array, "b ..."]]:
        if x.ndim < 2 or not x.shape[1]:
            raise ValueError(f"expected (batch, frames, ...) with a frame or more, got {x.shape}.")
        if is_traced((self, x)):
            return self._scanned(x)
        sizes = frame_batches(x.shape[1], self.size)
        results, cache, start = [], None, 0
        for size in sizes:
            result, cache = jitted_step((self.step, cut(x, start, start + size)), cache)
            results.append(result)
            start += size
        return join(results, axis=1)

    def _scanned(self, x: Array) -> PyTree[Array]:
        first, *steady = frame_batches(x.shape[1], self.size)
        result, cache = self.step(x[:, :first], None)
        if not steady:
            return result
        batches = x[:, first:].reshape(x.shape[0], -1, self.size, *x.shape[2:])

        def body(cache, frames):
            result, cache = self.step(frames, cache)
            return cache, result

        _, results = lax.scan(body, cache, jnp.moveaxis(batches, 1, 0))
        return join([result, jax.tree.map(_flatten_batches, results)], axis=1)


class Sliced(Transform):
    """See `sliced`."""

    fn: Callable

    def __call__(self, *args: PyTree[Shaped[Array, "_ ..."]]) -> PyTree[Shaped[Array, "b ..."]]:
        batch = {leaf.shape[0] for leaf in jax.tree.leaves(args)}
        if len(batch) != 1:
            raise ValueError(f"arguments must share their first axis, got sizes {sorted(batch)}.")
        if is_traced((self, args)):
            return lax.map(lambda element: _first(self.fn(*_batch_of_one(element))), args)
        elements = (jax.tree.map(lambda a, i=i: a[i : i + 1], args) for i in range(batch.pop()))
        return join([call(self.fn, *element) for element in elements], axis=0)


def framewise(step: Step, size: int) -> Framewise:
    """A function of a whole clip from a function of one frame batch.

    The clip's axis 1 is cut into batches of `size`, of which the first takes the remainder: 49
    frames by 8 are 9, 8, 8, 8, 8, 8. Each is handed the cache that the one before it returned.
    Equals diffusers at the same frame batch size, and `streamed` bit for bit.

    Outside of a trace two programs are compiled, one for the first batch (no cache) and one for
    the steady ones, whatever the length of the clip; another remainder, frame size or dtype
    compiles anew. While tracing, the steady batches are one `lax.scan`; a `jax.jit` around it
    compiles anew for each length. `eqx.filter_checkpoint(step)` bounds the memory of gradients.

    **Arguments:**

    - `step`: `(frames, cache) -> (result, cache)`, such as `vae.decode_step`. Results are PyTrees
        of arrays `(b, t', ...)`.
    - `size`: frames in a batch.

    **Returns:** `(b, t, ...) -> (b, t'', ...)`, itself a PyTree.

    **Raises:** `ValueError` for a `size` below 1 or a clip without frames.
    """
    return Framewise(step, size)


def sliced(fn: Callable) -> Sliced:
    """Calls `fn` on one element of axis 0 at a time, and joins the results: less memory.

    Equals `fn` itself, to rounding, where that treats the elements of a batch alike. Every array
    of the arguments and of the result must have the batch as axis 0.
    """
    return Sliced(fn)


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


def is_traced(tree: PyTree) -> bool:
    """Whether any array of `tree` stands for one that is not there yet."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


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


def _flatten_batches(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _batch_of_one(tree: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda x: x[None], tree)


def _first(tree: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda x: x[0], tree)


__all__ = [
    "Step",
    "Transform",
    "call",
    "check_batch_size",
    "cut",
    "framewise",
    "is_traced",
    "jitted_step",
    "join",
    "sliced",
]
