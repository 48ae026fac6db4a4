"""Shape checks of clips, and conversions between values in [-1, 1] and pixels in 0 to 255."""

from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

# Above what any normalised clip reaches, noise included, and far below pixel values up to 255.
LARGEST_SAMPLE = 16.0


def one_clip(video: Any) -> Shaped[np.ndarray, "t h w 3"]:
    """Returns the frames of (1, t, h, w, 3) or (t, h, w, 3).

    **Raises:** `ValueError` for another shape.
    """
    shape = video.shape
    if len(shape) == 5 and shape[0] == 1:
        video = video[0]
    elif len(shape) == 5:
        raise ValueError(f"one clip at a time, got a batch of {shape[0]}: pass `video[i]`.")
    if video.ndim != 4 or video.shape[-1] != 3:
        hint = ""
        if video.ndim == 4 and 3 in video.shape[:2]:
            axis = video.shape.index(3) + len(shape) - 4
            hint = f": the colours look to be on axis {axis}, use `moveaxis(video, {axis}, -1)`"
        raise ValueError(f"video must be (1, t, h, w, 3) or (t, h, w, 3), got shape {shape}{hint}.")
    return np.asarray(video)


@overload
def from_pixels(pixels: UInt8[np.ndarray, "..."]) -> Float[np.ndarray, "..."]: ...
@overload
def from_pixels(pixels: UInt8[Array, "..."]) -> Float[Array, "..."]: ...
def from_pixels(pixels: Any) -> Any:
    """Converts pixels to float32 in [-1, 1]; arrays of NumPy stay NumPy's, those of JAX JAX's."""
    return pixels.astype(np.float32) / 127.5 - 1


@overload
def quantised(values: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]: ...
@overload
def quantised(values: Float[Array, "..."]) -> UInt8[Array, "..."]: ...
def quantised(values: Any) -> Any:
    """Rounds float32 values in [-1, 1] to pixels; values beyond are clipped."""
    module = jnp if isinstance(values, jax.Array) else np
    return module.rint((module.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)


def to_pixels(frame: Shaped[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Converts a frame to pixels, clipped to [-1, 1]; pixels pass unchanged.

    **Raises:** `ValueError` for a dtype that is neither floating nor uint8, for NaN, and for
    floating values that look like pixels.
    """
    if frame.dtype == np.uint8:
        return np.ascontiguousarray(frame)
    if not jnp.issubdtype(frame.dtype, jnp.floating):
        raise ValueError(f"video must be floating in [-1, 1] or uint8, got {frame.dtype}.")
    frame = frame.astype(np.float32)
    largest = np.max(np.abs(frame), initial=0)
    if not np.isfinite(largest):
        raise ValueError("video holds NaN or infinite values; it was not written.")
    if largest > LARGEST_SAMPLE:
        raise ValueError(
            f"video must lie in [-1, 1], got values up to {largest:g}: scale by `x / 127.5 - 1`."
        )
    return quantised(frame)


__all__ = ["LARGEST_SAMPLE", "from_pixels", "one_clip", "quantised", "to_pixels"]
