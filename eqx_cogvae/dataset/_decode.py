"""Latents to videos, for looking at what a trainer reads or a sampler wrote."""

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from .. import video
from .._autoencoder import VAE
from .._frames import LATENT_BATCH, frame_batches
from .._latents import Latents, load_latents
from .._transforms.base import continued, jitted_step
from .._transforms.streamed import as_uint8
from .._types import Cache
from ._clips import reason
from ._results import OUT_OF_MEMORY, Result
from ._sources import Item
from ._store import digest, prepared
from ._text import label

_DIGITS = 20
_FPS = 8.0
RESERVED = frozenset(("source", "frames", "fps", "encoded_by", "file"))
"""The names of the manifest's own columns."""


def to_decode(vae: VAE, record: Latents, first: int | None = None) -> tuple[Array, int]:
    """Returns latents in the VAE's units, and the number of the video's frames.

    Latents in the diffusion model's units are divided by the factor that their file names; the
    model's own factor serves where the file names none. What is decoded beyond the number of
    frames is padding. `first` latents are decoded in the first batch, as in `framewise`.
    """
    array = jnp.asarray(record.array)
    if record.scaled:
        factor = vae.config.scaling_factor
        ratio = factor / (record.scaling_factor or factor)
        if ratio != 1:
            array = (array.astype(jnp.float32) * ratio).astype(array.dtype)
        array = vae.unscale_latents(array)
    count = vae.config.sample_frames(array.shape[1], first)
    return array, min(record.frames or count, count)


class PixelDecodeStep(eqx.Module):
    """Applies `VAE.decode_step`; gives pixels, and whether all that they come from is finite."""

    vae: VAE

    def __call__(
        self, latents: Float[Array, "b t h w z"], cache: Cache = None
    ) -> tuple[tuple[UInt8[Array, "b t2 h2 w2 c"], Bool[Array, ""]], Cache]:
        frames, cache = self.vae.decode_step(latents, cache)
        pixels, _ = as_uint8(lambda x, cache: (x, cache))(frames)
        return (pixels, jnp.isfinite(frames).all()), cache


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decodes latents files into a folder, several at a time: one is written as another decodes."""

    vae: VAE
    root: Path
    weights: str
    fps: float | int | None = None
    layout: str | None = None
    threads: int = 2
    first: int | None = None

    def __call__(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yields the results of latents files, in order."""
        with ThreadPoolExecutor(self.threads, "decode") as pool:
            yield from pool.map(self._decode, items)

    def _decode(self, item: Item) -> Result:
        result = Result(item.name, item.rows)
        path = item.path
        try:
            with item.local() as (path, sha256):
                with result.timing("read"):
                    channels = self.vae.config.latent_channels
                    record = load_latents(path, channels=channels, layout=self.layout)
                if len(record.array) != 1:
                    raise ValueError(f"{path} holds {len(record.array)} clips, expected one.")
        except (ValueError, OSError) as error:
            result.problem = reason(error, path, item)
            return result
        try:
            self._write(item, sha256, record, result)
        # An OSError is of the disk that is written to: it ends the run.
        except ValueError as error:
            result.problem = reason(error, path, item)
        except RuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            size = "x".join(map(str, record.array.shape[2:4]))
            result.problem = f"latents of {size} do not fit into memory when decoded."
        return result

    def _write(self, item: Item, sha256: str, record: Latents, result: Result) -> None:
        fps = float(self.fps or record.fps or _FPS)
        video.check_rate(fps)
        array, count = to_decode(self.vae, record, self.first)
        # A file of another factor was once decoded by the model's: it is another video now.
        own = (record.scaling_factor,) if record.scaled and record.scaling_factor else ()
        factor = () if own == (self.vae.config.scaling_factor,) else own
        batching = () if self.first is None else ("first", self.first)
        options = (fps, self.layout, *factor, *batching)
        key = digest("decoded", self.weights, sha256, item.name, *options)
        path = prepared(self.root / f"{label(item.name, 80)}-{key[:_DIGITS]}.mp4")
        if not _is_whole(path):
            with result.timing("write"):
                video.write(path, self._frames(np.asarray(array), count, result), fps=fps)
            result.spend("write", -result.spent["decode"])
            result.written = 1
        known = {"source": item.name, "frames": count, "fps": fps, "encoded_by": record.fingerprint}
        result.clips = [known | {"file": path.name}]

    def _frames(
        self, latents: Float[np.ndarray, "1 t h w c"], count: int, result: Result
    ) -> Iterator[UInt8[np.ndarray, "1 t2 h2 w2 3"]]:
        step, cache, start, done = PixelDecodeStep(self.vae), None, 0, 0
        for size in frame_batches(latents.shape[1], LATENT_BATCH, self.first):
            if done >= count:
                return
            with result.timing("decode"):
                batch = latents[:, start : start + size]
                (pixels, finite), cache = jitted_step((step, batch), cache)
                cache = cache if self.first is None else continued(cache)
                frames = np.asarray(pixels)
            if not finite:
                raise ValueError(
                    f"its latents decode to NaN or infinite values from frame {done} on: decode "
                    "with float32 or bfloat16, and check what made them."
                )
            yield frames[:, : count - done]
            start, done = start + size, done + frames.shape[1]


def _is_whole(path: Path) -> bool:
    """True for a video that a crash of the machine did not cut short or empty."""
    try:
        return video.info(path).frames > 0
    except (OSError, ValueError):
        return False


__all__ = ["RESERVED", "Decoder", "PixelDecodeStep", "to_decode"]
