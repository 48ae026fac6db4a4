"""Lowers convolutions and their gradients for CPUs.

XLA's CPU backend is fast at 2D convolutions only. Its gradient with respect to the kernel is a
convolution whose window is the whole frame, ten times slower than the matrix products here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .choose import Geometry, Spec
from .frames import conv2d


def taps(x: Array, kernel: Array, spec: Spec) -> Array:
    """Adds up one 2D convolution of all frames for each tap in time."""
    count, geometry = x.shape[1] - kernel.shape[0] + 1, spec.geometry
    parts = (
        conv2d(x[:, i : i + count], tap, geometry.stride, geometry.pads)
        for i, tap in enumerate(kernel)
    )
    return functools.reduce(jnp.add, parts)


def phases(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "1 3 3 i o"], spec: Spec
) -> Float[Array, "b t h2 w2 o"]:
    """Doubles by nearest neighbour, then convolves, as four 2x2 convolutions on the small grid.

    There is one for each phase of the large grid: 4/9 of the multiplications, and the enlarged
    frames are never there.
    """
    geometry = _of_phases(spec.geometry)
    return _interleaved(conv2d(x, _phase_kernels(kernel)[0], 1, geometry.pads))


def _of_phases(geometry: Geometry) -> Geometry:
    """Returns the geometry of the four phases, for pads of 1 or -1.

    Each phase sees one pixel beyond the large grid: a zero, or with a pad of -1 a pixel of `x`.
    """
    (above, below), (left, right) = (tuple((n + 1) // 2 for n in pads) for pads in geometry.pads)
    return Geometry(pads=((above, below), (left, right)))


def _phase_kernels(kernel: Float[Array, "1 3 3 i o"]) -> Float[Array, "1 2 2 i 4*o"]:
    """Returns the kernels of the four phases, side by side.

    A large pixel sees two small ones per axis: the even phase the pair that ends at its own pixel
    with taps (k0, k1 + k2), the odd phase the pair that begins there with (k0 + k1, k2).
    """

    def pair(k: Array, axis: int) -> list[Array]:
        k0, k1, k2 = jnp.split(k, 3, axis)
        return [jnp.concatenate(p, axis) for p in ((k0, k1 + k2), (k0 + k1, k2))]

    kernels = [phase for rows in pair(kernel, 1) for phase in pair(rows, 2)]
    return jnp.concatenate(kernels, axis=-1)


def _interleaved(y: Array) -> Array:
    """Returns the large grid `(b, t, 2h, 2w, o)` from its phases `(b, t, h+1, w+1, 4o)`."""
    b, t, h, w = y.shape[0], y.shape[1], y.shape[2] - 1, y.shape[3] - 1
    quads = jnp.split(y, 4, axis=-1)
    shifted = [quads[2 * i + j][:, :, i : i + h, j : j + w] for i in (0, 1) for j in (0, 1)]
    y = jnp.stack(shifted, axis=3).reshape(b, t, h, 2, 2, w, -1)
    return y.swapaxes(4, 5).reshape(b, t, 2 * h, 2 * w, -1)


def by_input(
    cotangent: Array, kernel: Array, size: tuple[int, int], spec: Spec
) -> Float[Array, "b t h w i"]:
    """Returns the gradient of a convolution with respect to its input, of `size` pixels."""
    b, t = cotangent.shape[0], cotangent.shape[1] + kernel.shape[0] - 1
    x = jax.ShapeDtypeStruct((b, t, *size, kernel.shape[3]), cotangent.dtype)
    if spec.geometry.doubles:
        kernel = _phase_kernels(kernel)
        cotangent = _interleaved_transpose(cotangent)
        spec = spec._replace(geometry=_of_phases(spec.geometry))
    return jax.linear_transpose(lambda x: taps(x, kernel, spec), x)(cotangent)[0]


def by_kernel(
    x: Array, cotangent: Array, sizes: tuple[int, int, int], spec: Spec
) -> Float[Array, "kt kh kw i o"]:
    """Returns the gradient of a convolution with respect to its kernel, of `sizes` taps."""
    if spec.geometry.doubles:
        on_phases = spec._replace(geometry=_of_phases(spec.geometry))
        merged = by_kernel(x, _interleaved_transpose(cotangent), (1, 2, 2), on_phases)
        kernel = jax.ShapeDtypeStruct((*sizes, x.shape[4], cotangent.shape[4]), x.dtype)
        return jax.linear_transpose(_phase_kernels, kernel)(merged)[0]
    stride, (_, *spatial) = spec.geometry.stride, sizes
    x = jnp.pad(x, [(0, 0), (0, 0), *spec.geometry.pads, (0, 0)])
    if stride == 1:
        return _by_kernel(x, cotangent, sizes[1:])
    # A strided kernel is a smaller one over the phases of the frame: (rows, columns, phases, o).
    rows, columns = coarse = tuple(-(-size // stride) for size in spatial)
    by_phase = _by_kernel(_phases(x, stride), cotangent, coarse)
    split = by_phase.reshape(-1, *coarse, stride, stride, x.shape[4], cotangent.shape[4])
    merged = split.swapaxes(2, 3).reshape(-1, rows * stride, columns * stride, *split.shape[5:])
    return merged[:, : spatial[0], : spatial[1]]


def _interleaved_transpose(cotangent: Array) -> Array:
    b, t, h, w, o = cotangent.shape
    y = jax.ShapeDtypeStruct((b, t, h // 2 + 1, w // 2 + 1, 4 * o), cotangent.dtype)
    return jax.linear_transpose(_interleaved, y)(cotangent)[0]


def _phases(x: Array, stride: int) -> Array:
    """Returns each `stride` x `stride` square of pixels as one pixel of so many more channels."""
    b, t, h, w, c = x.shape
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -h % stride), (0, -w % stride), (0, 0)])
    x = x.reshape(b, t, -(-h // stride), stride, -(-w // stride), stride, c).swapaxes(3, 4)
    return x.reshape(*x.shape[:4], stride * stride * c)


def _by_kernel(x: Array, cotangent: Array, sizes: tuple[int, ...]) -> Array:
    """Returns the gradient of a valid convolution with respect to its kernel.

    With the rows of a frame flattened, each tap reads one contiguous slice, so its gradient is one
    matrix product. The outer loop is over frames, so that their slices stay in the processor's
    cache. The inner one is over taps: written out, it takes three times as long to compile.

    **Returns:** `(taps, *sizes, i, o)`.
    """
    (b, t, h, w, o), width, i = cotangent.shape, x.shape[3], x.shape[4]
    rows, columns = sizes
    taps = x.shape[1] - t + 1
    # What is read past a row's end meets zeros.
    cotangent = jnp.pad(cotangent, [(0, 0)] * 3 + [(0, width - w), (0, 0)])
    length = h * width - columns + 1
    x, cotangent = (y.reshape(*y.shape[:2], -1, y.shape[-1]) for y in (x, cotangent))
    late, down, right = np.indices((taps, rows, columns), np.int32).reshape(3, -1)
    starts = (late, down * np.int32(width) + right)

    def stretch(y: Array, frame: Array, start: Array) -> Array:
        at = (jnp.zeros_like(frame), frame, start, jnp.zeros_like(frame))
        seen = lax.dynamic_slice(y, at, (b, 1, length, y.shape[-1]))
        # XLA copies the operands of dots over several axes, so clips and pixels become one axis.
        return seen.reshape(b * length, -1)

    def add_frame(total: Array, frame: Array) -> tuple[Array, None]:
        reaching = stretch(cotangent, frame, jnp.zeros_like(frame))

        def product(tap: tuple[Array, Array]) -> Array:
            seen = stretch(x, frame + tap[0], tap[1])
            return lax.dot_general(seen, reaching, (((0,), (0,)), ((), ())))

        return total + lax.map(product, starts), None

    total = jnp.zeros_like(x, shape=(late.size, i, o))
    total, _ = lax.scan(add_frame, total, jnp.arange(t, dtype=jnp.int32))
    return total.reshape(taps, rows, columns, i, o)


LOWERINGS = (taps, phases)

__all__ = ["LOWERINGS", "by_input", "by_kernel", "phases", "taps"]
