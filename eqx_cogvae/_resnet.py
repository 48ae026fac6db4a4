"""Defines the residual block: norm, activation, convolution, twice, beside a shortcut."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import named_scope
from jaxtyping import Array, Float

from ._config import ACTIVATIONS
from ._layers import CausalConv3d, Conv, GroupNorm, SpatialNorm
from ._lowering import (
    normalised,
    normed_conv as normed_conv_in_parts,
    residual_block,
    scheduled,
)
from ._types import Cache, Key, ResnetCache


class ResnetBlock(eqx.Module):
    """Applies norm, activation and convolution twice, and adds a shortcut.

    The norms are `SpatialNorm`s if `latents` gives the latents' channels, else `GroupNorm`s.
    """

    norm1: GroupNorm | SpatialNorm
    conv1: CausalConv3d
    norm2: GroupNorm | SpatialNorm
    conv2: CausalConv3d
    conv_shortcut: Conv | None
    act_fn: str = eqx.field(static=True)

    def __init__(
        self,
        i: int,
        o: int,
        *,
        groups: int,
        eps: float,
        act_fn: str,
        latents: int | None,
        pad_mode: str,
        key: Key,
        dtype=jnp.float32,
    ):
        def norm(channels: int, key: Key) -> GroupNorm | SpatialNorm:
            if latents is None:
                return GroupNorm(channels, groups, eps, dtype=dtype)
            return SpatialNorm(channels, latents, groups, key=key, dtype=dtype)

        keys = jax.random.split(key, 5)
        self.norm1 = norm(i, keys[0])
        self.conv1 = CausalConv3d(i, o, pad_mode=pad_mode, key=keys[1], dtype=dtype)
        self.norm2 = norm(o, keys[2])
        self.conv2 = CausalConv3d(o, o, pad_mode=pad_mode, key=keys[3], dtype=dtype)
        self.conv_shortcut = None if i == o else Conv((1, 1, 1), i, o, key=keys[4], dtype=dtype)
        self.act_fn = act_fn

    @property
    def activation(self) -> Callable[[Array], Array]:
        """The activation function."""
        return ACTIVATIONS[self.act_fn]

    @named_scope("eqx_cogvae.ResnetBlock")
    @scheduled(residual_block)
    def __call__(
        self,
        x: Float[Array, "b t h w i"],
        cache: ResnetCache | None = None,
        *,
        latents: Float[Array, "b t2 h2 w2 z"] | None = None,
    ) -> tuple[Float[Array, "b t h w o"], ResnetCache]:
        cache1, cache2 = cache or ResnetCache()
        y, cache1 = normed_conv(self.norm1, self.activation, self.conv1, x, cache1, latents)
        y, cache2 = normed_conv(self.norm2, self.activation, self.conv2, y, cache2, latents)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + y, ResnetCache(cache1, cache2)


@scheduled(normed_conv_in_parts)
def normed_conv(
    norm: Callable,
    act: Callable[[Array], Array],
    conv: Callable,
    x: Float[Array, "b t h w i"],
    cache: Cache = None,
    latents: Float[Array, "b t2 h2 w2 z"] | None = None,
) -> tuple[Float[Array, "b t h w o"], Cache]:
    """Normalises, activates and convolves."""
    return conv(act(normalised(norm, x, latents)).astype(x.dtype), cache)


__all__ = ["ResnetBlock", "ResnetCache", "normed_conv"]
