"""Type aliases. `b t h w c` are batch, frames, height, width and channels."""

from typing import Any, TypeAlias

from jaxtyping import Array, Float, PRNGKeyArray

Video: TypeAlias = Float[Array, "b t h w c"]
Cache: TypeAlias = Any
"""The last frames each causal convolution saw: a PyTree of arrays, or None at a clip's start."""

Key: TypeAlias = PRNGKeyArray

__all__ = ["Cache", "Key", "Video"]
