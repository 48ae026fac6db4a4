"""Draws the site's diagrams and charts as SVG: python scripts/drawings.py [--folder FOLDER].

Colours are CSS variables. A file on its own follows the reader's system from light to dark; the
site puts the drawings inline, where they follow its switch.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "assets"

# Seconds with the default configuration: benchmarks/gpu.py on one H200, bfloat16, 2026-11-26, and
# benchmarks/cpu.py on two Zen 5 cores, float32, 9 frames, 2026-11-28.
GPU = {
    "decode 49x480x720": (0.89, 2.10),
    "encode 49x480x720": (0.43, 0.95),
}
CPU = {
    "encode 64x96": (0.97, 1.54),
    "decode 64x96": (1.71, 2.60),
    "gradient 64x96": (5.85, 5.72),
    "encode 128x192": (3.65, 6.14),
    "decode 128x192": (7.03, 13.68),
    "gradient 128x192": (21.64, 39.93),
}
# GiB, of cv.plan for the tiny configuration in float32 on a CPU, 480x720, 2026-11-28:
# `python benchmarks/memory.py --model tiny --dtype float32 --frames N`.
WAYS = {"whole": "--blue", "streamed": "--green", "tiled": "--orange"}
MEMORY = {
    "frames": (9, 17, 33, 65, 129, 257),
    "whole": (1.61, 1.78, 1.84, 1.97, 2.22, 2.73),
    "streamed": (1.61, 2.12, 2.12, 2.12, 2.12, 2.12),
    "tiled": (0.531, 0.608, 0.764, 1.08, 1.76, 3.5),
}

_STYLE = """<style>
.drawing { --ink: #1f2430; --soft: #5b6472; --line: #8a93a3; --pale: #eef0f8; --paper: #ffffff;
  --blue: #3f51b5; --orange: #c2561a; --green: #1e7d5a; }
@media (prefers-color-scheme: dark) { .drawing { --ink: #e6e8ee; --soft: #a7afbe; --line: #7b8496;
  --pale: #2c3140; --paper: #1e2129; --blue: #8c9eff; --orange: #ffab70; --green: #6fd3a8; } }
.drawing text { font: 13px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  fill: var(--ink); }
.drawing .soft { fill: var(--soft); }
.drawing .small { font-size: 11.5px; }
.drawing .code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.drawing .bold { font-weight: 600; }
</style>"""


def main() -> None:
    """Writes every drawing, and prints its name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings().items():
        (folder / f"{name}.svg").write_text(drawing, encoding="utf-8")
        print(f"{name}.svg")


def drawings() -> dict[str, str]:
    """Returns the text of every drawing by its name."""
    return {
        "idea": idea(),
        "decoder": decoder(),
        "cuts": cuts(),
        "memory": memory(),
        "speed-gpu": bars("Seconds on one H200, bfloat16", GPU),
        "speed-cpu": bars("Seconds on two CPU cores, float32, 9 frames", CPU),
    }


def idea() -> str:
    """Draws three steps in a row, and the cache that goes from one to the next."""
    parts = [text(360, 20, "latents", "soft", "middle")]
    for i, (latents, frames) in enumerate(((3, 9), (2, 8), (2, 8))):
        x = 96 + 218 * i
        for j in range(latents):
            parts.append(rect(x + 70 - 13 * latents + 26 * j + 2, 30, 22, 22, "--green"))
        parts.append(arrow(x + 70, 56, x + 70, 82))
        parts.append(rect(x, 86, 140, 52, "--pale", line="--blue", radius=8))
        parts.append(text(x + 70, 117, "decode_step", "code bold", "middle"))
        parts.append(arrow(x + 70, 142, x + 70, 168))
        for j in range(frames):
            parts.append(rect(x + 70 - 8 * frames + 16 * j + 1.5, 172, 13, 22, "--blue"))
        parts.append(arrow(x - 72, 112, x - 5, 112, "--orange"))
        parts.append(text(x - 39, 103, "cache" if i else "None", "small", "middle"))
    parts.append(text(360, 215, "frames", "soft", "middle"))
    names = ("framewise", "streamed", "tiled", "sliced", "sharded", "jax.jit", "jax.grad")
    widths = [8 * len(name) + 18 for name in names]
    x = (720 - sum(widths) - 10 * (len(names) - 1)) / 2
    for name, width in zip(names, widths, strict=True):
        parts.append(rect(x, 236, width, 26, "--paper", line="--line", radius=13))
        parts.append(text(x + width / 2, 253.5, name, "code small", "middle"))
        x += width + 10
    parts.append(text(360, 284, "functions that take the step, and each other", "soft", "middle"))
    return svg(720, 294, "A step takes a batch of frames and a cache, and returns both", parts)


def decoder() -> str:
    """Draws the array after each block as a stack of frames."""
    stages = (
        ("latents", 13, 60, 16),
        ("mid_block", 13, 60, 512),
        ("up_blocks[0]", 25, 120, 512),
        ("up_blocks[1]", 49, 240, 256),
        ("up_blocks[2]", 49, 480, 256),
        ("up_blocks[3]", 49, 480, 128),
        ("video", 49, 480, 3),
    )
    heights, sheets = {60: 22, 120: 32, 240: 44, 480: 56}, {13: 2, 25: 4, 49: 6}
    parts, x, last = [], 0.0, None
    for name, frames, height, channels in stages:
        h, count = heights[height], sheets[frames]
        w, slot = 1.5 * h, max(1.5 * h + 3 * count, 86)
        left, top = x + (slot - w - 3 * count) / 2, 62 - h / 2
        if last is not None:
            parts.append(arrow(last, 62, left - 4, 62))
        strength = 0.15 + 0.85 * math.log2(channels) / 9
        for k in reversed(range(count)):
            at = (left + 3 * k, top - 3 * k, w, h)
            parts += [rect(*at, "--paper"), rect(*at, "--blue", "--line", 2, strength)]
        last = left + w + 3 * count
        lines = (f"{frames} frames", f"{height}x{height * 3 // 2}", f"{channels} channels")
        parts.append(text(x + slot / 2, 118, name, "code small bold", "middle"))
        for j, line in enumerate(lines):
            parts.append(text(x + slot / 2, 136 + 16 * j, line, "small soft", "middle"))
        x += slot + 14
    return svg(x - 14, 178, "Shapes of a clip through the decoder's blocks", parts)


def cuts() -> str:
    """Draws a frame in tiles, in bands and in shards."""
    parts = []
    columns = (
        ("tiled", "decoded apart, blended:", "an approximation"),
        ("bands of rows", "one band after the other,", "statistics of the whole: exact"),
        ("sharded", "one part for each device,", "rims and moments exchanged: exact"),
    )
    for i, (name, one, two) in enumerate(columns):
        x = 20 + 240 * i
        parts.append(text(x + 100, 20, name, "code bold", "middle"))
        parts.append(rect(x, 34, 200, 126, "--pale", line="--line", radius=2))
        parts.append(text(x + 100, 184, one, "small soft", "middle"))
        parts.append(text(x + 100, 201, two, "small soft", "middle"))
    for row in range(2):
        for column in range(3):
            at = (20 + 64 * column, 34 + 54 * row, 72, 72)
            parts.append(rect(*at, "--orange", "--orange", 2, 0.22))
    for band in range(6):
        parts.append(rect(260, 34 + 21 * band, 200, 21, "--green", "--green", 0, 0.5 - 0.08 * band))
    parts.append(arrow(360, 42, 360, 152, "--ink"))
    for device in range(4):
        x, y = 500 + 100 * (device % 2), 34 + 63 * (device // 2)
        parts.append(rect(x, y, 100, 63, "--blue", "--blue", 0, 0.22))
        parts.append(text(x + 50, y + 36, f"device {device}", "small", "middle"))
    for x, y in ((600, 50), (600, 146)):
        parts += [arrow(x - 14, y, x + 15, y, "--ink"), arrow(x + 14, y, x - 15, y, "--ink")]
    for x, y in ((520, 97), (680, 97)):
        parts += [arrow(x, y - 14, x, y + 15, "--ink"), arrow(x, y + 14, x, y - 15, "--ink")]
    return svg(720, 212, "What tiling, bands and sharding cut", parts)


def memory() -> str:
    """Draws peak memory against the number of frames."""
    counts, top = MEMORY["frames"], max(max(MEMORY[way]) for way in WAYS)
    right, bottom = 560, 250
    x = lambda count: 60 + (right - 60) * count / max(counts)  # noqa: E731
    y = lambda gib: bottom - 200 * gib / top  # noqa: E731
    parts = [text(10, 20, "Peak memory of a decode of 480x720, GiB, tiny model in float32", "bold")]
    for gib in range(math.floor(top) + 1):
        parts.append(line([(60, y(gib)), (right, y(gib))], "--pale", 1))
        parts.append(text(50, y(gib) + 4, f"{gib}", "small soft", "end"))
    for count in counts:
        parts.append(text(x(count), bottom + 20, f"{count}", "small soft", "middle"))
    parts.append(text((60 + right) / 2, bottom + 40, "frames", "small soft", "middle"))
    for way, color in WAYS.items():
        points = [(x(count), y(gib)) for count, gib in zip(counts, MEMORY[way], strict=True)]
        parts.append(line(points, color, 2.4))
        parts += [f'<circle cx="{a:g}" cy="{b:g}" r="3.5" fill="var({color})"/>' for a, b in points]
        parts.append(text(right + 12, points[-1][1] + 4, way, "bold"))
    return svg(720, 300, "Peak memory against the number of frames", parts)


def bars(title: str, rows: dict[str, tuple[float, float]]) -> str:
    """Draws two bars for each row, ours and diffusers', to the row's own scale."""
    parts = [text(10, 20, title, "bold"), *legend(500, 15)]
    for i, (name, (ours, theirs)) in enumerate(rows.items()):
        y = 44 + 46 * i
        parts.append(text(150, y + 20, name, "small", "end"))
        for j, (value, color) in enumerate(((ours, "--blue"), (theirs, "--line"))):
            width = 380 * value / theirs
            parts.append(rect(162, y + 17 * j, width, 14, color, radius=2))
            parts.append(text(168 + width, y + 11.5 + 17 * j, f"{value:.2f} s", "small"))
        parts.append(text(700, y + 20, f"{theirs / ours:.1f} x", "bold", "end"))
    note = "Bars of a row share one scale; the factor is diffusers' time over ours."
    parts.append(text(10, 44 + 46 * len(rows) + 10, note, "small soft"))
    return svg(720, 44 + 46 * len(rows) + 22, title, parts)


def legend(x: float, y: float) -> Iterable[str]:
    """Yields the two colours and their names."""
    for color, name, left in (("--blue", "eqx_cogvae", x), ("--line", "diffusers", x + 108)):
        yield rect(left, y - 8, 12, 12, color, radius=2)
        yield text(left + 18, y + 2.5, name, "small")


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """Returns a whole drawing; a screen reader says its `title`."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" role="img" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", _STYLE, *parts, "</svg>\n"])


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Returns one line of text."""
    of = f' class="{kind}"' if kind else ""
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}"{at}{of}>{escape(words)}</text>'


def rect(
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str,
    line: str | None = None,
    radius: float = 0,
    opacity: float = 1,
) -> str:
    """Returns a rectangle, filled with a variable's colour."""
    edge = "" if line is None else f' stroke="var({line})"'
    clear = "" if opacity == 1 else f' fill-opacity="{opacity:.2f}"'
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
        f'fill="var({fill})"{clear}{edge}/>'
    )


def line(points: Sequence[tuple[float, float]], color: str, width: float) -> str:
    """Returns a line through points."""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="var({color})" stroke-width="{width:g}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float, color: str = "--line") -> str:
    """Returns a straight arrow."""
    length = math.hypot(x2 - x1, y2 - y1)
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    bx, by = x2 - 7 * ux, y2 - 7 * uy
    return (
        f'<path d="M{x1:g} {y1:g}L{bx:g} {by:g}" stroke="var({color})" stroke-width="1.6"/>'
        f'<path d="M{x2:g} {y2:g}L{bx - 4 * uy:g} {by + 4 * ux:g}L{bx + 4 * uy:g} '
        f'{by - 4 * ux:g}Z" fill="var({color})"/>'
    )


if __name__ == "__main__":
    main()
