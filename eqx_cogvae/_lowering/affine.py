"""Defines the affine map that a norm applies, and resizing by nearest neighbour."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._types import at_least_float32


class Affine(NamedTuple):
    """The map `x -> (x - mean) * scale + shift`, which normalises `x`.

    `scale` and `shift` may be of lower resolution than `x`: each pixel takes its nearest
    neighbour, as `nearest` does. Both have the same resolution, and may be one for all clips. Each
    clip and channel has one mean, or one for each frame.
    """

    mean: Float[Array, "b _t 1 1 c"]
    scale: Float[Array, "b t2 h2 w2 c"]
    shift: Float[Array, "b t2 h2 w2 c"]

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        """Returns the result in at least float32, not yet rounded to the dtype of `x`."""
        return _applied(self, x)

    def with_rows(self, frames: int, height: int) -> "Affine":
        """Returns the same map with a row of `scale` and `shift` for each row of each frame."""
        if self.scale.shape[2] == 1:
            return self
        scale, shift = (
            _repeat(repeat_frames(s, frames), height, axis=2) for s in (self.scale, self.shift)
        )
        return self._replace(scale=scale, shift=shift)

    def of_frame(self, i: Int[Array, ""], count: int) -> "Affine":
        """Returns the map of frame `i` of `count`, which may be known at run time only."""
        mean = self.mean if self.mean.shape[1] == 1 else frame(self.mean, i)
        if self.scale.shape[1] == 1:
            return self._replace(mean=mean)
        source = _nearest_frame(i, count, self.scale.shape[1])
        return Affine(mean, frame(self.scale, source), frame(self.shift, source))

    def of_frames(self, start: int, stop: int, count: int) -> "Affine":
        """Returns the map of frames `start` to `stop` of `count`."""
        scale, shift = (repeat_frames(s, count) for s in (self.scale, self.shift))
        return Affine(
            *(x if x.shape[1] == 1 else x[:, start:stop] for x in (self.mean, scale, shift))
        )

    def of_rows(self, start: Int[Array, ""], count: int) -> "Affine":
        """Returns the map of `count` rows from `start` on, of a map `with_rows`."""
        if self.scale.shape[2] == 1:
            return self
        return self._replace(
            scale=rows(self.scale, start, count), shift=rows(self.shift, start, count)
        )

    def of_pixels(self, axis: int, start: int, count: int, shape: tuple[int, ...]) -> "Affine":
        """Returns the map of `count` rows or columns from `start` on, of an array of `shape`.

        `axis` is 2 for rows and 3 for columns.
        """
        sources = self.scale.shape[axis]
        if sources == 1:
            return self
        chosen = np.arange(start, start + count) * sources // shape[axis]
        return self._replace(
            scale=jnp.take(self.scale, chosen, axis), shift=jnp.take(self.shift, chosen, axis)
        )

    def in_cells(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        """Returns what a call does, without enlarging `scale` and `shift`.

        `x` is reshaped into cells of pixels that share a scale and a shift.
        """
        x = at_least_float32(x) - self.mean
        scale, shift = (repeat_frames(s, x.shape[1]) for s in (self.scale, self.shift))
        (h, w), (h2, w2) = x.shape[2:4], scale.shape[2:4]
        if (h2, w2) == (1, 1):
            return x * scale + shift
        if h % h2 or w % w2:
            scale, shift = (_repeat(_repeat(s, h, axis=2), w, axis=3) for s in (scale, shift))
            return x * scale + shift
        cells = x.reshape(*x.shape[:2], h2, h // h2, w2, w // w2, -1)
        scale, shift = (s[:, :, :, None, :, None] for s in (scale, shift))
        return (cells * scale + shift).reshape(x.shape)


@jax.custom_jvp
def _applied(affine: Affine, x: Array) -> Array:
    scale, shift = (nearest(s, x.shape[1:4]) for s in affine[1:])
    return (at_least_float32(x) - affine.mean) * scale + shift


@_applied.defjvp
def _applied_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (affine, x), (affine_tangent, x_tangent) = primals, tangents
    offset, change = affine_tangent.shift, at_least_float32(x_tangent)
    if affine.mean.shape[1] == 1:
        # The mean's tangent joins the shift's at low resolution. Transposed, that is two sums over
        # all pixels, of which JAX's own derivative makes one more for every broadcast.
        offset = offset - affine_tangent.mean * affine.scale
    else:
        change = change - affine_tangent.mean
    scale, slope, offset = (
        nearest(s, x.shape[1:4]) for s in (affine.scale, affine_tangent.scale, offset)
    )
    tangent = change * scale + (at_least_float32(x) - affine.mean) * slope + offset
    return _applied(affine, x), tangent


def nearest(x: Float[Array, "b t2 h2 w2 c"], size: tuple[Any, ...]) -> Array:
    """Resizes to `size`, frames, height and width, by nearest neighbour.

    A 1x1x1 array is returned as it is, to be broadcast. If the number of frames is odd and above
    one, the first source frame stands for the first frame alone.
    """
    if x.shape[1:4] == (1, 1, 1):
        return x
    count, height, width = size
    # The width is enlarged last, so that the transpose begins with it and shrinks the array.
    return _repeat(_repeat(repeat_frames(x, count), height, axis=2), width, axis=3)


def repeat_frames(x: Float[Array, "b t2 *rest"], count: int) -> Array:
    """Repeats frames to `count`, the first once if `count` is odd; a lone frame broadcasts."""
    if x.shape[1] == 1:
        return x
    if count > 1 and count % 2 == 1:
        return jnp.concatenate([x[:, :1], _repeat(x[:, 1:], count - 1, axis=1)], axis=1)
    return _repeat(x, count, axis=1)


def _nearest_frame(i: Array, count: int, sources: int) -> Array:
    """Returns the source frame that `repeat_frames` takes for frame `i` of `count`."""
    if count > 1 and count % 2 == 1:
        return jnp.where(i == 0, 0, 1 + (i - 1) * (sources - 1) // (count - 1))
    return i * sources // count


def _repeat(x: Array, size: Any, axis: int) -> Array:
    if x.shape[axis] == size:
        return x
    if size % x.shape[axis] == 0:
        return jnp.repeat(x, size // x.shape[axis], axis)
    return jnp.take(x, jnp.arange(size) * x.shape[axis] // size, axis)


def frame(x: Float[Array, "b t *rest"], i: Int[Array, ""] | int) -> Float[Array, "b 1 *rest"]:
    """Returns frame `i`, which may be known at run time only."""
    return jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)


def rows(x: Float[Array, "b t h *rest"], start: Int[Array, ""], count: int) -> Array:
    """Returns `count` rows from `start` on, which may be known at run time only."""
    return jax.lax.dynamic_slice_in_dim(x, start, count, axis=2)


__all__ = ["Affine", "frame", "nearest", "repeat_frames", "rows"]
