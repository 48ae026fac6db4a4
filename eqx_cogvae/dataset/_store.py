"""The folder of a dataset's results, under names that depend only on what they were made of."""

import contextlib
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

import safetensors

from .._files import atomic
from ._lists import Row
from ._results import Entry, Result, with_columns
from ._settings import Settings
from ._sources import TAR_ERRORS
from ._text import label

_FORMAT = "eqx_cogvae.dataset.1"
_DIGITS = 20
# 60 bits: no two of a hundred million clips are likely to share a seed, and JSON's readers, which
# take numbers for 64-bit integers, hold it.
_SEED_DIGITS = 15
_SEED_RULE = "60 bits"
CONTAINERS = ("safetensors", "webdataset")
RESERVED = frozenset(
    (
        *("id", "source", "source_sha256", "start", "frames", "padded", "fps", "height", "width"),
        *("latents", "shape", "layout", "dtype", "scaling_factor", "fingerprint", "seed"),
        *("file", "rows"),
    )
)
"""The names of the manifest's own columns."""


def digest(*parts: Any) -> str:
    """Returns 64 hexadecimal digits of anything that JSON can say."""
    return hashlib.sha256(json.dumps([_FORMAT, *parts], sort_keys=True).encode()).hexdigest()


def prepared(path: Path) -> Path:
    """Returns the path, its folder made.

    Deletes the unfinished files that a killed process left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.stem}.*.partial{path.suffix}"):
        stale.unlink(missing_ok=True)
    return path


def suffix_of(shard: tuple[int, int]) -> str:
    """Returns the part of file names that tells one shard among several."""
    return "" if shard[1] == 1 else "-{}-of-{}".format(*shard)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines, atomically."""
    with atomic(prepared(path)) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclasses.dataclass(frozen=True)
class Record:
    """Says what a video gave: so many frames, at the settings' rate, and these clips of them."""

    source: str
    frames: int
    clips: list[Entry]


@dataclasses.dataclass(frozen=True)
class Store:
    """The folder that a dataset is encoded into, seen by one model with one kind of settings.

    A clip is `latents/xx/NAME-START-KEY.safetensors`, or a member of a tar under that name;
    `records/` says what each finished video gave. `shard` is (i, n) and only names lists and tars.
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
        """Returns the id of a clip: no two differ in content and share one."""
        # A sample that was drawn with a seed of another rule is another clip.
        rule = [_SEED_RULE] if self.settings.latents == "sample" else []
        key = digest(self.weights, self.settings.identity(), sha256, name, start, *rule)
        return f"{label(name)}-{start:06d}-{key[:_DIGITS]}"

    def seed(self, sha256: str, start: int) -> int:
        """Returns the seed of a clip's noise, equal for a video under another name."""
        key = digest(self.weights, self.settings.identity(), sha256, start)
        return int(key[:_SEED_DIGITS], 16)

    def path(self, clip: str) -> Path:
        """Returns the path of a clip's own file."""
        return self.root / "latents" / clip.rpartition("-")[2][:2] / f"{clip}.safetensors"

    def has(self, clip: str) -> bool:
        """True where a clip is done, as a whole file or in a tar."""
        return clip in self.packed or _is_whole(self.path(clip))

    def record(self, name: str, sha256: str) -> Path:
        """Returns the path of the record of a finished video."""
        key = digest(self.weights, self.settings.identity(), sha256, name)[:_DIGITS]
        return self.root / "records" / key[:2] / f"{key}.json"

    def finished(self, name: str, sha256: str) -> Record | None:
        """Returns what a video gave.

        None where it was not done, its record cannot be read, or a clip of it is missing.
        """
        try:
            said = json.loads(self.record(name, sha256).read_bytes())
            record = Record(said["source"], said["frames"], said["clips"])
            ids = [clip["id"] for clip in record.clips]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        named = all(isinstance(clip, str) and re.fullmatch(r"[\w-]+", clip) for clip in ids)
        return record if named and all(map(self.has, ids)) else None

    def finish(self, name: str, sha256: str, record: Record) -> None:
        """Says that a video is done."""
        with atomic(prepared(self.record(name, sha256))) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(record)))

    @functools.cached_property
    def packed(self) -> dict[str, str]:
        """The name of the tar of each clip that is in one."""
        tars = sorted(self.root.glob("latents-*.tar"))
        return {clip: path.name for path in tars for clip in _clips_of(path)[0]}

    def repair(self) -> None:
        """Replaces this shard's tars that are damaged by files of the clips that they still hold.

        A crash of the machine may leave such. What they lack is done again.
        """
        for path in self.root.glob(f"latents{self._suffix}-[0-9]*.tar"):
            clips, damaged = _clips_of(path)
            if not damaged or not re.fullmatch(rf"latents{self._suffix}-\d+\.tar", path.name):
                continue
            with path.open("rb") as file:
                for clip, (offset, size) in clips.items():
                    file.seek(offset)
                    with atomic(prepared(self.path(clip))) as partial:
                        partial.write_bytes(file.read(size))
            path.unlink()

    def pack(self, samples: Mapping[str, Entry]) -> None:
        """Moves clips from files of their own into tars, in order, each with its sample."""
        for clip in samples.keys() & self.packed.keys():
            self.path(clip).unlink(missing_ok=True)
        waiting = iter([clip for clip in samples if clip not in self.packed])
        while group := list(itertools.islice(waiting, self.per_tar)):
            path = next(path for path in self._tars() if not path.exists())
            with atomic(prepared(path)) as partial, tarfile.open(partial, "w") as tar:
                for clip in group:
                    _add(tar, f"{clip}.safetensors", self.path(clip).read_bytes())
                    _add(tar, f"{clip}.json", json.dumps(samples[clip]).encode())
            for clip in group:
                self.packed[clip] = path.name
                self.path(clip).unlink()

    def _tars(self) -> Iterator[Path]:
        names = (f"latents{self._suffix}-{number:06d}.tar" for number in itertools.count())
        return (self.root / name for name in names)

    @property
    def _suffix(self) -> str:
        return suffix_of(self.shard)

    def close(self, results: Iterable[Result], skipped: list[Entry]) -> None:
        """Packs what is to be packed, and writes the lists of what there is and what is not."""
        pairs = [(clip, result.rows) for result in results for clip in result.clips]
        if self.container == "webdataset":
            self.pack({clip["id"]: _sample(clip, rows) for clip, rows in pairs})
        lines = [
            with_columns(clip, row, RESERVED) | {"file": self._file(clip["id"])}
            for clip, rows in pairs
            for row in rows
        ]
        write_lines(self.root / f"manifest{self._suffix}.jsonl", lines)
        write_lines(self.root / f"skipped{self._suffix}.jsonl", skipped)

    def _file(self, clip: str) -> str:
        return self.packed.get(clip) or self.path(clip).relative_to(self.root).as_posix()


def _sample(clip: Entry, rows: Sequence[Row]) -> Entry:
    """Returns what a tar says of a clip: the line of its first row, and all rows of several."""
    every = [with_columns({}, row, RESERVED) for row in rows]
    more = {"rows": every} if len(rows) > 1 else {}
    return with_columns(clip, rows[0], RESERVED) | more


def _is_whole(path: Path) -> bool:
    """True for a safetensors file that a crash of the machine did not cut short or empty."""
    try:
        with safetensors.safe_open(path, framework="np"):
            return True
    except (OSError, safetensors.SafetensorError):
        return False


def _clips_of(path: Path) -> tuple[dict[str, tuple[int, int]], bool]:
    """Returns offset and size of each clip in a tar, and whether the tar is damaged.

    A tar of ours has clips, all of it is read, and the end of an archive follows on its last
    member at once. One that holds anything but clips is not ours, and never counts as damaged.
    """
    members: dict[str, tuple[int, int]] = {}
    size, end = path.stat().st_size, 0
    with contextlib.suppress(*TAR_ERRORS), tarfile.open(path, "r:") as tar:
        for member in tar:
            end = member.offset_data + member.size
            if end <= size:
                members[member.name] = member.offset_data, member.size
    stems = [name.removesuffix(".json") for name in members if name.endswith(".json")]
    pairs = {stem: members.get(f"{stem}.safetensors") for stem in stems}
    clips = {stem: place for stem, place in pairs.items() if place}
    padded = math.ceil(end / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE
    whole = size == math.ceil(padded / tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    ours = all(name.endswith((".json", ".safetensors")) for name in members)
    return clips, ours and not (clips and whole)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # A TarInfo's own defaults are fixed: no time, no owner.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


__all__ = [
    "CONTAINERS",
    "RESERVED",
    "Record",
    "Store",
    "digest",
    "prepared",
    "suffix_of",
    "write_lines",
]
