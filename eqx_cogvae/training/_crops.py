"""Random crops in space and time out of clips: the data that a VAE is trained on."""

import collections
import dataclasses
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from .. import video
from .._pixels import to_pixels

_AHEAD = 4
_SEGMENT = 64


@dataclasses.dataclass(frozen=True)
class Source:
    """A clip to cut crops from."""

    clip: str | os.PathLike | video.Frames
    """A video file, or frames (t, h, w, 3), floating in [-1, 1] or uint8."""
    height: int | None = None
    """Height in pixels that a file's frames are resized to, keeping their aspect; None keeps it."""
    weight: float = 1.0
    """A source of twice the weight is drawn twice as often."""


class Crops:
    """Batches of random crops, uint8 `(batch, frames, height, width, 3)`.

    The batch of an index depends on `seed` and that index alone, so that a run that was cut off
    goes on with the batches it would have seen. Files are decoded by `workers` threads, in
    segments of 64 frames, which are kept as pixels up to `memory` bytes. A segment is decoded from
    the beginning of its file: cut long videos into clips first.

    **Arguments:**

    - `sources`: clips to cut from.
    - `batch`: number of crops in a batch.
    - `frames`, `size=(height, width)`: size of a crop, in frames and pixels.
    - `strides`: distances of a crop's frames in time. One is drawn for each crop; those that a
        clip is too short for are left out.
    - `flip`: if True, half of the crops are mirrored left to right.
    - `seed`: seed of everything that is drawn.
    - `workers`: number of threads that make batches ahead of their use.
    - `memory`: bytes of decoded segments to keep.

    **Raises:** `ValueError` for no sources, or one that is smaller or shorter than a crop.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch: int,
        frames: int,
        size: tuple[int, int],
        strides: Sequence[int] = (1,),
        flip: bool = True,
        seed: int = 0,
        workers: int = 2,
        memory: int = 2**30,
    ):
        if not sources:
            raise ValueError("there is nothing to cut crops from: give a source or more.")
        self._clips = [_Clip(source) for source in sources]
        for clip in self._clips:
            clip.check(frames, size, min(strides))
        weights = np.array([source.weight for source in sources], np.float64)
        self._odds = weights / weights.sum()
        self._batch, self._frames, self._size = batch, frames, size
        self._strides, self._flip, self._seed = tuple(strides), flip, seed
        self._workers, self._segments = workers, _Segments(memory)

    def batch(self, index: int) -> UInt8[np.ndarray, "b t h w 3"]:
        """Makes one batch.

        **Arguments:**

        - `index`: its number, from 0 on.

        **Returns:** crops, (batch, frames, height, width, 3), uint8.
        """
        rng = np.random.default_rng([self._seed, index])
        return np.stack([self._crop(rng) for _ in range(self._batch)])

    def batches(self, start: int = 0) -> Iterator[UInt8[np.ndarray, "b t h w 3"]]:
        """Yields batches without end, made by threads ahead of their use.

        **Arguments:**

        - `start`: index of the first batch, such as the number of steps taken so far.

        **Returns:** an iterator over what `batch` returns.
        """
        with ThreadPoolExecutor(self._workers, "crops") as pool:
            ahead = collections.deque(pool.submit(self.batch, start + i) for i in range(_AHEAD))
            try:
                for index in itertools.count(start + _AHEAD):
                    batch = ahead.popleft().result()
                    ahead.append(pool.submit(self.batch, index))
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()

    def _crop(self, rng: np.random.Generator) -> np.ndarray:
        clip = self._clips[rng.choice(len(self._clips), p=self._odds)]
        segment = rng.integers(len(clip.segments))
        length = clip.segments[segment][1]
        possible = [s for s in self._strides if (self._frames - 1) * s < length]
        stride = possible[rng.integers(len(possible))]
        first = rng.integers(length - (self._frames - 1) * stride)
        corner = rng.random(2)
        flipped = self._flip and rng.random() < 0.5
        pixels = self._segments.get(clip, int(segment))
        height, width = self._size
        top = int(corner[0] * (pixels.shape[1] - height + 1))
        left = int(corner[1] * (pixels.shape[2] - width + 1))
        times = first + stride * np.arange(self._frames)
        crop = pixels[times, top : top + height, left : left + width]
        return crop[:, :, ::-1] if flipped else crop


class _Clip:
    """A source, the size it is cut at, and the first frame and the length of each segment."""

    def __init__(self, source: Source):
        self.source = source
        if isinstance(source.clip, str | os.PathLike):
            found = video.info(source.clip)
            frames, height, width = found.frames, found.height, found.width
            if source.height is not None:
                height, width = source.height, round(width * source.height / height)
        else:
            frames, height, width, _ = source.clip.shape
            if source.height not in (None, height):
                raise ValueError("`height` resizes files, give frames at the size to cut from.")
        self.frames, self.size = frames, (height, width)
        # The last segment takes the rest: one of few frames would be too short for a crop.
        count = max(frames // _SEGMENT, 1)
        starts = [_SEGMENT * i for i in range(count)]
        self.segments = [
            (start, stop - start) for start, stop in zip(starts, [*starts[1:], frames], strict=True)
        ]

    def check(self, frames: int, size: tuple[int, int], stride: int) -> None:
        short = (frames - 1) * stride + 1 > min(length for _, length in self.segments)
        if short or size[0] > self.size[0] or size[1] > self.size[1]:
            name = self.source.clip
            name = Path(name).name if isinstance(name, str | os.PathLike) else "a source"
            raise ValueError(
                f"crops of {frames} frames of {size[0]}x{size[1]}, {stride} apart, do not fit "
                f"into {name}, which has {self.frames} of {self.size[0]}x{self.size[1]}: "
                "give smaller crops, or a larger `height`."
            )

    def decode(self, segment: int) -> UInt8[np.ndarray, "t h w 3"]:
        start, frames = self.segments[segment]
        clip = self.source.clip
        if isinstance(clip, str | os.PathLike):
            clip = video.read(clip, start=start, frames=frames, size=self.size)[0]
            start = 0
        return np.stack([to_pixels(frame) for frame in np.asarray(clip[start : start + frames])])


class _Segments:
    """Decoded segments, the least recently used dropped first; each is decoded once at a time."""

    def __init__(self, memory: int):
        self._memory, self._held = memory, collections.OrderedDict()
        self._lock, self._locks = threading.Lock(), collections.defaultdict(threading.Lock)

    def get(self, clip: _Clip, segment: int) -> np.ndarray:
        key = (id(clip), segment)
        with self._lock:
            lock = self._locks[key]
        with lock:
            with self._lock:
                if key in self._held:
                    self._held.move_to_end(key)
                    return self._held[key]
            pixels = clip.decode(segment)
            with self._lock:
                self._held[key] = pixels
                while len(self._held) > 1 and self._bytes() > self._memory:
                    self._held.popitem(last=False)
            return pixels

    def _bytes(self) -> int:
        return sum(pixels.nbytes for pixels in self._held.values())


__all__ = ["Crops", "Source"]
