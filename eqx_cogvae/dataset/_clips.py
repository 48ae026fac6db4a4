"""Videos as events of clips, decoded by threads ahead of the encoder."""

import dataclasses
import itertools
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8

from .. import video
from .._frames import SAMPLE_BATCH
from ._results import Entry
from ._settings import Settings
from ._sources import Item
from ._store import Store
from ._text import readable

_LONGEST_REASON = 1000
_QUEUE_LENGTH = 8
_POLL_SECONDS = 0.1
# A rate of 30 asked of a video at 29.97 is met.
_RATE_TOLERANCE = 1.01


@dataclasses.dataclass(frozen=True)
class Begin:
    """A clip begins; its frame batches follow as pixels `(1, t, h, w, 3)`, where it is `wanted`."""

    id: str
    start: int
    fps: float
    size: tuple[int, int]
    sha256: str
    wanted: bool = True


@dataclasses.dataclass(frozen=True)
class End:
    """A clip ends, with `frames` of the video, `padded` to a count; both are 0 if it is dropped."""

    frames: int
    padded: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """A video ends; `clips` is what it gave before, where it was done already."""

    sha256: str
    frames: int
    clips: list[Entry] | None = None


@dataclasses.dataclass(frozen=True)
class Broken:
    """A video cannot be read on, for a reason."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Slow:
    """A video has fewer frames a second than are asked for, so that some are repeated."""

    fps: float


Event: TypeAlias = Begin | UInt8[np.ndarray, "1 t h w 3"] | End | Finished | Broken | Slow


def events(item: Item, store: Store, cell: int) -> Iterator[Event]:
    """Yields what a video holds; clips that are done are read past and come without frames."""
    path = item.path
    try:
        with item.local() as (path, sha256):
            done = store.finished(item.name, sha256)
            if done is not None:
                yield Finished(sha256, done.frames, done.clips)
                return
            yield from _clips(path, sha256, item.name, store, cell)
    except (ValueError, OSError) as error:
        yield Broken(reason(error, path, item))


def reason(error: Exception, path: Any, item: Item) -> str:
    """Returns the line that says why an item was skipped, under the item's own name."""
    line = " ".join(str(error).replace(str(path), item.name).split())
    return readable(line)[:_LONGEST_REASON]


def _clips(path: Any, sha256: str, name: str, store: Store, cell: int) -> Iterator[Event]:
    settings = store.settings
    found = video.info(path)
    size = fitted((found.height, found.width), settings.sizes, cell)
    if not min(size):
        raise ValueError(
            f"{name} is {found.height}x{found.width}, the model needs {cell}x{cell}: name a size."
        )
    if settings.fps is not None and settings.fps > found.fps * _RATE_TOLERANCE:
        yield Slow(found.fps)
    pictures = video.pictures(path, size=size, fps=settings.fps)
    fps = float(settings.fps or found.fps)
    start = 0
    while (first := next(pictures, None)) is not None:
        clip = store.clip(name, sha256, start)
        yield Begin(clip, start, fps, size, sha256, wanted := not store.has(clip))
        rest = None if settings.frames is None else settings.frames - 1
        frames = itertools.chain([first], itertools.islice(pictures, rest))
        start += yield from _clip(frames, settings, wanted)
    yield Finished(sha256, start)


def _clip(
    frames: Iterator[np.ndarray], settings: Settings, wanted: bool
) -> Generator[Event, None, int]:
    """Yields the frame batches of one clip, and its end; returns its number of frames."""
    held, due, count = [], SAMPLE_BATCH + 1, 0
    # The last frame decides whether a clip is dropped: until then its frames are kept back.
    kept: list[np.ndarray] | None = [] if _may_drop(settings) else None
    for frame in frames:
        count += 1
        held.append(frame)
        if len(held) == due:
            if wanted and kept is not None:
                kept.append(np.stack(held)[None])
            elif wanted:
                yield np.stack(held)[None]
            held, due = [], SAMPLE_BATCH
    end = _end(count, settings)
    if wanted and end.frames:
        yield from kept or ()
        missing = end.padded - (count - len(held))
        if missing > 0:
            yield np.stack((held + held[-1:] * SAMPLE_BATCH)[:missing])[None]
    yield end
    return count


def _may_drop(settings: Settings) -> bool:
    return settings.frames is not None and settings.tail == "drop"


def _end(count: int, settings: Settings) -> End:
    if settings.frames is None or settings.tail == "pad":
        return End(count, count + (1 - count) % SAMPLE_BATCH)
    if count < settings.frames and _may_drop(settings):
        return End(0, 0)
    count = (count - 1) // SAMPLE_BATCH * SAMPLE_BATCH + 1
    return End(count, count)


def fitted(size: tuple[int, int], sizes: tuple[tuple[int, int], ...], cell: int) -> tuple[int, int]:
    """Returns the size of the nearest aspect ratio; without any, `size` cut to whole cells."""
    if not sizes:
        return size[0] // cell * cell, size[1] // cell * cell
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: abs(math.log(s[0] / s[1]) - aspect))


class Prefetcher:
    """Iterates over items that a thread makes ahead; the thread worked for `seconds`."""

    def __init__(self, source: Iterable[Any], pool: ThreadPoolExecutor, stop: threading.Event):
        self.seconds = 0.0
        self._source, self._stop = iter(source), stop
        self._queue: queue.Queue = queue.Queue(_QUEUE_LENGTH)
        self._future = pool.submit(self._run)

    def __iter__(self) -> Iterator[Any]:
        while True:
            more, item = self._queue.get()
            if not more:
                self._future.result()
                return
            yield item

    def _run(self) -> None:
        try:
            while True:
                begun = time.perf_counter()
                item = next(self._source, self)
                self.seconds += time.perf_counter() - begun
                if item is self or not self._put((True, item)):
                    return
        finally:
            self._put((False, None))

    def _put(self, item: tuple[bool, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False


def prefetched(
    items: Iterable[Any], read: Callable[[Any], Iterable[Any]], threads: int
) -> Generator[tuple[Any, Prefetcher], None, None]:
    """Yields each item with what `read` gives of it; each thread reads one item at a time."""
    stop = threading.Event()
    with ThreadPoolExecutor(threads, "decode") as pool:
        waiting: deque[tuple[Any, Prefetcher]] = deque()
        try:
            for item in items:
                waiting.append((item, Prefetcher(read(item), pool, stop)))
                if len(waiting) > threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


__all__ = [
    "Begin",
    "Broken",
    "End",
    "Event",
    "Finished",
    "Prefetcher",
    "Slow",
    "events",
    "fitted",
    "prefetched",
    "reason",
]
