"""Peak signal-to-noise ratio."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped


def psnr(
    a: Shaped[np.ndarray, "..."] | Shaped[Array, "..."],
    b: Shaped[np.ndarray, "..."] | Shaped[Array, "..."],
) -> float:
    """Computes the peak signal-to-noise ratio of two clips, both clipped to [-1, 1].

    **Arguments:**

    - `a`, `b`: clips of one shape, floating.

    **Returns:** decibels; infinity for equal clips.

    **Raises:** `ValueError` for different shapes or a dtype that is not floating.
    """
    if a.shape != b.shape:
        raise ValueError(f"PSNR compares clips of one shape, got {a.shape} and {b.shape}.")
    return decibels(squared_error(a, b) / max(a.size, 1))


def squared_error(
    a: Shaped[np.ndarray, "..."] | Shaped[Array, "..."],
    b: Shaped[np.ndarray, "..."] | Shaped[Array, "..."],
) -> float:
    """Returns the squared error, summed in float64 over all elements, both clipped to [-1, 1]."""
    for x in (a, b):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"PSNR is of floating values in [-1, 1], got {x.dtype}: scale by `x / 127.5 - 1`."
            )
    difference = _clipped(a) - _clipped(b)
    return float(np.sum(np.square(difference), dtype=np.float64))


def decibels(mse: float) -> float:
    """Returns the PSNR of a mean squared error, for values that span [-1, 1]."""
    return math.inf if mse == 0 else 10 * math.log10(4 / mse)


def _clipped(x: Any) -> Float[np.ndarray, "..."]:
    return np.clip(np.asarray(x).astype(np.float32), -1, 1)


__all__ = ["decibels", "psnr", "squared_error"]
