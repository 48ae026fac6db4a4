"""Holds weights in 8 bits: convolutions with a quantised kernel, which they dequantise for use."""

import functools
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree, UInt8

from ._layers import Conv
from ._lowering import Taps
from ._resnet import ResnetBlock
from ._types import at_least_float32

_M = TypeVar("_M", bound=eqx.Module)

FORMATS = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
"""The largest number of each format of 8 bits."""


class QuantisedConv(eqx.Module):
    """Holds a convolution's kernel in 8 bits, with one scale for each output channel.

    It stands in for the `Conv` of a causal convolution. The kernel is dequantised wherever it is
    used, in the dtype of the scale.
    """

    # Integers hold the bits: neither `eqx.is_inexact_array` nor a cast of the model to another
    # dtype takes them for numbers.
    bits: UInt8[Array, "*sizes i o"]
    scale: Float[Array, " o"]
    bias: Float[Array, " o"]
    format: str = eqx.field(static=True)

    @property
    def weight(self) -> Float[Array, "*sizes i o"]:
        """The kernel, dequantised."""
        if self.bits.dtype != jnp.uint8:
            raise TypeError(
                f"weights held in 8 bits were cast to {self.bits.dtype}, which destroys them: "
                "cast floating arrays alone, by `eqx.is_inexact_array`."
            )
        small = lax.bitcast_convert_type(self.bits, jnp.dtype(self.format))
        scale = lax.stop_gradient(self.scale)  # it is part of the kernel, which is not trained
        return small.astype(scale.dtype) * _by_channel(scale, self.bits.ndim)

    def taps(self) -> Taps:
        """Returns the dequantised kernel and the bias."""
        return Taps(self.weight, self.bias)


def quantised(vae: _M, dtype: Any) -> _M:
    """Returns the model with the kernels of its residual blocks held in 8 bits.

    Each output channel of a kernel has a scale. Kernels are dequantised where they are used, so
    that all is computed in the dtype that the model had: this saves memory for weights, and no
    time. Everything else stays as it is: biases, norms, pointwise convolutions, and the first,
    the last and the resampling convolutions, which are 2 % of the weights and would add most of
    the error. Scales of the float8 formats are powers of two, so that weights which were of that
    format before are held bit by bit.

    Kernels in 8 bits are not trained and have no gradients; gradients by video, latents and any
    other weights are as before.

    !!! Example

        ```python
        small = cv.quantised(vae, "float8_e4m3fn")
        ```

    **Arguments:**

    - `vae`: a `VAE`, or one with a half removed. For shapes alone, as `plan` takes them, call
        `eqx.filter_eval_shape(cv.quantised, shapes, "float8_e4m3fn")`.
    - `dtype`: `"float8_e4m3fn"`, `"float8_e5m2"` or `"int8"`. The error of `"int8"` is the
        smallest; but it does not hold published float8 weights exactly.

    **Returns:** a model of the same type and calls. `dequantised` undoes it, but for the rounding.

    **Raises:** `ValueError` for another `dtype`, and for a model that is quantised already, has
    LoRA, or has no residual blocks.
    """
    form = _format(dtype)
    if is_quantised(vae):
        raise ValueError(
            "the model's weights are held in 8 bits already: quantise `cv.dequantised(vae)`."
        )
    paths, _ = jax.tree_util.tree_flatten_with_path(vae)
    if any(jax.tree_util.keystr(path[-1:], simple=True) == "lora_A" for path, _ in paths):
        raise ValueError(
            "the model has LoRA, whose kernels would stay as they are: `training.merge` it first."
        )
    result = jax.tree.map(lambda node: _in_block(node, form), vae, is_leaf=_is_block)
    if not is_quantised(result):
        raise ValueError(
            f"a {type(vae).__name__} without residual blocks was given, and their kernels are what "
            "is quantised: give a VAE."
        )
    return result


def dequantised(vae: _M) -> _M:
    """Returns the model with plain convolutions again, of the weights that `quantised` rounded.

    Such a model can be saved by `save_pretrained`, and trained.

    **Arguments:**

    - `vae`: a model from `quantised`; any other is returned as it is.

    **Returns:** a model that computes the same.
    """
    convert = lambda node: _plain(node) if _is_quantised(node) else node  # noqa: E731
    return jax.tree.map(convert, vae, is_leaf=_is_quantised)


def is_quantised(tree: PyTree) -> bool:
    """Returns True if any weights in `tree` are held in 8 bits, and their scales are there.

    A trainer's part of a model has no bits, which are no floating numbers.
    """
    nodes = jax.tree.leaves(tree, is_leaf=_is_quantised)
    return any(_is_quantised(node) and node.scale is not None for node in nodes)


def _is_quantised(node: Any) -> bool:
    return isinstance(node, QuantisedConv)


def _is_block(node: Any) -> bool:
    return isinstance(node, ResnetBlock)


def _in_block(node: Any, form: str) -> Any:
    if not _is_block(node):
        return node
    convert = lambda node: _packed(node, form) if _is_taken(node) else node  # noqa: E731
    return jax.tree.map(convert, node, is_leaf=_is_taken)


def _is_taken(node: Any) -> bool:
    # A subclass may compute something else. A pointwise kernel holds too little to save.
    return type(node) is Conv and max(node.weight.shape[:-2]) > 1


def _format(dtype: Any) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in FORMATS:
        raise ValueError(f"`dtype` must be one of {', '.join(FORMATS)}, got {name}.")
    return name


def _packed(conv: Conv, form: str) -> QuantisedConv:
    bits, scale = _quantise(conv.weight, form)
    return QuantisedConv(bits, scale, conv.bias, form)


def _plain(conv: QuantisedConv) -> Conv:
    *sizes, i, o = conv.bits.shape
    like = eqx.filter_eval_shape(lambda: Conv(tuple(sizes), i, o, key=jax.random.key(0)))
    return eqx.tree_at(lambda conv: (conv.weight, conv.bias), like, (conv.weight, conv.bias))


@functools.partial(jax.jit, static_argnames="form")
def _quantise(kernel: Array, form: str) -> tuple[Array, Array]:
    """Returns the bits of a kernel in a format, and the scale of each output channel."""
    wide = at_least_float32(kernel)
    largest = jnp.max(jnp.abs(wide), axis=tuple(range(kernel.ndim - 1))) / FORMATS[form]
    scale = _rounding_scale(largest) if form == "int8" else _power_of_two(largest, kernel.dtype)
    scale = scale.astype(kernel.dtype)
    scaled = wide / _by_channel(scale, kernel.ndim).astype(wide.dtype)
    if form == "int8":
        scaled = jnp.clip(jnp.rint(scaled), -FORMATS[form], FORMATS[form])
    return lax.bitcast_convert_type(scaled.astype(jnp.dtype(form)), jnp.uint8), scale


def _rounding_scale(largest: Array) -> Array:
    return jnp.where(largest > 0, largest, 1)


def _power_of_two(largest: Array, dtype: Any) -> Array:
    """Returns the smallest power of two that is not below `largest` and is normal in `dtype`."""
    # Rounding to float8 is relative: no other scale would round less.
    mantissa, exponent = jnp.frexp(largest)
    exponent = jnp.where(mantissa == 0.5, exponent - 1, exponent)
    return jnp.ldexp(jnp.ones_like(largest), jnp.maximum(exponent, jnp.finfo(dtype).minexp))


def _by_channel(scale: Array, rank: int) -> Array:
    return scale.reshape((1,) * (rank - 1) + (-1,))


__all__ = ["FORMATS", "QuantisedConv", "dequantised", "is_quantised", "quantised"]
