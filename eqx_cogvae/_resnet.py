"""The residual block, and what it is made of: a norm, an activation, then a convolution."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import named_scope
from jaxtyping import Array, Float, Int

from ._convolution import is_large, pointwise_conv
from ._layers import CausalConv3d, Conv, GroupNorm, SpatialNorm, frame
from ._types import Key

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


class Skip(NamedTuple):
    """What goes around a residual branch, by a pointwise convolution where widths differ."""

    x: Float[Array, "b t h w i"]
    conv: Conv | None

    def __call__(self) -> Float[Array, "b t h w o"]:
        if self.conv is None:
            return self.x
        return pointwise_conv(self.x, self.conv.weight, self.conv.bias)

    def frame(self, i: Int[Array, ""]) -> "Skip":
        return self._replace(x=frame(self.x, i))


class ResnetCache(NamedTuple):
    """What the two causal convolutions of a `ResnetBlock` saw last."""

    conv1: Float[Array, "b k h w i"] | None = None
    conv2: Float[Array, "b k h w o"] | None = None


class ResnetBlock(eqx.Module):
    """Norm, activation, convolution, twice, beside a shortcut.

    Normalises by `SpatialNorm` when `latents` gives their channel count, else by `GroupNorm`.
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
        keys = jax.random.split(key, 5)
        self.norm1 = _norm(i, groups, eps, latents, key=keys[0], dtype=dtype)
        self.conv1 = CausalConv3d(i, o, pad_mode=pad_mode, key=keys[1], dtype=dtype)
        self.norm2 = _norm(o, groups, eps, latents, key=keys[2], dtype=dtype)
        self.conv2 = CausalConv3d(o, o, pad_mode=pad_mode, key=keys[3], dtype=dtype)
        self.conv_shortcut = None if i == o else Conv((1, 1, 1), i, o, key=keys[4], dtype=dtype)
        self.act_fn = act_fn

    @named_scope("eqx_cogvae.ResnetBlock")
    def __call__(
        self,
        x: Float[Array, "b t h w i"],
        cache: ResnetCache | None = None,
        *,
        latents: Float[Array, "b t2 h2 w2 z"] | None = None,
    ) -> tuple[Float[Array, "b t h w o"], ResnetCache]:
        act = _ACTIVATIONS[self.act_fn]
        cache1, cache2 = cache or ResnetCache()
        y, cache1 = normed_conv(self.norm1, act, self.conv1, x, cache1, latents)
        skip = Skip(x, self.conv_shortcut)
        y, cache2 = normed_conv(self.norm2, act, self.conv2, y, cache2, latents, skip)
        return y, ResnetCache(cache1, cache2)


def _norm(channels: int, groups: int, eps: float, latents: int | None, *, key: Key, dtype):
    if latents is None:
        return GroupNorm(channels, groups, eps, dtype=dtype)
    return SpatialNorm(channels, latents, groups, key=key, dtype=dtype)


def normed_conv(
    norm: GroupNorm | SpatialNorm,
    act: Callable[[Array], Array],
    conv: CausalConv3d,
    x: Float[Array, "b t h w i"],
    cache: Float[Array, "b k h w i"] | None,
    latents: Float[Array, "b t2 h2 w2 z"] | None = None,
    skip: Skip | None = None,
    *,
    variant: str | None = None,
) -> tuple[Float[Array, "b t h w o"], Float[Array, "b k h w i"] | None]:
    """A norm over all frames, an activation, then the convolution, and what is added to it.

    Of large arrays frame by frame: what is normalised, and what the convolution makes of it on
    its way, is then there for one frame at a time. `variant`, "whole" or "frames", is for tests.
    """
    if isinstance(norm, SpatialNorm) and latents is None:
        raise ValueError("a resnet block with spatial norms needs `latents=`.")
    causal = isinstance(conv, CausalConv3d) and conv.pad_mode != "replicate"
    frames = causal and is_large(x) if variant is None else variant == "frames"
    apply = _normed_conv_of_frames if frames else _normed_conv
    return apply(act, norm, conv, x, cache, latents, skip)


def _normed_conv(act, norm, conv, x, cache, latents, skip):
    affine = norm.affine(x) if latents is None else norm.affine(x, latents)
    y, cache = conv(act(affine(x)).astype(x.dtype), cache)
    return y if skip is None else skip() + y, cache


def _normed_conv_of_frames(act, *args):
    """The same, by a loop over frames whose carry is the cache of the convolution.

    The derivative is that of the whole: a loop's would keep every frame's intermediates.
    """
    arrays, static = eqx.partition(args, eqx.is_array)

    @jax.custom_vjp
    def run(arrays):
        return _loop_over_frames(act, *eqx.combine(arrays, static))

    def backward(arrays, cotangent):
        whole = lambda arrays: _normed_conv(act, *eqx.combine(arrays, static))  # noqa: E731
        return jax.vjp(whole, arrays)[1](cotangent)

    run.defvjp(lambda arrays: (run(arrays), arrays), backward)
    return run(arrays)


def _loop_over_frames(act, norm, conv, x, cache, latents, skip):
    affine = norm.affine(x) if latents is None else norm.affine(x, latents)
    count, past = x.shape[1], conv.conv.weight.shape[0] - 1

    def normed(i):
        return act(affine.of_frame(frame(x, i), i, count)).astype(x.dtype)

    def convolved(frames, i):
        cache = jnp.concatenate(frames, axis=1) if frames else None
        y, cache = conv(normed(i), cache)
        y = y if skip is None else skip.frame(i)() + y
        frames = tuple(jnp.split(cache, past, axis=1)) if frames else ()
        return frames, y[:, 0]

    index = jnp.arange(count, dtype=jnp.int32)
    if cache is None and past:
        cache = jnp.repeat(normed(index[0]), past, axis=1)
    frames = () if cache is None else tuple(jnp.split(cache, past, axis=1))
    _, y = jax.lax.scan(convolved, frames, index)
    y = jnp.moveaxis(y, 0, 1)
    if cache is None:
        return y, None
    # Made anew: what the loop carries has the loop's layout, not that of a result, and left to
    # XLA for TPUs the copies of all caches come last, when every one is there twice.
    last = jnp.moveaxis(jax.lax.map(lambda i: normed(i)[:, 0], index[-past:]), 0, 1)
    cache = jnp.concatenate([cache[:, last.shape[1] :], last], axis=1)
    return jax.lax.optimization_barrier((y, cache))


__all__ = ["ResnetBlock", "ResnetCache", "Skip", "normed_conv"]
