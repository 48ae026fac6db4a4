"""Files that appear whole or not at all, and paths that are no files."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A name beside `path`, of the same suffix, to write to.

    It takes the place of `path` when the block ends, and is deleted when the block fails.

    **Raises:** `FileNotFoundError` where the directory does not exist, `IsADirectoryError` where
    `path` is one.
    """
    with beside(path) as partial:
        yield partial
        os.replace(partial, path)


@contextlib.contextmanager
def beside(path: str | os.PathLike) -> Iterator[Path]:
    """A name beside `path`, of the same suffix, for a file that is deleted in the end.

    **Raises:** as `atomic`.
    """
    path = Path(path)
    check_writable(path)
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


class Written:
    """A file to write arrays to, whose every write is checked.

    NumPy writes past a file that it knows as one, by a buffer of C's, and does not hear of a disk
    that is full when that is emptied at last.
    """

    def __init__(self, path: Path):
        self._file = path.open("wb")

    def __enter__(self) -> "Written":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: Any) -> int:
        """As any file does."""
        return self._file.write(content)


def check_writable(path: str | os.PathLike) -> None:
    """Raises what `atomic` would: worth asking before a long computation."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a directory, name a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {path}: there is no directory {path.parent}, create it first."
        )
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: {path.parent} is not writable.")


def check_regular(path: str | os.PathLike) -> None:
    """Raises `OSError` for a pipe, a socket or a device: they may never end, or never begin."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{path} is a pipe or a device: copy what it gives to a file, and name that.")


__all__ = ["Written", "atomic", "beside", "check_regular", "check_writable"]
