"""The cycles that XLA for TPUs expects a program to take, by what it notes of each operation.

It chooses among ways to compute by these figures. They are no measurement: TPUs move data while
they compute, and the notes are of single operations. Branches and calls, which ours have none of,
are left out.
"""

import re

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_NOTED = re.compile(r'"estimated_cycles":"(\d+)"')
_LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_BOUND = re.compile(r" constant\((\d+)\)")


def cycles(text: str) -> int:
    """Of a compiled program's `as_text()`; 0 where nothing is noted, as for other platforms."""
    entry, computations = _computations(text)
    return _of(computations.get(entry, []), computations)


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    entry, computations = "", {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return entry, computations


def _of(lines: list[str], computations: dict[str, list[str]]) -> int:
    """Bodies of loops count as often as their conditions' largest constant says."""
    total = 0
    for line in lines:
        if loop := _LOOP.search(line):
            bounds = _BOUND.findall("\n".join(computations[loop[1]]))
            total += max(map(int, bounds), default=1) * _of(computations[loop[2]], computations)
        elif noted := _NOTED.search(line):
            total += int(noted[1])
    return total


__all__ = ["cycles"]
