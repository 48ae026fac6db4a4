"""Colours of a frame as standard dynamic range; HDR is tone-mapped.

Formulas: the transfer functions of Recommendation ITU-R BT.2100, the conversion of primaries of
BT.2087, and the reference white of 203 cd/m2 of Report BT.2408.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

_WHITE = 203.0

# FFmpeg's numbers of transfer functions, primaries and matrices are those of Rec. ITU-T H.273.
_PQ, _HLG = 16, 18
_BT709, _UNSPECIFIED = 1, 2
NAMES = {_PQ: "PQ, SMPTE ST 2084", _HLG: "HLG, ARIB STD-B67"}
"""HDR transfer functions by their number, with the names by which people know them."""

_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)


def is_hdr(frame: Any) -> bool:
    """True for a frame whose transfer function is PQ or HLG."""
    return frame.color_trc in NAMES


def standard_range(frame: Any) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a frame's RGB pixels, tone-mapped where they are HDR.

    White of 203 cd/m2 becomes 255, brighter light is clipped, and what is darker keeps its
    luminance on a display of gamma 2.4.
    """
    if not is_hdr(frame):
        return frame.to_ndarray(format="rgb24")
    given = {"src_colorspace": "BT2020"} if frame.colorspace == _UNSPECIFIED else {}
    codes = frame.to_ndarray(format="rgb48le", **given)
    light = np.take(_table(frame.color_trc), codes)
    if frame.color_trc == _HLG:
        # The system gamma of a display of 1000 cd/m2; the table gives light of the scene.
        luminance = light @ _LUMINANCE
        light *= (1000 / _WHITE) * (luminance**0.2)[..., None]
    if frame.color_primaries != _BT709:
        light = light @ _TO_BT709.T
    return np.rint(255 * np.clip(light, 0, 1) ** (1 / 2.4)).astype(np.uint8)


@functools.cache
def _table(transfer: int) -> Float[np.ndarray, "65536"]:
    """Linear light of each 16-bit code: for PQ in units of white, for HLG that of the scene."""
    curve: Callable[[np.ndarray], np.ndarray] = {_PQ: _pq, _HLG: _hlg}[transfer]
    return curve(np.linspace(0, 1, 65536)).astype(np.float32)


def _pq(signal: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    root = signal ** (1 / m2)
    return 10_000 / _WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def _hlg(signal: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


__all__ = ["NAMES", "is_hdr", "standard_range"]
