"""Timing, padding and comparing a clip that passes by, frame batch by frame batch."""

import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from .._frames import SAMPLE_BATCH
from ..video._psnr import decibels, squared_error

STRIP = 8


class Stopwatch:
    """Seconds spent in a step: in its first call, and in all."""

    def __init__(self):
        self.first, self.total = 0.0, 0.0

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        passed = time.perf_counter() - self._start
        self.first = self.first or passed
        self.total += passed


def timed(results: Iterable[jax.Array], watch: Stopwatch) -> Iterator[np.ndarray]:
    """Yields the results on the host; times how long each takes."""
    results = iter(results)
    while True:
        with watch:
            result = next(results, None)
            if result is None:
                return
            result = np.asarray(result)
        yield result


class Padding:
    """Repeats the last frame, up to 8k + 1 in all; knows the counts once it has seen them."""

    def __init__(self):
        self.count = self.padded = 0

    def pad(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for piece in pieces:
            self.count += piece.shape[1]
            missing = (1 - self.count) % SAMPLE_BATCH
            tail = np.repeat(piece[:, -1:], missing, axis=1)
            piece = np.concatenate([piece, tail], axis=1)
            self.padded += piece.shape[1]
            yield piece


class Comparison:
    """Gathers PSNR and a film strip of a reconstruction that passes by."""

    def __init__(self, pieces: Iterable[np.ndarray], count: int):
        self._originals = (frame for piece in pieces for frame in piece[0])
        chosen = np.linspace(0, count - 1, min(STRIP, count)).round()
        self._chosen = {int(i) for i in chosen}
        self._error, self._elements, self._seen = 0.0, 0, 0
        self._rows: tuple[list, list] = ([], [])

    def watch(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for piece in pieces:
            for frame, original in zip(piece[0], self._originals):  # noqa: B905
                self._error += squared_error(original, frame)
                self._elements += frame.size
                if self._seen in self._chosen:
                    self._rows[0].append(original)
                    self._rows[1].append(frame.astype(np.float32))
                self._seen += 1
            yield piece

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        return np.stack(self._rows[0]), np.stack(self._rows[1])

    def psnr(self) -> float:
        return decibels(self._error / self._elements)


def progress(results: Iterable[np.ndarray], label: str, total: int | None) -> Iterable:
    """Shows a bar on stderr, where that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return results
    return tqdm(results, label, total, unit="batch", disable=None)


__all__ = ["STRIP", "Comparison", "Padding", "Stopwatch", "progress", "timed"]
