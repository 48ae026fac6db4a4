"""Videos to latents, on the devices of this process."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from .._autoencoder import VAE
from .._latents import Latents, save_latents
from .._pixels import from_pixels
from .._posterior import DiagonalGaussian
from .._transforms.base import jitted_step
from .._types import Cache
from ._clips import Begin, Broken, End, Finished, Prefetcher, Slow, events, prefetched
from ._results import OUT_OF_MEMORY, Entry, Result
from ._sources import Item
from ._store import Record, Store, prepared


class PixelStep(eqx.Module):
    """Applies `VAE.encode_step` to pixels: a quarter of the bytes on their way to the device."""

    vae: VAE

    def __call__(
        self, pixels: UInt8[Array, "b t h w c"], cache: Cache = None
    ) -> tuple[Float[Array, "b t2 h2 w2 z"], Cache]:
        return self.vae.encode_step(from_pixels(pixels), cache)


class Encoder:
    """Encodes videos into a store, while threads decode the next ones."""

    def __init__(self, vae: VAE, store: Store, fingerprint: str, threads: int):
        self._config, self._store, self._threads = vae.config, store, threads
        self._fingerprint = fingerprint
        self._dtype = vae.dtype.name
        devices = jax.local_devices()
        self._steps = [PixelStep(_on(vae, device)) for device in devices]

    def __call__(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yields the results of videos as they come: in order, where there is one device."""
        cell = self._config.spatial_compression
        threads = max(self._threads, len(self._steps))
        feeds = prefetched(items, lambda item: events(item, self._store, cell), threads)
        # An error that leaves this closes it too: threads would wait for a reader for ever.
        with contextlib.closing(feeds):
            if len(self._steps) == 1:
                for item, feed in feeds:
                    yield self._encode(item, feed, self._steps[0])
                return
            yield from _shared(feeds, [self._on_device(step) for step in self._steps])

    def _on_device(self, step: PixelStep) -> Callable[[tuple[Item, Prefetcher]], Result]:
        return lambda pair: self._encode(*pair, step)

    def _encode(self, item: Item, feed: Prefetcher, step: PixelStep) -> Result:
        result = Result(item.name, item.rows)
        clip: Begin | None = None
        moments, cache = [], None
        for event in _timed(feed, result):
            if isinstance(event, Begin):
                clip, moments, cache = event, [], None
            elif isinstance(event, np.ndarray) and not result.problem:
                with result.timing("encode"), _noting_memory(result, event):
                    moment, cache = jitted_step((step, event), cache)
                    moments.append(np.asarray(moment))
            elif isinstance(event, Slow):
                result.slow = event.fps
            elif isinstance(event, End) and clip is not None:
                self._end(item, clip, event, moments, result)
            elif isinstance(event, Finished):
                self._finish(item, event, result)
            elif isinstance(event, Broken):
                result.problem = result.problem or event.reason
        result.spend("decode", feed.seconds)
        return result

    def _end(
        self, item: Item, clip: Begin, end: End, moments: list[np.ndarray], result: Result
    ) -> None:
        if not end.frames or result.problem:
            return
        if clip.wanted:
            try:
                with result.timing("write"):
                    latents = self._latents(item, clip, end, np.concatenate(moments, axis=1))
                    path = prepared(self._store.path(clip.id))
                    save_latents(path, latents, layout=self._store.settings.layout)
            except ValueError as error:
                result.problem = f"frames from {clip.start} on: {error}"
                return
            result.written += 1
        result.clips.append(self._entry(item, clip, end))

    def _finish(self, item: Item, event: Finished, result: Result) -> None:
        if event.clips is not None:
            result.clips = event.clips
        elif not result.problem:
            record = Record(item.name, event.frames, result.clips)
            self._store.finish(item.name, event.sha256, record)
        if not result.clips and not result.problem:
            result.problem = (
                f"holds {event.frames} frames, a clip {self._store.settings.frames}: "
                "choose fewer frames, or another tail than drop."
            )

    def _latents(self, item: Item, clip: Begin, end: End, moments: np.ndarray) -> Latents:
        array, _ = np.split(moments, 2, axis=-1)
        kind, logvar, seed = self._store.settings.latents, None, None
        # NumPy takes the mean, as JAX would compile for each length anew.
        if kind != "mode":
            posterior = DiagonalGaussian.from_moments(jnp.asarray(moments))
            if kind == "posterior":
                logvar = np.asarray(posterior.logvar)
            else:
                seed = self._store.seed(clip.sha256, clip.start)
                array = np.asarray(posterior.sample(noise_key(seed)))
        return Latents(
            array,
            logvar=logvar,
            seed=seed,
            scaling_factor=self._config.scaling_factor,
            invert_scale_latents=self._config.invert_scale_latents,
            fps=clip.fps,
            height=clip.size[0],
            width=clip.size[1],
            frames=end.frames,
            padded=end.padded,
            fingerprint=self._fingerprint,
            source=item.name,
            source_sha256=clip.sha256,
            start=clip.start,
        )

    def _entry(self, item: Item, clip: Begin, end: End) -> Entry:
        settings, config = self._store.settings, self._config
        height, width = (side // config.spatial_compression for side in clip.size)
        shape = [1, config.latent_frames(end.padded), height, width, config.latent_channels]
        if settings.layout == "BCTHW":
            shape.insert(1, shape.pop())
        entry = {
            "id": clip.id,
            "source": item.name,
            "source_sha256": clip.sha256,
            "start": clip.start,
            "frames": end.frames,
            "padded": end.padded,
            "fps": clip.fps,
            "height": clip.size[0],
            "width": clip.size[1],
            "latents": settings.latents,
            "shape": shape,
            "layout": settings.layout,
            "dtype": self._dtype,
            "scaling_factor": config.scaling_factor,
            "fingerprint": self._fingerprint,
        }
        if settings.latents == "sample":
            entry["seed"] = self._store.seed(clip.sha256, clip.start)
        return entry


def _timed(feed: Prefetcher, result: Result) -> Iterator[Any]:
    feed_events = iter(feed)
    while True:
        with result.timing("wait"):
            event = next(feed_events, None)
        if event is None:
            return
        yield event


@contextlib.contextmanager
def _noting_memory(result: Result, pixels: np.ndarray) -> Iterator[None]:
    """Makes an error for want of memory the problem of one source, so that the run goes on."""
    try:
        yield
    except RuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        height, width = pixels.shape[2:4]
        result.problem = f"frames of {height}x{width} do not fit into memory: name a smaller size."


def noise_key(seed: int) -> Array:
    """Returns the key that a sample was drawn with, of the `seed` in its metadata.

    It is the threefry key that `jax.random.key(seed)` gives with 64-bit numbers enabled. Without
    them `jax.random.key` drops the upper half of a seed.

    !!! Example

        ```python
        >>> import jax
        >>> from eqx_cogvae import dataset
        >>> jax.random.key_data(dataset.noise_key(5 * 2**32 + 7)).tolist()
        [5, 7]

        ```

    **Arguments:**

    - `seed`: from 0 to 2^64 - 1.

    **Returns:** a key for `jax.random`.
    """
    halves = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(halves), impl="threefry2x32")


def _on(vae: VAE, device: Any) -> VAE:
    arrays, rest = eqx.partition(vae, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, device), rest)


def _shared(items: Iterator[Any], workers: list[Callable[[Any], Any]]) -> Iterator[Any]:
    """Yields the results of items; each worker takes the next item when it is free."""
    lock = threading.Lock()

    def take(worker: Callable[[Any], Any]) -> Any:
        with lock:
            item = next(items, None)
        return None if item is None else (worker, worker(item))

    with ThreadPoolExecutor(len(workers), "device") as pool:
        running = {pool.submit(take, worker) for worker in workers}
        while running:
            future = next(as_completed(running))
            running.discard(future)
            done = future.result()
            if done is not None:
                running.add(pool.submit(take, done[0]))
                yield done[1]


__all__ = ["Encoder", "PixelStep", "noise_key"]
