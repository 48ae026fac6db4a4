"""The residual block, and what it is made of: a norm, an activation, then a convolution."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import named_scope
from jaxtyping import Array, Float

from ._layers import CausalConv3d, Conv, GroupNorm, SpatialNorm, frame, rows
from ._lowering.convolution import (
    band_conv,
    frames_or_bands,
    in_order,
    is_large,
    pointwise_conv,
    rows_of_bands,
)
from ._types import Key

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


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
        act, short = _ACTIVATIONS[self.act_fn], self.conv_shortcut
        cache1, cache2 = cache or ResnetCache()
        onto, beside = x, None
        if (
            short is not None
            and _goes_in_parts(self.conv1, x)
            and x.shape[-1] == 2 * short.bias.size
        ):
            onto, beside = None, short  # the branch and the shortcut fit into x
        elif short is not None:
            onto = pointwise_conv(x, short.weight, short.bias)
        y, cache1 = normed_conv(self.norm1, act, self.conv1, x, cache1, latents, beside=beside)
        y, cache2 = normed_conv(self.norm2, act, self.conv2, y, cache2, latents, onto=onto)
        return y, ResnetCache(cache1, cache2)


def _norm(channels: int, groups: int, eps: float, latents: int | None, *, key: Key, dtype):
    if latents is None:
        return GroupNorm(channels, groups, eps, dtype=dtype)
    return SpatialNorm(channels, latents, groups, key=key, dtype=dtype)


def normed_conv(
    norm: GroupNorm | SpatialNorm,
    act: Callable[[Array], Array],
    conv: CausalConv3d,
    x: Float[Array, "b t h w _c"],
    cache: Float[Array, "b k h w i"] | None,
    latents: Float[Array, "b t2 h2 w2 z"] | None = None,
    *,
    onto: Float[Array, "b t h w o"] | None = None,
    beside: Conv | None = None,
    variant: str | None = None,
) -> tuple[Float[Array, "b t h w _c2"], Float[Array, "b k h w i"] | None]:
    """A norm over all frames, an activation, then the convolution, and what is added to it.

    Added are `onto`, and the channels of `x` that come after those of the norm. `beside` is a
    pointwise convolution of `x` that is appended to the result, for a later call to add: with
    it the result must be as wide as `x`, and there is no `onto`.

    Of large arrays frame by frame, and on TPUs in bands of rows: what is normalised, and what
    the convolution makes of it on its way, is then there for one at a time; and the result is
    written over `onto`, or over `x` with `beside`, where XLA sees that nothing else reads it.
    `variant`, "whole", "frames" or "bands", is for tests.
    """
    if isinstance(norm, SpatialNorm) and latents is None:
        raise ValueError("a resnet block with spatial norms needs `latents=`.")
    if beside is not None and (onto is not None or x.shape[-1] != 2 * beside.bias.size):
        raise ValueError("`beside` goes without `onto`, and must halve the channels.")
    args = (norm, conv, x, cache, latents, onto, beside)
    if variant == "whole" or (variant is None and not _goes_in_parts(conv, x)):
        return _normed_conv(act, *args)
    return _normed_conv_in_parts(act, variant, *args)


def _goes_in_parts(conv: Callable, x: Array) -> bool:
    # What a user put in place of the convolution is called once, with all frames.
    return isinstance(conv, CausalConv3d) and conv.pad_mode != "replicate" and is_large(x)


def _normed_conv(act, norm, conv, x, cache, latents, onto, beside):
    own = x[..., : _channels(norm)]
    y, cache = conv(act(_affine(norm, own, latents)(own)).astype(x.dtype), cache)
    return _joined(y, x[..., _channels(norm) :], x, onto, beside), cache


def _joined(y, beyond, x, onto, beside):
    """The result of the convolution with all that is added or appended to it."""
    if onto is not None:
        y = onto + y
    if beyond.shape[-1]:
        y = beyond + y
    if beside is None:
        return y
    return jnp.concatenate([y, pointwise_conv(x, beside.weight, beside.bias)], axis=-1)


def _normed_conv_in_parts(act, variant, *args):
    """The same, by a loop.

    The derivative is that of the whole: a loop's would keep the intermediates of every part.
    """
    arrays, static = eqx.partition(args, eqx.is_array)
    on = lambda fn: lambda arrays: fn(act, *eqx.combine(arrays, static))  # noqa: E731
    _, conv, x, *_ = args
    # Bands are not convolved by a call: a user's own kind of convolution is.
    high = rows_of_bands(x, _margin(conv)) if type(conv) is CausalConv3d else 0
    bands = on(functools.partial(_loop_over_bands, high)) if high else None
    frames, whole = on(_loop_over_frames), on(_normed_conv)
    return frames_or_bands(frames, bands, whole, arrays, variant=variant)


def _margin(conv: CausalConv3d) -> int:
    """Rows above, and below, that a convolution sees."""
    return conv.conv.weight.shape[1] // 2


def _loop_over_frames(act, norm, conv, x, cache, latents, onto, beside):
    """A loop whose carry is the cache of the convolution."""
    channels = _channels(norm)
    normed = _of_frames(act, _affine(norm, x[..., :channels], latents), x)
    x, before, cache = _caches(normed, conv, x, cache)

    def convolved(carry, i):
        before, result = carry
        now = frame(x if beside is None else result, i)
        y, seen = conv(normed(now, i), jnp.concatenate(before, axis=1) if before else None)
        own = None if onto is None else frame(result, i)
        y = in_order(_joined(y, now[..., channels:], now, own, beside))
        before = tuple(jnp.split(seen, len(before), axis=1)) if before else ()
        return (before, jax.lax.dynamic_update_slice_in_dim(result, y, i, axis=1)), None

    before = () if before is None else tuple(jnp.split(before, before.shape[1], axis=1))
    carry, index = (before, _room(x, conv, onto, beside)), jnp.arange(x.shape[1], dtype=jnp.int32)
    (_, y), _ = jax.lax.scan(convolved, carry, index)
    return jax.lax.optimization_barrier((y, cache))


def _loop_over_bands(high, act, norm, conv, x, cache, latents, onto, beside):
    """A loop over bands of so many rows.

    It carries the last normalised rows of the band above, as the result may be written over their
    source. Each band is read together with the rows below it. The last has none: it is read from
    higher up, and zeros stand in below the frame.
    """
    height, channels, margin = x.shape[2], _channels(norm), _margin(conv)
    affine = _affine(norm, x[..., :channels], latents)
    x, before, cache = _caches(_of_frames(act, affine, x), conv, x, cache)
    affine = affine.of_height(height)

    def normed(source, start):
        first = jnp.minimum(start, height - high - margin)
        now = rows(source, first, high + margin)
        y = act(affine.of_rows(now[..., :channels], first)).astype(x.dtype)
        if before is not None:
            y = jnp.concatenate([rows(before, first, high + margin), y], axis=1)
        y = jnp.pad(y, ((0, 0), (0, 0), (0, margin), (0, 0), (0, 0)))
        return rows(y, start - first, high + margin)

    def convolved(carry, i):
        above, result = carry
        start, source = i * high, x if beside is None else result
        y = jnp.concatenate([above, normed(source, start)], axis=2)
        above = y[:, :, high : high + margin]
        y = band_conv(y, conv.conv.weight, conv.conv.bias)
        now, own = rows(source, start, high), None if onto is None else rows(result, start, high)
        y = _joined(y, now[..., channels:], now, own, beside)
        return (above, jax.lax.dynamic_update_slice_in_dim(result, y, start, axis=2)), None

    seen = x.shape[1] + (0 if before is None else before.shape[1])
    above = jnp.zeros_like(x, shape=(len(x), seen, margin, x.shape[3], channels))
    index = jnp.arange(height // high, dtype=jnp.int32)
    (_, y), _ = jax.lax.scan(convolved, (above, _room(x, conv, onto, beside)), index)
    return jax.lax.optimization_barrier((y, cache))


def _of_frames(act, affine, x):
    """What is normalised, and goes through the activation, of frame `i` of those of `x`."""
    count, channels = x.shape[1], affine.bias.shape[-1]
    return lambda x, i: act(affine.of_frame(x[..., :channels], i, count)).astype(x.dtype)


def _caches(normed, conv, x, cache):
    """`x`, the normalised frames before it, and those to cache; the last two None of one tap.

    The cache is made apart, and before a loop may write over `x`: what the loop carries has the
    loop's layout, not that of a result, and left to XLA for TPUs the copies of all caches come
    last, when every one is there twice.
    """
    past = conv.conv.weight.shape[0] - 1
    if not past:
        return x, None, None
    index = jnp.arange(x.shape[1], dtype=jnp.int32)
    ends = index[max(0, len(index) - past) :]
    if cache is None:  # the first frame stands in for it
        ends = jnp.concatenate([index[:1], ends])
    last = list(jax.lax.map(lambda i: normed(frame(x, i), i), ends))
    before = jnp.repeat(last.pop(0), past, axis=1) if cache is None else cache
    cache = jnp.concatenate([before[:, len(last) :], *last], axis=1)
    x, cache = jax.lax.optimization_barrier((x, cache))
    return x, before, cache


def _room(x, conv, onto, beside):
    """What the result is written over, part by part."""
    if onto is not None:
        return onto
    if beside is not None:
        return x
    bias = conv.conv.bias
    return jnp.zeros_like(x, shape=(*x.shape[:-1], bias.size), dtype=bias.dtype)


def _affine(norm, x, latents):
    return norm.affine(x) if latents is None else norm.affine(x, latents)


def _channels(norm: GroupNorm | SpatialNorm) -> int:
    """How many it takes."""
    return (norm.norm_layer if isinstance(norm, SpatialNorm) else norm).weight.size


__all__ = ["ResnetBlock", "ResnetCache", "normed_conv"]
