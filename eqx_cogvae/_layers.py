"""The layers: from an array and what is cached of its past, to an array and the new cache."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import named_scope
from jaxtyping import Array, Float, Int

from ._lowering import (
    Affine,
    Geometry,
    Taps,
    causal_conv,
    frame_by_frame,
    frame_conv,
    pointwise_conv,
    repeat_frames,
    valid_conv,
)
from ._types import Key, at_least_float32, is_traced

PAD_MODES = ("first", "constant", "replicate")
_SPATIAL_EPS = 1e-6
_DRAWN_AT_ONCE = 2**16


class Conv(eqx.Module):
    """A convolution's kernel, `(*sizes, in, out)`, and bias, `(out,)`.

    Initialised as torch initialises its own. Called, it is a pointwise convolution.
    """

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

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h w o"]:
        """Multiplies the channels of each pixel by a kernel of size 1x1x1."""
        return pointwise_conv(x, self.weight, self.bias)

    def taps(self) -> Taps:
        """Returns the kernel and the bias."""
        return Taps(self.weight, self.bias)


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
        kernel, bias = self.conv.taps()
        if kernel.shape[:3] == (1, 1, 1):
            return pointwise_conv(x, kernel, bias), None
        if self.pad_mode != "replicate":
            return causal_conv(x, kernel, bias, cache)
        kt, kh, kw = kernel.shape[:3]
        pads = [(0, 0), (kt - 1, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)]
        unpadded = Geometry(pads=((0, 0), (0, 0)))
        return valid_conv(jnp.pad(x, pads, mode="edge"), kernel, bias, unpadded), None

    def taps(self) -> Taps | None:
        """Returns the kernel and the bias, or None if space is padded by replication."""
        return None if self.pad_mode == "replicate" else self.conv.taps()


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
        """Computes the affine map that normalises `x`."""
        mean, variance = _moments(at_least_float32(x), self.groups)
        weight, bias = self.weight.astype(mean.dtype), self.bias.astype(mean.dtype)
        scale = jax.lax.rsqrt(variance + self.eps) * _channels(weight)
        return Affine(mean, scale, _channels(bias))


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
    """Returns the mean of each channel's group, over all frames and pixels."""
    # Row by row first: millions of float32 in one sum would lose digits, and take twice the
    # time. Groups last: to split the channels of large arrays is to copy them.
    by_channel = jnp.mean(jnp.mean(x, axis=3, keepdims=True), axis=(1, 2))
    by_group = jnp.mean(by_channel.reshape(x.shape[0], groups, -1), axis=2)
    # By a sum, not repeated: some compilers would look the group up for every pixel.
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
        """Computes the affine map that normalises `x`, at the resolution of the latents."""
        mean, gain, bias = self.norm_layer.affine(x)
        # The barrier keeps them in the dtype of the latents until they are used. A compiler would
        # else leave out that rounding, and hold those of all norms in float32 from the start.
        read_off = jax.lax.optimization_barrier((self.conv_y(latents)[0], self.conv_b(latents)[0]))
        scale, shift = map(at_least_float32, read_off)
        if gain.shape[1] > 1:  # A norm of one's own may have moments for each frame.
            scale, shift = (repeat_frames(s, gain.shape[1]) for s in (scale, shift))
        return Affine(mean, gain * scale, bias * scale + shift)


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
        geometry = Geometry(stride=2, pads=((0, 1), (0, 1)))
        return frame_by_frame(lambda x: frame_conv(x, *self.conv.taps(), geometry), x)


class Upsample(eqx.Module):
    """Doubles height and width, and the frames too, by repeating; then convolves every frame.

    Of an odd number of frames the first is not doubled in time, unless they are `continued`: no
    clip begins with them.
    """

    conv: Conv
    compress_time: bool = eqx.field(static=True)

    def __init__(self, channels: int, compress_time: bool, *, key: Key, dtype=jnp.float32):
        self.conv = Conv((3, 3), channels, channels, key=key, dtype=dtype)
        self.compress_time = compress_time

    @named_scope("eqx_cogvae.Upsample")
    def __call__(
        self, x: Float[Array, "b t h w c"], *, continued: bool = False
    ) -> Float[Array, "b t2 2*h 2*w c"]:
        # The convolution sees one frame at a time, so the copies are made after it.
        geometry = Geometry(doubles=True)
        x = frame_by_frame(lambda x: frame_conv(x, *self.conv.taps(), geometry), x)
        if not self.compress_time:
            return x
        first, rest = (x[:, :0], x) if continued else _split_first(x)
        return jnp.concatenate([first, jnp.repeat(rest, 2, axis=1)], axis=1)


def _split_first(x: Array) -> tuple[Array, Array]:
    odd = x.shape[1] % 2
    return x[:, :odd], x[:, odd:]


def _channels(c: Array) -> Array:
    return c[None, None, None, None]


__all__ = [
    "PAD_MODES",
    "CausalConv3d",
    "Conv",
    "Downsample",
    "GroupNorm",
    "SpatialNorm",
    "Upsample",
]
