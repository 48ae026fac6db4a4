"""Keeps the compiled programs of a process few enough for Linux."""

import gc
import itertools
from pathlib import Path

import equinox as eqx
import jax

_MAPS = Path("/proc/self/maps")
_MANY_MAPS = 25_000
_calls = itertools.count(1)


def forget_if_many():
    """Forgets compiled programs before there are too many.

    XLA maps the kernels of a program for CPU into memory one by one, a gradient's by the
    thousand, and Linux ends a process that asks for more than 65,530 maps. Counting them takes
    13 ms, so every eighth call does. It is called after every test, and by those whose many
    examples compile programs of their own.
    """
    if next(_calls) % 8 or not _MAPS.exists():
        return
    if _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()
        eqx.clear_caches()
        gc.collect()
