"""The commands `encode-dataset` and `decode-dataset`."""

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import dataset
from ..dataset import _store as store
from ..dataset._run import ENGINES

_EVERY = 30.0
_BRIEF = 5


def add_commands(
    commands: Any, load: Callable[[argparse.Namespace], Any], note: Callable[[str], None]
) -> None:
    """Adds both to a parser's commands; `load` gives the model that options name."""
    for run, about in (
        (_encode, "videos to latents, a whole dataset"),
        (_decode, "latents to videos, a whole dataset"),
    ):
        command = commands.add_parser(f"{run.__name__[1:]}-dataset", help=about, description=about)
        command.set_defaults(run=lambda options, run=run: run(options, load, note))
        command.add_argument("source", type=Path, metavar="SRC", help="folder, tar or list")
        command.add_argument("destination", type=Path, metavar="DST", help="a folder")
        command.add_argument("--model", default="tiny", help="directory or hub id; default: tiny")
        command.add_argument(
            "--dtype", choices=("float32", "bfloat16", "float16"), default="float32"
        )
        command.add_argument("--fps", type=float, help="default: as the input has it")
        command.add_argument(
            "--shard", type=_shard, default=(0, 1), metavar="I/N", help="0/8 to 7/8: a part of all"
        )
        (_add_encoding if run is _encode else _add_decoding)(command)


def _add_encoding(command: argparse.ArgumentParser) -> None:
    default = dataset.Settings()
    add = command.add_argument
    add("--frames", type=_frames, default=default.frames, help="8k + 1, or all; default: 49")
    add("--height", type=int, help="in pixels; with --width")
    add("--width", type=int)
    add(
        "--buckets", nargs="+", type=_size, metavar="HxW", help="sizes, the nearest aspect is taken"
    )
    add("--latents", choices=store.KINDS, default=default.latents, help="default: mode")
    add("--seed", type=int, default=default.seed, help="of samples; default: 0")
    add("--layout", choices=("BTHWC", "BCTHW"), default=default.layout, help="default: BTHWC")
    add("--tail", choices=store.TAILS, default=default.tail, help="of a video; default: drop")
    add("--format", choices=store.CONTAINERS, default="safetensors", help="default: safetensors")
    add("--per-tar", type=int, default=1000, metavar="CLIPS", help="default: 1000")
    add("--engine", choices=ENGINES, default="local", help="default: local")
    add("--actors", type=int, help="of Ray, at most; default: one for each accelerator")
    add("--decoders", type=int, default=2, help="threads that decode videos; default: 2")


def _add_decoding(command: argparse.ArgumentParser) -> None:
    command.add_argument("--layout", choices=("BTHWC", "BCTHW"), help="where not said")
    command.add_argument("--threads", type=int, default=2, help="files at a time; default: 2")


def _encode(options: argparse.Namespace, load: Callable, note: Callable[[str], None]) -> None:
    settings = dataset.Settings(
        frames=options.frames,
        sizes=_sizes(options),
        fps=options.fps,
        latents=options.latents,
        seed=options.seed,
        layout=options.layout,
        tail=options.tail,
    )
    _report(
        dataset.encode(
            load(options),
            options.source,
            options.destination,
            settings,
            container=options.format,
            per_tar=options.per_tar,
            shard=options.shard,
            engine=options.engine,
            decoders=options.decoders,
            actors=options.actors,
            progress=_Line("clips"),
        ),
        note,
    )


def _decode(options: argparse.Namespace, load: Callable, note: Callable[[str], None]) -> None:
    _report(
        dataset.decode(
            load(options),
            options.source,
            options.destination,
            fps=options.fps,
            layout=options.layout,
            shard=options.shard,
            threads=options.threads,
            progress=_Line("videos"),
        ),
        note,
    )


def _report(summary: dataset.Summary, note: Callable[[str], None]) -> None:
    for source, reason in summary.skipped[:_BRIEF]:
        note(f"skipped {source}: {reason}")
    if len(summary.skipped) > _BRIEF:
        note(f"skipped {len(summary.skipped) - _BRIEF} more: skipped.jsonl tells why")
    print(summary)


class _Line:
    """Progress on stderr: one line that changes on a terminal, now and then a line elsewhere."""

    def __init__(self, unit: str):
        self._unit, self._shown = unit, time.monotonic()
        self._live = sys.stderr.isatty()

    def __call__(self, progress: dataset.Progress) -> None:
        last = progress.sources == progress.of
        if not self._live and time.monotonic() - self._shown < _EVERY:
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


def _sizes(options: argparse.Namespace) -> tuple[tuple[int, int], ...]:
    if (options.height is None) != (options.width is None):
        raise ValueError("--height and --width go together, give both.")
    if options.height is None:
        return tuple(options.buckets or ())
    if options.buckets:
        raise ValueError("--buckets are sizes already, leave --height and --width out.")
    return ((options.height, options.width),)


def _frames(text: str) -> int | None:
    if text == "all":
        return None
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected 8k + 1 frames or `all`, got {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"a size is HEIGHTxWIDTH, such as 480x720, got {text!r}")
    return int(match[1]), int(match[2])


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/([1-9]\d*)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"a shard is I/N, from 0/N on, such as 0/8, got {text!r}")
    return int(match[1]), int(match[2])


__all__ = ["add_commands"]
