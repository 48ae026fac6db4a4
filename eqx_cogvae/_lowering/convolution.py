"""How a convolution is lowered on this platform.

The only file that asks which platform it is on. Every function takes and returns BTHWC
arrays; all variants are equal, to rounding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from .._types import at_least_float32
from .cpu import Pads, conv2d, doubling_conv_by_phases, taps_conv
from .winograd import winograd_conv

VARIANTS = ("cpu", "gpu", "default")

LARGE = 2**24
"""Elements from which on an array is worked on in parts, and at most in a band of rows.

Below it TPUs convolve wide arrays by products of matrices.
"""

HUGE = 2**16
"""Pixels of a frame from which on it is kept in order, and on TPUs convolved tap by tap.

Both save memory on TPUs. This and `LARGE` are of a whole array, also where devices hold parts.
"""

WIDE = 32
"""Channels from which on, of both, fewer multiplications are worth the sums."""

LONG = 2**42
"""Multiplications, times the channels squared, from which on fewer are worth compiling.

Narrow arrays gain less by them: with 32 channels 9 frames of 128x192 are enough, 96x144 are not.
"""

MANY = 2**9
"""Pixels of the result, of all frames and videos, from which on fewer multiplications are worth
the sums of a kernel's taps, which are as many for one pixel as for all.
"""

_SUBLANES, _LANES = 8, 128
"""Rows and columns of a matrix that a TPU computes with at once."""

_LOW = 8
"""Rows that a band may have also of more than `LARGE` elements. With fewer than half of them there
are no bands.
"""

partitioned = jax.make_user_context(False)
"""Whether XLA is to cut height and width among devices. Known to JAX's caches."""


def _per_platform(
    cpu: Callable,
    default: Callable,
    *args: Array,
    variant: str | None,
    rounded: Callable | None = None,
) -> Array:
    """Calls the one for the platform that the program is compiled for.

    `rounded` stands in for `default` on GPUs, and in every backward pass but the CPU's.

    Derivatives are chosen anew in the backward pass. Left to JAX, the choice would come there
    as a value from the forward pass, and XLA would keep both branches: ten times as slow. The
    price is forward-mode differentiation.
    """
    rounded = rounded or default
    if variant is not None:
        return {"cpu": cpu, "gpu": rounded, "default": default}[variant](*args)

    def pullback(fn: Callable) -> Callable:
        return lambda cotangent, *args: jax.vjp(fn, *args)[1](cotangent)

    def forward(*args):
        return lax.platform_dependent(*args, cpu=cpu, cuda=rounded, rocm=rounded, default=default)

    def backward(args, cotangent):
        pullbacks = {"cpu": pullback(cpu), "default": pullback(rounded)}
        return lax.platform_dependent(cotangent, *args, **pullbacks)

    return _with_backward(forward, backward)(*args)


def _with_backward(forward: Callable, backward: Callable) -> Callable:
    """`forward`, with a derivative of its own, of its arguments and a cotangent.

    For derivatives both are traced only after `sharded` has returned.
    """
    here = partitioned.value

    def placed(fn: Callable) -> Callable:
        def call(*args):
            with partitioned(here):
                return fn(*args)

        return call

    run = jax.custom_vjp(placed(forward))
    run.defvjp(lambda *args: (run(*args), args), placed(backward))
    return run


def is_large(x: Float[Array, "b t *rest"]) -> bool:
    """Whether `x` is worked on in parts."""
    return x.shape[1] > 1 and x.size >= LARGE


def _map_frames(fn: Callable[[Array], Array], x: Float[Array, "b t *rest"]) -> Array:
    """`fn`, which takes frames one by one, of large arrays one after another.

    What it makes of them on its way is then there for one frame at a time.
    """
    if not is_large(x):
        return fn(x)
    frames = jnp.moveaxis(x, 1, 0)[:, :, None]
    _, y = lax.scan(lambda _, frame: (None, fn(frame)[:, 0]), None, frames)
    # One layout for all that read it: XLA for TPUs would else copy it for each.
    return lax.optimization_barrier(jnp.moveaxis(y, 0, 1))


def rows_of_bands(x: Float[Array, "b t h w c"], margin: int) -> int:
    """Rows of the bands, of equal height, that `x` is worked on in on TPUs; 0 where it is not.

    Of at most `LARGE` elements, or `_LOW` rows. `margin` is how many rows around a band are seen.
    There are none within `sharded`, where devices hold rows, nor where frames leave many of a
    TPU's sublanes empty: 9 of them would be as large in memory as 16. (Of up to 4, tiles have
    fewer rows.)
    """
    _, frames, height, *_ = x.shape
    most = min(max(_LOW, LARGE * height // x.size), height // 2)
    rows = max((n for n in range(1, most + 1) if height % n == 0), default=0)
    empty = -frames % _SUBLANES if frames > _SUBLANES // 2 else 0
    worth = rows >= max(margin, _LOW // 2) and 2 * empty <= frames
    return rows if worth and not partitioned.value else 0


def frames_or_bands(
    frames: Callable, bands: Callable | None, whole: Callable, *args: Any, variant: str | None
) -> Any:
    """Calls `bands`, where there is one, on TPUs, else `frames`; the derivative is of `whole`.

    All three are equal. TPUs compute eight rows of a matrix at once: frames are these rows, where
    all are convolved together. For one alone XLA cuts its width into eight, and copies it to that
    end and back.
    """

    def forward(*args):
        if variant is not None:
            return {"frames": frames, "bands": bands}[variant](*args)
        if bands is None:
            return frames(*args)
        return lax.platform_dependent(*args, cpu=frames, cuda=frames, rocm=frames, default=bands)

    def backward(args, cotangent):
        return jax.vjp(whole, *args)[1](cotangent)

    return _with_backward(forward, backward)(*args)


def _is_huge(x: Float[Array, "b t h w c"]) -> bool:
    return x.shape[2] * x.shape[3] >= HUGE


def in_order(frame: Float[Array, "b 1 h w c"]) -> Float[Array, "b 1 h w c"]:
    """The frame; a huge one in memory in the order of its axes, as frames together are.

    XLA for TPUs would else hold all frames of a loop in the layout that its convolution has one
    in, and copy them before it and after. Compiling for a layout that is not the convolution's
    own can take minutes, but not where frames are huge. Not within `sharded`, nor for a batch,
    which may be cut among devices: XLA's partitioner would gather what is.
    """
    if partitioned.value or frame.shape[0] > 1 or not _is_huge(frame):
        return frame
    return with_layout_constraint(frame, Layout(tuple(range(frame.ndim))))


def causal_conv(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "kt kh kw i o"],
    bias: Float[Array, " o"],
    cache: Float[Array, "b kt-1 h w i"] | None = None,
    *,
    variant: str | None = None,
) -> tuple[Float[Array, "b t h w o"], Float[Array, "b kt-1 h w i"] | None]:
    """Causal in time, zero-padded to the same size in space, odd kernels, stride 1.

    `cache` holds the `kt - 1` frames before `x`; without it the first frame of `x` stands in
    for them. Returned with the result: the cache for the next frames, None if `kt` is 1.
    `variant` picks a lowering by name, for tests.
    """
    past = kernel.shape[0] - 1
    if past:
        before = jnp.repeat(x[:, :1], past, axis=1) if cache is None else cache
        x = jnp.concatenate([before, x], axis=1)
    (kh, kw) = kernel.shape[1:3]
    pads = ((kh // 2, kh // 2), (kw // 2, kw // 2))
    y = valid_conv(x, kernel, bias, pads, variant=variant)
    return y, x[:, -past:] if past else None


def valid_conv(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "kt kh kw i o"],
    bias: Float[Array, " o"],
    pads: Pads,
    *,
    variant: str | None = None,
) -> Float[Array, "b t-kt+1 h2 w2 o"]:
    """A 3D convolution, valid in time, with zero `pads` of height and width."""

    def direct(x, kernel, bias):
        if x.shape[1] == kernel.shape[0] and _is_huge(x):
            convolved = _tap_by_tap
        elif x.size < LARGE and kernel.shape[3] >= _LANES and not partitioned.value:
            convolved = _taps_as_products
        else:
            convolved = _taps_as_channels
        return _biased(convolved(x, kernel, pads, _accumulator(x)), bias)

    def rounded(x, kernel, bias):
        # On GPUs, whose tensor cores sum in float32 anyhow: to write that takes 1.8 times as long.
        # In derivatives: cotangents, and copies of the frames, would else be float32.
        return _biased(_taps_as_channels(x, kernel, pads, x.dtype), bias)

    def cpu(x, kernel, bias):
        x, kernel = at_least_float32(x), at_least_float32(kernel)
        if pads == ((1, 1), (1, 1)) and _is_worth_sums(x, kernel):
            return _biased(winograd_conv(x, kernel), bias)
        return _biased(taps_conv(x, kernel, 1, pads), bias)

    return _per_platform(cpu, direct, x, kernel, bias, variant=variant, rounded=rounded)


def _is_worth_sums(x: Array, kernel: Array) -> bool:
    """Whether a convolution that keeps the frames' size is one for `winograd_conv`."""
    b, t, h, w, _ = x.shape
    pixels, channels = b * (t - kernel.shape[0] + 1) * h * w, min(kernel.shape[3:])
    # It lines up pixels of rows and columns, for which XLA's partitioner would gather them.
    return (
        kernel.shape[1:3] == (3, 3)
        and channels >= WIDE
        and pixels >= MANY
        and pixels * kernel.size * channels**2 >= LONG
        and not partitioned.value
    )


def _taps_as_channels(x: Array, kernel: Array, pads: Pads, accumulator: Any) -> Array:
    """One 2D convolution of frames that hold the channels of all the frames a tap would see.

    XLA for TPUs compiles it several times as fast as one in 3D or one for each tap; on an H200
    it takes 0.78 to 0.9 of the time of either, in bfloat16.
    """
    (taps, *_, i, o), b = kernel.shape, x.shape[0]
    frames = x.shape[1] - taps + 1
    seen = jnp.concatenate([x[:, tap : tap + frames] for tap in range(taps)], axis=-1)
    seen = seen.reshape(b * frames, *seen.shape[2:])
    wide = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], taps * i, o)
    y = _summed_conv2d(seen, wide, pads, accumulator)
    return y.reshape(b, frames, *y.shape[1:])


def _tap_by_tap(x: Array, kernel: Array, pads: Pads, accumulator: Any) -> Array:
    """The one frame that a valid convolution of as many frames as it has taps makes.

    XLA for TPUs pads and lays out anew what it convolves: here one frame at a time.
    """
    total = _summed_conv2d(x[:, 0], kernel[0], pads, accumulator)
    for i in range(1, len(kernel)):
        # One after the other: XLA would prepare all the frames first.
        frame, total = lax.optimization_barrier((x[:, i], total))
        total = total + _summed_conv2d(frame, kernel[i], pads, accumulator)
    return jnp.expand_dims(total, 1)


def _taps_as_products(x: Array, kernel: Array, pads: Pads, accumulator: Any) -> Array:
    """A product of matrices for each tap in time and row, of pixels that hold a row's taps.

    For small arrays XLA for TPUs expects half the cycles of a convolution, and compiles it sooner.
    """
    (taps, down, across, i, o), x = kernel.shape, jnp.pad(x, [(0, 0)] * 2 + [*pads, (0, 0)])
    frames, height, width = x.shape[1] - taps + 1, x.shape[2] - down + 1, x.shape[3] - across + 1
    seen = jnp.concatenate([x[:, :, :, j : j + width] for j in range(across)], axis=-1)
    total = jnp.zeros((), accumulator)
    for tap in range(taps):
        for row in range(down):
            part = seen[:, tap : tap + frames, row : row + height]
            matrix = kernel[tap, row].reshape(across * i, o)
            total = total + jnp.matmul(part, matrix, preferred_element_type=accumulator)
    return total


def band_conv(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "kt kh kw i o"],
    bias: Float[Array, " o"],
) -> Float[Array, "b t-kt+1 h-kh+1 w o"]:
    """A 3D convolution, valid in time and height, zero-padded to the same width; for TPUs.

    The sum of one in 2D for each tap in time, which XLA adds up as it convolves: of bands it
    expects fewer cycles than with taps as channels.
    """
    (taps, _, kw), b, frames = kernel.shape[:3], x.shape[0], x.shape[1] - kernel.shape[0] + 1
    total, pads = jnp.zeros((), _accumulator(x)), ((0, 0), (kw // 2, kw // 2))
    for tap in range(taps):
        seen = x[:, tap : tap + frames].reshape(b * frames, *x.shape[2:])
        total = total + _summed_conv2d(seen, kernel[tap], pads, _accumulator(x))
    return _biased(total.reshape(b, frames, *total.shape[1:]), bias)


def _summed_conv2d(x: Array, kernel: Array, pads: Pads, accumulator: Any) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=accumulator,
    )


def _accumulator(x: Array) -> Any:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def frame_conv(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "kh kw i o"],
    bias: Float[Array, " o"],
    *,
    stride: int,
    pads: Pads,
) -> Float[Array, "b t h2 w2 o"]:
    """A 2D convolution of every frame."""

    def cpu(x, kernel, bias):
        x, kernel = at_least_float32(x), at_least_float32(kernel)
        return _biased(taps_conv(x, kernel[None], stride, pads), bias)

    def default(x, kernel, bias):
        return _biased(conv2d(x, kernel, stride, pads), bias)

    apply = lambda x: _per_platform(cpu, default, x, kernel, bias, variant=None)  # noqa: E731
    return _map_frames(apply, x)


def doubling_conv(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "3 3 i o"],
    bias: Float[Array, " o"],
    *,
    variant: str | None = None,
) -> Float[Array, "b t 2*h 2*w o"]:
    """Nearest doubling of height and width, then a 3x3 convolution of every frame.

    On CPU as four 2x2 convolutions on the small grid, one for each phase of the large one:
    4/9 of the multiplications, and the enlarged frames are never there.
    """

    def doubled(x, kernel, bias):
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return _biased(conv2d(x, kernel, 1, ((1, 1), (1, 1))), bias)

    def phases(x, kernel, bias):
        return _biased(doubling_conv_by_phases(at_least_float32(x), at_least_float32(kernel)), bias)

    apply = lambda x: _per_platform(phases, doubled, x, kernel, bias, variant=variant)  # noqa: E731
    return _map_frames(apply, x)


def pointwise_conv(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "1 1 1 i o"], bias: Float[Array, " o"]
) -> Float[Array, "b t h w o"]:
    """A 1x1x1 convolution, accumulated in at least float32."""
    y = jnp.matmul(x, kernel[0, 0, 0], preferred_element_type=_accumulator(x))
    return _biased(y, bias)


def _biased(y: Array, bias: Array) -> Array:
    """Adds the bias in the dtype of `y`, then rounds to the model's."""
    return (y + bias.astype(y.dtype)[None, None, None, None]).astype(bias.dtype)


__all__ = [
    "VARIANTS",
    "band_conv",
    "causal_conv",
    "doubling_conv",
    "frame_conv",
    "frames_or_bands",
    "in_order",
    "is_large",
    "partitioned",
    "pointwise_conv",
    "rows_of_bands",
    "valid_conv",
]
