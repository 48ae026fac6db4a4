"""Clips of any length, one frame batch at a time."""

from collections.abc import Iterable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from .._frames import frame_batches
from .._types import Cache, at_least_float32
from .base import Step, check_batch_size, cut, jitted_step
from .interruption import Interruption
from .progress import progress_bar


class Streamed(eqx.Module):
    """See `streamed`."""

    step: Step
    size: int = eqx.field(static=True)
    progress: bool = eqx.field(static=True)

    def __check_init__(self):
        check_batch_size(self.size)

    def __call__(self, frames: Any, *, cache: Cache = None, length: int | None = None) -> "Stream":
        """Starts a stream; see `streamed`."""
        return Stream(self, frames, cache, length)


class Stream(Iterator):
    """Results of a step over frame batches; `cache` and `frame` tell how far it has come.

    `cache` is what the last batch returned, and is given away when the next one is asked for.
    `frame` counts the input frames that the results so far were made of. A `KeyboardInterrupt`
    leaves both as they belong together, for another stream to go on from: during a step it waits
    until the next one is asked for. An error within a step takes the cache along that was given
    to it: `cache` then raises an `AttributeError` that says so.
    """

    cache: Cache
    frame: int

    def __init__(self, streamed: Streamed, frames: Any, cache: Cache, length: int | None):
        source = _Source(frames, streamed.size, resumed=cache is not None, length=length)
        self._step = streamed.step
        self._batches = source.batches()
        self._bar = progress_bar(source.length, "frame", show=streamed.progress)
        self._last: PyTree = None
        self._interruption = Interruption()
        # A cache that was given stays the caller's own.
        self.cache = jax.tree.map(lambda x: jnp.array(x, copy=True), cache)
        self.frame = 0

    def __getattr__(self, name: str) -> Any:
        if name != "cache":
            raise AttributeError(f"a stream has no {name!r}.")
        raise AttributeError(
            f"the cache was given to the step that failed at frame {self.frame}: resume from a "
            "copy of `.cache` that was made before, or from the start."
        )

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> PyTree[Array]:
        self._interruption.raise_pending()
        # One batch in flight: else a slow consumer lets results pile up on the device.
        jax.block_until_ready(self._last)
        try:
            batch = next(self._batches)
            # The old cache is given away before the new one is there.
            with self._interruption:
                self._last, self.cache = jitted_step((self._step, batch), self.cache)
                self.frame += batch.shape[1]
                self._bar.update(batch.shape[1])
                return self._last
        except StopIteration:
            self._close()
            raise
        except Exception as error:
            self._close()
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.cache)):
                del self.cache
            if not self.frame:
                raise
            reason = " ".join(str(error).split())
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            raise kind(
                f"the stream stopped at frame {self.frame}, those before it are done: {reason}"
            ) from error

    def _close(self) -> None:
        self._last = None
        self._bar.close()


def streamed(step: Step, size: int, *, progress: bool = False) -> Streamed:
    """A function from a clip to an iterator over the results of its frame batches.

    Memory is constant however long the clip: the cache is donated from step to step, and no
    more than one batch is in flight. The results, joined, equal `framewise(step, size)` bit for
    bit.

    !!! Example

        ```python
        stream = cv.streamed(vae.decode_step, 2)(latents)
        for frames in stream:
            writer.write(frames)
        ```

    **Arguments:**

    - `step`: `(frames, cache) -> (result, cache)`, such as `vae.decode_step`.
    - `size`: frames in a batch; the first takes the remainder.
    - `progress`: show a bar of frames.

    **Returns:** a function of

    - `frames`: an array `(b, t, ...)`, or an iterable of arrays: pieces `(b, t_i, h, w, c)` or
        single frames `(b, h, w, c)`.
    - `cache`: a stream's `.cache`, also one that was saved and read again: goes on behind the
        batch that it came from. There is no remainder then.
    - `length`: frames that an iterable holds in all; a list knows. Where nothing tells, the
        first piece does: its frames modulo `size` are taken for the clip's. One frame at a
        time suits 8k + 1 frames of video, and 2k + 1 latents.

    It gives an iterator, with `.cache` and `.frame`, the count of frames done.

    **Raises:** `ValueError` for a `size` below 1. While iterating, once results were given:
    `ValueError` for frames that change their size or do not fill the last batch, `RuntimeError`
    for what else goes wrong, both of which say at which frame the stream stopped.
    """
    return Streamed(step, size, progress)


class AsUint8(eqx.Module):
    """See `as_uint8`."""

    step: Step

    def __call__(
        self, x: Float[Array, "b t h w c"], cache: Cache = None
    ) -> tuple[UInt8[Array, "b t2 h2 w2 c2"], Cache]:
        frames, cache = self.step(x, cache)
        levels = (jnp.clip(at_least_float32(frames), -1, 1) + 1) * 127.5
        return jnp.rint(levels).astype(jnp.uint8), cache


def as_uint8(step: Step) -> AsUint8:
    """A step whose frames are pixels, 0 to 255, before they leave the device.

    A quarter of the bytes of float32: `streamed(as_uint8(vae.decode_step), 2)`.
    """
    return AsUint8(step)


class _Source:
    """Frame batches of an array or an iterable."""

    def __init__(self, frames: Any, size: int, *, resumed: bool, length: int | None):
        self._size, self._resumed = size, resumed
        if hasattr(frames, "shape"):
            self.length = frames.shape[1]
            self._pieces = self._cut(frames)
        else:
            self.length = _length(frames) if length is None else length
            self._pieces = map(_piece, frames)
        self._waiting: list[Any] = []
        self._like: tuple[int, ...] = ()

    def batches(self) -> Iterator[Any]:
        if not self._fill(1):
            raise ValueError("expected a frame or more, got none.")
        if self.length is None and not self._resumed:
            # A clip that ends before its first batch is full is that batch.
            first = self._size + self._waiting[0].shape[1] % self._size
            yield self._take(min(first, self._fill(first)))
        else:
            yield self._take(self._first(self.length or self._size))
        while self._fill(1):
            yield self._take(self._size)

    def _first(self, length: int) -> int:
        """Frames of the first batch."""
        if not self._resumed:
            return frame_batches(length, self._size)[0]
        if self.length is not None and length % self._size:
            raise ValueError(
                f"a resumed stream takes frames in multiples of {self._size}, got {length}."
            )
        return self._size

    def _cut(self, x: Any) -> Iterator[Any]:
        """An array's batches: sliced as they are asked for, never copied whole."""
        start = 0
        while start < x.shape[1]:
            stop = start + (self._size if start else self._first(x.shape[1]))
            yield cut(x, start, stop)
            start = stop

    def _fill(self, count: int) -> int:
        """Reads until `count` frames wait, or there are no more; returns how many do."""
        held = sum(piece.shape[1] for piece in self._waiting)
        while held < count and (piece := next(self._pieces, None)) is not None:
            like = _but_frames(piece)
            if (self._like or like) != like:
                raise ValueError(
                    f"frames change from {self._like} to {like} midway: "
                    "a stream is of one batch, height, width and channel count."
                )
            self._like = like
            self._waiting.append(piece)
            held += piece.shape[1]
        return held

    def _take(self, count: int) -> Any:
        held = self._fill(count)
        if held < count:
            raise ValueError(
                f"{held} frames are left for a batch of {count}: say `length=` beforehand, so "
                "that the first batch takes the remainder."
            )
        taken = _concatenate(self._waiting)
        self._waiting = [cut(taken, count, held)] if held > count else []
        return cut(taken, 0, count)


def _piece(frames: Any) -> Any:
    if frames.ndim == 4:
        return frames[:, None]
    if frames.ndim < 2 or not frames.shape[1]:
        raise ValueError(
            f"expected frames (b, h, w, c) or pieces (b, t, h, w, c), got shape {frames.shape}."
        )
    return frames


def _length(frames: Iterable) -> int | None:
    """Of a sequence of pieces, whose lengths add up; None where only reading it tells."""
    if not isinstance(frames, list | tuple):
        return None
    return sum(_piece(piece).shape[1] for piece in frames)


def _but_frames(x: Any) -> tuple[int, ...]:
    return (x.shape[0], *x.shape[2:])


def _concatenate(pieces: list[Any]) -> Any:
    if len(pieces) == 1:
        return pieces[0]
    # Host arrays are joined on the host.
    onhost = all(isinstance(piece, np.ndarray) for piece in pieces)
    return (np if onhost else jnp).concatenate(pieces, axis=1)


__all__ = ["as_uint8", "streamed"]
