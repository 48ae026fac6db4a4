"""What a dataset is made of: files in a folder, in a list of names, or in WebDataset's tars."""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
LATENTS = (".safetensors",)
_LISTS = (".csv", ".jsonl", ".txt")
_COLUMNS = ("video", "path", "file", "file_name")
_BLOCK = 2**20


@dataclasses.dataclass(frozen=True)
class Item:
    """A file of a dataset: `size` bytes from `offset` on where it lies in a tar.

    `name` tells it apart in its dataset. `fields` is what the dataset says of it besides.
    `problem` is why it can not be read, where that is known already.
    """

    name: str
    path: Path
    offset: int = 0
    size: int | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    problem: str | None = None

    @contextlib.contextmanager
    def local(self) -> Iterator[tuple[Path, str]]:
        """A path to read it at, and the SHA-256 of its bytes.

        **Raises:** `OSError`, or `ValueError` where the item has a problem.
        """
        if self.problem:
            raise ValueError(self.problem)
        if self.size is None:
            with self.path.open("rb") as file:
                yield self.path, _copied(file, None, None)
            return
        with (
            tempfile.NamedTemporaryFile(suffix=PurePosixPath(self.name).suffix) as target,
            self.path.open("rb") as file,
        ):
            file.seek(self.offset)
            digest = _copied(file, target, self.size)
            target.flush()
            yield Path(target.name), digest


def find(source: str | Path, suffixes: Sequence[str]) -> list[Item]:
    """The files of a dataset that end in one of `suffixes`, sorted by name.

    `source` is a folder, whose tars are opened; a tar; a list of names, as `.csv`, `.jsonl` or
    `.txt`; or a single file.

    **Raises:** `FileNotFoundError`; `ValueError` for a list that can not be read, or where there
    is nothing of that kind.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"there is no dataset at {source}.")
    if source.is_dir():
        items = list(_in_folder(source, suffixes))
    elif source.suffix == ".tar":
        items = list(_in_tar(source, source.name, suffixes))
    elif source.suffix in _LISTS:
        items = list(_in_list(source))
    elif source.suffix.lower() in suffixes:
        items = [Item(source.name, source)]
    else:
        raise ValueError(
            f"{source} must be a folder, a .tar, a list ({', '.join(_LISTS)}), "
            f"or a file that ends in {', '.join(suffixes)}."
        )
    if not items:
        raise ValueError(f"{source} holds nothing that ends in {', '.join(suffixes)}.")
    found = {item.name: item for item in reversed(items)}
    return [found[name] for name in sorted(found)]


def shard_of(items: Sequence[Item], shard: tuple[int, int]) -> list[Item]:
    """Every n-th item from the i-th on, for `shard=(i, n)`: all shards together are all items."""
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"a shard is i of n, counted from 0 to n - 1, got {index} of {count}.")
    return list(items[index::count])


def _in_folder(folder: Path, suffixes: Sequence[str]) -> Iterator[Item]:
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if path.suffix.lower() in suffixes and path.is_file():
            yield Item(relative.as_posix(), path)
        elif path.suffix == ".tar" and path.is_file():
            yield from _in_tar(path, relative.as_posix(), suffixes)


def _in_tar(path: Path, name: str, suffixes: Sequence[str]) -> Iterator[Item]:
    """WebDataset's convention: members of one key, up to the first dot, are one sample."""
    items: list[tuple[str, Item]] = []
    fields: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                key = f"{folder}/{file.partition('.')[0]}"
                if PurePosixPath(file).suffix.lower() in suffixes:
                    inside = Item(f"{name}/{member.name}", path, member.offset_data, member.size)
                    items.append((key, inside))
                elif file.endswith((".json", ".txt")):
                    fields.setdefault(key, {}).update(_sidecar(tar, member))
    except (tarfile.TarError, OSError) as error:
        yield Item(name, path, problem=f"{name} is not a complete, uncompressed tar ({error}).")
    for key, item in items:
        yield dataclasses.replace(item, fields=fields.get(key, {}))


def _sidecar(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    file = tar.extractfile(member)
    text = file.read().decode(errors="replace") if file else ""
    if member.name.endswith(".txt"):
        return {"caption": text.strip()}
    with contextlib.suppress(json.JSONDecodeError):
        held = json.loads(text)
        return held if isinstance(held, dict) else {}
    return {}


def _in_list(path: Path) -> Iterator[Item]:
    text = path.read_text()
    readers: dict[str, Callable[[str], Any]] = {
        ".csv": lambda text: csv.DictReader(io.StringIO(text)),
        ".jsonl": lambda text: map(json.loads, filter(str.strip, text.splitlines())),
        ".txt": lambda text: ({"video": line} for line in _names(text)),
    }
    try:
        rows = list(readers[path.suffix](text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must hold a JSON object in each line: {error}.") from error
    for number, row in enumerate(rows, 1):
        column = next((c for c in _COLUMNS if isinstance(row, dict) and row.get(c)), None)
        if column is None:
            raise ValueError(
                f"row {number} of {path} must name a file under one of "
                f"{', '.join(_COLUMNS)}, got {row}."
            )
        name = row[column]
        fields = {k: v for k, v in row.items() if k != column}
        yield Item(str(name), path.parent / name, fields=fields)


def _names(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _copied(file: Any, target: Any, size: int | None) -> str:
    """The digest of `size` bytes, or of all, that are also written to a target, if there is one."""
    digest = hashlib.sha256()
    left = size
    while block := file.read(_BLOCK if left is None else min(_BLOCK, left)):
        digest.update(block)
        if target is not None:
            target.write(block)
        left = None if left is None else left - len(block)
    return digest.hexdigest()


__all__ = ["LATENTS", "VIDEOS", "Item", "find", "shard_of"]
