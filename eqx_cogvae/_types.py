"""Type aliases, and the dtype that sums are held in."""

from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

Cache: TypeAlias = Any
"""The last frames each causal convolution saw: a PyTree of arrays, or None at a clip's start."""

Key: TypeAlias = PRNGKeyArray

AnyArray: TypeAlias = Array | np.ndarray
"""What a caller may have: a clip that was read from a file is NumPy's."""


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` in the dtype for sums over many of its elements: float32, or float64 as it is."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


__all__ = ["AnyArray", "Cache", "Key", "at_least_float32"]
