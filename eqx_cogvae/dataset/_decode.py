"""Latents to videos: for looking at what a trainer reads or a sampler wrote."""

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, UInt8

from .. import video
from .._autoencoder import VAE
from .._cli.passes import to_decode
from .._frames import LATENT_BATCH
from .._latents import Latents, load_latents
from .._transforms.streamed import as_uint8, streamed
from ._encode import Result
from ._sources import Item
from ._store import digest, label, prepared

_DIGITS = 20
_FPS = 8.0


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decodes latents files into a folder, several at a time: one is written as another decodes."""

    vae: VAE
    root: Path
    weights: str
    fps: float | int | None = None
    layout: str | None = None
    threads: int = 2

    def __call__(self, items: Iterable[Item]) -> Iterator[Result]:
        """The results of latents files, in order."""
        with ThreadPoolExecutor(self.threads, "decode") as pool:
            yield from pool.map(self._decode, items)

    def _decode(self, item: Item) -> Result:
        result = Result(item.name)
        path = item.path
        try:
            with item.local() as (path, sha256):
                with result.timing("read"):
                    channels = self.vae.config.latent_channels
                    record = load_latents(path, channels=channels, layout=self.layout)
                if len(record.array) != 1:
                    raise ValueError(f"{path} holds {len(record.array)} clips, expected one.")
        except (ValueError, OSError) as error:
            result.problem = " ".join(str(error).replace(str(path), item.name).split())
            return result
        self._write(item, sha256, record, result)
        return result

    def _write(self, item: Item, sha256: str, record: Latents, result: Result) -> None:
        array, count = to_decode(self.vae, record)
        fps = float(self.fps or record.fps or _FPS)
        key = digest("decoded", self.weights, sha256, item.name, fps, self.layout)
        path = prepared(self.root / f"{label(item.name, 80)}-{key[:_DIGITS]}.mp4")
        if not path.exists():
            with result.timing("write"):
                video.write(path, self._frames(array, count, result), fps=fps)
            result.spend("write", -result.spent["decode"])
            result.written = 1
        known = {"source": item.name, "frames": count, "fps": fps, "encoded_by": record.fingerprint}
        result.clips = [item.fields | known | {"file": path.name}]

    def _frames(
        self, latents: Float[Array, "1 t h w c"], count: int, result: Result
    ) -> Iterator[UInt8[np.ndarray, "1 t2 h2 w2 3"]]:
        stream = streamed(as_uint8(self.vae.decode_step), LATENT_BATCH)(latents)
        while count > 0:
            with result.timing("decode"):
                frames = np.asarray(next(stream))[:, :count]
            count -= frames.shape[1]
            yield frames


__all__ = ["Decoder"]
