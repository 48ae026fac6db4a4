"""Players and film strips, to look at clips."""

import base64
import dataclasses
import io
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from .._files import Written, atomic
from .._pixels import one_clip, to_pixels
from ._av import Frames, pyav
from ._write import check_encoding, encode, naming


@dataclasses.dataclass(frozen=True)
class Player:
    """Holds an mp4 that a notebook shows, looping, with controls."""

    mp4: bytes = dataclasses.field(repr=False)
    """The file's bytes."""
    width: int | None = None
    """Width of the player in CSS pixels; None is the video's own."""

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
    """Encodes a clip as `write` does, for a notebook to display.

    **Arguments:** as `write`, and `width`, that of the player in CSS pixels.

    **Returns:** a `Player`.

    **Raises:** as `write`.
    """
    check_encoding(fps, crf)
    target = io.BytesIO()
    encode(target, video, fps, crf, "memory")
    return Player(target.getvalue(), width)


def filmstrip(
    *videos: Frames, n: int = 8, path: str | os.PathLike | None = None
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Draws evenly spaced frames side by side, a row per video.

    **Arguments:**

    - `videos`: clips of one shape, as `write` takes them.
    - `n`: the number of frames; shorter clips give all they have.
    - `path`: a `.png` to save to.

    **Returns:** the picture, (rows, columns, 3) in 0 to 255.

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
        content = _png(strip)
        with atomic(path) as partial, naming(path), Written(partial) as file:
            file.write(content)
    return strip


def _png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    codec = pyav().CodecContext.create("png", "w")
    codec.height, codec.width = pixels.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1)
    frame = pyav().VideoFrame.from_ndarray(pixels, format="rgb24")
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode()])


__all__ = ["Player", "filmstrip", "show"]
