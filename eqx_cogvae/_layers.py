"""The layers: from an array and what is cached of its past, to an array and the new cache."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import named_scope
from jaxtyping import Array, Float, Int

from ._convolution import (
    causal_conv,
    doubling_conv,
    frame_conv,
    is_large,
    pointwise_conv,
    valid_conv,
)
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


class Affine(NamedTuple):
    """What a norm does to a pixel, once the moments are known.

    `scale` and `shift` are read off at latent resolution, by nearest neighbour.
    """

    mean: Float[Array, "b _t 1 1 c"]
    gain: Float[Array, "b _t 1 1 c"]
    bias: Float[Array, "1 1 1 1 c"]
    scale: Float[Array, "b t2 h2 w2 c"] | None = None
    shift: Float[Array, "b t2 h2 w2 c"] | None = None

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        """The result in at least float32, not yet rounded to the dtype of `x`."""
        y = (at_least_float32(x) - self.mean) * self.gain + self.bias
        if self.scale is None or self.shift is None:
            return y
        scale, shift = (_nearest(s, x.shape[1:4]) for s in (self.scale, self.shift))
        return y * scale.astype(y.dtype) + shift.astype(y.dtype)

    def of_frame(
        self, x: Float[Array, "b 1 h w c"], i: Int[Array, ""], frames: int
    ) -> Float[Array, "b 1 h w c"]:
        """The result for frame `i` of so many."""
        if self.scale is None or self.shift is None:
            return self(x)
        source = _nearest_frame(i, frames, self.scale.shape[1])
        scale, shift = (
            jax.lax.dynamic_slice_in_dim(s, source, 1, axis=1) for s in (self.scale, self.shift)
        )
        (h, w), (h2, w2) = x.shape[2:4], scale.shape[2:4]
        if h % h2 or w % w2:
            return self._replace(scale=scale, shift=shift)(x)
        # Broadcast, a cell of pixels to each number: enlarged arrays would be there in full.
        y = self._replace(scale=None, shift=None)(x)
        cells = y.reshape(*y.shape[:2], h2, h // h2, w2, w // w2, -1)
        scale, shift = (s.astype(y.dtype)[:, :, :, None, :, None] for s in (scale, shift))
        return (cells * scale + shift).reshape(y.shape)


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
        return self.affine(x)(x).astype(x.dtype)

    @named_scope("eqx_cogvae.GroupNorm")
    def affine(self, x: Float[Array, "b t h w c"]) -> Affine:
        """What the moments of `x` make of the norm."""
        mean = self._mean(at_least_float32(x))
        variance = self._mean(jnp.square(at_least_float32(x) - mean))
        weight, bias = self.weight.astype(mean.dtype), self.bias.astype(mean.dtype)
        gain = jax.lax.rsqrt(variance + self.eps) * _channels(weight)
        return Affine(mean, gain, _channels(bias))

    def _mean(self, x: Array) -> Array:
        # Row by row first: millions of float32 in one sum would lose digits, and take twice the
        # time. Groups last: to split the channels of large arrays is to copy them.
        by_channel = jnp.mean(jnp.mean(x, axis=3, keepdims=True), axis=(1, 2), keepdims=True)
        by_group = jnp.mean(by_channel.reshape(x.shape[0], self.groups, -1), axis=2)
        return jnp.repeat(by_group, x.shape[4] // self.groups, axis=1)[:, None, None, None]


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
        return self.affine(x, latents)(x).astype(x.dtype)

    @named_scope("eqx_cogvae.SpatialNorm")
    def affine(self, x: Float[Array, "b t h w c"], latents: Float[Array, "b t2 h2 w2 z"]) -> Affine:
        """What the moments of `x`, and the latents, make of the norm."""
        scale, shift = self.conv_y(latents)[0], self.conv_b(latents)[0]
        return self.norm_layer.affine(x)._replace(scale=scale, shift=shift)


class Skip(NamedTuple):
    """What goes around a residual branch, by a pointwise convolution where widths differ."""

    x: Float[Array, "b t h w i"]
    conv: Conv | None

    def __call__(self) -> Float[Array, "b t h w o"]:
        return (
            self.x
            if self.conv is None
            else pointwise_conv(self.x, self.conv.weight, self.conv.bias)
        )

    def frame(self, i: Int[Array, ""]) -> "Skip":
        return self._replace(x=jax.lax.dynamic_slice_in_dim(self.x, i, 1, axis=1))


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
        one = jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)
        return act(affine.of_frame(one, i, count)).astype(x.dtype)

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


def _nearest_frame(i: Array, frames: int, sources: int) -> Array:
    """The frame of so many sources that `_nearest` takes for frame `i` of so many frames."""
    if frames > 1 and frames % 2 == 1:
        return jnp.where(i == 0, 0, 1 + (i - 1) * (sources - 1) // (frames - 1))
    return i * sources // frames


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
    "Skip",
    "SpatialNorm",
    "Upsample",
    "normed_conv",
]
