"""Type aliases, and small questions asked of arrays."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Cache: TypeAlias = Any
"""The last frames each causal convolution saw: a PyTree of arrays, or None at a clip's start."""


class ResnetCache(NamedTuple):
    """The last frames that the two causal convolutions of a resnet block saw."""

    conv1: Any = None
    conv2: Any = None


Key: TypeAlias = PRNGKeyArray

AnyArray: TypeAlias = Array | np.ndarray
"""What a caller may have: a clip that was read from a file is NumPy's."""


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` in the dtype for sums over many of its elements: float32, or float64 as it is."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def is_traced(tree: PyTree) -> bool:
    """Whether any array of `tree` stands for one that is not there yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


__all__ = ["AnyArray", "Cache", "Key", "ResnetCache", "at_least_float32", "is_traced"]
