"""Cuts clips into frame batches, and knows the frame counts that round-trip."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Float

from ._types import AnyArray

SAMPLE_BATCH = 8
LATENT_BATCH = 2


def frame_batches(t: int, size: int, first: int | None = None) -> tuple[int, ...]:
    """Returns the frame counts of the batches that `t` frames are cut into.

    The first takes the remainder; with `first` it takes so many, and the last what is left.
    """
    if first is not None:
        full, last = divmod(max(t - first, 0), size)
        return (min(first, t),) + (size,) * full + (last,) * bool(last)
    return (t,) if t < size else (size + t % size,) + (size,) * (t // size - 1)


def round_trip_period(temporal_compression: int) -> int:
    """Returns the p of the frame counts k * p + 1 that come back as they were; 8 by default.

    Every frame batch but the first one must be even, in sample and in latent frames; where time
    is not compressed, every count comes back.
    """
    return LATENT_BATCH * temporal_compression if temporal_compression > 1 else 1


def pad_frames(video: Float[AnyArray, "b t h w c"]) -> tuple[Float[AnyArray, "b t2 h w c"], int]:
    """Repeats the last frame until there are 8k + 1, the counts that round-trip.

    **Arguments:**

    - `video`: `(b, t, h, w, c)`.

    **Returns:** the video, `(b, 8k + 1, h, w, c)`, and the old count `t`, for `crop_frames`.

    **Raises:** `ValueError` unless there are five axes.
    """
    check_axes(video, "video", "channels")
    t = video.shape[1]
    missing = (1 - t) % SAMPLE_BATCH
    if not missing:
        return video, t
    return _repeated(video, missing), t


@eqx.filter_jit
def _repeated(video: AnyArray, count: int) -> AnyArray:
    return jnp.concatenate([video, jnp.repeat(video[:, -1:], count, axis=1)], axis=1)


def crop_frames(video: Float[AnyArray, "b t2 h w c"], t: int) -> Float[AnyArray, "b t h w c"]:
    """Returns the first `t` frames: undoes `pad_frames` after decoding.

    **Arguments:**

    - `video`: `(b, t2, h, w, c)`.
    - `t`: number of frames to keep.

    **Returns:** the video, `(b, t, h, w, c)`.

    **Raises:** `ValueError` for more frames than there are, or unless there are five axes.
    """
    check_axes(video, "video", "channels")
    if not 0 < t <= video.shape[1]:
        raise ValueError(f"cannot crop {video.shape[1]} frames to {t}.")
    return video[:, :t]


def check_axes(x: AnyArray, what: str, channels: str) -> None:
    """Raises `ValueError` unless `x` has five axes."""
    if x.ndim != 5:
        raise ValueError(
            f"{what} must have five axes, (batch, frames, height, width, {channels}), "
            f"got shape {x.shape}; add a batch axis with `[None]` if it lacks one, and to grey "
            "video channels with `jnp.repeat(x[..., None], 3, -1)`."
        )


__all__ = [
    "LATENT_BATCH",
    "SAMPLE_BATCH",
    "check_axes",
    "crop_frames",
    "frame_batches",
    "pad_frames",
    "round_trip_period",
]
