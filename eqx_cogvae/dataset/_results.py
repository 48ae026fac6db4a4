"""Results of one source."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

from ._lists import Row

Entry: TypeAlias = dict[str, Any]
"""A clip's line of the manifest, without the user's columns."""

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
"""The word by which XLA's error for want of memory is known."""


@dataclasses.dataclass
class Result:
    """The clips of a source, of which `written` are new, and the reason why there are no more.

    `rows` are the user's columns. `spent` has seconds by kind of work. `slow` is the video's own
    frame rate, where that is below the one asked for.
    """

    source: str
    rows: tuple[Row, ...] = ({},)
    clips: list[Entry] = dataclasses.field(default_factory=list)
    written: int = 0
    problem: str | None = None
    slow: float | None = None
    spent: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Adds the seconds of a block to `spent`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.spend(what, time.perf_counter() - begun)

    def spend(self, what: str, seconds: float) -> None:
        """Adds seconds to `spent`."""
        self.spent[what] = self.spent.get(what, 0.0) + seconds


def with_columns(entry: Entry, row: Row, reserved: frozenset[str]) -> Entry:
    """Returns a clip's entry together with the user's columns.

    A column under a `reserved` name is kept as `input_NAME`.
    """
    kept = {name: value for name, value in row.items() if name not in reserved}
    for name in (name for name in row if name in reserved):
        free = f"input_{name}"
        while free in kept or free in reserved:
            free = f"input_{free}"
        kept[free] = row[name]
    return kept | entry


__all__ = ["OUT_OF_MEMORY", "Entry", "Result", "with_columns"]
