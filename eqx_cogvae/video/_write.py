"""Writing video files."""

import itertools
import os
import platform
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from .._files import atomic
from .._pixels import one_clip, to_pixels
from ._av import LONGEST_SIDE, Frames, check_rate, pyav

CONTAINERS = (".mp4", ".mov", ".mkv")
"""What the name of a video that is written may end in."""


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

    Takes (1, t, h, w, 3) or (t, h, w, 3), floating and clipped to [-1, 1], or uint8. The file is
    `.mp4`, `.mov` or `.mkv`, and appears only when complete. Pixels are yuv420p; an odd height or
    width needs yuv444p, which not every player shows. `crf` runs from 0 (best) to 51.

    **Raises:** `ValueError` for a wrong rank, channel count, dtype or range, NaN, frames of several
    sizes or none; `OSError` where the file cannot be written; `ImportError` without PyAV.
    """
    path = Path(path)
    if path.suffix.lower() not in CONTAINERS:
        raise ValueError(f"a video's name must end in {', '.join(CONTAINERS)}, got {path.name!r}.")
    check_encoding(fps, crf)
    with atomic(path) as partial:
        encode(str(partial), video, fps, crf)


def check_encoding(fps: float | int, crf: int) -> None:
    check_rate(fps)
    if not 0 <= crf <= 51:
        raise ValueError(f"`crf` must lie in 0 to 51, got {crf}.")


def encode(target: Any, video: Frames | Iterable[Frames], fps: float | int, crf: int) -> None:
    """To a path, or in memory; draws the first frame before it opens the target."""
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
    kind = {"options": {"movflags": "faststart"}} if isinstance(target, str) else {"format": "mp4"}
    with av.open(target, "w", **kind) as container:
        stream = _h264(container, first.shape, fps, crf)
        for frame in itertools.chain([first], frames):
            if frame.shape != first.shape:
                raise ValueError(
                    f"frames must be of one size, got {first.shape} and {frame.shape}."
                )
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(format=stream.pix_fmt, dst_colorspace="ITU709")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _h264(container: Any, shape: tuple[int, ...], fps: float | int, crf: int) -> Any:
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000))
    stream.height, stream.width = shape[:2]
    stream.pix_fmt = "yuv444p" if shape[0] % 2 or shape[1] % 2 else "yuv420p"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    stream.options = {"crf": str(crf), "preset": "medium"} | (_X264 if x86 else {})
    codec = stream.codec_context
    codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = _BT709
    return stream


__all__ = ["CONTAINERS", "check_encoding", "encode", "write"]
