"""Defines the layers: convolutions, norms and resampling.

A layer that sees earlier frames takes an array and a cache, and returns an array and the next
cache.
"""

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
    frame_conv,
    moments,
    nearest,
    offers,
    pointwise_conv,
    repeat_frames,
    valid_conv,
)
from ._types import Key, at_least_float32, is_traced

PAD_MODES = ("first", "constant", "replicate")
_SPATIAL_EPS = 1e-6
_DRAWN_AT_ONCE = 2**16


class Conv(eqx.Module):
    """Holds a convolution's kernel, `(*sizes, in, out)`, and bias, `(out,)`.

    They are initialised as torch does it. A kernel of size 1x1x1 can be called.
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
        if self.weight.shape[:-2] != (1, 1, 1):
            raise ValueError(
                f"a kernel (kt, kh, kw, in, out) of {self.weight.shape} is not pointwise: "
                "hold it in a `CausalConv3d`."
            )
        return pointwise_conv(x, self.weight, self.bias)

    def taps(self) -> Taps:
        """Returns the kernel and the bias."""
        return Taps(self.weight, self.bias)


@functools.partial(jax.jit, static_argnames="dtype")
def _draw(key: Key, i: Int[Array, ""] | int, bound: Float[Array, ""] | float, dtype) -> Array:
    return jax.random.uniform(jax.random.fold_in(key, i), (_DRAWN_AT_ONCE,), dtype, -bound, bound)


def _uniform(key: Key, shape: tuple[int, ...], bound: float, dtype) -> Array:
    """Draws numbers between `-bound` and `bound`, in parts of one size.

    All parts share one compiled program: compiling one for each shape takes longer than drawing.
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

    Time is padded in front by the cache, or by copies of the first frame, and space by zeros. With
    `pad_mode="replicate"` both are padded by replication, and nothing is cached.
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
    """Normalises groups of channels of each clip over all pixels of a frame batch.

    Moments are computed in at least float32.
    """

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
        mean, variance = moments(x, self.groups)
        weight, bias = self.weight.astype(mean.dtype), self.bias.astype(mean.dtype)
        scale = jax.lax.rsqrt(variance + self.eps) * _channels(weight)
        return Affine(mean, scale, _channels(bias))


class SpatialNorm(eqx.Module):
    """Applies a group norm, then a scale and a shift that are computed from the latents.

    Scale and shift are resized by nearest neighbour. This commutes with 1x1x1 convolutions, which
    therefore run at latent resolution. From MoVQ (Zheng et al. 2022,
    https://arxiv.org/abs/2209.09002).
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
        if offers(self.norm_layer, "affine"):
            return self.affine(x, latents)(x).astype(x.dtype)
        scale, shift = (nearest(s, x.shape[1:4]) for s in self._modulation(latents))
        return (at_least_float32(self.norm_layer(x)) * scale + shift).astype(x.dtype)

    @named_scope("eqx_cogvae.SpatialNorm")
    def affine(self, x: Float[Array, "b t h w c"], latents: Float[Array, "b t2 h2 w2 z"]) -> Affine:
        """Computes the affine map that normalises `x`, at the resolution of the latents."""
        mean, gain, bias = self.norm_layer.affine(x)
        scale, shift = self._modulation(latents)
        if gain.shape[1] > 1:  # A user's norm may return moments for each frame.
            scale, shift = (repeat_frames(s, gain.shape[1]) for s in (scale, shift))
        return Affine(mean, gain * scale, bias * scale + shift)

    def _modulation(self, latents: Array) -> tuple[Array, Array]:
        """Returns scale and shift at the resolution of the latents."""
        # The barrier keeps them in the dtype of the latents until they are used. Otherwise a
        # compiler removes the rounding, and holds those of all norms in float32 from the start.
        scale, shift = self.conv_y(latents)[0], self.conv_b(latents)[0]
        scale, shift = jax.lax.optimization_barrier((scale, shift))
        return at_least_float32(scale), at_least_float32(shift)


class Downsample(eqx.Module):
    """Halves height and width by a strided convolution.

    With `compress_time` it first averages pairs of frames. If their number is odd, the first frame
    has no partner and is not averaged.
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
            # Two slices need less memory than a mean over an axis of pairs.
            earlier, later = (at_least_float32(rest[:, i::2]) for i in (0, 1))
            means = ((earlier + later) / 2).astype(x.dtype)
            x = jnp.concatenate([first, means], axis=1)
        geometry = Geometry(stride=2, pads=((0, 1), (0, 1)))
        return frame_conv(x, *self.conv.taps(), geometry)


class Upsample(eqx.Module):
    """Doubles height and width by nearest neighbour, then convolves each frame.

    With `compress_time` it then repeats each frame. If their number is odd, the first frame is not
    repeated, unless `continued=True` says that the batch does not start a clip.
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
        # Repeating frames commutes with a 2D convolution, so the copies are made afterwards.
        x = frame_conv(x, *self.conv.taps(), Geometry(doubles=True))
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
