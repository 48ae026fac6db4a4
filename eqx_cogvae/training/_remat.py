"""Less memory for gradients."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from .._autoencoder import VAE
from .._resnet import ResnetBlock
from ._crops import Crops as Crops, Source as Source
from ._losses import gradient as gradient, kl as kl, l1 as l1, l2 as l2, temporal as temporal


class _Rematerialised(eqx.Module):
    """A resnet block that keeps only its inputs for the backward pass."""

    block: ResnetBlock

    def __call__(self, x: Array, cache: Any = None, *, latents: Array | None = None) -> Any:
        return eqx.filter_checkpoint(self.block)(x, cache, latents=latents)


def rematerialised(vae: VAE) -> VAE:
    """The same function, with each resnet block computed again in the backward pass.

    Gradients need less memory and take about a forward pass longer.
    """
    is_block = lambda node: isinstance(node, ResnetBlock)  # noqa: E731
    wrap = lambda node: _Rematerialised(node) if is_block(node) else node  # noqa: E731
    return jax.tree.map(wrap, vae, is_leaf=is_block)


__all__ = ["rematerialised"]
