"""Runs the model's blocks on large arrays in chunks.

Layers take part through two methods, and a layer without them is called with the whole array:

- a norm's `affine(x[, latents])` returns the `Affine` map that it applies to `x`;
- a convolution's `taps()` returns the `Taps` of the causal, zero-padded convolution that it is,
  or None.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
from jaxtyping import Array

from .._types import ResnetCache
from . import choose, chunked
from .units import Activation, Taps, Unit

_F = TypeVar("_F", bound=Callable)


def scheduled(alternative: Callable) -> Callable[[_F], _F]:
    """Decorates a function to call `alternative` first, and itself only if that returns None.

    Both take the same arguments, and return the same numbers.
    """

    def decorate(plain: _F) -> _F:
        @functools.wraps(plain)
        def run(*args: Any, **kwargs: Any) -> Any:
            result = alternative(*args, **kwargs)
            return plain(*args, **kwargs) if result is None else result

        return run  # pyright: ignore

    return decorate


def normed_conv(
    norm: Callable,
    act: Activation,
    conv: Callable,
    x: Array,
    cache: Any = None,
    latents: Array | None = None,
    *,
    residual: Array | None = None,
    beside: Taps | None = None,
) -> tuple[Array, Any] | None:
    """Runs a norm, an activation and a convolution in chunks if `x` is large, else returns None."""
    if not choose.in_chunks(x.shape, choose.current_hints()) or not offers(norm, "affine"):
        return None
    if (taps := _taps(conv)) is None:
        return None
    own = x[..., : taps.kernel.shape[3]]
    given = (own,) if latents is None else (own, latents)
    # The checkpoint keeps `x` alone: the moments' derivative would keep a centred float32 copy.
    affine = eqx.filter_checkpoint(lambda norm, *given: norm.affine(*given))(norm, *given)
    return chunked.in_chunks(act, Unit(affine, taps, x, cache, residual, beside))


def residual_block(
    block: Any, x: Array, cache: Any = None, *, latents: Array | None = None
) -> tuple[Array, Any] | None:
    """Runs a resnet block in chunks if `x` is large, else returns None.

    The second convolution is added into the buffer of the shortcut. If the block halves its
    channels, the first convolution writes its result and the shortcut into the buffer of `x`, and
    the second adds them up.
    """
    if not choose.in_chunks(x.shape, choose.current_hints()):
        return None
    act, shortcut = block.activation, block.conv_shortcut
    cache1, cache2 = (None, None) if cache is None else cache
    first = (block.norm1, act, block.conv1, x, cache1, latents)
    beside = None if shortcut is None else _taps(shortcut)
    halves = beside is not None and x.shape[-1] == 2 * beside.bias.size
    if halves and _fits(block.norm1, block.conv1) and _fits(block.norm2, block.conv2):
        y, cache1 = _unit(*first, beside=beside)
        y, cache2 = _unit(block.norm2, act, block.conv2, y, cache2, latents)
        return y, ResnetCache(cache1, cache2)
    residual = x if shortcut is None else shortcut(x)
    y, cache1 = _unit(*first)
    y, cache2 = _unit(block.norm2, act, block.conv2, y, cache2, latents, residual=residual)
    return y, ResnetCache(cache1, cache2)


def normalised(norm: Callable, x: Array, latents: Array | None = None) -> Array:
    """Applies a norm; the result of one with `affine` is not rounded to the dtype of `x` yet.

    It stays in float32 for the activation, which saves a rounding in half precision.
    """
    given = (x,) if latents is None else (x, latents)
    return norm.affine(*given)(x) if offers(norm, "affine") else norm(*given)  # pyright: ignore


def _unit(
    norm: Callable,
    act: Activation,
    conv: Callable,
    x: Array,
    cache: Any,
    latents: Array | None,
    *,
    residual: Array | None = None,
    beside: Taps | None = None,
) -> tuple[Array, Any]:
    """Runs a norm, an activation and a convolution, in chunks where that is possible."""
    added = {"residual": residual, "beside": beside}
    result = normed_conv(norm, act, conv, x, cache, latents, **added)
    if result is None:
        y, cache = conv(act(normalised(norm, x, latents)).astype(x.dtype), cache)
        result = (y if residual is None else residual + y), cache
    return result


def _fits(norm: Any, conv: Any) -> bool:
    return offers(norm, "affine") and _taps(conv) is not None


def _taps(conv: Any) -> Taps | None:
    return conv.taps() if offers(conv, "taps") else None


def offers(part: Any, method: str) -> bool:
    """Returns True if `part` has a method that describes what a call of it does.

    A subclass that overrides `__call__` and inherits the method does not. A norm that wraps another
    as its `norm_layer` does if both have the method.
    """
    for kind in type(part).__mro__:
        if method in vars(kind):
            inner = getattr(part, "norm_layer", None)
            return inner is None or offers(inner, method)
        if "__call__" in vars(kind):
            return False
    return False


__all__ = ["normalised", "normed_conv", "offers", "residual_block", "scheduled"]
