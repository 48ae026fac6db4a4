"""Checks of the clips that a model is given."""

import contextlib
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ._config import Config
from ._frames import SAMPLE_BATCH, check_axes
from ._pixels import LARGEST_SAMPLE
from ._types import AnyArray, is_traced


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
    if min(x.shape[:2]) < 1 or min(x.shape[2:4]) < smallest:
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
    """Raises `ValueError` for pixel values or NaN, where the values are there to be seen."""
    if is_traced(video):
        return
    # NumPy's clips are looked at where they are.
    xp = np if isinstance(video, np.ndarray) else jnp
    # A clip that is there may be a constant of a function that is being traced.
    with jax.ensure_compile_time_eval():
        largest = float(jax.device_get(xp.max(xp.abs(video))))
    if not np.isfinite(largest):
        raise ValueError("video holds NaN or infinite values.")
    if largest > LARGEST_SAMPLE:
        raise ValueError(
            f"video must lie in [-1, 1], got values up to {largest:g}: "
            "scale pixels by `x / 127.5 - 1`."
        )


@contextlib.contextmanager
def memory_advice(shape: tuple[int, ...]) -> Iterator[None]:
    """Adds to an error for want of memory what to do about it."""
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
    """Warns, in the name of the caller's caller, of a count that does not round-trip."""
    if t % SAMPLE_BATCH == 1:
        return
    low = max(t - 1, 0) // SAMPLE_BATCH * SAMPLE_BATCH + 1
    back = config.sample_frames(config.latent_frames(t))
    outcome = f"come back as {back}" if back != t else "lose the first frame's special place"
    warnings.warn(
        f"{t} frames {outcome}: the nearest good counts are {low} and {low + SAMPLE_BATCH} "
        "(8k + 1); `pad_frames` reaches the next, `crop_frames` undoes it.",
        stacklevel=3,
    )


__all__ = [
    "check_clip",
    "check_range",
    "memory_advice",
    "warn_of_frames",
]
