"""Reads the text of compiled programs: their operations, and what they send to other devices."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_CALL = re.compile(r" call\(.*to_apply=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r" constant\((\d+)\)")
_COLLECTIVE = re.compile(
    r" = (.*?) (collective-permute|all-reduce|all-gather|all-to-all|reduce-scatter)(-start)?\("
)
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_BITS = re.compile(r"\d+")


class Exchange(NamedTuple):
    """A collective operation: how often it runs, and the bytes that a device sends each time."""

    kind: str
    times: int
    sent: float
    line: str


def operations(text: str) -> Iterator[tuple[str, int]]:
    """Yields each operation of a program's `as_text()`, and how often it runs.

    Operations of loops run as often as the loop does. Those within a fusion are left out, and so
    are those of branches, of which our programs have none.
    """
    entry, computations = "", {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    yield from _operations(entry, computations, 1)


def _operations(
    name: str, computations: dict[str, list[str]], times: int
) -> Iterator[tuple[str, int]]:
    for line in computations.get(name, []):
        if loop := _LOOP.search(line):
            yield from _operations(
                loop[2], computations, times * _trips(line, computations[loop[1]])
            )
        elif call := _CALL.search(line):
            yield from _operations(call[1], computations, times)
        else:
            yield line, times


def _trips(line: str, condition: list[str]) -> int:
    if known := _TRIPS.search(line):
        return int(known[1])
    # Else the largest constant of its condition.
    return max(map(int, _BOUND.findall("\n".join(condition))), default=1)


def exchanges(text: str, devices: int, halo_bytes: int | None = None) -> list[Exchange]:
    """Returns the collective operations of a program for `devices` devices.

    Sums over devices are taken to go around a ring, which sends the fewest bytes. `halo_bytes`
    is what a number of a halo has where XLA did not widen it, or None to count what is written.
    """
    found = []
    for line, times in operations(text):
        if match := _COLLECTIVE.search(line):
            result, kind, started = match.groups()
            widths = {"collective-permute": halo_bytes}
            arrays = _SHAPE.findall(result)
            sizes = [_size(shape, widths.get(kind) or _width(dtype)) for dtype, shape in arrays]
            if started and kind == "collective-permute":
                sizes = sizes[:1]  # of the operand, the result and flags
            elif started and kind in ("all-gather", "reduce-scatter"):
                sizes = sizes[1:2]
            sent = sum(sizes) * _share_sent(kind, _group(line, devices))
            found.append(Exchange(kind, times, sent, line.strip()))
    return found


def _share_sent(kind: str, devices: int) -> float:
    """Returns what one of a ring's devices sends, as a share of the bytes of its result."""
    if kind == "collective-permute":
        return 1
    others = devices - 1
    return {"all-reduce": 2 * others / devices, "reduce-scatter": others}.get(
        kind, others / devices
    )


def _group(line: str, devices: int) -> int:
    """Returns how many devices take part together, written as a list or by axes of a mesh."""
    if mesh := _MESH.search(line):
        sizes = dict(axis.split("=") for axis in mesh[1].split(","))
        return math.prod(int(sizes[axis.strip()]) for axis in mesh[2].split(","))
    if found := _GROUPS.search(line):
        return int(found[1]) if found[1] else found[2].count(",") + 1
    return devices


def _size(shape: str, width: float) -> float:
    return math.prod(int(side) for side in shape.split(",") if side) * width


def _width(dtype: str) -> float:
    bits = _BITS.search(dtype)
    return int(bits[0]) / 8 if bits else 1


__all__ = ["Exchange", "exchanges", "operations"]
