"""PyAV, and what reading and writing of video files share."""

import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Shaped

Frames: TypeAlias = Shaped[np.ndarray, "..."] | Shaped[Array, "..."]
"""A clip: (1, t, h, w, 3) or (t, h, w, 3), floating in [-1, 1] or uint8."""


LONGEST_SIDE = 16384
"""Largest height and width in pixels that H.264 holds."""


# Beyond these rates the time bases of containers round frames away.
_RATES = (0.001, 1000)


def check_installed() -> None:
    """Raises `ImportError` without PyAV; worth calling before a long computation."""
    pyav()


def pyav() -> Any:
    """Returns the module `av`.

    **Raises:** `ImportError`, which names the extra to install.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError('video files need PyAV: pip install "eqx_cogvae[video]".') from error
    return av


def check_rate(fps: float | int) -> None:
    """Raises `ValueError` for a frame rate that files cannot hold."""
    slowest, fastest = _RATES
    if not slowest <= fps <= fastest:
        raise ValueError(
            f"`fps` must be a positive number, got {fps}: files hold {slowest} to {fastest}."
        )


def local_name(path: str | os.PathLike) -> str:
    """Returns the absolute path, which FFmpeg never takes for a URL.

    FFmpeg reads what stands before the first colon of a relative name, such as
    `2024-01-01T12:30:00.mp4` or `pipe:1`, as a protocol.
    """
    return str(Path(os.fsdecode(path)).absolute())


__all__ = ["LONGEST_SIDE", "Frames", "check_installed", "check_rate", "local_name", "pyav"]
