"""A discriminator of patches of clips."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import Key

_SLOPE = 0.2
_CHANNELS_PER_GROUP = 16


class Discriminator(eqx.Module):
    """Tells patches of real clips from decoded ones: a PatchGAN with time as a third axis.

    `levels` convolutions of stride 2 double the channels, from `width` on; two of stride 1 follow,
    the last of which gives one logit for each patch. All are 3x3x3 and zero-padded, so that clips
    of any size fit. In between are leaky ReLUs, and group norms but for the first. After Isola et
    al. 2017, https://arxiv.org/abs/1611.07004.

    **Arguments:**

    - `channels`: number of channels of a clip.
    - `width`: number of channels after the first convolution.
    - `levels`: number of times that frames, height and width are halved, rounding up.
    - `key`: for the weights, drawn as Equinox draws a convolution's.
    - `dtype`: dtype of the weights and of the arithmetic.

    **Raises:** `ValueError` for a size below 1.
    """

    convs: tuple[eqx.nn.Conv3d, ...]
    norms: tuple[eqx.nn.GroupNorm, ...]

    def __init__(
        self,
        channels: int = 3,
        *,
        width: int = 64,
        levels: int = 3,
        key: Key,
        dtype=jnp.float32,
    ):
        if min(channels, width, levels) < 1:
            raise ValueError(
                "`channels`, `width` and `levels` must be at least 1, "
                f"got {channels}, {width} and {levels}."
            )
        widths = (channels, *(width * 2**level for level in range(levels + 1)), 1)
        strides = (2,) * levels + (1, 1)
        keys = jax.random.split(key, len(strides))
        self.convs = tuple(
            eqx.nn.Conv3d(i, o, 3, stride, 1, dtype=dtype, key=k)
            for i, o, stride, k in zip(widths[:-1], widths[1:], strides, keys, strict=True)
        )
        self.norms = tuple(
            eqx.nn.GroupNorm(math.gcd(c, max(c // _CHANNELS_PER_GROUP, 1)), c, dtype=dtype)
            for c in widths[2:-1]
        )

    def __call__(self, clips: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 1"]:
        """Returns the logits of patches, high for real ones.

        **Arguments:**

        - `clips`: in [-1, 1]; cast to the dtype of the weights.

        **Returns:** logits in the dtype of the weights.

        **Raises:** `ValueError` for another number of channels.
        """
        first, *others = self.convs
        if clips.shape[-1] != first.in_channels:
            raise ValueError(
                f"the discriminator takes clips of {first.in_channels} channels, got shape "
                f"{clips.shape}: make it with `Discriminator({clips.shape[-1]}, ...)`."
            )
        x = jax.vmap(first)(jnp.moveaxis(clips.astype(first.weight.dtype), -1, 1))
        for conv, norm in zip(others, (*self.norms, None), strict=True):
            x = jax.nn.leaky_relu(x, _SLOPE)
            x = jax.vmap(conv)(x)
            x = x if norm is None else jax.vmap(norm)(x)
        return jnp.moveaxis(x, 1, -1)


__all__ = ["Discriminator"]
