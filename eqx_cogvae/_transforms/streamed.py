"""Clips of any length, one frame batch at a time."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from .._frames import frame_batches
from .._pixels import quantised
from .._types import Cache, at_least_float32
from .base import Step, check_batch_size, continued, cut, jitted_step, own_message
from .interruption import Interruption
from .progress import progress_bar


class Streamed(eqx.Module):
    """See `streamed`."""

    step: Step
    size: int = eqx.field(static=True)
    first: int | None = eqx.field(static=True)
    ahead: bool | None = eqx.field(static=True)
    progress: bool = eqx.field(static=True)

    def __check_init__(self):
        check_batch_size(self.size, self.first)

    def __call__(self, frames: Any, *, cache: Cache = None, length: int | None = None) -> "Stream":
        """Starts a stream; see `streamed`."""
        return Stream(self, frames, cache, length)


class _Pending(NamedTuple):
    """A batch that was dispatched, and whose result was not given yet."""

    result: PyTree
    cache: Cache
    frames: int


class Stream(Iterator):
    """Iterates over the results of a step; `cache` and `frame` tell how far it has come.

    `cache` is what the batch of the last result returned; it is deleted when the next result is
    asked for. `frame` counts the input frames that the results so far were made of.

    A `KeyboardInterrupt` leaves both in step, so another stream can go on from them. It is held
    back while a batch is dispatched, until the result after that batch's is asked for. An error
    within a step deletes the cache that the step was given: `cache` then raises an
    `AttributeError` that says so. A stream that runs ahead keeps its cache.
    """

    cache: Cache
    frame: int

    def __init__(self, streamed: Streamed, frames: Any, cache: Cache, length: int | None):
        source = _Source(
            frames, streamed.size, streamed.first, resumed=cache is not None, length=length
        )
        self._step, self._first = streamed.step, streamed.first
        self._ahead = source.is_there if streamed.ahead is None else streamed.ahead
        self._batches = source.batches()
        self._bar = progress_bar(source.length, "frame", show=streamed.progress)
        self._last: PyTree = None
        self._pending: _Pending | Exception | None = None
        self._interruption, self._interrupted = Interruption(), False
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
        try:
            return self._next_ahead() if self._ahead else self._next_in_turn()
        except StopIteration:
            self._close()
            raise
        except Exception as error:
            self._close()
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.cache)):
                del self.cache
            if not self.frame:
                raise
            kind, reason = _told(error)
            raise kind(
                f"the stream stopped at frame {self.frame}; the frames before it are done: {reason}"
            ) from error

    def _next_in_turn(self) -> PyTree[Array]:
        """Reads and dispatches a batch, and gives its result, which may not be ready yet."""
        self._interruption.raise_pending()
        # One batch in flight: else a slow consumer lets results pile up on the device.
        jax.block_until_ready(self._last)
        batch = next(self._batches)
        with self._interruption:
            # The old cache is given away before the new one is there.
            self._last = self._given(self._dispatched(batch, ahead=False))
            return self._last

    def _next_ahead(self) -> PyTree[Array]:
        """Gives the result of a batch that was dispatched before, and dispatches the next."""
        if self._interrupted:
            self._interrupted = False
            self._interruption.raise_pending()
        if self._pending is None:
            with self._interruption:
                self._look_ahead()
        if not isinstance(self._pending, _Pending):
            # An interrupt may have come while the end, or an error, was found ahead.
            self._interruption.raise_pending()
            raise self._pending or StopIteration
        # One batch in flight: the next one is dispatched when this one is done.
        jax.block_until_ready(self._pending.result)
        with self._interruption:
            spent, before = self.cache, self._last
            self._last = self._given(self._pending)
            self._interrupted = self._interruption.is_pending
            _delete(spent, (self.cache, self._last, before))
            self._look_ahead()
            _copy_to_host(self._last)
            return self._last

    def _look_ahead(self) -> None:
        """Dispatches the next batch, and keeps the cache that it goes on from."""
        try:
            # A clip's first batch has no cache to keep, and shares its program with `framewise`.
            batch = next(self._batches)
            self._pending = self._dispatched(batch, ahead=self.cache is not None)
        except Exception as error:
            # It is heard when this batch's result is asked for: those before it are good.
            self._pending = error

    def _dispatched(self, batch: Any, ahead: bool) -> _Pending:
        result, cache = jitted_step((self._step, batch), self.cache, ahead)
        if self._first is not None:
            cache = continued(cache)
        return _Pending(result, cache, batch.shape[1])

    def _given(self, done: _Pending) -> PyTree[Array]:
        self.cache = done.cache
        self.frame += done.frames
        self._bar.update(done.frames)
        return done.result

    def _close(self) -> None:
        self._last = self._pending = None
        self._batches = iter(())
        self._bar.close()


def streamed(
    step: Step,
    size: int,
    *,
    first: int | None = None,
    ahead: bool | None = None,
    progress: bool = False,
) -> Streamed:
    """Returns a function from a clip to an iterator over the results of its frame batches.

    Memory is constant however long the clip is, and no more than one batch is in flight. The
    results, joined, equal `framewise(step, size, first=first)` bit for bit.

    A stream that runs ahead dispatches a batch before it gives the result of the batch before it:
    the device computes while the caller copies that result to the host and writes it. The device
    then holds two caches, `.cache` and the one after the batch in flight. A stream that does not
    run ahead donates the cache from step to step, and holds one.

    !!! Example

        ```python
        stream = cv.streamed(vae.decode_step, 2)(latents)
        for frames in stream:
            writer.write(frames)
        ```

    **Arguments:**

    - `step`: `(frames, cache) -> (result, cache)`, such as `vae.decode_step`.
    - `size`: frames in a batch.
    - `first`: frames in the first batch; the last batch then takes what is left. None lets the
        first batch take the remainder. See `framewise`.
    - `ahead`: True runs ahead, and reads one batch more than it has given results of; False never
        does. None runs ahead of an array or a list, whose frames are all there, and not of another
        iterable, whose frames may come late or depend on the results.
    - `progress`: True shows a bar of frames.

    **Returns:** a function that takes

    - `frames`: an array `(b, t, ...)`, or an iterable of arrays: pieces `(b, t_i, h, w, c)` or
        single frames `(b, h, w, c)`;
    - `cache`: a stream's `.cache`, also one that was saved and read again. The new stream goes on
        after the batch that it came from, and its first batch takes no remainder;
    - `length`: number of frames that an iterable holds in all. A list knows it. If nothing tells
        it, the first piece does: its frames modulo `size` are taken for the clip's. One frame at
        a time suits 8k + 1 frames of video, and 2k + 1 latents. With `first` it is not needed;

    and returns an iterator over results, with `.cache` and `.frame`, the number of frames done.

    **Raises:** `ValueError` for a `size` or a `first` below 1. While iterating: `ValueError` for
    frames that change their size or do not fill the last batch, and `RuntimeError` for any other
    fault; both say at which frame the stream stopped. Before the first result a fault is raised
    as it is.
    """
    return Streamed(step, size, first, ahead, progress)


def _told(error: Exception) -> tuple[type[Exception], str]:
    """Returns the kind of an error, and what it says, in one line."""
    if (own := own_message(error)) is not None:
        return RuntimeError, own
    reason = " ".join(str(error).split())
    return (ValueError if isinstance(error, ValueError) else RuntimeError), reason


def _delete(spent: Cache, others: PyTree) -> None:
    """Frees a cache, also where the caller still holds it, but for arrays among the others."""
    kept = {id(leaf) for leaf in jax.tree.leaves(others)}
    for leaf in jax.tree.leaves(spent):
        if id(leaf) not in kept:
            leaf.delete()


def _copy_to_host(result: PyTree[Array]) -> None:
    """Begins to copy a result to the host, beside what the device computes."""
    for leaf in jax.tree.leaves(result):
        if leaf.is_fully_addressable:
            leaf.copy_to_host_async()


class AsUint8(eqx.Module):
    """See `as_uint8`."""

    step: Step

    def __call__(
        self, x: Float[Array, "b t h w c"], cache: Cache = None
    ) -> tuple[UInt8[Array, "b t2 h2 w2 c2"], Cache]:
        frames, cache = self.step(x, cache)
        return quantised(at_least_float32(frames)), cache


def as_uint8(step: Step) -> AsUint8:
    """Returns a step whose frames are pixels before they leave the device.

    They take a quarter of the bytes of float32: `streamed(as_uint8(vae.decode_step), 2)`.

    **Arguments:**

    - `step`: `(latents, cache) -> (frames, cache)`, frames in [-1, 1], such as `vae.decode_step`.

    **Returns:** a step whose frames are uint8 from 0 to 255, clipped and rounded to the nearest.
    """
    return AsUint8(step)


class _Source:
    """Cuts an array or an iterable into frame batches."""

    def __init__(
        self, frames: Any, size: int, first: int | None, *, resumed: bool, length: int | None
    ):
        self._size, self._resumed = size, resumed
        self._first_size = size if resumed and first is not None else first
        self.is_there = True
        if hasattr(frames, "shape"):
            self.length = frames.shape[1]
            self._pieces = self._cut(frames)
        else:
            self.is_there = isinstance(frames, list | tuple)
            self.length = _length(frames) if length is None else length
            self._pieces = map(_piece, frames)
        self._waiting: list[Any] = []
        self._like: tuple[int, ...] = ()

    def batches(self) -> Iterator[Any]:
        if not self._fill(1):
            raise ValueError("expected a frame or more, got none.")
        if self._first_size is not None:
            yield self._take(min(self._first_size, self._fill(self._first_size)))
        elif self.length is None and not self._resumed:
            # A clip that ends before its first batch is full is that batch.
            first = self._size + self._waiting[0].shape[1] % self._size
            yield self._take(min(first, self._fill(first)))
        else:
            yield self._take(self._first(self.length or self._size))
        while held := self._fill(self._size):
            yield self._take(self._size if self._first_size is None else min(self._size, held))

    def _first(self, length: int) -> int:
        """Returns the frames of the first batch."""
        if self._first_size is not None:
            return self._first_size
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
                    f"frames change from (b, h, w, c) = {self._like} to {like}: "
                    "a stream has one batch size, height, width and channel count."
                )
            self._like = like
            self._waiting.append(piece)
            held += piece.shape[1]
        return held

    def _take(self, count: int) -> Any:
        held = self._fill(count)
        if held < count:
            raise ValueError(
                f"{held} frames are left for a batch of {count}: give the stream its `length=`, "
                "so that the first batch takes the remainder."
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
    """Returns the frame count of a sequence of pieces, or None if only reading it tells."""
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
