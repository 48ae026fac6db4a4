"""Defines the blocks of a resolution: resnets, then a layer that changes the resolution."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Float

from ._config import Config
from ._layers import Downsample, Upsample
from ._resnet import ResnetBlock, ResnetCache
from ._types import Key

_MID_RESNETS = 2


class BlockCache(NamedTuple):
    """Holds the caches of a block's resnets."""

    resnets: tuple[ResnetCache, ...]


class DownBlock(eqx.Module):
    """Applies the resnets, then the downsampler, which the last level lacks."""

    resnets: tuple[ResnetBlock, ...]
    downsamplers: tuple[Downsample, ...]

    def __call__(
        self, x: Float[Array, "b t h w i"], cache: BlockCache | None = None
    ) -> tuple[Float[Array, "b t2 h2 w2 o"], BlockCache]:
        x, cache = _chain(self.resnets, x, cache)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x, cache


class MidBlock(eqx.Module):
    """Applies resnets at the lowest resolution."""

    resnets: tuple[ResnetBlock, ...]

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        cache: BlockCache | None = None,
        *,
        latents: Float[Array, "b t2 h2 w2 z"] | None = None,
    ) -> tuple[Float[Array, "b t h w c"], BlockCache]:
        return _chain(self.resnets, x, cache, latents)


class UpBlock(eqx.Module):
    """Applies the resnets, then the upsampler, which the last level lacks."""

    resnets: tuple[ResnetBlock, ...]
    upsamplers: tuple[Upsample, ...]

    def __call__(
        self,
        x: Float[Array, "b t h w i"],
        cache: BlockCache | None = None,
        *,
        latents: Float[Array, "b t2 h2 w2 z"],
        continued: bool = False,
    ) -> tuple[Float[Array, "b t3 h3 w3 o"], BlockCache]:
        x, cache = _chain(self.resnets, x, cache, latents)
        for upsample in self.upsamplers:
            # An upsampler of a user need not know of `continued`.
            x = upsample(x, continued=True) if continued else upsample(x)
        return x, cache


def _chain(
    resnets: tuple[Callable, ...], x: Array, cache: BlockCache | None, latents=None
) -> tuple[Array, BlockCache]:
    pasts = (None,) * len(resnets) if cache is None else cache.resnets
    caches = []
    for resnet, past in zip(resnets, pasts, strict=True):
        x, past = resnet(x, past, latents=latents)
        caches.append(past)
    return x, BlockCache(tuple(caches))


def _resnets(
    config: Config, widths: tuple[int, ...], latents: int | None, *, pad_mode: str, key: Key, dtype
) -> tuple[ResnetBlock, ...]:
    keys = jax.random.split(key, len(widths) - 1)
    return tuple(
        ResnetBlock(
            i,
            o,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            act_fn=config.act_fn,
            latents=latents,
            pad_mode=pad_mode,
            key=k,
            dtype=dtype,
        )
        for i, o, k in zip(widths[:-1], widths[1:], keys, strict=True)
    )


def mid_block(
    config: Config, width: int, latents: int | None, *, pad_mode: str, key: Key, dtype
) -> MidBlock:
    """Returns the block at the lowest resolution; `latents` gives their channels in a decoder."""
    widths = (width,) * (_MID_RESNETS + 1)
    return MidBlock(_resnets(config, widths, latents, pad_mode=pad_mode, key=key, dtype=dtype))


def down_block(config: Config, level: int, *, pad_mode: str, key: Key, dtype) -> DownBlock:
    """Returns the encoder's block of a level."""
    rkey, skey = jax.random.split(key)
    before = config.block_out_channels[max(level - 1, 0)]
    width = config.block_out_channels[level]
    widths = (before,) + (width,) * config.layers_per_block
    resnets = _resnets(config, widths, None, pad_mode=pad_mode, key=rkey, dtype=dtype)
    if level == len(config.block_out_channels) - 1:
        return DownBlock(resnets, ())
    in_time = level < config.temporal_levels
    return DownBlock(resnets, (Downsample(width, in_time, key=skey, dtype=dtype),))


def up_block(config: Config, level: int, *, pad_mode: str, key: Key, dtype) -> UpBlock:
    """Returns the decoder's block of a level."""
    rkey, skey = jax.random.split(key)
    reverse = config.block_out_channels[::-1]
    widths = (reverse[max(level - 1, 0)],) + (reverse[level],) * (config.layers_per_block + 1)
    z = config.latent_channels
    resnets = _resnets(config, widths, z, pad_mode=pad_mode, key=rkey, dtype=dtype)
    if level == len(reverse) - 1:
        return UpBlock(resnets, ())
    in_time = level < config.temporal_levels
    return UpBlock(resnets, (Upsample(reverse[level], in_time, key=skey, dtype=dtype),))


__all__ = [
    "BlockCache",
    "DownBlock",
    "MidBlock",
    "UpBlock",
    "down_block",
    "mid_block",
    "up_block",
]
