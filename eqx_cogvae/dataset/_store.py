"""Where a dataset's results lie: under names that only what they were made of decides."""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import atomic
from .._frames import SAMPLE_BATCH
from .._latents import check_layout

_FORMAT = "eqx_cogvae.dataset.1"
_DIGITS = 20
_SEED_DIGITS = 7
KINDS = ("mode", "sample", "posterior")
TAILS = ("drop", "shorten", "pad")
CONTAINERS = ("safetensors", "webdataset")
Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What becomes of a video; with the weights and the video's bytes it decides every result.

    !!! Example

        ```python
        >>> from eqx_cogvae import dataset
        >>> dataset.Settings(frames=17, sizes=((480, 720), (720, 480)), fps=8).tail
        'drop'

        ```

    **Arguments:**

    - `frames`: of a clip, 8k + 1. A longer video is cut into clips that follow on each other.
        None takes each video whole, in constant memory, its last frame repeated up to 8k + 1.
    - `sizes`: (height, width) in pixels, multiples of 8. A video is cropped about its centre and
        resized to the one of the nearest aspect ratio. Without any, its own size is cut down to
        multiples of 8; each size that occurs compiles two programs.
    - `fps`: frames a second that are picked out of the video; None takes all.
    - `latents`: `"mode"`; `"sample"`, drawn with a seed of its own for each clip, which depends
        on what the video, the settings and the weights are and on nothing else; or `"posterior"`,
        the mean as `latents` and beside it `logvar`.
    - `seed`: for samples, of all clips.
    - `layout`: `"BTHWC"`, or `"BCTHW"` as torch has it.
    - `tail`: what becomes of frames at a video's end that are too few for a clip: `"drop"`;
        `"shorten"` to the last 8k + 1; `"pad"`, with the last frame, to the next 8k + 1.

    **Raises:** `ValueError` for values outside of these.
    """

    frames: int | None = 49
    sizes: tuple[tuple[int, int], ...] = ()
    fps: float | int | None = None
    latents: str = "mode"
    seed: int = 0
    layout: str = "BTHWC"
    tail: str = "drop"

    def __post_init__(self):
        if self.frames is not None and (self.frames < 1 or self.frames % SAMPLE_BATCH != 1):
            low = max(self.frames - 1, 0) // SAMPLE_BATCH * SAMPLE_BATCH + 1
            raise ValueError(
                f"`frames` must be 8k + 1, got {self.frames}: "
                f"the nearest are {low} and {low + SAMPLE_BATCH}."
            )
        if any(len(size) != 2 or min(size) < 1 for size in self.sizes):
            raise ValueError(f"`sizes` must be of (height, width) in pixels, got {self.sizes}.")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"`fps` must be a positive number, got {self.fps}.")
        for name, value, allowed in (
            ("latents", self.latents, KINDS),
            ("tail", self.tail, TAILS),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` is one of {', '.join(allowed)}, got {value!r}.")
        check_layout(self.layout)

    def identity(self) -> dict[str, Any]:
        """The fields that make a difference."""
        fields = dataclasses.asdict(self)
        if self.latents != "sample":
            del fields["seed"]
        if self.frames is None:
            del fields["tail"]
        return fields | {"fps": None if self.fps is None else float(self.fps)}


def digest(*parts: Any) -> str:
    """64 hexadecimal digits of anything that JSON can say."""
    return hashlib.sha256(json.dumps([_FORMAT, *parts], sort_keys=True).encode()).hexdigest()


def label(name: str, length: int = 40) -> str:
    """A file's name, shorn of what would be awkward in another's: no dots, for WebDataset."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem)[:length] or "_"


def prepared(path: Path) -> Path:
    """The path, its folder made, and rid of what a killed process had begun to write there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.stem}.*.partial{path.suffix}"):
        stale.unlink(missing_ok=True)
    return path


def suffix_of(shard: tuple[int, int]) -> str:
    """What the lists of one shard among several have in their names."""
    return "" if shard[1] == 1 else "-{}-of-{}".format(*shard)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, atomically."""
    with atomic(prepared(path)) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclasses.dataclass(frozen=True)
class Record:
    """What a video gave: so many frames, at the settings' rate, and these clips of them."""

    source: str
    frames: int
    clips: list[Entry]


@dataclasses.dataclass(frozen=True)
class Store:
    """The folder that a dataset is encoded into, seen by one model with one kind of settings.

    A clip is `latents/xx/NAME-START-KEY.safetensors`, or a member of a tar under that name; what
    a finished video gave is in `records/`. `shard` is (i, n) and only names lists and tars.
    """

    root: Path
    settings: Settings
    weights: str
    container: str = "safetensors"
    per_tar: int = 1000
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self):
        if self.container not in CONTAINERS:
            raise ValueError(
                f"`container` is one of {', '.join(CONTAINERS)}, got {self.container!r}."
            )
        if self.per_tar < 1:
            raise ValueError(f"`per_tar` must be at least 1 clip, got {self.per_tar}.")

    def clip(self, name: str, sha256: str, start: int) -> str:
        """The id of a clip: no two differ in content and share one."""
        key = digest(self.weights, self.settings.identity(), sha256, name, start)
        return f"{label(name)}-{start:06d}-{key[:_DIGITS]}"

    def seed(self, sha256: str, start: int) -> int:
        """Of the noise of a clip: equal for a video under another name."""
        key = digest(self.weights, self.settings.identity(), sha256, start)
        return int(key[:_SEED_DIGITS], 16)

    def path(self, clip: str) -> Path:
        """Where a clip's own file lies."""
        return self.root / "latents" / clip.rpartition("-")[2][:2] / f"{clip}.safetensors"

    def has(self, clip: str) -> bool:
        """Whether a clip is done, as a file or in a tar."""
        return clip in self.packed or self.path(clip).exists()

    def record(self, name: str, sha256: str) -> Path:
        """Where it is told what a video gave, once all of it is there."""
        key = digest(self.weights, self.settings.identity(), sha256, name)[:_DIGITS]
        return self.root / "records" / key[:2] / f"{key}.json"

    def finished(self, name: str, sha256: str) -> Record | None:
        """What a video gave; None where it was not done, or a clip of it is missing."""
        path = self.record(name, sha256)
        if not path.exists():
            return None
        record = Record(**json.loads(path.read_text()))
        return record if all(self.has(clip["id"]) for clip in record.clips) else None

    def finish(self, name: str, sha256: str, record: Record) -> None:
        """Says that a video is done."""
        with atomic(prepared(self.record(name, sha256))) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(record)))

    @functools.cached_property
    def packed(self) -> dict[str, str]:
        """The tar of each clip that is in one."""
        found = {}
        for path in sorted(self.root.glob("latents-*.tar")):
            with tarfile.open(path, "r:") as tar:
                for name in tar.getnames():
                    found[name.partition(".")[0]] = path.name
        return found

    def pack(self, clips: Sequence[Entry]) -> None:
        """Moves clips from files of their own into tars, in order."""
        for clip in clips:
            if clip["id"] in self.packed:
                self.path(clip["id"]).unlink(missing_ok=True)
        waiting = iter([clip for clip in clips if clip["id"] not in self.packed])
        while group := list(itertools.islice(waiting, self.per_tar)):
            path = next(path for path in self._tars() if not path.exists())
            with atomic(prepared(path)) as partial, tarfile.open(partial, "w") as tar:
                for clip in group:
                    content = self.path(clip["id"]).read_bytes()
                    _add(tar, f"{clip['id']}.safetensors", content)
                    _add(tar, f"{clip['id']}.json", json.dumps(clip).encode())
            for clip in group:
                self.packed[clip["id"]] = path.name
                self.path(clip["id"]).unlink()

    def _tars(self) -> Iterator[Path]:
        names = (f"latents{self._suffix}-{number:06d}.tar" for number in itertools.count())
        return (self.root / name for name in names)

    @property
    def _suffix(self) -> str:
        return suffix_of(self.shard)

    def close(self, clips: list[Entry], skipped: list[Entry]) -> None:
        """Packs what is to be packed, and writes the lists of what there is and what is not."""
        if self.container == "webdataset":
            self.pack(clips)
        rows = [clip | {"file": self._file(clip["id"])} for clip in clips]
        write_lines(self.root / f"manifest{self._suffix}.jsonl", rows)
        write_lines(self.root / f"skipped{self._suffix}.jsonl", skipped)

    def _file(self, clip: str) -> str:
        return self.packed.get(clip) or self.path(clip).relative_to(self.root).as_posix()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # A TarInfo's own defaults are fixed: no time, no owner.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


__all__ = [
    "CONTAINERS",
    "KINDS",
    "TAILS",
    "Entry",
    "Record",
    "Settings",
    "Store",
    "digest",
    "label",
    "prepared",
    "suffix_of",
    "write_lines",
]
