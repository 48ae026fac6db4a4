"""Type aliases, and small questions asked of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Cache: TypeAlias = Any
"""The last frames each causal convolution saw: a PyTree of arrays, or None at a clip's start."""


class ResnetCache(NamedTuple):
    """Holds the last frames that the two causal convolutions of a resnet block saw."""

    conv1: Any = None
    conv2: Any = None


Key: TypeAlias = PRNGKeyArray

AnyArray: TypeAlias = Array | np.ndarray
"""What a caller may have: a clip that was read from a file is NumPy's."""


class Bound(eqx.Module):
    """A method and its model, as one PyTree; unlike Equinox's own it says how to compile it."""

    fn: Callable = eqx.field(static=True)
    model: eqx.Module

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Calls the method."""
        return self.fn(self.model, *args, **options)

    def __hash__(self) -> int:
        return hashed(self)


def hashed(module: eqx.Module) -> int:
    """Returns the hash of a module without arrays; of one with arrays it says how to compile it."""
    try:
        return eqx.Module.__hash__(module)
    except TypeError as error:
        raise TypeError(UNHASHABLE) from error


class bound:
    """Decorates a method of a model, so that what cannot take it is told what can."""

    def __init__(self, fn: Callable):
        self.fn, self.__doc__ = fn, fn.__doc__

    def __get__(self, model: Any, kind: Any = None) -> Any:
        """Returns the bound method, or the function itself from the class."""
        return self.fn if model is None else Bound(self.fn, model)


UNHASHABLE = (
    "a model holds arrays, which `jax.jit` and `jax.checkpoint` cannot take in a function: use "
    "`eqx.filter_jit`, or `eqx.filter_checkpoint`."
)
"""The message to those who hash a model, as `jax.jit` does."""


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Casts `x` to float32, the dtype for sums over many elements; float64 stays."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def is_traced(tree: PyTree) -> bool:
    """Returns True if any array of `tree` is being traced."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


__all__ = [
    "UNHASHABLE",
    "AnyArray",
    "Bound",
    "Cache",
    "Key",
    "ResnetCache",
    "at_least_float32",
    "bound",
    "hashed",
    "is_traced",
]
