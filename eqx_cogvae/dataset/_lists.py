"""Lists of files, with columns of the user's own: text, tables, JSON and Parquet."""

import csv
import io
import itertools
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ._text import decoded, parsed, portable

_EXCEL = re.compile(r'"?sep=([^\s"]|\t)"?(?:\r\n?|\n|$)', re.IGNORECASE)
# A cell may hold any text. The limit is the largest that csv takes on all systems.
_LONGEST_CELL = 2**31 - 1
COLUMNS = (
    *("video", "path", "file", "file_name", "video_path", "file_path", "video_file"),
    *("video_name", "clip", "clip_path", "media", "media_path", "latents_path"),
)
"""The columns that may name a file, the first that does is taken; `Video Path` is as good."""

Row = dict[str, Any]


def rows(path: Path, suffixes: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Yields, for each row of a list, the name of its file and its other columns.

    Of several columns that may name it, the first with one of `suffixes` does.

    **Raises:** `ValueError` for a list that is not UTF-8, not of its kind, or has a row without
    a name; `ImportError` for Parquet without pyarrow.
    """
    for number, row in enumerate(_READERS[path.suffix.lower()](path), 1):
        where = f"row {number} of {path}"
        name, columns = _name_and_columns(row, tuple(suffixes), where)
        yield name, portable(columns, where)


def _name_and_columns(row: Any, suffixes: tuple[str, ...], where: str) -> tuple[str, Row]:
    if isinstance(row, str):
        row = {"video": row}
    if isinstance(row, dict):
        keys = {_plain(str(key)): key for key in reversed(row)}
        named = [keys[column] for column in map(_plain, COLUMNS) if column in keys]
        named = [key for key in named if isinstance(row[key], str) and row[key].strip()]
        for key in sorted(named, key=lambda key: not row[key].lower().endswith(suffixes)):
            return row[key], {k: v for k, v in row.items() if k != key}
    raise ValueError(
        f"{where} must name a file under one of {', '.join(COLUMNS)}, got {reprlib.repr(row)}."
    )


def _plain(column: str) -> str:
    return re.sub(r"[\W_]+", "", column.lower())


_NAMING = {_plain(column) for column in COLUMNS}


def _lines(path: Path) -> list[str]:
    # str.splitlines would also cut at characters that JSON and captions may hold.
    return [line.strip() for line in re.split("\r\n?|\n", decoded(path.read_bytes(), str(path)))]


def _names(path: Path) -> list[str]:
    return [line for line in _lines(path) if line and not line.startswith("#")]


def _json_lines(path: Path) -> list[Any]:
    lines = [(number, line) for number, line in enumerate(_lines(path), 1) if line]
    return [parsed(line, f"line {number} of {path}") for number, line in lines]


def _json(path: Path) -> list[Any]:
    text = decoded(path.read_bytes(), str(path))
    # Many a file that is named .json holds JSON lines.
    if not text.lstrip().startswith("["):
        return _json_lines(path)
    return parsed(text, str(path))


def _table(path: Path, delimiters: Sequence[str]) -> list[Row]:
    text = decoded(path.read_bytes(), str(path))
    delimiter = _delimiter(text, delimiters)
    if named := _EXCEL.match(text):
        # Excel has a first line for the delimiter. Left empty, it keeps the numbers of the others.
        delimiter, text = named[1], f"\n{text[named.end() :]}"
    header, *table = _cells(path, text, delimiter) or [[]]
    if len(set(header)) < len(header):
        raise ValueError(f"{path} has two columns of one name in its header: rename one.")
    for number, row in enumerate(table, 1):
        if len(row) > len(header):
            raise ValueError(
                f"row {number} of {path} has {len(row)} cells and the header {len(header)}: "
                'put text that holds the delimiter between quotes (").'
            )
    # A short row lacks its last cells: they are None.
    return [dict(itertools.zip_longest(header, row)) for row in table]


def _delimiter(text: str, delimiters: Sequence[str]) -> str:
    """Returns the first delimiter by which the header has a column that names files."""
    line = re.split("[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    for delimiter in delimiters:
        if not _NAMING.isdisjoint(_plain(cell) for cell in line.split(delimiter)):
            return delimiter
    return delimiters[0]


def _cells(path: Path, text: str, delimiter: str) -> list[list[str]]:
    old = csv.field_size_limit(_LONGEST_CELL)
    # A quote that is never closed would otherwise swallow all rows after it.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [row for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise ValueError(
            f"{path} is no table with {delimiter!r} between its cells: {error}, in line "
            f"{reader.line_num}."
        ) from error
    finally:
        csv.field_size_limit(old)


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install pyarrow.") from error
    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError, OverflowError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path} is no complete Parquet file: {said}.") from error


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".csv": lambda path: _table(path, (",", ";", "\t")),
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".tsv": lambda path: _table(path, ("\t",)),
    ".txt": _names,
}
LISTS = tuple(_READERS)

__all__ = ["COLUMNS", "LISTS", "Row", "rows"]
