"""Treats the parts of frames that devices hold as clips of their own.

A convolution needs the pixels around a part: `Edges` holds those of its neighbours. They are
exchanged once, and what follows, a loop over chunks perhaps, needs no other device.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import choose
from .affine import Affine, nearest
from .choose import Geometry, Pads


class Edges(NamedTuple):
    """The pixels around each clip that is a part of frames. Beyond the frames they are zeros.

    The rows above and below hold the corners. Along a side that is not divided there are no pixels.
    """

    above: Float[Array, "p t above left+w+right c"]
    below: Float[Array, "p t below left+w+right c"]
    left: Float[Array, "p t h left c"]
    right: Float[Array, "p t h right c"]

    @property
    def sizes(self) -> Pads:
        """Number of pixels above and below, and on the left and on the right."""
        above, below, left, right = self
        return (above.shape[2], below.shape[2]), (left.shape[3], right.shape[3])

    def around(self, x: Float[Array, "p t h w c"]) -> Float[Array, "p t h2 w2 c"]:
        """Returns the clips with the pixels around them."""
        x = jnp.concatenate([self.left, x, self.right], axis=3)
        return jnp.concatenate([self.above, x, self.below], axis=2)


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
        """Returns the map of the parts; `size` is that of whole clips, `(b, t, h, w)`."""
        mean, scale, shift = affine
        if scale.shape[2:4] == (1, 1):
            return Affine(*map(self._for_each, affine))
        if scale.shape[2] % self.rows or scale.shape[3] % self.columns:
            # Latents that do not divide are rare. Their scale and shift get the size of the frames.
            scale, shift = (nearest(s, size[1:]) for s in (scale, shift))
        scale, shift = (jnp.broadcast_to(s, (size[0], *s.shape[1:])) for s in (scale, shift))
        return Affine(self._for_each(mean), self.as_clips(scale), self.as_clips(shift))

    def _for_each(self, x: Float[Array, "b ..."]) -> Array:
        """Returns values of clips, or one for all of them, for the parts of each clip."""
        return x if x.shape[0] == 1 else jnp.tile(x, (self.number, *[1] * (x.ndim - 1)))

    def edges(
        self, size: Sequence[int], reach: Pads, pixels: Callable[[int, int, int], Array]
    ) -> Edges:
        """Returns the pixels around each part.

        **Arguments:**

        - `size`: height and width of a part.
        - `reach`: number of pixels above, below, on the left and on the right.
        - `pixels`: given an axis, 2 for rows and 3 for columns, a start and a number, it returns
          so many rows or columns of each part.
        """
        (height, width), none = size, (0, 0)
        above, below = reach[0] if self.rows > 1 else none
        left, right = reach[1] if self.columns > 1 else none
        before, behind = self._exchanged(pixels(3, width - left, left), pixels(3, 0, right), axis=1)

        def row(start: int, count: int) -> Array:
            corners = lambda x: jax.lax.slice_in_dim(x, start, start + count, axis=2)  # noqa: E731
            return jnp.concatenate([corners(before), pixels(2, start, count), corners(behind)], 3)

        rows = self._exchanged(row(height - above, above), row(0, below), axis=0)
        return Edges(*rows, before, behind)

    def _exchanged(self, last: Array, first: Array, axis: int) -> tuple[Array, Array]:
        """Returns what precedes and follows each part: the `last` and `first` of its neighbours."""
        clips = last.shape[0]
        last, first = self._by_place(last), self._by_place(first)
        if last.shape[axis] == 2 and last.shape == first.shape:
            # Each part has one neighbour, and both send at once: a reversal is one exchange.
            leads = np.arange(2).reshape([-1 if i == axis else 1 for i in range(last.ndim)]) == 0
            other = jnp.flip(jnp.where(leads, last, first), axis)
            found = jnp.where(leads, 0, other), jnp.where(leads, other, 0)
        else:
            found = _shifted(last, 1, axis), _shifted(first, -1, axis)
        before, behind = (x.reshape(clips, *x.shape[3:]) for x in found)
        return before, behind

    def _by_place(self, x: Array) -> Array:
        return x.reshape(self.rows, self.columns, x.shape[0] // self.number, *x.shape[1:])


def _shifted(x: Array, by: int, axis: int) -> Array:
    """Returns `x` moved along an axis, zeros first or last."""
    # XLA's partitioner turns a pad that is negative at one end into one exchange.
    widths = [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), widths)


def on_parts(
    run: Callable[[Array, Geometry], Array],
    x: Float[Array, "b t h w i"],
    kernel: Sequence[int],
    geometry: Geometry,
) -> Float[Array, "b t2 h2 w2 o"]:
    """Calls `run`, which convolves frames, on what each device holds of them.

    It is given the parts of frames with the pixels around them, and the geometry that is left.
    `kernel` is the kernel's shape.
    """
    hints = choose.current_hints()
    parts = Parts(*choose.parts(x.shape, hints, kernel[1:3], geometry))
    if parts.number == 1:
        return run(x, geometry)
    x = parts.as_clips(x)

    def pixels(axis: int, start: int, count: int) -> Array:
        return jax.lax.slice_in_dim(x, start, start + count, axis=axis)

    edges = parts.edges(x.shape[2:4], geometry.reach, pixels)
    with choose.using(hints.of_parts()):
        return parts.as_frames(run(edges.around(x), geometry.within(edges.sizes)))


__all__ = ["Edges", "Parts", "on_parts"]
