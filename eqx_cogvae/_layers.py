"""The layers: from an array and what is cached of its past, to an array and the new cache."""

import functools
import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import named_scope
from jaxtyping import Array, Float, Int

from ._lowering.convolution import (
    causal_conv,
    doubling_conv,
    frame_conv,
    pointwise_conv,
    valid_conv,
)
from ._types import Key, at_least_float32, is_traced

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
        self.weight = _uniform(wkey, (*sizes, i, o), bound, dtype)
        self.bias = _uniform(bkey, (o,), bound, dtype)


_DRAWN_AT_ONCE = 2**16


@functools.partial(jax.jit, static_argnames="dtype")
def _draw(key: Key, i: Int[Array, ""] | int, bound: Float[Array, ""] | float, dtype) -> Array:
    return jax.random.uniform(jax.random.fold_in(key, i), (_DRAWN_AT_ONCE,), dtype, -bound, bound)


def _uniform(key: Key, shape: tuple[int, ...], bound: float, dtype) -> Array:
    """Draws numbers between `-bound` and `bound`, in parts of one size.

    The parts share one program: compiling one for each shape takes five times as long as drawing.
    """
    count = math.prod(shape)
    parts = range(-(-count // _DRAWN_AT_ONCE))
    if is_traced(key):
        drawn = jax.vmap(lambda i: _draw(key, i, bound, dtype))(jnp.arange(len(parts)))
        return drawn.ravel()[:count].reshape(shape)
    drawn = jax.device_get([_draw(key, i, bound, dtype) for i in parts])
    return jax.device_put(np.concatenate(drawn)[:count].reshape(shape))


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
        # A user's own norm may have moments for each frame.
        return _applied(self, x) if self.mean.shape[1] == 1 else _apply(self, x)

    def of_frame(
        self, x: Float[Array, "b 1 h w c"], i: Int[Array, ""], frames: int
    ) -> Float[Array, "b 1 h w c"]:
        """The result for frame `i` of so many."""
        mean, gain = (m if m.shape[1] == 1 else frame(m, i) for m in (self.mean, self.gain))
        own = Affine(mean, gain, self.bias)
        if self.scale is None or self.shift is None:
            return own(x)
        source = _nearest_frame(i, frames, self.scale.shape[1])
        return _scaled(own(x), frame(self.scale, source), frame(self.shift, source))

    def of_height(self, height: int) -> "Affine":
        """The same, with a row of `scale` and `shift` for each of so many rows of pixels."""
        if self.scale is None or self.shift is None:
            return self
        scale, shift = (_repeat(s, height, axis=2) for s in (self.scale, self.shift))
        return self._replace(scale=scale, shift=shift)

    def of_rows(self, x: Float[Array, "b t h w c"], start: Int[Array, ""]) -> Array:
        """The result for some rows, from `start` on, by a norm `of_height`."""
        y = self._replace(scale=None, shift=None)(x)
        if self.scale is None or self.shift is None:
            return y
        return _scaled(y, *(rows(s, start, x.shape[2]) for s in (self.scale, self.shift)))


def _scaled(y: Array, scale: Array, shift: Array) -> Array:
    """Scales and shifts every pixel by its nearest neighbours in `scale` and `shift`."""
    scale, shift = (_repeat_frames(s.astype(y.dtype), y.shape[1]) for s in (scale, shift))
    (h, w), (h2, w2) = y.shape[2:4], scale.shape[2:4]
    if h % h2 or w % w2:
        scale, shift = (_repeat(_repeat(s, h, axis=2), w, axis=3) for s in (scale, shift))
        return y * scale + shift
    # Broadcast, a cell of pixels to each number: enlarged arrays would be there in full.
    cells = y.reshape(*y.shape[:2], h2, h // h2, w2, w // w2, -1)
    scale, shift = (s[:, :, :, None, :, None] for s in (scale, shift))
    return (cells * scale + shift).reshape(y.shape)


def _apply(affine: Affine, x: Array) -> Array:
    y = (at_least_float32(x) - affine.mean) * affine.gain + affine.bias
    if affine.scale is None or affine.shift is None:
        return y
    scale, shift = (_nearest(s, x.shape[1:4]) for s in (affine.scale, affine.shift))
    return y * scale.astype(y.dtype) + shift.astype(y.dtype)


def _pull_back(saved: tuple[Affine, Array], cotangent: Array) -> tuple[Affine, Array]:
    # Two sums give every derivative but the one by x; JAX's own would sum once per broadcast.
    affine, x = saved
    mean, gain, bias, scale, _ = affine
    centred = at_least_float32(x) - mean
    if scale is None:
        by_pixel, of_ones, of_centred = cotangent, cotangent, cotangent * centred
    else:
        by_pixel = cotangent * _nearest(scale, x.shape[1:4]).astype(cotangent.dtype)
        of_ones, of_centred = (
            _sum_of_copies(y, scale.shape) for y in (cotangent, cotangent * centred)
        )
        by_scale, by_shift = of_centred * gain + of_ones * bias, of_ones
        scales = (by_scale.astype(scale.dtype), by_shift.astype(scale.dtype))
        of_ones, of_centred = (s * scale.astype(s.dtype) for s in (of_ones, of_centred))
    total, by_gain = _sum_of_pixels(of_ones), _sum_of_pixels(of_centred)
    moments = (-total * gain, by_gain, jnp.sum(total, axis=0, keepdims=True))
    by_x = (by_pixel * gain).astype(x.dtype)
    return Affine(*moments) if scale is None else Affine(*moments, *scales), by_x


_applied = jax.custom_vjp(_apply)
_applied.defvjp(lambda affine, x: (_apply(affine, x), (affine, x)), _pull_back)


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
        mean, variance = _moments(at_least_float32(x), self.groups)
        weight, bias = self.weight.astype(mean.dtype), self.bias.astype(mean.dtype)
        gain = jax.lax.rsqrt(variance + self.eps) * _channels(weight)
        return Affine(mean, gain, _channels(bias))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _moments(x: Array, groups: int) -> tuple[Array, Array]:
    """Mean and variance of each group of channels, over all frames and pixels."""
    mean = _mean(x, groups)
    return mean, _mean(jnp.square(x - mean), groups)


@_moments.defjvp
def _moments_jvp(groups, primals, tangents):
    # As the mean changes the variance about it does not: JAX would sum to find that out.
    (x,), (by_x,) = primals, tangents
    mean, variance = _moments(x, groups)
    return (mean, variance), (_mean(by_x, groups), 2 * _mean((x - mean) * by_x, groups))


def _mean(x: Array, groups: int) -> Array:
    """Of each group of channels over all frames and pixels, for each channel."""
    # Row by row first: millions of float32 in one sum would lose digits, and take twice the
    # time. Groups last: to split the channels of large arrays is to copy them.
    by_channel = jnp.mean(jnp.mean(x, axis=3, keepdims=True), axis=(1, 2))
    by_group = jnp.mean(by_channel.reshape(x.shape[0], groups, -1), axis=2)
    # By a sum, not repeated: XLA's CPU backend would look the group up for every pixel.
    member = np.repeat(np.eye(groups, dtype=bool), x.shape[4] // groups, axis=1)
    mean = jnp.sum(jnp.where(member[None], by_group[:, :, None], 0), axis=1)
    return mean[:, None, None, None]


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


def frame(x: Float[Array, "b t *rest"], i: Int[Array, ""]) -> Float[Array, "b 1 *rest"]:
    """Frame `i`, which may be known at run time only."""
    return jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)


def rows(x: Float[Array, "b t h *rest"], start: Int[Array, ""], count: int) -> Array:
    """So many rows from `start` on, which may be known at run time only."""
    return jax.lax.dynamic_slice_in_dim(x, start, count, axis=2)


def _channels(c: Array) -> Array:
    return c[None, None, None, None]


def _nearest(x: Array, size: tuple[int, ...]) -> Array:
    """Resizes `(b, t, h, w, c)` to `size` of time, height and width.

    An odd number of frames above one takes its first from the first and the rest from the rest.
    """
    frames, height, width = size
    return _repeat_frames(_repeat(_repeat(x, height, axis=2), width, axis=3), frames)


def _repeat_frames(x: Array, frames: int) -> Array:
    if frames > 1 and frames % 2 == 1:
        return jnp.concatenate([x[:, :1], _repeat(x[:, 1:], frames - 1, axis=1)], axis=1)
    return _repeat(x, frames, axis=1)


def _sum_of_copies(x: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of `_nearest`: to `shape`, the sum of all that were copied from one."""
    (b, t, h, w, c), (_, sources, h2, w2, _) = x.shape, shape
    odd = int(t > 1 and t % 2 == 1)
    if h % h2 or w % w2 or (t - odd) % (sources - odd):
        back = jax.linear_transpose(
            lambda s: _nearest(s, (t, h, w)), jax.ShapeDtypeStruct(shape, x.dtype)
        )
        return back(x)[0]
    x = jnp.sum(x.reshape(b, t, h2, h // h2, w2, w // w2, c), axis=(3, 5))
    rest = jnp.sum(x[:, odd:].reshape(b, sources - odd, -1, *x.shape[2:]), axis=2)
    return jnp.concatenate([x[:, :odd], rest], axis=1)


def _sum_of_pixels(x: Array) -> Array:
    """For each channel; row by row, as for the moments."""
    return jnp.sum(jnp.sum(x, axis=3, keepdims=True), axis=(1, 2), keepdims=True)


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
    "SpatialNorm",
    "Upsample",
    "frame",
    "rows",
]
