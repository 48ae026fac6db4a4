"""Video files, film strips and PSNR. Reading and writing need `eqx_cogvae[video]`."""

import base64
import dataclasses
import io
import itertools
import os
import platform
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Shaped, UInt8

from ._files import atomic
from ._pixels import one_clip, to_pixels
from ._procedural import procedural_clip
from ._psnr import psnr
from ._video_reading import (
    LONGEST_SIDE,
    Info,
    av_module,
    check_rate,
    frames,
    info,
    pictures,
    read,
)

Frames: TypeAlias = Shaped[np.ndarray, "..."] | Shaped[Array, "..."]
"""A clip: (1, t, h, w, 3) or (t, h, w, 3), floating in [-1, 1] or uint8."""

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
    _check_encoding(fps, crf)
    with atomic(path) as partial:
        _encode(str(partial), video, fps, crf)


@dataclasses.dataclass(frozen=True)
class Player:
    """An mp4 that a notebook shows, looping, with controls."""

    mp4: bytes = dataclasses.field(repr=False)
    """The file."""
    width: int | None = None
    """Of the player, in CSS pixels; None is the video's own."""

    def _repr_html_(self) -> str:
        width = "" if self.width is None else f' width="{self.width}"'
        data = base64.b64encode(self.mp4).decode()
        return (
            f"<video controls autoplay loop muted playsinline{width} "
            f'src="data:video/mp4;base64,{data}"></video>'
        )


def show(
    video: Frames | Iterable[Frames],
    *,
    fps: float | int = 8,
    crf: int = 18,
    width: int | None = None,
) -> Player:
    """The clip `write` would write, for a notebook to display; `width` in CSS pixels."""
    _check_encoding(fps, crf)
    target = io.BytesIO()
    _encode(target, video, fps, crf)
    return Player(target.getvalue(), width)


def filmstrip(
    *videos: Frames, n: int = 8, path: str | os.PathLike | None = None
) -> UInt8[np.ndarray, "rows columns 3"]:
    """`n` evenly spaced frames side by side, a row per video; also saved to `path`, a `.png`.

    **Raises:** `ValueError` for videos of different shapes, and as `write`.
    """
    if not videos or n < 1:
        raise ValueError(
            f"a film strip needs a video and `n` of at least 1, got {len(videos)}, {n}."
        )
    clips = [one_clip(video) for video in videos]
    if len({clip.shape for clip in clips}) > 1:
        raise ValueError(f"videos must be of one shape, got {[clip.shape for clip in clips]}.")
    chosen = np.linspace(0, len(clips[0]) - 1, min(n, len(clips[0]))).round().astype(int)
    rows = [np.concatenate([to_pixels(clip[i]) for i in chosen], axis=1) for clip in clips]
    strip = np.concatenate(rows, axis=0)
    if path is not None:
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"a film strip's name must end in .png, got {Path(path).name!r}.")
        with atomic(path) as partial:
            av_module().VideoFrame.from_ndarray(strip, format="rgb24").save(str(partial))
    return strip


def _check_encoding(fps: float | int, crf: int) -> None:
    check_rate(fps)
    if not 0 <= crf <= 51:
        raise ValueError(f"`crf` must lie in 0 to 51, got {crf}.")


def _encode(target: Any, video: Frames | Iterable[Frames], fps: float | int, crf: int) -> None:
    """To a path, or in memory; draws the first frame before it opens the target."""
    av = av_module()
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


__all__ = [
    "CONTAINERS",
    "Frames",
    "Info",
    "Player",
    "filmstrip",
    "frames",
    "info",
    "pictures",
    "procedural_clip",
    "psnr",
    "read",
    "show",
    "write",
]
