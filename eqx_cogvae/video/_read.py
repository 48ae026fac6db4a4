"""Reading video files."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from .._files import check_regular
from ._av import LONGEST_SIDE, check_rate, pyav

_MOST_FRAMES = 2**31 - 1


# FFmpeg goes by a file's content, whatever its name: no playlists, which name other files.
_READABLE = {
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,flv,ogg,asf,"
    "mxf,nut,rm,dv,gif,apng,yuv4mpegpipe,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe",
    "protocol_whitelist": "file",
}


@dataclasses.dataclass(frozen=True)
class Info:
    """Of a video file: frames a second, frame count, and the size it is shown at, in pixels."""

    fps: float
    """Frames a second."""
    frames: int
    """How many there are, by the container's own count."""
    height: int
    """In pixels, after rotation."""
    width: int
    """In pixels, after rotation."""


def info(path: str | os.PathLike) -> Info:
    """What a video file holds, with one frame decoded. `frames` is the container's own count.

    **Raises:** as `read`.
    """
    with _opened(path) as (container, stream):
        rate = float(_rate(stream))
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    _, first = next(_decoded(path))
    height, width = first.height, first.width
    if _turns(first) % 2:
        height, width = width, height
    return Info(rate, count, height, width)


def read(
    path: str | os.PathLike,
    *,
    start: int = 0,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | int | None = None,
) -> Float[np.ndarray, "1 t h w 3"]:
    """Reads a clip as float32 in [-1, 1]: `pixel / 127.5 - 1`.

    `fps` picks, for each instant of the new rate, the nearest frame. `start` and `frames` then
    count frames of that rate. `size=(height, width)` crops each frame about its centre to that
    aspect ratio and resizes it, bicubic and antialiased. Rotation metadata is applied.

    **Raises:** `FileNotFoundError`; `IsADirectoryError`; `ValueError` for a file that is no video,
    is truncated, has no frames, or has fewer than asked for; `ImportError` without PyAV.
    """
    return np.concatenate(list(_chunks(path, start, frames, size, fps, 8)), axis=1)


def frames(
    path: str | os.PathLike,
    *,
    start: int = 0,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | int | None = None,
    batch: int = 8,
) -> Iterator[Float[np.ndarray, "1 t h w 3"]]:
    """`read`, `batch` frames at a time, in constant memory.

    The first piece holds one frame more, the last what remains: from 8k + 1 frames come the
    frame batches of `VAE.encode`. A faulty file raises when the fault is reached.

    **Raises:** as `read`.
    """
    return _chunks(path, start, frames, size, fps, batch)


def pictures(
    path: str | os.PathLike,
    *,
    size: tuple[int, int] | None = None,
    fps: float | int | None = None,
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """`read`, one frame at a time, as pixels: a quarter of the bytes.

    **Raises:** as `read`.
    """
    _check_reading(0, None, size, fps, 1)
    return _pictures(path, 0, None, size, fps)


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; FFmpeg's errors become `ValueError`."""
    av = pyav()
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no video at {path}.")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a directory, name a video in it.")
    check_regular(path)
    try:
        with av.open(os.fspath(path), options=_READABLE, **_lenient(av)) as container:
            if not container.streams.video:
                raise ValueError(
                    f"{path} has no video stream, or an empty one: choose another file."
                )
            yield container, container.streams.video[0]
    except av.error.EOFError as error:
        raise ValueError(f"{path} holds no frames, choose a video that has some.") from error
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{path} is not a video that FFmpeg can read, or is truncated "
            f"({error.strerror}): check it in a player, or copy it again."
        ) from error


def _lenient(av: Any) -> dict[str, str]:
    """Titles and the like may be in any encoding; PyAV 19 takes them all by itself."""
    return {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def _decoded(path: str | os.PathLike) -> Iterator[tuple[Fraction, Any]]:
    """Frames with their times in seconds, rising; raises where the file ends too early."""
    packets = count = 0
    frame: Any
    with _opened(path) as (container, stream):
        rate = _rate(stream)
        for packet in container.demux(stream):
            packets += packet.size > 0
            for frame in packet.decode():
                timed = frame.pts is not None and frame.time_base
                yield (frame.pts * frame.time_base if timed else count / rate), frame
                count += 1
        if packets < len(stream.index_entries):
            raise ValueError(
                f"{path} is truncated: {packets} of {len(stream.index_entries)} frames are there, "
                "copy it again, or ask for a range of frames that it has."
            )
    if not count:
        raise ValueError(f"{path} holds no frames, choose a video that has some.")


def _rate(stream: Any) -> Fraction:
    return Fraction(stream.average_rate or stream.guessed_rate or 1)


def _resampled(path: str | os.PathLike, fps: float | int | None) -> Iterator[Any]:
    """The frame nearest to each instant of the new rate, the earlier one of two as near."""
    if fps is None:
        yield from (frame for _, frame in _decoded(path))
        return
    step = 1 / Fraction(fps).limit_denominator(1_000_000)
    frames = _decoded(path)
    before, shown = next(frames)
    begin = target = before
    interval = None
    for time, frame in frames:
        while 2 * target <= before + time:
            yield shown
            target += step
        before, shown, interval = time, frame, time - before
    end = before + (interval or step)
    while target < end or target == begin:
        yield shown
        target += step


def _chunks(
    path: str | os.PathLike,
    start: int,
    frames: int | None,
    size: tuple[int, int] | None,
    fps: float | int | None,
    batch: int,
) -> Iterator[Float[np.ndarray, "1 t h w 3"]]:
    _check_reading(start, frames, size, fps, batch)
    return _batched(_pictures(path, start, frames, size, fps), batch)


def _check_reading(
    start: int,
    frames: int | None,
    size: tuple[int, int] | None,
    fps: float | int | None,
    batch: int,
) -> None:
    for name, value, least in (("start", start, 0), ("frames", frames, 1), ("batch", batch, 1)):
        if value is not None and not least <= value <= _MOST_FRAMES:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    if size is not None and (len(size) != 2 or min(size) < 1 or max(size) > LONGEST_SIDE):
        raise ValueError(
            f"`size` must be (height, width) in pixels, at most {LONGEST_SIDE}, got {size}."
        )
    if fps is not None:
        check_rate(fps)


def _pictures(
    path: str | os.PathLike,
    start: int,
    frames: int | None,
    size: tuple[int, int] | None,
    fps: float | int | None,
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    count = 0
    for frame in itertools.islice(_resampled(path, fps), start + frames if frames else None):
        count += 1
        if count > start:
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), _turns(frame))
            yield _fitted(pixels, size)
    if count <= start or (frames and count < start + frames):
        asked = f"frames {start} to {start + frames - 1}" if frames else f"frame {start} and later"
        raise ValueError(f"{path} holds {count} frames, asked for {asked}: ask for fewer.")


def _turns(frame: Any) -> int:
    """Quarter turns, counterclockwise, that set the frame upright."""
    return round(frame.rotation / 90)


def _fitted(
    pixels: UInt8[np.ndarray, "h w 3"], size: tuple[int, int] | None
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Centre crop to the aspect ratio, then bicubic."""
    height, width = pixels.shape[:2]
    if size is None or size == (height, width):
        return pixels
    rows = min(height, max(1, round(width * size[0] / size[1])))
    columns = min(width, max(1, round(height * size[1] / size[0])))
    top, left = (height - rows) // 2, (width - columns) // 2
    crop = np.ascontiguousarray(pixels[top : top + rows, left : left + columns])
    frame = pyav().VideoFrame.from_ndarray(crop, format="rgb24")
    frame = frame.reformat(width=size[1], height=size[0], interpolation="BICUBIC")
    return frame.to_ndarray(format="rgb24")


def _batched(pictures: Iterator[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    held = []
    due = batch + 1
    for picture in pictures:
        held.append(picture)
        if len(held) == due:
            yield _joined(held)
            held, due = [], batch
    if held:
        yield _joined(held)


def _joined(pictures: list[np.ndarray]) -> Float[np.ndarray, "1 t h w 3"]:
    return np.stack(pictures)[None].astype(np.float32) / np.float32(127.5) - np.float32(1)


__all__ = ["Info", "frames", "info", "pictures", "read"]
