"""Chooses the lowering and the chunks of each operation.

Every choice is a pure function of shapes, the platform and `Hints`. Sizes may be symbolic, as they
are under `jax.export`. If they leave a choice open, the plain way is taken.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from .._meshes import Split, split

Pads: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
"""Zeros before and behind, along height and along width."""


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Sizes at which another lowering becomes faster, or needs less memory.

    They were measured on the default configuration, by the scripts in `benchmarks/`. If several
    devices share a video, elements are those of one device.
    """

    chunk_elements: int = 2**24
    """Arrays with at least this many elements are processed in chunks. From `tpu_compile.py` and
    `cpu.py`."""
    band_elements: int = 6 * 2**20
    """Maximum elements of a band of rows, whose intermediates then fit the fast memory of a TPU.
    From `tpu_compile.py`."""
    band_min_rows: int = 4
    """Minimum height of a band. With fewer rows, frames are processed one by one instead."""
    band_always_rows: int = 8
    """Height that a band may have even if it then exceeds `band_elements`."""
    huge_frame_pixels: int = 2**16
    """Minimum pixels of a single frame for a TPU to convolve it tap by tap, which saves memory."""
    product_max_elements: int = 2**24
    """Maximum elements of an array that a TPU convolves by matrix products."""
    product_min_channels: int = 128
    """Minimum input channels for such products: a TPU's matrix unit has 128 columns."""
    winograd_min_channels: int = 32
    """Minimum channels, input and output, for Winograd's products to repay its sums."""
    winograd_min_pixels: int = 2**9
    """Minimum output pixels for Winograd: transforming the kernel costs the same however few there
    are."""
    winograd_min_work: int = 2**42
    """Minimum multiplications x channels^2 for Winograd to repay its longer compile time."""
    winograd_band_elements: int = 2**24
    """Maximum elements of a band that Winograd works on: its sums are four times as many."""
    winograd_piece_elements: int = 2**21
    """Elements that one step of Winograd's kernel gradient sees; the fastest of 2^18 to 2^22."""


_ONE_DEVICE = Split()


@dataclasses.dataclass(frozen=True)
class Hints:
    """Facts about the whole program that the shapes of one operation do not show."""

    split: Split = _ONE_DEVICE
    """Numbers of devices that batch, height and width are split over.

    Frames that devices share are divided into `parts`, which are clips of a batch. Height and width
    are split only where that is not possible: XLA's partitioner then divides the work.
    """
    thresholds: Thresholds = Thresholds()
    """Sizes that decide. Tests and tuning replace them."""
    platform: str | None = None
    """Platform whose lowerings are used, or None for the platform that is compiled for."""

    def of_parts(self) -> "Hints":
        """Returns the hints for frames' parts, one a device, that are treated as clips."""
        return dataclasses.replace(self, split=Split(batch=self.split.devices))


thresholds = jax.make_user_context(Thresholds())
"""Thresholds that functions are traced with. They are part of JAX's cache key."""


as_if_on = jax.make_user_context(None)
"""Platform whose lowerings functions are traced with, so that they can run on another one."""


def current_hints() -> Hints:
    """Returns the hints that hold while tracing."""
    return Hints(split.value, thresholds.value, as_if_on.value)


@contextlib.contextmanager
def using(hints: Hints) -> Iterator[None]:
    """Restores earlier hints: rules for derivatives run after their context has ended."""
    with split(hints.split), thresholds(hints.thresholds), as_if_on(hints.platform):
        yield


class Geometry(NamedTuple):
    """The static part of a convolution, which is valid in time."""

    stride: int = 1
    """Step along height and width."""
    pads: Pads = ((1, 1), (1, 1))
    """Zeros around each frame."""
    doubles: bool = False
    """True if height and width are doubled first, by nearest neighbour."""
    band: bool = False
    """True if `x` is a band of rows that brings the rows above and below along."""

    @property
    def reach(self) -> Pads:
        """Number of pixels around a frame, or a part of one, that its result depends on."""
        above, below, left, right = (-(-n // self.scale) for pads in self.pads for n in pads)
        return (above, below), (left, right)

    @property
    def scale(self) -> int:
        """Factor by which height and width are enlarged first."""
        return 2 if self.doubles else 1

    def within(self, edges: Pads) -> "Geometry":
        """Returns the geometry for frames that have so many pixels of `edges` around them."""
        (above, below), (left, right) = (
            tuple(n - self.scale * m for n, m in zip(*pair, strict=True))
            for pair in zip(self.pads, edges, strict=True)
        )
        return self._replace(pads=((above, below), (left, right)))


_UNPADDED = Geometry(pads=((0, 0), (0, 0)))


class Spec(NamedTuple):
    """The arguments of a lowering besides its two arrays."""

    geometry: Geometry
    accumulator: Any
    """The dtype of sums and of the result; None leaves it to XLA."""
    limits: Thresholds


def lowering(
    geometry: Geometry,
    x: Sequence[Any],
    kernel: Sequence[int],
    platform: str,
    hints: Hints = Hints(),
) -> str:
    """Returns the name of the lowering of a convolution, a key of `conv.LOWERINGS`.

    **Arguments:**

    - `x`: the shape `(b, t, h, w, i)`; `kernel`: the shape `(kt, kh, kw, i, o)`.
    - `platform`: `"cpu"`, `"gpu"`, `"tpu"`, or another, which is treated as a TPU.
    """
    if platform == "cpu":
        if geometry.doubles:
            return "phases"
        return "winograd" if _suits_winograd(geometry, x, kernel, hints) else "taps"
    if geometry.doubles and platform != "gpu":
        return "doubled"
    if geometry.doubles or geometry.stride > 1 or kernel[0] == 1:
        return "frames"
    if platform == "gpu":
        return "channels"
    return _on_tpu(geometry, x, kernel, hints)


def _on_tpu(geometry: Geometry, x: Sequence[Any], kernel: Sequence[int], hints: Hints) -> str:
    limits, (_, frames, _, _, channels) = hints.thresholds, x
    if kernel[1] > 1 and geometry.band:
        return "summed"
    if frames == kernel[0] and _is_huge(x, hints):
        return "sequential"
    if hints.split.within_frames:
        # The products' shifted rows would make XLA gather frames that cannot be divided into parts.
        return "summed"
    small = _known(x) and _share(x, hints) < limits.product_max_elements
    return "products" if small and channels >= limits.product_min_channels else "channels"


def _suits_winograd(
    geometry: Geometry, x: Sequence[Any], kernel: Sequence[int], hints: Hints
) -> bool:
    """Returns True if Winograd's algorithm is faster than a sum of direct 2D convolutions."""
    # It reads shifted rows. XLA would gather frames that cannot be divided into parts.
    unsuitable = tuple(kernel[1:3]) != (3, 3) or geometry.stride > 1
    if unsuitable or not _known(x) or hints.split.within_frames:
        return False
    (above, below), (left, right) = geometry.pads
    height, width = x[2] + above + below - 2, x[3] + left + right - 2
    pixels, channels = x[0] * (x[1] - kernel[0] + 1) * height * width, min(kernel[3:])
    pixels //= hints.split.devices
    limits = hints.thresholds
    return (
        channels >= limits.winograd_min_channels
        and pixels >= limits.winograd_min_pixels
        and pixels * math.prod(kernel) * channels**2 >= limits.winograd_min_work
    )


def in_chunks(x: Sequence[Any], hints: Hints = Hints()) -> bool:
    """Returns True if an array of shape `(b, t, ...)` is processed in chunks."""
    return _known(x) and x[1] > 1 and _share(x, hints) >= hints.thresholds.chunk_elements


def band_height(x: Sequence[int], margin: int, hints: Hints = Hints()) -> int:
    """Returns the height of the equal bands of rows that `x` is processed in, or 0 for none.

    There are none if height is split over devices, because XLA would gather the rows; parts of such
    frames can be clips of their own. There are none either if a TPU would waste memory on so many
    frames. The rule is the same on every platform.

    **Arguments:**

    - `x`: the shape `(b, t, h, w, c)`.
    - `margin`: number of rows above a band, and below it, that its result depends on.
    """
    limits, frames, height = hints.thresholds, x[1], x[2]
    if hints.split.height > 1 or not _fills_rows(frames):
        return 0
    most = limits.band_elements * height // _share(x, hints)
    most = min(max(most, limits.band_always_rows), height // 2)
    found = max((n for n in range(1, most + 1) if height % n == 0), default=0)
    return found if found >= max(margin, limits.band_min_rows) else 0


def _fills_rows(frames: int) -> bool:
    """Returns True if a TPU wastes at most half of the memory of so many frames.

    It pads their number to a multiple of 8, or to 4.
    """
    return frames <= 4 or 2 * (-frames % 8) <= frames


def is_first_apart(x: Sequence[Any], hints: Hints = Hints()) -> bool:
    """Returns True if the first frame of `x` is processed by itself, so that the rest has bands."""
    if not in_chunks(x, hints) or _fills_rows(x[1]):
        return False
    b, t, h, w, c = x
    rows, columns = parts(x, hints)
    if rows * columns > 1:
        hints = hints.of_parts()
    return band_height((b * rows * columns, t - 1, h // rows, w // columns, c), 1, hints) > 0


def parts(
    x: Sequence[Any],
    hints: Hints = Hints(),
    kernel: Sequence[int] = (1, 1),
    geometry: Geometry = _UNPADDED,
) -> tuple[int, int]:
    """Returns the rows and columns of equal parts that frames are divided into.

    They are the devices' parts. It is the whole, `(1, 1)`, if sizes are symbolic, or if the result
    of a convolution is not that of parts and the pixels of their neighbours.

    **Arguments:**

    - `x`: the shape `(b, t, h, w, c)`.
    - `kernel`, `geometry`: height and width of a kernel, and how it is applied.
    """
    _, rows, columns = hints.split
    sides = zip(x[2:4], (rows, columns), kernel, geometry.pads, geometry.reach, strict=True)
    fits = _known(x) and all(_divides(*side, geometry) for side in sides)
    return (rows, columns) if fits else (1, 1)


def _divides(
    side: int, number: int, size: int, pads: Sequence[int], reach: Sequence[int], geometry: Geometry
) -> bool:
    """Returns True if the results of `number` parts of a side, joined, are that of the whole.

    A part may depend on its next neighbours, but not on those beyond them.
    """
    if number == 1:
        return True
    part, enlarged = side // number, geometry.scale * side
    result = (enlarged + sum(pads) - size) // geometry.stride + 1
    in_step = side % number == 0 and part % geometry.stride == 0
    return in_step and result == enlarged // geometry.stride and part >= max(reach)


def pins_layout(x: Sequence[Any], hints: Hints = Hints()) -> bool:
    """Returns True if a loop over the frames of `x` pins them to row-major layout.

    XLA for TPUs would otherwise hold all frames in the layout of its convolution, and copy them
    before and after the loop. Only huge frames are pinned, because pinning can make programs of
    smaller ones compile for minutes. A batch of several clips is not pinned: it may be split over
    devices, and XLA would gather it.
    """
    return _is_huge(x, hints) and x[0] == 1 and not hints.split.within_frames


def _is_huge(x: Sequence[Any], hints: Hints) -> bool:
    return _known(x) and math.prod(x[2:4]) >= hints.thresholds.huge_frame_pixels


def _share(shape: Sequence[int], hints: Hints) -> int:
    """Returns the number of elements of an array that one device holds."""
    return max(math.prod(shape) // hints.split.devices, 1)


def _known(shape: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in shape)


__all__ = [
    "Geometry",
    "Hints",
    "Pads",
    "Spec",
    "Thresholds",
    "as_if_on",
    "band_height",
    "current_hints",
    "in_chunks",
    "lowering",
    "parts",
    "pins_layout",
    "thresholds",
    "using",
]
