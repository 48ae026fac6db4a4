"""The cycles that XLA for TPUs expects a program to take, by what it notes of each operation.

It chooses among ways to compute by these figures. They are no measurement: TPUs move data while
they compute, and the notes are of single operations. Branches, which ours have none of, are left
out.
"""

import re

from hlo import operations

_NOTED = re.compile(r'"estimated_cycles":"(\d+)"')


def cycles(text: str) -> int:
    """Of a compiled program's `as_text()`; 0 where nothing is noted, as for other platforms."""
    noted = ((_NOTED.search(line), times) for line, times in operations(text))
    return sum(int(each[1]) * times for each, times in noted if each)


__all__ = ["cycles"]
