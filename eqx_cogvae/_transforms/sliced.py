"""Calls a function on one clip of a batch at a time."""

from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, PyTree, Shaped

from .._meshes import on_automatic_axes
from .._types import is_traced
from .base import Transform, call, join


class Sliced(Transform):
    """See `sliced`."""

    fn: Callable

    @on_automatic_axes
    def __call__(self, *args: PyTree[Shaped[Array, "_ ..."]]) -> PyTree[Shaped[Array, "b ..."]]:
        batch = {leaf.shape[0] for leaf in jax.tree.leaves(args)}
        if len(batch) != 1:
            raise ValueError(f"arguments must share their first axis, got sizes {sorted(batch)}.")
        if is_traced((self, args)):
            return lax.map(lambda element: _first(self.fn(*_batch_of_one(element))), args)
        elements = (jax.tree.map(lambda a, i=i: a[i : i + 1], args) for i in range(batch.pop()))
        return join([call(self.fn, *element) for element in elements], axis=0)


def sliced(fn: Callable) -> Sliced:
    """Returns a function that calls `fn` on one element of the batch at a time: less memory.

    It equals `fn` itself, to rounding, if that treats the elements of a batch alike.

    **Arguments:**

    - `fn`: a function of PyTrees of arrays. Every array of the arguments and of the result has the
        batch as axis 0.

    **Returns:** a function with the arguments and the result of `fn`, itself a PyTree.

    **Raises:** `ValueError`, when called, for arguments that differ in axis 0.
    """
    return Sliced(fn)


def _batch_of_one(tree: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda x: x[None], tree)


def _first(tree: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda x: x[0], tree)


__all__ = ["sliced"]
