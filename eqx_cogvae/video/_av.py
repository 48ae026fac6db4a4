"""PyAV, and what all video files share."""

from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Shaped

Frames: TypeAlias = Shaped[np.ndarray, "..."] | Shaped[Array, "..."]
"""A clip: (1, t, h, w, 3) or (t, h, w, 3), floating in [-1, 1] or uint8."""


# What H.264 holds, and what the time bases of containers do: beyond, frames would be lost.
LONGEST_SIDE = 16384


_RATES = (0.001, 1000)


def check_installed() -> None:
    """Raises `ImportError` without PyAV: worth asking before a long computation."""
    pyav()


def pyav() -> Any:
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


__all__ = ["LONGEST_SIDE", "Frames", "check_installed", "check_rate", "pyav"]
