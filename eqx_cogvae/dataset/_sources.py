"""The files of a dataset: in a folder, in a list, or in WebDataset's tars."""

import contextlib
import dataclasses
import hashlib
import math
import os
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .._files import check_name
from ._lists import LISTS, Row, rows
from ._text import decoded, parsed, portable, readable

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
LATENTS = (".safetensors",)
TAR_ERRORS = (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError)
"""The errors that a damaged tar may raise."""
_SIDECARS = (".json", ".txt")
_MOST_SIDECAR_BYTES = 2**26
_BLOCK = 2**20


@dataclasses.dataclass(frozen=True)
class Item:
    """A file of a dataset; in a tar, it is the `size` bytes from `offset` on.

    `name` tells it apart in its dataset, and is always text that can be written. `rows` are the
    user's own columns, of every row that names this file. `problem` is the reason why it cannot
    be read, where that is known already.
    """

    name: str
    path: Path
    offset: int = 0
    size: int | None = None
    rows: tuple[Row, ...] = dataclasses.field(default=({},), hash=False)
    problem: str | None = None

    @property
    def fields(self) -> Row:
        """The columns of the first row."""
        return self.rows[0]

    @contextlib.contextmanager
    def local(self) -> Iterator[tuple[Path, str]]:
        """Gives a path to read it at, and the SHA-256 of its bytes.

        **Raises:** `OSError`; `ValueError` where the item has a problem, or its tar ends before
        it does.
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
            if target.tell() < self.size:
                raise ValueError(
                    f"{self.name} is cut short with its tar: {target.tell()} of {self.size} "
                    "bytes are there; copy the tar again."
                )
            yield Path(target.name), digest


def find(source: str | Path, suffixes: Sequence[str]) -> list[Item]:
    """Returns the files of a dataset that end in one of `suffixes`, sorted by name.

    `source` is a folder, whose tars are opened; a tar; a list, in one of `LISTS`; or one file. A
    file that several rows of a list name is one item with several rows.

    **Raises:** `FileNotFoundError`; `ValueError` for a list that cannot be read, or where there
    is nothing of that kind; `ImportError` for Parquet without pyarrow.
    """
    source = Path(source)
    check_name(source)
    suffix = source.suffix.lower()
    if not source.exists():
        raise FileNotFoundError(f"there is no dataset at {source}.")
    if source.is_dir():
        items = _in_folder(source, suffixes)
    elif suffix == ".tar":
        items = _in_tar(source, source.name, suffixes)
    elif suffix in LISTS:
        items = (_listed(source, name, row) for name, row in rows(source, suffixes))
    elif suffix in suffixes:
        items = [Item(readable(source.name), source)]
    else:
        raise ValueError(
            f"{source} must be a folder, a .tar, a list ({', '.join(LISTS)}), "
            f"or a file that ends in {', '.join(suffixes)}."
        )
    found = _merged(items)
    if not found:
        held = "lists nothing" if suffix in LISTS else "holds nothing"
        raise ValueError(f"{source} {held} that ends in {', '.join(suffixes)}.")
    return sorted(found, key=lambda item: item.name)


def _listed(source: Path, name: str, row: Row) -> Item:
    """Returns the item of a list's row."""
    title, path = readable(name), source.parent / name
    try:
        check_name(name)
    except ValueError as error:
        return Item(title, source, rows=(row,), problem=str(error))
    return Item(title, path, rows=(row,))


def shard_of(items: Sequence[Item], shard: tuple[int, int]) -> list[Item]:
    """Returns every n-th item from the i-th on, for `shard=(i, n)`.

    All shards together are all items.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"a shard is i of n, counted from 0 to n - 1, got {index} of {count}.")
    return list(items[index::count])


def _merged(items: Iterable[Item]) -> list[Item]:
    """Returns each file once, with all rows that name it, each once."""
    found: dict[Any, Item] = {}
    for item in items:
        place = os.path.realpath(item.path), item.offset, item.problem
        first = found.setdefault(place, item)
        if any(row not in first.rows for row in item.rows):
            found[place] = dataclasses.replace(first, rows=first.rows + item.rows)
    return list(found.values())


def _in_folder(folder: Path, suffixes: Sequence[str]) -> Iterator[Item]:
    unreadable: list[OSError] = []
    for place, folders, names in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(place)
        names = [n for n in sorted(names) if not n.startswith(".") and (here / n).is_file()]
        sidecars = _sidecars(names, suffixes)
        for name in names:
            path = here / name
            title = readable(path.relative_to(folder).as_posix())
            if name in sidecars:
                row, problem = _columns(sidecars[name], lambda n, at=here: (at / n).open("rb"))
                yield Item(title, path, rows=(row,), problem=problem)
            elif path.suffix.lower() == ".tar":
                yield from _in_tar(path, title, suffixes)
    for error in unreadable:
        path = Path(error.filename)
        title = readable(path.relative_to(folder).as_posix())
        yield Item(title, path, problem=f"{title} cannot be read: {error.strerror}.")


def _in_tar(path: Path, name: str, suffixes: Sequence[str]) -> Iterator[Item]:
    members: dict[str, tarfile.TarInfo] = {}
    name = readable(name)
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                end = 0
                for member in tar:
                    end = member.offset_data + member.size
                    if member.isfile() and not _is_hidden(member.name):
                        members[member.name] = member
                _check_end(path, end)
            except TAR_ERRORS as error:
                yield _broken_tar(path, name, error)
            for inner, sidecars in _sidecars(members, suffixes).items():
                row, problem = _columns(sidecars, lambda n: tar.extractfile(members[n]))
                title, member = f"{name}/{readable(inner)}", members[inner]
                if member.issparse():
                    problem = f"{title} is stored as a sparse file: make the tar without them."
                yield Item(title, path, member.offset_data, member.size, (row,), problem)
    except TAR_ERRORS as error:
        yield _broken_tar(path, name, error)


def _check_end(path: Path, end: int) -> None:
    """Raises `tarfile.ReadError` unless a block of zeros follows on the last member.

    tarfile takes a header that is cut short for the end.
    """
    with path.open("rb") as file:
        file.seek(math.ceil(end / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")


def _broken_tar(path: Path, name: str, error: BaseException) -> Item:
    return Item(name, path, problem=f"{name} is not a complete, uncompressed tar ({error}).")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _sidecars(names: Iterable[str], suffixes: Sequence[str]) -> dict[str, list[str]]:
    """Returns the `.txt` and `.json` files of each file that ends in one of `suffixes`.

    As in WebDataset, they belong to every file of the same name up to the first dot. But a name
    with more dots, such as `2024.05.txt`, belongs to `2024.05.mp4` alone where that is there. The
    files of the whole name come last, so that they have the last word.
    """
    wanted, beside, stems = [], defaultdict(list), set()
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if f".{suffix.lower()}" in suffixes:
            wanted.append(name)
            stems.add(stem)
        elif f".{suffix.lower()}" in _SIDECARS:
            beside[_key(name)].append(name)
    found = {}
    for name in wanted:
        stem = name.rpartition(".")[0]
        near = sorted((other.rpartition(".")[0] == stem, other) for other in beside[_key(name)])
        found[name] = [o for same, o in near if same or o.rpartition(".")[0] not in stems]
    return found


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _columns(names: list[str], read: Callable[[str], Any]) -> tuple[Row, str | None]:
    """Returns what sidecars say, and the reason where one cannot be read."""
    columns: Row = {}
    for name in names:
        title = readable(name)
        try:
            with read(name) as file:
                content = file.read(_MOST_SIDECAR_BYTES + 1)
            if len(content) > _MOST_SIDECAR_BYTES:
                raise ValueError(f"{title} has more than {_MOST_SIDECAR_BYTES} bytes: shorten it.")
            text = decoded(content, title)
            if name.lower().endswith(".txt"):
                columns["caption"] = text.strip()
                continue
            value = portable(parsed(text, title), title)
            columns |= value if isinstance(value, dict) else {"json": value}
        except TAR_ERRORS as error:
            return {}, f"its sidecar cannot be read: {error}"
    return columns, None


def _copied(file: Any, target: Any, size: int | None) -> str:
    """Returns the SHA-256 of `size` bytes, or of all; writes them to a target, if there is one."""
    digest = hashlib.sha256()
    left = size
    while block := file.read(_BLOCK if left is None else min(_BLOCK, left)):
        digest.update(block)
        if target is not None:
            target.write(block)
        left = None if left is None else left - len(block)
    return digest.hexdigest()


__all__ = ["LATENTS", "TAR_ERRORS", "VIDEOS", "Item", "find", "shard_of"]
