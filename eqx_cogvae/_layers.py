"""The layers: from an array and what is cached of its past, to an array and the new cache."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import named_scope
from jaxtyping import Array, Float

from ._convolution import causal_conv, doubling_conv, frame_conv, pointwise_conv, valid_conv
from ._types import Key, at_least_float32

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}
PAD_MODES = ("first", "constant", "replicate")
_SPATIAL_EPS = 1e-6


class Conv(eqx.Module):
    """A convolution's kernel, `(*sizes, in, out)`, and bias, `(out,)`; torch's initialisation."""

    weight: Float[Array, "*sizes i o"]
    bias: Float[Array, " o"]

    def __init__(self, sizes: tuple[int, ...], i: int, o: int, *, key: Key, dtype=jnp.float32):
        fan_in = i
        for size in sizes:
            fan_in *= size
        bound = fan_in**-0.5
        wkey, bkey = jax.random.split(key)
        self.weight = jax.random.uniform(wkey, (*sizes, i, o), dtype, -bound, bound)
        self.bias = jax.random.uniform(bkey, (o,), dtype, -bound, bound)


class CausalConv3d(eqx.Module):
    """A 3D convolution that sees no later frame.

    With `pad_mode="replicate"` time (in front) and space are padded by replication and nothing
    is cached; in any other mode time is padded by the cache, or by copies of the first frame,
    and space by zeros.
    """

    conv: Conv
    pad_mode: str = eqx.field(static=True)

    def __init__(
        self, i: int, o: int, size: int = 3, *, pad_mode: str = "first", key: Key, dtype=jnp.float32
    ):
        self.conv = Conv((size,) * 3, i, o, key=key, dtype=dtype)
        self.pad_mode = pad_mode

    def __check_init__(self):
        if self.pad_mode not in PAD_MODES:
            raise ValueError(
                f"`pad_mode` must be one of {', '.join(PAD_MODES)}, got {self.pad_mode!r}."
            )

    @named_scope("eqx_cogvae.CausalConv3d")
    def __call__(
        self, x: Float[Array, "b t h w i"], cache: Float[Array, "b k h w i"] | None = None
    ) -> tuple[Float[Array, "b t h w o"], Float[Array, "b k h w i"] | None]:
        kernel, bias = self.conv.weight, self.conv.bias
        if kernel.shape[:3] == (1, 1, 1):
            return pointwise_conv(x, kernel, bias), None
        if self.pad_mode != "replicate":
            return causal_conv(x, kernel, bias, cache)
        kt, kh, kw = kernel.shape[:3]
        pads = [(0, 0), (kt - 1, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)]
        return valid_conv(jnp.pad(x, pads, mode="edge"), kernel, bias, ((0, 0), (0, 0))), None


class GroupNorm(eqx.Module):
    """Normalises groups of channels over all frames of the batch, moments in float32."""

    weight: Float[Array, " c"]
    bias: Float[Array, " c"]
    groups: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(self, channels: int, groups: int, eps: float, *, dtype=jnp.float32):
        self.weight = jnp.ones(channels, dtype)
        self.bias = jnp.zeros(channels, dtype)
        self.groups = groups
        self.eps = eps

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        return self.at_least_float32(x).astype(x.dtype)

    @named_scope("eqx_cogvae.GroupNorm")
    def at_least_float32(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        """The result before it is rounded to the dtype of `x`."""
        grouped = at_least_float32(x).reshape(*x.shape[:4], self.groups, -1)
        centred = grouped - _mean(grouped)
        variance = _mean(jnp.square(centred))
        y = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        weight, bias = self.weight.astype(y.dtype), self.bias.astype(y.dtype)
        return y * _channels(weight) + _channels(bias)


class SpatialNorm(eqx.Module):
    """A group norm whose scale and shift are read off the latents, nearest neighbour.

    From MoVQ (Zheng et al. 2022, https://arxiv.org/abs/2209.09002). A 1x1x1 convolution
    commutes with nearest resizing, so both run at latent resolution.
    """

    norm_layer: GroupNorm
    conv_y: CausalConv3d
    conv_b: CausalConv3d

    def __init__(self, channels: int, latents: int, groups: int, *, key: Key, dtype=jnp.float32):
        ykey, bkey = jax.random.split(key)
        self.norm_layer = GroupNorm(channels, groups, _SPATIAL_EPS, dtype=dtype)
        self.conv_y = CausalConv3d(latents, channels, 1, key=ykey, dtype=dtype)
        self.conv_b = CausalConv3d(latents, channels, 1, key=bkey, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b t h w c"], latents: Float[Array, "b t2 h2 w2 z"]
    ) -> Float[Array, "b t h w c"]:
        return self.at_least_float32(x, latents).astype(x.dtype)

    @named_scope("eqx_cogvae.SpatialNorm")
    def at_least_float32(
        self, x: Float[Array, "b t h w c"], latents: Float[Array, "b t2 h2 w2 z"]
    ) -> Float[Array, "b t h w c"]:
        """The result before it is rounded to the dtype of `x`."""
        y = self.norm_layer.at_least_float32(x)
        scale = _nearest(self.conv_y(latents)[0], x.shape[1:4]).astype(y.dtype)
        shift = _nearest(self.conv_b(latents)[0], x.shape[1:4]).astype(y.dtype)
        return y * scale + shift


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
        y = normalised(self.norm1, x, act, latents)
        y, cache1 = self.conv1(y, cache1)
        y = normalised(self.norm2, y, act, latents)
        y, cache2 = self.conv2(y, cache2)
        if self.conv_shortcut is not None:
            x = pointwise_conv(x, self.conv_shortcut.weight, self.conv_shortcut.bias)
        return x + y, ResnetCache(cache1, cache2)


class Downsample(eqx.Module):
    """Halves height and width by a strided convolution, and the frames too by averaging pairs.

    Of an odd number of frames the first is kept as it is.
    """

    conv: Conv
    compress_time: bool = eqx.field(static=True)

    def __init__(self, channels: int, compress_time: bool, *, key: Key, dtype=jnp.float32):
        self.conv = Conv((3, 3), channels, channels, key=key, dtype=dtype)
        self.compress_time = compress_time

    @named_scope("eqx_cogvae.Downsample")
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h//2 w//2 c"]:
        if self.compress_time:
            first, rest = _split_first(x)
            pairs = at_least_float32(rest).reshape(x.shape[0], -1, 2, *x.shape[2:])
            x = jnp.concatenate([first, jnp.mean(pairs, axis=2).astype(x.dtype)], axis=1)
        far = ((0, 1), (0, 1))
        return frame_conv(x, self.conv.weight, self.conv.bias, stride=2, pads=far)


class Upsample(eqx.Module):
    """Doubles height and width, and the frames too, by repeating; then convolves every frame.

    Of an odd number of frames the first is not doubled in time.
    """

    conv: Conv
    compress_time: bool = eqx.field(static=True)

    def __init__(self, channels: int, compress_time: bool, *, key: Key, dtype=jnp.float32):
        self.conv = Conv((3, 3), channels, channels, key=key, dtype=dtype)
        self.compress_time = compress_time

    @named_scope("eqx_cogvae.Upsample")
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 2*h 2*w c"]:
        # The convolution sees one frame at a time, so the copies are made after it.
        x = doubling_conv(x, self.conv.weight, self.conv.bias)
        if not self.compress_time:
            return x
        first, rest = _split_first(x)
        return jnp.concatenate([first, jnp.repeat(rest, 2, axis=1)], axis=1)


def _split_first(x: Array) -> tuple[Array, Array]:
    odd = x.shape[1] % 2
    return x[:, :odd], x[:, odd:]


def _mean(x: Array) -> Array:
    # In two stages: millions of float32 in one sum would lose digits, and take twice the time.
    return jnp.mean(jnp.mean(x, axis=3, keepdims=True), axis=(1, 2, 5), keepdims=True)


def _norm(channels: int, groups: int, eps: float, latents: int | None, *, key: Key, dtype):
    if latents is None:
        return GroupNorm(channels, groups, eps, dtype=dtype)
    return SpatialNorm(channels, latents, groups, key=key, dtype=dtype)


def normalised(
    norm: GroupNorm | SpatialNorm,
    x: Float[Array, "b t h w c"],
    act: Callable[[Array], Array],
    latents: Float[Array, "b t2 h2 w2 z"] | None = None,
) -> Float[Array, "b t h w c"]:
    """The norm, then the activation, rounded to the dtype of `x` once."""
    if isinstance(norm, GroupNorm):
        return act(norm.at_least_float32(x)).astype(x.dtype)
    if latents is None:
        raise ValueError("a resnet block with spatial norms needs `latents=`.")
    return act(norm.at_least_float32(x, latents)).astype(x.dtype)


def _channels(c: Array) -> Array:
    return c[None, None, None, None]


def _nearest(x: Array, size: tuple[int, ...]) -> Array:
    """Resizes `(b, t, h, w, c)` to `size` of time, height and width.

    An odd number of frames above one takes its first from the first and the rest from the rest.
    """
    frames, height, width = size
    x = _repeat(_repeat(x, height, axis=2), width, axis=3)
    if frames > 1 and frames % 2 == 1:
        return jnp.concatenate([x[:, :1], _repeat(x[:, 1:], frames - 1, axis=1)], axis=1)
    return _repeat(x, frames, axis=1)


def _repeat(x: Array, size: int, axis: int) -> Array:
    times, rest = divmod(size, x.shape[axis])
    if not rest:
        return x if times == 1 else jnp.repeat(x, times, axis)
    return jnp.take(x, jnp.arange(size) * x.shape[axis] // size, axis)


__all__ = [
    "PAD_MODES",
    "CausalConv3d",
    "Conv",
    "Downsample",
    "GroupNorm",
    "ResnetBlock",
    "ResnetCache",
    "SpatialNorm",
    "Upsample",
    "normalised",
]
