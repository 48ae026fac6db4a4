"""Times of frames: one clock for a whole file, and other frame rates."""

import heapq
import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, TypeVar

from ._decode import REORDERED

T = TypeVar("T")

# Seconds beyond which a gap between frames is another clock and no pause. Recordings of
# broadcasts and joined MPEG files change clocks; elsewhere a frame may be shown for long.
_MPEG_PAUSE, _PAUSE = 10, 3600
_MPEG = ("mpegts", "mpeg")


def rate(stream: Any) -> Fraction:
    """Returns the frame rate of a stream in frames per second, 1 where nothing tells."""
    return Fraction(stream.average_rate or stream.guessed_rate or 1)


def seconds(timed: Any) -> Fraction | None:
    """Returns the time at which a frame or packet is shown, or None if the file has no times."""
    if timed.pts is None or not timed.time_base:
        return None
    return timed.pts * timed.time_base


def clocked(
    frames: Iterable[tuple[Fraction | None, T]], stream: Any, container: Any
) -> Iterator[tuple[Fraction, T]]:
    """Puts frames on one clock, in seconds, which never runs back.

    Where the file's clock jumps, as where MPEG-TS files were joined, a frame follows the one
    before by the last interval between frames. So does a frame without a time.
    """
    interval = 1 / rate(stream)
    pause = max(_MPEG_PAUSE if container.format.name in _MPEG else _PAUSE, 10 * interval)
    offset = Fraction(0)
    before: Fraction | None = None
    for time, frame in frames:
        if before is None:
            now = time or Fraction(0)
        elif time is None:
            now = before + interval
        else:
            now = time + offset
            if not 0 <= now - before <= pause:
                now = before + interval
                offset = now - time
            interval = now - before or interval
        yield now, frame
        before = now


def resampled(frames: Iterable[tuple[Fraction, T]], fps: float | int | None) -> Iterator[T]:
    """Yields, for each instant of the new rate, the frame nearest to it, the earlier of two.

    Without `fps` every frame is yielded once.
    """
    if fps is None:
        yield from (frame for _, frame in frames)
        return
    step = 1 / Fraction(fps).limit_denominator(1_000_000)
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        return
    before, shown = first
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


def count(container: Any, stream: Any, fps: float | int | None, most: int) -> int:
    """Counts frames by the packets of an open file, undecoded, up to `most`."""
    packets = (p for p in container.demux(stream) if p.size and not p.is_discard)
    if fps is None:
        return sum(1 for _ in itertools.islice(packets, most))
    times = ((time, None) for time in _shown_order(packets))
    return sum(1 for _ in itertools.islice(resampled(clocked(times, stream, container), fps), most))


def _shown_order(packets: Iterable[Any]) -> Iterator[Fraction | None]:
    """Yields the packets' times in the order in which their frames are shown."""
    held: list[Fraction] = []
    decoded = None
    for packet in packets:
        time = seconds(packet)
        if time is None:
            yield None
            continue
        if decoded is not None and packet.dts is not None and packet.dts < decoded:
            yield from sorted(held)
            held.clear()
        decoded = packet.dts
        heapq.heappush(held, time)
        if len(held) > REORDERED:
            yield heapq.heappop(held)
    yield from sorted(held)


__all__ = ["clocked", "count", "rate", "resampled", "seconds"]
