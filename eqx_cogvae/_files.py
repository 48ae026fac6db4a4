"""Files and folders that appear whole or not at all, and paths that are no files."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a name beside `path`, of the same suffix, to write to.

    The file written there takes the place of `path` when the block ends. It is deleted when the
    block fails.

    **Raises:** `FileNotFoundError` where the directory does not exist, `IsADirectoryError` where
    `path` is one; `OSError` that names `path` for a full disk.
    """
    path = Path(path)
    check_writable(path)
    partial = _partial(path.parent, path)
    with _named_as(path, partial):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Gives a new folder to write the files of `folder` in; it is deleted when the block ends.

    It lies in `folder`, or beside it where `folder` does not exist, so that its files can be
    renamed into place. Parents that are missing are created, and removed if the block fails.

    **Raises:** `OSError` that names `folder`, where it cannot be written.
    """
    check_folder(folder)
    home = folder if folder.is_dir() else folder.parent
    missing = [parent for parent in (home, *home.parents) if not parent.exists()]
    partial = _partial(home, folder)
    with _named_as(folder, partial):
        try:
            home.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in missing:
                # Another process may have written into it meanwhile.
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise
        shutil.rmtree(partial, ignore_errors=True)


def _partial(home: Path, path: Path) -> Path:
    """Returns a new hidden name in `home`, of the suffix of `path`."""
    return home / f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}"


def check_folder(path: str | os.PathLike) -> None:
    """Raises `OSError` where no folder can be made at `path`, and `check_name`'s `ValueError`."""
    path = Path(path)
    check_name(path)
    _check_places(path, path, *path.parents)


def _check_places(path: Path, *places: Path) -> None:
    for place in places:
        if place.is_symlink() and not place.exists():
            raise FileNotFoundError(
                f"cannot write {path}: {place} is a link to {os.readlink(place)}, which does not "
                "exist: create that directory, or remove the link."
            )
        if place.exists() and not place.is_dir():
            named = "it" if place == path else place
            raise NotADirectoryError(f"cannot write {path}: {named} is a file, name a directory.")


@contextlib.contextmanager
def _named_as(path: Path, partial: Path) -> Iterator[None]:
    """Makes errors name `path` where they name its partial file, or none, as a full disk's do."""
    try:
        yield
    except OSError as error:
        named = error.filename
        if error.errno is None or not (named is None or str(named).startswith(str(partial))):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class Written:
    """A file to write arrays to, whose every write is checked.

    NumPy writes to a file object that it knows through a buffer of the C library, and misses the
    error of a full disk when that buffer is flushed.
    """

    def __init__(self, path: Path):
        self._file = path.open("wb")

    def __enter__(self) -> "Written":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: Any) -> int:
        """Writes as any file does."""
        return self._file.write(content)


def check_writable(path: str | os.PathLike) -> None:
    """Raises the errors of `atomic` before a long computation."""
    path = Path(path)
    check_name(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a directory, name a file in it.")
    if not path.parent.is_dir():
        _check_places(path, *path.parents)
        raise FileNotFoundError(
            f"cannot write {path}: there is no directory {path.parent}, create it first."
        )
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: {path.parent} is not writable.")


def check_name(path: str | os.PathLike) -> None:
    """Raises `ValueError` for a name with a NUL byte, which no file can have."""
    name = os.fsdecode(path)
    if "\0" in name:
        raise ValueError(f"{name!r} holds a NUL byte, which no file's name can: correct the name.")


def check_regular(path: str | os.PathLike) -> None:
    """Raises `OSError` for a pipe, a socket or a device: they may never end, or never begin.

    Raises `ValueError` for a name that no file can have.
    """
    check_name(path)
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(
            f"{path} is a pipe or a device: copy its content to a file, and name that file."
        )


__all__ = [
    "Written",
    "atomic",
    "check_folder",
    "check_name",
    "check_regular",
    "check_writable",
    "staged",
]
