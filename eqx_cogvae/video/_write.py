"""Writing video files."""

import contextlib
import io
import itertools
import os
import platform
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from .._files import atomic
from .._pixels import one_clip, to_pixels
from ._av import LONGEST_SIDE, Frames, check_rate, local_name, pyav

CONTAINERS = (".mp4", ".mov", ".mkv")
"""Endings of the names of videos that can be written."""


_BT709 = 1


# Up to SSE4.2: with AVX-512, x264 was measured to give different files for equal clips.
_X264 = {"x264-params": "asm=MMX2,SSE2Fast,SSSE3,SSE4.2"}


def write(
    path: str | os.PathLike,
    video: Frames | Iterable[Frames],
    *,
    fps: float | int = 8,
    crf: int = 12,
) -> None:
    """Writes a clip, or an iterator over pieces of one, as H.264, in BT.709 colours.

    The file appears only when complete. Pixels are yuv420p; an odd height or width needs yuv444p,
    which not every player shows.

    **Arguments:**

    - `path`: a name that ends in `.mp4`, `.mov` or `.mkv`; any name is a file's, never a URL.
    - `video`: (1, t, h, w, 3) or (t, h, w, 3), floating and clipped to [-1, 1], or uint8.
    - `fps`: frames per second.
    - `crf`: quality, from 0 (best) to 51.

    **Raises:** `ValueError` for a wrong rank, channel count, dtype or range, NaN, frames of several
    sizes or none; `OSError` if the file cannot be written; `ImportError` without PyAV.
    """
    path = Path(path)
    if path.suffix.lower() not in CONTAINERS:
        raise ValueError(f"a video's name must end in {', '.join(CONTAINERS)}, got {path.name!r}.")
    check_encoding(fps, crf)
    with atomic(path) as partial:
        encode(local_name(partial), video, fps, crf, path)


def check_encoding(fps: float | int, crf: int) -> None:
    """Raises `ValueError` for a frame rate or a quality that cannot be encoded."""
    check_rate(fps)
    if not 0 <= crf <= 51:
        raise ValueError(f"`crf` must lie in 0 to 51, got {crf}.")


def encode(
    target: str | io.BytesIO,
    video: Frames | Iterable[Frames],
    fps: float | int,
    crf: int,
    name: str | os.PathLike,
) -> None:
    """Encodes to a file or in memory; draws the first frame before it opens the target.

    `name` is the destination that errors speak of.
    """
    av = pyav()
    pieces = [video] if hasattr(video, "shape") else video
    frames = (to_pixels(frame) for piece in pieces for frame in one_clip(piece))
    first = next(frames, None)
    if first is None:
        raise ValueError("there are no frames to write, got an empty clip.")
    if not 1 <= min(first.shape[:2]) <= max(first.shape[:2]) <= LONGEST_SIDE:
        raise ValueError(
            f"frames must have 1 to {LONGEST_SIDE} pixels a side, got {first.shape[0]}x"
            f"{first.shape[1]}."
        )
    kind: dict[str, Any] = {"format": "mp4"} if isinstance(target, io.BytesIO) else {}
    if isinstance(target, str) and not target.endswith(".mkv"):
        kind = {"options": {"movflags": "faststart"}}
    with naming(name):
        container = av.open(target, "w", **kind)
    try:
        stream = _h264(container, first.shape, fps, crf)
        for frame in itertools.chain([first], frames):
            if frame.shape != first.shape:
                raise ValueError(
                    f"frames must be of one size, got {first.shape} and {frame.shape}."
                )
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(format=stream.pix_fmt, dst_colorspace="ITU709")
            with naming(name):
                container.mux(stream.encode(picture))
        with naming(name):
            container.mux(stream.encode())
    finally:
        with naming(name):
            container.close()


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Turns errors of the block into an `OSError` that names the destination.

    FFmpeg names the partial file or none, and a user who reads "No space left on device" looks
    for the disk that it is about.
    """
    try:
        yield
    except (OSError, pyav().error.FFmpegError) as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _h264(container: Any, shape: tuple[int, ...], fps: float | int, crf: int) -> Any:
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000))
    stream.height, stream.width = shape[:2]
    stream.pix_fmt = "yuv444p" if shape[0] % 2 or shape[1] % 2 else "yuv420p"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    stream.options = {"crf": str(crf), "preset": "medium"} | (_X264 if x86 else {})
    codec = stream.codec_context
    codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = _BT709
    return stream


__all__ = ["CONTAINERS", "check_encoding", "encode", "naming", "write"]
