"""Runs over whole datasets."""

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from .. import video
from .._autoencoder import VAE
from .._checks import warn
from .._files import check_folder
from .._frames import LATENT_BATCH
from .._latents import check_layout, exact_fingerprint, fingerprint
from .._transforms.base import check_batch_size
from ._decode import RESERVED, Decoder
from ._encode import Encoder
from ._lock import held
from ._results import Result, with_columns
from ._settings import Settings
from ._sources import LATENTS, VIDEOS, find, shard_of
from ._store import Store, suffix_of, write_lines

ENGINES = ("local", "ray")


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a run after a source, as the `progress` of `encode` and `decode` gets it."""

    sources: int
    """Number of sources done."""
    of: int
    """Number of all sources."""
    written: int
    """Number of clips, or videos, that this run wrote."""
    seconds: float
    """Seconds since the run began."""
    fresh: int = 0
    """Number of sources of which this run wrote something."""

    @property
    def clips_per_second(self) -> float:
        """Clips written per second, so far."""
        return self.written / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Seconds left, by the pace of sources that gave something new; None before the first."""
        if not self.fresh:
            return None
        return (self.of - self.sources) * self.seconds / self.fresh


@dataclasses.dataclass(frozen=True)
class Summary:
    """The sum of a run; print it for a table."""

    sources: int
    """Number of sources."""
    clips: int
    """Number of clips, or videos, that there are now."""
    written: int
    """Number of those that this run wrote."""
    skipped: tuple[tuple[str, str], ...]
    """Name of each source that was not read to its end, and the reason."""
    seconds: float
    """Seconds that the run took."""
    spent: Mapping[str, float]
    """Seconds by kind of work: of `encode`, in the threads that decode videos (`decode`), waiting
    for them (`wait`), in the model (`encode`) and writing (`write`). Little `wait` means that the
    model is the bottleneck. Of `decode`, reading, decoding and writing."""

    def __str__(self) -> str:
        rows = [
            ("sources", f"{self.sources}"),
            ("skipped", f"{len(self.skipped)}"),
            ("clips", f"{self.clips}"),
            ("written now", f"{self.written}"),
            ("clips per second", f"{self.written / max(self.seconds, 1e-9):.2f}"),
            ("seconds", f"{self.seconds:.1f}"),
            *((f"seconds in {name}", f"{spent:.1f}") for name, spent in self.spent.items()),
        ]
        return "\n".join(f"{name:18}{value:>12}" for name, value in rows)


Watch: TypeAlias = Callable[[Progress], Any]


def encode(
    vae: VAE,
    source: str | os.PathLike,
    destination: str | os.PathLike,
    settings: Settings | None = None,
    *,
    container: str = "safetensors",
    per_tar: int = 1000,
    shard: tuple[int, int] = (0, 1),
    engine: str = "local",
    decoders: int = 2,
    actors: int | None = None,
    progress: Watch | None = None,
) -> Summary:
    """Encodes the videos of a dataset, clip by clip, into latents files.

    !!! Example

        ```python
        from pathlib import Path
        from eqx_cogvae import dataset, video

        Path("videos").mkdir(exist_ok=True)
        video.write("videos/a.mp4", video.procedural_clip(20, 64, 96))
        summary = dataset.encode(vae, "videos", "latents", dataset.Settings(frames=9))
        assert (summary.sources, summary.clips) == (1, 2)
        ```

    `destination` gets `latents/xx/NAME-START-KEY.safetensors`, which `python -m eqx_cogvae decode`
    reads; `manifest.jsonl`, a line for each clip of these sources and settings, and for each row
    that names its video; `skipped.jsonl`, the sources that could not be read to their end, each
    with its reason; and `records/`, by which a later run knows finished videos. Clips before a
    fault are kept. KEY is a hash of the video's bytes and name, the settings, every bit of the
    weights, and where the clip begins. One clip is encoded at a time, so its bytes depend on
    nothing but these, on one kind of device and one version of JAX.

    **Arguments:**

    - `vae`: the model. Its dtype is that of the latents.
    - `source`: a folder; a WebDataset tar, or a folder of them; a list of files as `.txt`,
        `.csv`, `.tsv`, `.jsonl`, `.json` or `.parquet`, under `video`, `path`, `file_name` or
        the like, whose other columns go into the manifest; or one video. In folders and tars,
        `NAME.txt` is the caption and `NAME.json` the columns of the video NAME. A column that
        the manifest has itself, such as `fps`, is kept as `input_fps`.
    - `destination`: a folder, created if it is not there.
    - `settings`: a `Settings`; None has its defaults.
    - `container`: `"safetensors"`, or `"webdataset"`: at the end of the run the files move into
        `latents-000000.tar` and so on.
    - `per_tar`: clips in a tar.
    - `shard`: `(i, n)`, every n-th video from the i-th on; all shards may share a destination.
        Their lists are `manifest-i-of-n.jsonl`.
    - `engine`: `"local"`, on every device of this process, or `"ray"`, Ray Data, with an actor
        for each accelerator of the cluster; sources and destination must be there on each node.
    - `decoders`: number of threads that decode videos ahead of the model, per process.
    - `actors`: number of Ray's actors at most; None is one for each accelerator.
    - `progress`: called with a `Progress` after each video.

    **Returns:** a `Summary`. A warning names videos with fewer frames per second than
    `settings.fps`.

    **Raises:** `FileNotFoundError` or `ValueError` for a source that is not there, a list that
    cannot be read, or settings that do not suit the model; `BlockingIOError` if another run
    writes to the same shard of the destination; `OSError` if results cannot be written;
    `ImportError` for an extra that is missing.
    """
    settings = settings or Settings()
    _check(vae, settings, engine, decoders)
    items = shard_of(find(Path(source), VIDEOS), shard)
    root = _folder(destination)
    store = Store(root, settings, exact_fingerprint(vae), container, per_tar, shard)
    with held(root, suffix_of(shard)):
        store.repair()
        results: Iterable[Result]
        if engine == "ray":
            from ._ray import encode_with_ray

            results = encode_with_ray(vae, store, items, threads=decoders, actors=actors)
        else:
            results = Encoder(vae, store, fingerprint(vae), decoders)(items)
        results = _telling_of_slow(results, settings.fps)
        gathered, seconds = _gathered(results, len(items), progress)
        store.close(gathered, _skipped(gathered))
    return _summary(gathered, seconds, ("decode", "wait", "encode", "write"))


def decode(
    vae: VAE,
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    fps: float | int | None = None,
    layout: str | None = None,
    first: int | None = None,
    shard: tuple[int, int] = (0, 1),
    threads: int = 2,
    progress: Watch | None = None,
) -> Summary:
    """Decodes latents files, those of `encode` or of others, into `.mp4` files for looking at.

    `destination` gets `NAME-KEY.mp4`, a `manifest.jsonl` with a line for each, and
    `skipped.jsonl`, the files that cannot be read or do not decode to finite video. KEY is a hash
    of the file, its name, the weights and the options, so that a run that is repeated does only
    what is missing. Scaled latents are divided by the factor that their file names.

    **Arguments:**

    - `vae`: the model.
    - `source`: a folder of `.safetensors`, or of WebDataset tars that hold such; a tar; a list, as
        for `encode`; or one file.
    - `destination`: a folder, created if it is not there.
    - `fps`: frames per second of the videos; None is the rate in the file, or 8.
    - `layout`: the layout of latents whose file does not say, `"BTHWC"` or `"BCTHW"`.
    - `first`: number of latents in the first batch, as in `framewise`; CogVideoX-Fun takes 1.
    - `shard`, `progress`: as for `encode`.
    - `threads`: number of files at a time: one is compressed while another decodes.

    **Returns:** a `Summary`. A warning names latents that another model encoded.

    **Raises:** as `encode`.
    """
    if layout is not None:
        check_layout(layout)
    _check_counts(threads=threads)
    check_batch_size(LATENT_BATCH, first)
    if fps is not None:
        video.check_rate(fps)
    video.check_installed()
    items = shard_of(find(Path(source), LATENTS), shard)
    root = _folder(destination)
    decoder = Decoder(vae, root, exact_fingerprint(vae), fps, layout, threads, first)
    suffix = suffix_of(shard)
    with held(root, suffix):
        gathered, seconds = _gathered(decoder(items), len(items), progress)
        pairs = [(clip, row) for r in gathered for clip in r.clips for row in r.rows]
        lines = [with_columns(clip, row, RESERVED) for clip, row in pairs]
        write_lines(root / f"manifest{suffix}.jsonl", lines)
        write_lines(root / f"skipped{suffix}.jsonl", _skipped(gathered))
    _warn_of_others(lines, fingerprint(vae))
    return _summary(gathered, seconds, ("read", "decode", "write"))


def _check(vae: VAE, settings: Settings, engine: str, decoders: int) -> None:
    cell = vae.config.spatial_compression
    wrong = [size for size in settings.sizes if size[0] % cell or size[1] % cell]
    if wrong:
        near = tuple(max(cell, round(side / cell) * cell) for side in wrong[0])
        raise ValueError(f"`sizes` must be multiples of {cell}, got {wrong[0]}: try {near}.")
    if engine not in ENGINES:
        raise ValueError(f"`engine` is one of {', '.join(ENGINES)}, got {engine!r}.")
    _check_counts(decoders=decoders)
    video.check_installed()


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")


def _folder(destination: str | os.PathLike) -> Path:
    root = Path(destination)
    check_folder(root)
    root.mkdir(parents=True, exist_ok=True)
    return root


def _gathered(
    results: Iterable[Result], count: int, progress: Watch | None
) -> tuple[list[Result], float]:
    """Returns all results, sorted by their sources' names, and the seconds that they took."""
    begun = time.perf_counter()
    gathered, written, fresh = [], 0, 0
    for result in results:
        gathered.append(result)
        written += result.written
        fresh += bool(result.written)
        if progress is not None:
            passed = time.perf_counter() - begun
            progress(Progress(len(gathered), count, written, passed, fresh))
    gathered.sort(key=lambda result: result.source)
    return gathered, time.perf_counter() - begun


def _skipped(results: Iterable[Result]) -> list[dict[str, Any]]:
    return [{"source": r.source, "reason": r.problem} for r in results if r.problem]


def _summary(results: list[Result], seconds: float, names: tuple[str, ...]) -> Summary:
    spent = {name: sum((result.spent.get(name, 0.0) for result in results), 0.0) for name in names}
    return Summary(
        len(results),
        sum(len(result.clips) for result in results),
        sum(result.written for result in results),
        tuple((result.source, result.problem) for result in results if result.problem),
        seconds,
        spent,
    )


def _telling_of_slow(results: Iterable[Result], fps: float | int | None) -> Iterator[Result]:
    """Passes results on; warns of the first video that lacks frames, and of their number."""
    count = 0
    for result in results:
        if result.slow is not None and not count:
            warn(
                f"{result.source} has {result.slow:g} frames a second, fewer than the {fps:g} that "
                "were asked for: frames are repeated. Leave `fps` out to take each as it is."
            )
        count += result.slow is not None
        yield result
    if count > 1:
        warn(f"{count} videos have fewer than {fps:g} frames a second: some were repeated.")


def _warn_of_others(clips: list[dict[str, Any]], mine: str) -> None:
    others = Counter(c["encoded_by"] for c in clips if c["encoded_by"] not in (None, mine))
    for other, count in sorted(others.items()):
        warn(f"{count} latents were encoded by model {other}, and decoded by {mine}.")


__all__ = ["Progress", "Settings", "Summary", "decode", "encode"]
