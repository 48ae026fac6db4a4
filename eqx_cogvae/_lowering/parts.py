"""Treats the parts of frames that devices hold as clips of their own.

A part needs the pixels around it: `Edges` holds those of its neighbours. They are exchanged once,
before a loop over the part, which then needs no other device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .affine import Affine, nearest


class Edges(NamedTuple):
    """The pixels around each clip, which are zeros outside of the frames that it is a part of.

    The rows above and below hold the corners. If the frames' columns are not divided, there are
    none on the left and on the right, and `side` is 0.
    """

    above: Float[Array, "p t m w+2*side c"]
    below: Float[Array, "p t m w+2*side c"]
    left: Float[Array, "p t h side c"]
    right: Float[Array, "p t h side c"]

    @property
    def side(self) -> int:
        """Number of columns on the left, and of those on the right."""
        return self.left.shape[3]


class Parts(NamedTuple):
    """The numbers of rows and columns of equal parts that frames are divided into."""

    rows: int
    columns: int

    @property
    def number(self) -> int:
        """Number of parts of a frame."""
        return self.rows * self.columns

    def as_clips(self, x: Float[Array, "b t h w c"]) -> Float[Array, "p t h2 w2 c"]:
        """Returns the parts as a batch of `rows x columns x b` clips."""
        b, t, h, w, c = x.shape
        x = x.reshape(b, t, self.rows, h // self.rows, self.columns, w // self.columns, c)
        # The clips of the batch come last. If a device holds several, its clips stay together.
        x = jnp.transpose(x, (2, 4, 0, 1, 3, 5, 6))
        return x.reshape(self.number * b, *x.shape[3:])

    def as_frames(self, x: Float[Array, "p t h2 w2 c"]) -> Float[Array, "b t h w c"]:
        """Returns the frames of which `x` are the parts: the inverse of `as_clips`."""
        p, t, h, w, c = x.shape
        x = jnp.transpose(self._by_place(x), (2, 3, 0, 4, 1, 5, 6))
        return x.reshape(p // self.number, t, self.rows * h, self.columns * w, c)

    def of_affine(self, affine: Affine, size: tuple[int, ...]) -> Affine:
        """Returns the map of the parts of frames, whose number, height and width are `size`."""
        mean, scale, shift = affine
        if scale.shape[2:4] == (1, 1):
            return Affine(*map(self._for_each, affine))
        if scale.shape[2] % self.rows or scale.shape[3] % self.columns:
            scale, shift = (nearest(s, size) for s in (scale, shift))
        return Affine(self._for_each(mean), self.as_clips(scale), self.as_clips(shift))

    def _for_each(self, x: Float[Array, "b ..."]) -> Array:
        """Returns values of clips, or one for all of them, for the parts of each clip."""
        return x if x.shape[0] == 1 else jnp.tile(x, (self.number, *[1] * (x.ndim - 1)))

    def exchanged(
        self,
        top: Float[Array, "p t m w c"],
        bottom: Float[Array, "p t m w c"],
        first: Float[Array, "p t h side c"],
        last: Float[Array, "p t h side c"],
    ) -> Edges:
        """Returns the pixels around each part, from the outermost rows and columns of all."""
        left, right = self._from(last, -1, axis=1), self._from(first, 1, axis=1)
        rows, height = top.shape[2], first.shape[2]
        corners = lambda x, start: x[:, :, start : start + rows]  # noqa: E731
        above, below = (
            jnp.concatenate([corners(left, start), edge, corners(right, start)], axis=3)
            for edge, start in ((bottom, height - rows), (top, 0))
        )
        return Edges(self._from(above, -1, axis=0), self._from(below, 1, axis=0), left, right)

    def _from(self, x: Array, step: int, axis: int) -> Array:
        """Returns for each part what the neighbour `step` places on holds, or zeros."""
        placed = self._by_place(x)
        widths = [(0, 0, 0)] * placed.ndim
        # A pad that is negative at one end is what XLA's partitioner turns into one exchange.
        widths[axis] = (-step, step, 0)
        return jax.lax.pad(placed, jnp.zeros((), x.dtype), widths).reshape(x.shape)

    def _by_place(self, x: Array) -> Array:
        clips = x.shape[0] // self.number
        return x.reshape(self.rows, self.columns, clips, *x.shape[1:])


__all__ = ["Edges", "Parts"]
