"""A video as the events of its clips, decoded by a thread ahead of whoever encodes them."""

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
from ._sources import Item
from ._store import Entry, Settings, Store

_AHEAD = 8
_POLL = 0.1


@dataclasses.dataclass(frozen=True)
class Begin:
    """A clip begins, whose frame batches follow as pixels `(1, t, h, w, 3)`."""

    id: str
    start: int
    fps: float
    size: tuple[int, int]
    sha256: str
    wanted: bool = True


@dataclasses.dataclass(frozen=True)
class End:
    """A clip ends: of how many frames, and with how many once it was padded; of none if dropped."""

    frames: int
    padded: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """A video ends; where it was done before, `clips` is what it gave then."""

    sha256: str
    frames: int
    clips: list[Entry] | None = None


@dataclasses.dataclass(frozen=True)
class Broken:
    """A video can not be read on, and why."""

    reason: str


Event: TypeAlias = Begin | UInt8[np.ndarray, "1 t h w 3"] | End | Finished | Broken


def events(item: Item, store: Store, cell: int) -> Iterator[Event]:
    """What a video holds. Clips that are done are read past: theirs come without frames."""
    path = item.path
    try:
        with item.local() as (path, sha256):
            done = store.finished(item.name, sha256)
            if done is not None:
                yield Finished(sha256, done.frames, done.clips)
                return
            yield from _clips(path, sha256, item.name, store, cell)
    except (ValueError, OSError) as error:
        yield Broken(" ".join(str(error).replace(str(path), item.name).split()))


def _clips(path: Any, sha256: str, name: str, store: Store, cell: int) -> Iterator[Event]:
    settings = store.settings
    found = video.info(path)
    size = fitted((found.height, found.width), settings.sizes, cell)
    if not min(size):
        raise ValueError(
            f"{name} is {found.height}x{found.width}, the model needs {cell}x{cell}: name a size."
        )
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
    """The frame batches of one clip and its end; returns how many frames there were."""
    held, due, count = [], SAMPLE_BATCH + 1, 0
    # Whether a clip is to be dropped is not known before its last frame.
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
    """The size of the nearest aspect ratio; without any, `size` cut down to whole cells."""
    if not sizes:
        return size[0] // cell * cell, size[1] // cell * cell
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: abs(math.log(s[0] / s[1]) - aspect))


class Ahead:
    """An iterator that a thread runs ahead of, by a few items; `seconds` are those it worked."""

    def __init__(self, source: Iterable[Any], pool: ThreadPoolExecutor, stop: threading.Event):
        self.seconds = 0.0
        self._source, self._stop = iter(source), stop
        self._queue: queue.Queue = queue.Queue(_AHEAD)
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
                self._queue.put(item, timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False


def ahead(
    items: Iterable[Any], read: Callable[[Any], Iterable[Any]], threads: int
) -> Generator[tuple[Any, Ahead], None, None]:
    """Each item with what `read` gives of it, so many of them at a time in threads."""
    stop = threading.Event()
    with ThreadPoolExecutor(threads, "decode") as pool:
        waiting: deque[tuple[Any, Ahead]] = deque()
        try:
            for item in items:
                waiting.append((item, Ahead(read(item), pool, stop)))
                if len(waiting) > threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


__all__ = ["Ahead", "Begin", "Broken", "End", "Event", "Finished", "ahead", "events", "fitted"]
