"""Options that commands share, and the types of their values."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .. import video
from .._config import shown
from .._latents import LAYOUTS

DTYPES = ("float32", "bfloat16", "float16")
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")

COUNT = click.IntRange(1, 9_999_999)
INDEX = click.IntRange(0, 999_999_999)


class Command(click.Command):
    """A command that also takes sizes as earlier versions did.

    `--buckets A B` is `--size A --size B`, and in `info` `--size 49 A` is `--frames 49 --size A`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses arguments, rewritten where they are of the earlier form."""
        words, rewritten = list(args), []
        while words and words[0] != "--":
            word = words.pop(0)
            if word == "--buckets" and words:
                rewritten += ["--size", words.pop(0)]
                while words and _SIZE.fullmatch(words[0]):
                    rewritten += ["--size", words.pop(0)]
            elif self.name == "info" and word == "--size" and len(words) > 1 and words[0].isdigit():
                rewritten += ["--frames", words.pop(0), "--size", words.pop(0)]
            else:
                rewritten.append(word)
        return super().parse_args(ctx, rewritten + words)


class Size(click.ParamType):
    """A height and a width in pixels, such as `480x720`."""

    name = "HxW"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Returns (height, width)."""
        if isinstance(value, tuple):
            return value
        match = _SIZE.fullmatch(value)
        if not match:
            self.fail(f"a size is HEIGHTxWIDTH, such as 480x720, got {shown(value)}", param, ctx)
        return int(match[1]), int(match[2])


class Rate(click.ParamType):
    """A number of frames a second that files can hold."""

    name = "fps"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Returns the rate."""
        try:
            video.check_rate(float(value))
        except ValueError:
            self.fail(f"a frame rate is of 0.001 to 1000, got {shown(value)}", param, ctx)
        return float(value)


class Gibibytes(click.FloatRange):
    """A size of memory, above 0 and finite."""

    name = "GiB"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Returns the number of gibibytes."""
        number = super().convert(value, param, ctx)
        # NaN is neither below nor above a range.
        if math.isnan(number):
            self.fail("expected gibibytes above 0, such as 16 or 0.5, got nan", param, ctx)
        return number


class Frames(click.ParamType):
    """A number of frames, or `all`, which is None."""

    name = "frames"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        """Returns the number."""
        if isinstance(value, int) or value == "all":
            return None if value == "all" else value
        if not re.fullmatch(r"[1-9][0-9]{0,6}", value):
            self.fail(f"expected 8k + 1 frames or `all`, got {shown(value)}", param, ctx)
        return int(value)


class Shard(click.ParamType):
    """A part of a dataset, such as `0/8`."""

    name = "I/N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Returns (i, n)."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([0-9]{1,6})/([1-9][0-9]{0,6})", value)
        if not match or int(match[1]) >= int(match[2]):
            self.fail(f"a shard is I/N, from 0/N on, such as 0/8, got {shown(value)}", param, ctx)
        return int(match[1]), int(match[2])


def added(*options: Callable) -> Callable:
    """Returns a decorator that adds options to a command, in the order of its help."""

    def decorate(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def path(name: str, metavar: str, *, required: bool = True) -> Callable:
    """Returns a positional argument for a path."""
    return click.argument(name, type=Path, metavar=metavar, required=required)


def model(*, required: bool = False) -> Callable:
    """Returns the options that name a model, its dtype, and the frame rate."""
    default: dict[str, Any] = {"required": True} if required else {"default": "tiny"}
    said = "" if required else "; default: tiny"
    return added(
        click.option("--model", help=f"Directory or hub id{said}.", **default),
        click.option("--dtype", type=click.Choice(DTYPES), default="float32"),
        click.option("--fps", type=Rate(), help="Default: as the input has it."),
    )


def size(*, several: bool = False) -> Callable:
    """Returns the options that name the size of frames, for `chosen_sizes`."""
    text = "Crop to the aspect and resize"
    more = "; more than one: the nearest aspect is taken." if several else "."
    return added(
        click.option("--size", type=Size(), metavar="HxW", multiple=several, help=text + more),
        click.option(
            "--height", type=COUNT, metavar="H", help="In pixels, with --width: the same as --size."
        ),
        click.option("--width", type=COUNT, metavar="W"),
    )


def chosen_sizes(size: Any, height: int | None, width: int | None) -> tuple[tuple[int, int], ...]:
    """Returns the sizes that `--size`, or `--height` and `--width`, name.

    **Raises:** `ValueError` for one side alone, or for both ways at once.
    """
    given = () if not size else (size,) if isinstance(size[0], int) else tuple(size)
    if (height is None) != (width is None):
        raise ValueError("--height and --width go together, give both.")
    if height is None or width is None:
        return given
    if given:
        raise ValueError("--height and --width are a size: leave --size and --buckets out.")
    return ((height, width),)


def first() -> Callable:
    """Returns the option for the number of latents in the first batch."""
    return click.option(
        "--first",
        type=COUNT,
        metavar="LATENTS",
        help="Latents decoded first: 1 for CogVideoX-Fun; default: the remainder of pairs.",
    )


def layout() -> Callable:
    """Returns the option for the layout of latents whose file does not say."""
    return click.option("--layout", type=click.Choice(LAYOUTS), help="Where the file does not say.")


__all__ = [
    "COUNT",
    "DTYPES",
    "INDEX",
    "Command",
    "Frames",
    "Gibibytes",
    "Rate",
    "Shard",
    "Size",
    "added",
    "chosen_sizes",
    "first",
    "layout",
    "model",
    "path",
    "size",
]
