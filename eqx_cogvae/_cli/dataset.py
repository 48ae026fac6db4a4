"""The commands `encode-dataset` and `decode-dataset`."""

import sys
import time
from types import SimpleNamespace
from typing import Any

import click
import jax.numpy as jnp

import eqx_cogvae as cv

from .. import dataset
from .._latents import LAYOUTS
from ..dataset._run import ENGINES
from ..dataset._settings import KINDS, TAILS
from ..dataset._store import CONTAINERS
from . import options
from .messages import note

_REPORT_SECONDS = 30.0
_MOST_SHOWN = 5
_DEFAULT = dataset.Settings()
_FAILED = 1

_common = options.added(
    options.path("source", "SRC"),
    options.path("destination", "DST"),
    options.model(required=True),
    click.option("--shard", type=options.Shard(), default=(0, 1), help="0/8 to 7/8: a part."),
    click.option("--strict", is_flag=True, help="Exit with 1 where anything was skipped."),
)


@click.command("encode-dataset", cls=options.Command, short_help="Encode many videos.")
@_common
@click.option(
    "--frames", type=options.Frames(), default=_DEFAULT.frames, help="8k + 1, or all; default: 49."
)
@options.size(several=True)
@click.option(
    "--latents", type=click.Choice(KINDS), default=_DEFAULT.latents, help="Default: mode."
)
@click.option("--seed", type=options.INDEX, default=_DEFAULT.seed, help="Of samples; default: 0.")
@click.option(
    "--layout", type=click.Choice(LAYOUTS), default=_DEFAULT.layout, help="Default: BTHWC."
)
@click.option(
    "--tail", type=click.Choice(TAILS), default=_DEFAULT.tail, help="Of a video; default: drop."
)
@click.option(
    "--format", type=click.Choice(CONTAINERS), default=CONTAINERS[0], help="Default: safetensors."
)
@click.option("--per-tar", type=int, default=1000, metavar="CLIPS", help="Default: 1000.")
@click.option("--engine", type=click.Choice(ENGINES), default=ENGINES[0], help="Default: local.")
@click.option(
    "--actors", type=options.COUNT, help="Of Ray, at most; default: one for each accelerator."
)
@click.option("--decoders", type=int, default=2, help="Threads that decode videos; default: 2.")
def encode(**given: Any) -> int:
    """Encode a dataset of videos, SRC, into latents in the folder DST.

    SRC is a folder, a WebDataset tar, or a list (txt, csv, tsv, json, jsonl, parquet).
    """
    chosen = SimpleNamespace(**given)
    settings = dataset.Settings(
        frames=chosen.frames,
        sizes=options.chosen_sizes(chosen.size, chosen.height, chosen.width),
        fps=chosen.fps,
        latents=chosen.latents,
        seed=chosen.seed,
        layout=chosen.layout,
        tail=chosen.tail,
    )
    summary = dataset.encode(
        _model(chosen),
        chosen.source,
        chosen.destination,
        settings,
        container=chosen.format,
        per_tar=chosen.per_tar,
        shard=chosen.shard,
        engine=chosen.engine,
        decoders=chosen.decoders,
        actors=chosen.actors,
        progress=_Line("clips"),
    )
    return _status(summary, strict=chosen.strict)


@click.command("decode-dataset", cls=options.Command, short_help="Decode many latents files.")
@_common
@options.layout()
@options.first()
@click.option("--threads", type=int, default=2, help="Files at a time; default: 2.")
def decode(**given: Any) -> int:
    """Decode a dataset of latents, SRC, into videos in the folder DST.

    SRC is a folder, a tar or a list of latents files.
    """
    chosen = SimpleNamespace(**given)
    summary = dataset.decode(
        _model(chosen),
        chosen.source,
        chosen.destination,
        fps=chosen.fps,
        layout=chosen.layout,
        first=chosen.first,
        shard=chosen.shard,
        threads=chosen.threads,
        progress=_Line("videos"),
    )
    return _status(summary, strict=chosen.strict)


def _model(chosen: SimpleNamespace) -> cv.VAE:
    return cv.from_pretrained(chosen.model, dtype=jnp.dtype(chosen.dtype))


def _status(summary: dataset.Summary, *, strict: bool) -> int:
    """Prints what came of a run, and returns its exit status."""
    for source, reason in summary.skipped[:_MOST_SHOWN]:
        note(f"skipped {source}: {reason}")
    if len(summary.skipped) > _MOST_SHOWN:
        note(f"skipped {len(summary.skipped) - _MOST_SHOWN} more: skipped.jsonl tells why")
    print(summary)
    if summary.skipped and not summary.clips:
        note(f"error: all of the {summary.sources} sources failed: skipped.jsonl tells why")
        return _FAILED
    if summary.skipped and strict:
        note(f"error: {len(summary.skipped)} sources were skipped, and --strict allows none")
        return _FAILED
    return 0


class _Line:
    """Shows progress on stderr: a terminal has one line that changes, a file one now and then."""

    def __init__(self, unit: str):
        self._unit, self._shown = unit, time.monotonic()
        self._live = sys.stderr.isatty()

    def __call__(self, progress: dataset.Progress) -> None:
        last = progress.sources == progress.of
        if not self._live and time.monotonic() - self._shown < _REPORT_SECONDS:
            return
        self._shown = time.monotonic()
        text = (
            f"{progress.sources}/{progress.of} sources, {progress.written} {self._unit}, "
            f"{progress.clips_per_second:.2f} {self._unit}/s, {_left(progress.seconds_left)}"
        )
        end = "\n" if last or not self._live else ""
        print(f"\r{text}\x1b[K" if self._live else text, end=end, file=sys.stderr, flush=True)


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "time left not known yet"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} left"


__all__ = ["decode", "encode"]
