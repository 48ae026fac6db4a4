"""How a convolution is lowered on this platform.

The only file that asks which platform it is on. Every function takes and returns BTHWC
arrays; every variant computes the same numbers, in another order of summation.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._types import at_least_float32

VARIANTS = ("cpu", "default")


def _per_platform(cpu: Callable, default: Callable, *args: Array, variant: str | None) -> Array:
    """Calls the one for the platform that the program is compiled for.

    Derivatives are chosen anew in the backward pass. Left to JAX, the choice would come there
    as a value from the forward pass, and XLA would keep both branches: ten times as slow. The
    price is forward-mode differentiation.
    """
    if variant is not None:
        return {"cpu": cpu, "default": default}[variant](*args)

    def pullback(fn: Callable) -> Callable:
        return lambda cotangent, *args: jax.vjp(fn, *args)[1](cotangent)

    @jax.custom_vjp
    def chosen(*args):
        return lax.platform_dependent(*args, cpu=cpu, default=default)

    def forward(*args):
        return chosen(*args), args

    def backward(args, cotangent):
        return lax.platform_dependent(
            cotangent, *args, cpu=pullback(cpu), default=pullback(default)
        )

    chosen.defvjp(forward, backward)
    return chosen(*args)


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
    pads = [(size // 2, size // 2) for size in kernel.shape[1:3]]
    y = valid_conv(x, kernel, bias, pads, variant=variant)
    return y, x[:, -past:] if past else None


def valid_conv(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "kt kh kw i o"],
    bias: Float[Array, " o"],
    pads: list[tuple[int, int]],
    *,
    variant: str | None = None,
) -> Float[Array, "b t-kt+1 h2 w2 o"]:
    """A 3D convolution, valid in time, with zero `pads` of height and width."""

    def direct(x, kernel, bias):
        dims = ("NDHWC", "DHWIO", "NDHWC")
        padding = [(0, 0), *pads]
        y = lax.conv_general_dilated(x, kernel, (1, 1, 1), padding, dimension_numbers=dims)
        return _biased(y, bias)

    def taps(x, kernel, bias):
        # XLA's CPU backend has a fast 2D convolution only.
        frames = x.shape[1] - kernel.shape[0] + 1
        x, kernel = at_least_float32(x), at_least_float32(kernel)
        parts = (_conv2d(x[:, i : i + frames], tap, (1, 1), pads) for i, tap in enumerate(kernel))
        return _biased(functools.reduce(jnp.add, parts), bias)

    return _per_platform(taps, direct, x, kernel, bias, variant=variant)


def frame_conv(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "kh kw i o"],
    bias: Float[Array, " o"],
    *,
    stride: int,
    pads: list[tuple[int, int]],
) -> Float[Array, "b t h2 w2 o"]:
    """A 2D convolution of every frame."""

    def cpu(x, kernel, bias):
        return _biased(
            _conv2d(at_least_float32(x), at_least_float32(kernel), (stride, stride), pads), bias
        )

    def default(x, kernel, bias):
        return _biased(_conv2d(x, kernel, (stride, stride), pads), bias)

    return _per_platform(cpu, default, x, kernel, bias, variant=None)


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
        return _biased(_conv2d(x, kernel, (1, 1), [(1, 1), (1, 1)]), bias)

    def phases(x, kernel, bias):
        return _biased(_phase_conv(at_least_float32(x), at_least_float32(kernel)), bias)

    return _per_platform(phases, doubled, x, kernel, bias, variant=variant)


def _phase_conv(x: Array, kernel: Array) -> Array:
    # A large pixel sees two small ones per axis: the even phase the pair that ends at its own
    # pixel with taps (k0, k1 + k2), the odd phase the pair that begins there, (k0 + k1, k2).
    def pair(k: Array, axis: int) -> list[Array]:
        k0, k1, k2 = jnp.split(k, 3, axis)
        return [jnp.concatenate(p, axis) for p in ((k0, k1 + k2), (k0 + k1, k2))]

    b, t, h, w, _ = x.shape
    kernels = [phase for rows in pair(kernel, 0) for phase in pair(rows, 1)]
    y = _conv2d(x, jnp.concatenate(kernels, axis=-1), (1, 1), [(1, 1), (1, 1)])
    quads = jnp.split(y, 4, axis=-1)
    shifted = [quads[2 * i + j][:, :, i : i + h, j : j + w] for i in (0, 1) for j in (0, 1)]
    y = jnp.stack(shifted, axis=3).reshape(b, t, h, 2, 2, w, -1)
    return y.swapaxes(4, 5).reshape(b, t, 2 * h, 2 * w, -1)


def pointwise_conv(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "1 1 1 i o"], bias: Float[Array, " o"]
) -> Float[Array, "b t h w o"]:
    """A 1x1x1 convolution, accumulated in at least float32."""
    accumulator = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    return _biased(jnp.matmul(x, kernel[0, 0, 0], preferred_element_type=accumulator), bias)


def _biased(y: Array, bias: Array) -> Array:
    """Adds the bias in the dtype `y` was summed in, then rounds, once, to the model's."""
    return (y + bias.astype(y.dtype)[None, None, None, None]).astype(bias.dtype)


def _conv2d(x: Array, kernel: Array, stride: tuple[int, int], pads: list) -> Array:
    b, t, *_ = x.shape
    frames = x.reshape(b * t, *x.shape[2:])
    # Padded by hand: with padding of its own the gradient by the kernel leaves the fast path of
    # XLA's CPU backend for some shapes, and takes thirty times as long.
    frames = jnp.pad(frames, [(0, 0), *pads, (0, 0)])
    y = lax.conv_general_dilated(
        frames, kernel, stride, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y.reshape(b, t, *y.shape[1:])


__all__ = ["VARIANTS", "causal_conv", "doubling_conv", "frame_conv", "pointwise_conv", "valid_conv"]
