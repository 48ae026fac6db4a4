"""Reading video files."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
from jaxtyping import Float, UInt8

from .._checks import warn
from .._pixels import from_pixels
from ._av import LONGEST_SIDE, check_rate, pyav
from ._decode import Corrupt, complete, decoded, opened, truncation
from ._geometry import fitted, is_transposed, matrix, pixel_aspect, resized, square_size, upright
from ._hdr import NAMES, is_hdr, standard_range
from ._timing import clocked, count, rate, resampled, seconds

_MOST_FRAMES = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Info:
    """Frame rate, frame count and shown size of a video file."""

    fps: float
    """Frames per second."""
    frames: int
    """Number of frames, by the container's own count."""
    height: int
    """In pixels, upright and with square pixels."""
    width: int
    """In pixels, upright and with square pixels."""


def info(path: str | os.PathLike) -> Info:
    """Returns rate, count and size of a video file's frames; decodes one of them.

    **Arguments:**

    - `path`: a video file.

    **Returns:** an `Info`. Its size is the one that `read` gives without `size`.

    **Raises:** as `read`, except for damaged frames.
    """
    with opened(path) as (container, stream):
        frames = stream.frames - sum(entry.is_discard for entry in stream.index_entries)
        if not stream.frames:
            frames = count(container, stream, None, _MOST_FRAMES)
        fps = float(rate(stream))
    with opened(path) as (container, stream):
        first = next(decoded(path, container, stream, "skip"))
        orientation = matrix(first, stream)
        height, width = first.height, first.width
        if is_transposed(orientation):
            height, width = width, height
        aspect = pixel_aspect(stream, orientation)
        return Info(fps, frames, *square_size(path, height, width, aspect))


def read(
    path: str | os.PathLike,
    *,
    start: int = 0,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | int | None = None,
    corrupt: Corrupt = "raise",
) -> Float[np.ndarray, "1 t h w 3"]:
    """Reads a clip as float32 in [-1, 1]: `pixel / 127.5 - 1`.

    Frames come upright and with square pixels: rotation, mirroring and the aspect ratio of pixels
    are applied. HDR (PQ or HLG) is tone-mapped with a warning: white of 203 cd/m2 becomes 1, and
    brighter light is clipped.

    **Arguments:**

    - `path`: a video file; any name is a file's, never a URL.
    - `start`, `frames`: the first frame, and the number of frames; None is all that follow.
    - `size`: (height, width) in pixels. Each frame is cropped about its centre to that aspect
        ratio and resized, bicubic and antialiased. Without it, the frames must be of one size.
    - `fps`: another frame rate. Each instant of it shows the nearest frame, and `start` and
        `frames` count frames of that rate. A clock that jumps back, or ahead by more than an hour
        (10 seconds in an MPEG stream), goes on after the jump, so joined files are read whole.
    - `corrupt`: treatment of frames that FFmpeg reports as damaged, up to the last one asked for.
        `"raise"` refuses the file; `"skip"` leaves them out, and ends where a truncated file
        ends; `"keep"` takes those that FFmpeg could conceal. Frames predicted from a damaged one
        may look damaged as well. Decoders of HEVC, VP9 and FFV1 do not report all damage, and
        frames that are lost between two whole ones are not missed, nor is a change of the pixels'
        aspect ratio midway.

    **Returns:** the clip, (1, t, h, w, 3).

    **Raises:** `FileNotFoundError`; `IsADirectoryError`; `ValueError` for a file that is no video,
    is truncated, damaged, changes its frame size, has no frames, or has fewer than asked for;
    `ImportError` without PyAV.
    """
    batches = _batched(_pictures(path, start, frames, size, fps, corrupt), 8)
    return np.concatenate(list(batches), axis=1)


def frames(
    path: str | os.PathLike,
    *,
    start: int = 0,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | int | None = None,
    batch: int = 8,
    corrupt: Corrupt = "raise",
) -> Iterator[Float[np.ndarray, "1 t h w 3"]]:
    """Reads as `read` does, `batch` frames at a time, in constant memory.

    The first piece holds one frame more, the last what remains: 8k + 1 frames come as the frame
    batches of `VAE.encode`. More frames than the file has are refused by the call itself; a
    damaged frame raises when it is reached.

    **Arguments:** as `read`, and `batch`, the number of frames in a piece.

    **Returns:** an iterator over pieces, (1, t, h, w, 3).

    **Raises:** as `read`.
    """
    if not 1 <= batch <= _MOST_FRAMES:
        raise ValueError(f"`batch` must be at least 1, got {batch}.")
    return _batched(_pictures(path, start, frames, size, fps, corrupt), batch)


def pictures(
    path: str | os.PathLike,
    *,
    size: tuple[int, int] | None = None,
    fps: float | int | None = None,
    corrupt: Corrupt = "raise",
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Reads as `read` does, one frame at a time, as pixels: a quarter of the bytes.

    **Arguments:** as `read`.

    **Returns:** an iterator over frames, (h, w, 3) in 0 to 255.

    **Raises:** as `read`.
    """
    return _pictures(path, 0, None, size, fps, corrupt)


def _pictures(
    path: str | os.PathLike,
    start: int,
    frames: int | None,
    size: tuple[int, int] | None,
    fps: float | int | None,
    corrupt: Corrupt,
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Checks the arguments at once, then gives an iterator that opens the file when it is run."""
    for name, value, least in (("start", start, 0), ("frames", frames, 1)):
        if value is not None and not least <= value <= _MOST_FRAMES:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    if size is not None and (len(size) != 2 or min(size) < 1 or max(size) > LONGEST_SIDE):
        raise ValueError(
            f"`size` must be (height, width) in pixels, at most {LONGEST_SIDE}, got {size}."
        )
    if fps is not None:
        check_rate(fps)
    if corrupt not in get_args(Corrupt):
        raise ValueError(f"`corrupt` must be 'raise', 'skip' or 'keep', got {corrupt!r}.")
    if start or frames:
        _check_range(path, start, frames, fps, corrupt)
    return _shown(path, start, frames, size, fps, corrupt)


def _check_range(
    path: str | os.PathLike,
    start: int,
    frames: int | None,
    fps: float | int | None,
    corrupt: Corrupt,
) -> None:
    """Raises if the file has too few frames, by its packets, none of which is decoded."""
    with opened(path) as (container, stream):
        try:
            there = count(container, stream, fps, start + (frames or 1))
        except pyav().error.FFmpegError:
            return  # Decoding names the frame at which the file is damaged.
        if there < start + (frames or 1):
            if corrupt == "raise" and complete(path, stream) < len(stream.index_entries):
                raise truncation(path, stream, complete(path, stream))
            raise _too_few(path, there, start, frames, fps)


def _too_few(
    path: str | os.PathLike, there: int, start: int, frames: int | None, fps: float | int | None
) -> ValueError:
    asked = f"frames {start} to {start + frames - 1}" if frames else f"frame {start} and later"
    rate = "" if fps is None else f" at {fps:g} frames a second"
    return ValueError(f"{path} holds {there} frames{rate}, asked for {asked}: ask for fewer.")


def _shown(
    path: str | os.PathLike,
    start: int,
    frames: int | None,
    size: tuple[int, int] | None,
    fps: float | int | None,
    corrupt: Corrupt,
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Decodes frames, puts them on a clock, and chooses, turns and fits them."""
    there, first, warned = 0, None, False
    with opened(path) as (container, stream):
        timed = ((seconds(frame), frame) for frame in decoded(path, container, stream, corrupt))
        chosen = resampled(clocked(timed, stream, container), fps)
        for frame in itertools.islice(chosen, start + frames if frames else None):
            there += 1
            if there <= start:
                continue
            warned = warned or _warn_of_hdr(path, frame)
            orientation = matrix(frame, stream)
            pixels = upright(standard_range(frame), orientation)
            aspect = pixel_aspect(stream, orientation)
            if size is not None:
                yield fitted(pixels, size, aspect)
                continue
            height, width = pixels.shape[:2]
            first = first or (height, width)
            if (height, width) != first:
                raise ValueError(
                    f"{path} changes its frame size from {first[0]}x{first[1]} to "
                    f"{height}x{width} at frame {there - 1}: pass `size=` to bring all frames to "
                    "one size."
                )
            yield resized(pixels, square_size(path, height, width, aspect))
    if there <= start or (frames and there < start + frames):
        raise _too_few(path, there, start, frames, fps)


def _warn_of_hdr(path: str | os.PathLike, frame: Any) -> bool:
    """Warns of a frame that is HDR; returns True if it is."""
    if is_hdr(frame):
        warn(
            f"{path} is HDR ({NAMES[frame.color_trc]}) and is tone-mapped: white of 203 cd/m2 "
            "becomes 1, brighter light is clipped. Grade it to SDR beforehand to keep highlights.",
        )
        return True
    return False


def _batched(pictures: Iterator[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    held = []
    due = batch + 1
    for picture in pictures:
        held.append(picture)
        if len(held) == due:
            yield from_pixels(np.stack(held)[None])
            held, due = [], batch
    if held:
        yield from_pixels(np.stack(held)[None])


__all__ = ["Info", "frames", "info", "pictures", "read"]
