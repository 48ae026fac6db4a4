"""Less memory for gradients."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from .._autoencoder import VAE
from .._blocks import DownBlock, MidBlock, UpBlock


class _Rematerialised(eqx.Module):
    """A resnet block that keeps only its inputs for the backward pass."""

    block: Callable

    def __call__(self, x: Array, cache: Any = None, *, latents: Array | None = None) -> Any:
        return eqx.filter_checkpoint(self.block)(x, cache, latents=latents)


def rematerialised(vae: VAE) -> VAE:
    """Returns a model that computes each resnet block again in the backward pass.

    Gradients need less memory and take about a forward pass longer. A block of one's own is
    wrapped like any other.

    **Arguments:**

    - `vae`: the model.

    **Returns:** a model with the same results.
    """
    holds_blocks = lambda node: isinstance(node, DownBlock | MidBlock | UpBlock)  # noqa: E731

    def wrapped(node: Any) -> Any:
        if not holds_blocks(node):
            return node
        blocks = tuple(map(_Rematerialised, node.resnets))
        return eqx.tree_at(lambda node: node.resnets, node, blocks)

    return jax.tree.map(wrapped, vae, is_leaf=holds_blocks)


__all__ = ["rematerialised"]
