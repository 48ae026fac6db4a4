"""Geometry of a frame: orientation, square pixels, and a size to fit into."""

import os
import struct
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8

from ._av import LONGEST_SIDE, pyav

Matrix: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
"""((a, b), (c, d)): a stored pixel (x, y) is shown at (a x + c y, b x + d y)."""


_UPRIGHT: Matrix = ((1, 0), (0, 1))


# Kinds of side data that FFmpeg 8.1 attaches and PyAV 18.1 cannot name: it then gives none at
# all. The last is Exif, which pictures from cameras have, and the orientation with it.
_UNNAMED = (28, 29, 30, 31)


def matrix(frame: Any, stream: Any) -> Matrix:
    """Returns the 2x2 part of a frame's display matrix, the identity where there is none."""
    try:
        found = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        found = _without_unnamed(frame, stream).side_data.get("DISPLAYMATRIX")
    if found is None:
        return _UPRIGHT
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(found))
    return (a, b), (c, d)


def _without_unnamed(frame: Any, stream: Any) -> Any:
    graph = pyav().filter.Graph()
    chain = [graph.add_buffer(template=stream)]
    chain += [graph.add("sidedata", f"mode=delete:type={kind}") for kind in _UNNAMED]
    chain.append(graph.add("buffersink"))
    graph.link_nodes(*chain).configure()
    graph.push(frame)
    return graph.pull()


def is_transposed(orientation: Matrix) -> bool:
    """True if rows are shown as columns."""
    (a, b), (c, d) = orientation
    return abs(b) + abs(c) > abs(a) + abs(d)


def upright(
    pixels: UInt8[np.ndarray, "h w 3"], orientation: Matrix
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Turns and mirrors a frame as its matrix says, to the nearest of the eight orientations."""
    (a, b), (c, d) = orientation
    if is_transposed(orientation):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    if a < 0:
        pixels = pixels[:, ::-1]
    if d < 0:
        pixels = pixels[::-1]
    return pixels


def pixel_aspect(stream: Any, orientation: Matrix) -> Fraction:
    """Returns width : height of a pixel as it is shown upright."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    (_, b), (c, _) = orientation
    # From a matrix that stretches, FFmpeg has the aspect ratio of what is shown already.
    is_stretched = abs(abs(b) - abs(c)) > 0.01 * abs(c)
    return 1 / aspect if is_transposed(orientation) and not is_stretched else aspect


def square_size(
    path: str | os.PathLike, height: int, width: int, aspect: Fraction
) -> tuple[int, int]:
    """Returns the (height, width) of a file's frames once their pixels are square.

    One side is enlarged and the other stays, so no pixel is lost.

    **Raises:** `ValueError` for pixels so oblong that frames would be too large.
    """
    size = (height, round(width * aspect)) if aspect >= 1 else (round(height / aspect), width)
    if aspect != 1 and max(size) > LONGEST_SIDE:
        raise ValueError(
            f"{path} has pixels of {aspect.numerator}:{aspect.denominator}, which makes its "
            f"{height}x{width} frames {size[0]}x{size[1]}: write it anew with square pixels."
        )
    return size


def fitted(
    pixels: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], aspect: Fraction
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Crops about the centre to the aspect ratio of `size`, and resizes.

    `aspect` is that of the given pixels; those of the result are square.
    """
    height, width = pixels.shape[:2]
    ratio = Fraction(*size) * aspect
    rows = min(height, max(1, round(width * ratio)))
    columns = min(width, max(1, round(height / ratio)))
    top, left = (height - rows) // 2, (width - columns) // 2
    return resized(pixels[top : top + rows, left : left + columns], size)


def resized(
    pixels: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Resizes to (height, width), bicubic and antialiased."""
    pixels = np.ascontiguousarray(pixels)
    if pixels.shape[:2] == size:
        return pixels
    frame = pyav().VideoFrame.from_ndarray(pixels, format="rgb24")
    frame = frame.reformat(width=size[1], height=size[0], interpolation="BICUBIC")
    return frame.to_ndarray(format="rgb24")


__all__ = [
    "fitted",
    "is_transposed",
    "matrix",
    "pixel_aspect",
    "resized",
    "square_size",
    "upright",
]
