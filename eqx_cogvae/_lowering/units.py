"""Defines a norm, an activation and a convolution with the arrays that they work on."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .affine import Affine
from .choose import Geometry
from .conv import pointwise_conv

Activation = Callable[[Array], Array]


class Taps(NamedTuple):
    """The kernel and the bias of a causal, zero-padded convolution."""

    kernel: Float[Array, "kt kh kw i o"]
    bias: Float[Array, " o"]


class Unit(NamedTuple):
    """A norm, a convolution, the arrays that they work on, and what is added to the result.

    The first channels of `x`, as many as the kernel takes, are normalised and convolved. The
    remaining channels, and `residual` if it is given, are added to the result. `beside` is a
    pointwise convolution of `x`, whose result is appended as extra channels for a later unit to
    add. The result is then as wide as `x`, and there is no residual.
    """

    affine: Affine
    taps: Taps
    x: Float[Array, "b t h w _c"]
    cache: Float[Array, "b k h w i"] | None
    residual: Float[Array, "b t h w o"] | None = None
    beside: Taps | None = None

    @property
    def channels(self) -> int:
        """Number of channels that are normalised and convolved."""
        return self.taps.kernel.shape[3]

    @property
    def geometry(self) -> Geometry:
        """How the kernel is applied."""
        _, kh, kw, *_ = self.taps.kernel.shape
        return Geometry(pads=((kh // 2, kh // 2), (kw // 2, kw // 2)))

    @property
    def past(self) -> int:
        """Number of frames before its own that a result depends on."""
        return self.taps.kernel.shape[0] - 1

    def of_frames(self, start: int, stop: int) -> "Unit":
        """Returns the unit of frames `start` to `stop`, with the same cache."""
        return self._replace(
            affine=self.affine.of_frames(start, stop, self.x.shape[1]),
            x=self.x[:, start:stop],
            residual=None if self.residual is None else self.residual[:, start:stop],
        )

    def joined(self, y: Array, x: Array, residual: Array | None) -> Array:
        """Returns the convolved frames `y` with all that is added and appended to them."""
        if residual is not None:
            y = residual + y
        if x.shape[-1] > self.channels:
            y = x[..., self.channels :] + y
        if self.beside is None:
            return y
        return jnp.concatenate([y, pointwise_conv(x, *self.beside)], axis=-1)

    def output_buffer(self) -> Array:
        """Returns the array that the result is written over, chunk by chunk."""
        if self.residual is not None:
            return self.residual
        if self.beside is not None:
            return self.x
        return lax.empty((*self.x.shape[:-1], self.taps.bias.size), self.x.dtype)


__all__ = ["Activation", "Taps", "Unit"]
