"""Clips to look at: players and film strips."""

import base64
import dataclasses
import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from .._files import atomic
from .._pixels import one_clip, to_pixels
from ._av import Frames, pyav
from ._write import check_encoding, encode


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
    check_encoding(fps, crf)
    target = io.BytesIO()
    encode(target, video, fps, crf)
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
            pyav().VideoFrame.from_ndarray(strip, format="rgb24").save(str(partial))
    return strip


__all__ = ["Player", "filmstrip", "show"]
