"""Checks of the clips that a model is given."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._config import Config
from ._frames import LATENT_BATCH, check_axes, round_trip_period
from ._pixels import LARGEST_SAMPLE
from ._types import AnyArray, is_traced

# Packages whose frames lie between the caller's line and ours: they wrap calls or make them.
_BETWEEN = {
    __name__.partition(".")[0],
    *("equinox", "jax", "jaxlib", "jaxtyping", "beartype"),
    *("torch", "diffusers", "accelerate", "contextlib"),
    *("importlib", "_frozen_importlib", "_frozen_importlib_external"),
}


def warn(message: str) -> None:
    """Warns at the caller's line: the nearest one outside of this package and of its wrappers."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def check_clip(x: AnyArray, what: str, channels: int, *, smallest: int) -> None:
    """Raises unless `x` is an array, BTHWC, floating, and of `smallest` sides or more."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{what} must be a JAX or NumPy array, got {_kind(x)}.")
    check_axes(x, what, f"channels={channels}")
    if x.shape[-1] != channels:
        raise ValueError(
            f"{what} must be BTHWC with {channels} channels last, got shape {x.shape}: "
            f"{_channel_hint(x.shape, what, channels)}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        hint = " scale pixels by `x / 127.5 - 1`." if what == "video" else " cast them."
        raise ValueError(f"{what} must be of a floating dtype, got {x.dtype}:{hint}")
    least = (1, 1, smallest, smallest)
    # A size that is a symbol, as under `jax.export`, may be any.
    if any(isinstance(n, int) and n < due for n, due in zip(x.shape, least, strict=False)):
        raise ValueError(
            f"{what} must have at least one clip, one frame and {smallest}x{smallest} in height "
            f"and width, got shape {x.shape}."
        )


def _kind(x: object) -> str:
    name = f"{type(x).__module__.partition('.')[0]}'s {type(x).__name__}"
    if type(x).__name__ == "DiagonalGaussian":
        return f"{name}: take its `.mode()` or `.sample(key)`"
    if name.startswith("torch"):
        return f"{name}: `eqx_cogvae.diffusers.to_jax` makes it BTHWC"
    return name


def _channel_hint(shape: tuple[int, ...], what: str, channels: int) -> str:
    if shape[1] == channels:
        return "this looks like BCTHW, use `jnp.moveaxis(x, 1, -1)`"
    if what == "latents":
        return "is this a video? `encode` makes latents"
    hints = {
        1: f"repeat grey video with `jnp.repeat(x, {channels}, -1)`",
        4: "drop an alpha channel with `x[..., :3]`",
    }
    return hints.get(shape[-1], f"the model's config says `in_channels={channels}`")


def check_range(video: AnyArray) -> None:
    """Raises `ValueError` for pixel values or NaN, where the values are there to be seen.

    Warns of a clip without a value below 0, which looks like one in [0, 1]. A constant clip,
    such as a white one, is what it seems.
    """
    if is_traced(video):
        return
    # NumPy's clips are looked at where they are.
    xp = np if isinstance(video, np.ndarray) else jnp
    # A clip that is there may be a constant of a function that is being traced.
    with jax.ensure_compile_time_eval():
        least, most = map(float, jax.device_get((xp.min(video), xp.max(video))))
    largest = max(abs(least), abs(most))
    if not np.isfinite(largest):
        raise ValueError("video holds NaN or infinite values.")
    if largest > LARGEST_SAMPLE:
        raise ValueError(
            f"video must lie in [-1, 1], got values up to {largest:g}: "
            "scale pixels by `x / 127.5 - 1`."
        )
    if 0 <= least < most:
        warn(
            f"video must lie in [-1, 1], and all values are in [{least:g}, {most:g}]: if it is "
            "in [0, 1], scale it by `2 * x - 1`."
        )


@contextlib.contextmanager
def memory_advice(shape: tuple[Any, ...]) -> Iterator[None]:
    """Adds advice to out-of-memory errors."""
    try:
        yield
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            error.add_note(
                f"This was an array of shape {tuple(shape)}. `cv.plan(vae, video.shape)` lists "
                "what each way to encode and decode takes and which fits: `cv.tiled`, `cv.sliced`, "
                "`cv.streamed`, or a VAE loaded with `dtype=jnp.bfloat16`."
            )
        raise


def warn_of_frames(t: int, config: Config) -> None:
    """Warns of a frame count that does not round-trip."""
    period = round_trip_period(config.temporal_compression)
    back = config.sample_frames(config.latent_frames(t))
    if back == t and (period == 1 or t % period == 1):
        return
    low = max(t - 1, 0) // period * period + 1
    # Batches of even counts come back, but in none of them a first frame is encoded alone.
    outcome = f"come back as {back}" if back != t else "have no first frame that is encoded alone"
    warn(
        f"{t} frames {outcome}: the nearest good counts are {low} and {low + period} "
        f"({period}k + 1); `pad_frames` reaches the next, `crop_frames` undoes it."
    )


def warn_of_latent_frames(t: int, config: Config) -> None:
    """Warns of latent frames that no frame count makes which round-trips."""
    if t % LATENT_BATCH == 1 or config.temporal_compression == 1:
        return
    low = max(config.sample_frames(t - 1), 1)
    warn(
        f"{t} latent frames come back as {config.sample_frames(t)}: the nearest good counts of "
        f"frames are {low} and {config.sample_frames(t + 1)} "
        f"({round_trip_period(config.temporal_compression)}k + 1), such as `num_frames={low}`."
    )


def warn_of_size(height: Any, width: Any, cell: int) -> None:
    """Warns of a frame size that is cropped, by what latents `cell` pixels wide do not cover."""
    kept = (height // cell * cell, width // cell * cell)
    # A side that is a symbol, as under `jax.export`, may be any.
    if isinstance(height * width, int) and kept != (height, width):
        warn(
            f"frames of {height}x{width} come back as {kept[0]}x{kept[1]}: sides that are no "
            f"multiples of {cell} lose the rest; crop, pad or resize them first."
        )


__all__ = [
    "check_clip",
    "check_range",
    "memory_advice",
    "warn",
    "warn_of_frames",
    "warn_of_latent_frames",
    "warn_of_size",
]
