r"""Defines convolutions as JAX primitives, which are lowered for each platform.

A convolution without bias belongs to a set of three bilinear primitives: the convolution itself,
its gradient with respect to the input, and its gradient with respect to the kernel. They are the
partial derivatives of one trilinear form, <c, conv(x, k)>, so the transposes of each are the other
two, and derivatives of any order stay in the set. A fourth primitive adds the bias as well.

```
                 y = conv(x, k)
        by x  /                  \  by k
   by_input(c, k)  <-------->  by_kernel(x, c)
```

`choose.lowering` names the lowering, and `LOWERINGS` holds it. `vmap`, `jax.export` and XLA's
partitioner need nothing more.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from .._meshes import varying_as, without_varying
from .._types import at_least_float32
from . import choose, cpu, frames, tpu, winograd
from .choose import Geometry, Hints, Spec
from .parts import on_parts

LOWERINGS: dict[str, Callable[[Array, Array, Spec], Array]] = {
    lowering.__name__: lowering
    for module in (frames, tpu, cpu, winograd)
    for lowering in module.LOWERINGS
}
"""Every way to convolve, by name. All of them agree, to rounding, where they apply."""

PLATFORMS = ("cpu", "gpu", "tpu")
"""Platforms with lowerings of their own. Any other is served as a TPU is."""


def causal_conv(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "kt kh kw i o"],
    bias: Float[Array, " o"],
    cache: Float[Array, "b kt-1 h w i"] | None = None,
) -> tuple[Float[Array, "b t h w o"], Float[Array, "b kt-1 h w i"] | None]:
    """Convolves causally in time, zero-padded to the same size in space, with odd kernels.

    `cache` holds the `kt - 1` frames before `x`; without it the first frame of `x` stands in
    for them. Returned with the result: the cache for the next frames, None if `kt` is 1.
    """
    past = kernel.shape[0] - 1
    if cache is not None and cache.shape[1] != past:
        raise ValueError(
            f"a kernel of {past + 1} taps in time needs a cache of {past} frames, got "
            f"{cache.shape[1]}: hand in the cache that the same layer returned."
        )
    if past:
        before = jnp.repeat(x[:, :1], past, axis=1) if cache is None else cache
        x = jnp.concatenate([before, x], axis=1)
    (kh, kw) = kernel.shape[1:3]
    geometry = Geometry(pads=((kh // 2, kh // 2), (kw // 2, kw // 2)))
    return valid_conv(x, kernel, bias, geometry), x[:, -past:] if past else None


def pointwise_conv(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "1 1 1 i o"], bias: Float[Array, " o"]
) -> Float[Array, "b t h w o"]:
    """Multiplies the channels of each pixel by a matrix; sums are held in at least float32."""
    y = jnp.matmul(x, kernel[0, 0, 0], preferred_element_type=_accumulator(x.dtype))
    return _biased(y, bias).astype(x.dtype)


def valid_conv(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "kt kh kw i o"],
    bias: Float[Array, " o"],
    geometry: Geometry,
) -> Float[Array, "b t-kt+1 h2 w2 o"]:
    """Convolves, valid in time, and adds the bias; the dtype is that of `x`."""

    def run(x: Array, geometry: Geometry) -> Array:
        return _bind(conv_p, x, kernel, bias, geometry=geometry, hints=choose.current_hints())

    return on_parts(run, x, kernel.shape, geometry)


def _bind(primitive: Primitive, *args: Array, **static: Any) -> Array:
    """Binds a primitive to arrays that vary over the same axes of a `jax.shard_map`."""
    return primitive.bind(*varying_as(*args), **static)


def _accumulator(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _biased(y: Array, bias: Array) -> Array:
    return y + bias.astype(y.dtype)[None, None, None, None]


# Shape rules. They are the same on every platform.


def _aval(shape: Sequence[Any], like: Any) -> ShapedArray:
    if any(axis is not None for axis in like.sharding.spec):
        raise TypeError(
            f"a layer does not take arrays on explicit mesh axes, got {like}: call "
            "`vae.encode_step` or `vae.decode_step`, or wrap it in `jax.sharding.auto_axes`."
        )
    return like.update(shape=tuple(shape))


def _conv_shape(x: Any, kernel: Any, *bias: Any, geometry: Geometry, hints: Hints) -> Any:
    del hints
    if any(other.dtype != x.dtype for other in (kernel, *bias)):
        dtypes = ", ".join(str(array.dtype) for array in (x, kernel, *bias))
        raise TypeError(
            f"a convolution needs frames, kernel and bias of one dtype, got {dtypes}: cast them."
        )
    if x.shape[4] != kernel.shape[3] or any(b.shape != kernel.shape[4:] for b in bias):
        raise ValueError(
            f"frames of {x.shape[4]} channels do not fit a kernel (kt, kh, kw, in, out) of "
            f"{kernel.shape}: give as many channels as the kernel takes."
        )
    return _aval(conv_shape(x.shape, kernel.shape, geometry), x)


def conv_shape(
    x: Sequence[Any], kernel: Sequence[Any], geometry: Geometry
) -> tuple[Any, Any, Any, Any, Any]:
    """Returns the shape of a convolution's result."""
    height, width = (
        (side * geometry.scale + sum(pads) - size) // geometry.stride + 1
        for side, pads, size in zip(x[2:4], geometry.pads, kernel[1:3], strict=True)
    )
    return x[0], x[1] - kernel[0] + 1, height, width, kernel[4]


def _by_input_shape(c: Any, kernel: Any, *, size: Any, geometry: Geometry, hints: Hints) -> Any:
    del geometry, hints
    count = c.shape[1] + kernel.shape[0] - 1
    return _aval((c.shape[0], count, *size, kernel.shape[3]), c)


def _by_kernel_shape(x: Any, c: Any, *, sizes: Any, geometry: Geometry, hints: Hints) -> Any:
    del geometry, hints
    return _aval((*sizes, x.shape[4], c.shape[4]), x)


# Lowering rules.


def _spec(platform: str, dtype: Any, geometry: Geometry, hints: Hints) -> Spec:
    # XLA's CPU backend is slow at bfloat16, so there `_widened` makes arrays float32. A GPU's
    # tensor cores accumulate in float32 in any case; writing the result in float32 takes 1.8
    # times as long.
    accumulator = dtype if platform == "gpu" else _accumulator(dtype)
    # Convolutions that change the size of frames are single 2D ones, which XLA sums in float32.
    resizes = geometry.doubles or geometry.stride > 1
    return Spec(geometry, None if resizes else accumulator, hints.thresholds)


def _widened(platform: str, *arrays: Array) -> tuple[Array, ...]:
    return tuple(map(at_least_float32, arrays)) if platform == "cpu" else arrays


def _conv(platform: str, x: Array, kernel: Array, *bias: Array, geometry: Any, hints: Any) -> Array:
    name = choose.lowering(geometry, x.shape, kernel.shape, platform, hints)
    wide_x, wide_kernel = _widened(platform, x, kernel)
    y = LOWERINGS[name](wide_x, wide_kernel, _spec(platform, x.dtype, geometry, hints))
    # Where the lowering returns float32 sums, the bias is added before they are rounded.
    return (_biased(y, *bias) if bias else y).astype(x.dtype)


def _by_input(platform: str, c: Array, kernel: Array, *, size: Any, geometry: Any, hints: Any):
    if platform == "cpu":
        if (flipped := _flipped(c, kernel, geometry, hints)) is not None:
            past = kernel.shape[0] - 1
            c = jnp.pad(c, [(0, 0), (past, past), (0, 0), (0, 0), (0, 0)])
            return _conv(platform, c, _adjoint(kernel), geometry=flipped, hints=hints)
        spec = _spec(platform, c.dtype, geometry, hints)
        wide_c, wide_kernel = _widened(platform, c, kernel)
        return cpu.by_input(wide_c, wide_kernel, size, spec).astype(c.dtype)
    # The result has the dtype of the frames: float32 cotangents would take twice the memory.
    spec = _spec("gpu", c.dtype, geometry, hints)
    plain = _transposable(platform, kernel.shape, geometry)
    shape = (c.shape[0], c.shape[1] + kernel.shape[0] - 1, *size, kernel.shape[3])
    x = jax.ShapeDtypeStruct(shape, c.dtype)
    return jax.linear_transpose(lambda x: plain(x, kernel, spec), x)(c)[0]


def _transposable(platform: str, kernel: Sequence[int], geometry: Geometry) -> Callable:
    """Returns the lowering whose transposes are the gradients on GPU and TPU."""
    if kernel[0] > 1:
        return frames.channels
    return tpu.doubled if geometry.doubles and platform != "gpu" else frames.frames


def _flipped(c: Array, kernel: Array, geometry: Geometry, hints: Hints) -> Geometry | None:
    """Returns the geometry of the input gradient as a convolution, or None without Winograd.

    The convolution of the cotangent with the flipped kernel needs the cotangent padded in time.
    Only Winograd's algorithm saves enough to repay that.
    """
    if geometry.stride > 1 or geometry.doubles:
        return None
    (taps, kh, kw, i, o), ((above, below), (left, right)) = kernel.shape, geometry.pads
    pads = (kh - 1 - above, kh - 1 - below), (kw - 1 - left, kw - 1 - right)
    flipped, shape = Geometry(pads=pads), (c.shape[0], c.shape[1] + 2 * taps - 2, *c.shape[2:])
    name = choose.lowering(flipped, shape, (taps, kh, kw, o, i), "cpu", hints)
    return flipped if name == "winograd" else None


def _adjoint(kernel: Array) -> Array:
    """Returns the kernel flipped, its input and output channels swapped."""
    flipped = jnp.flip(kernel, (0, 1, 2))
    # A loop over the taps keeps XLA from fusing the transposition into each of the kernel sums of
    # Winograd's algorithm, which on two CPU cores took 1.6 times as long.
    taps = lax.map(jnp.transpose, flipped.reshape(-1, *kernel.shape[3:]))
    return taps.reshape(*kernel.shape[:3], *taps.shape[1:])


def _by_kernel(platform: str, x: Array, c: Array, *, sizes: Any, geometry: Any, hints: Any):
    shape = (*sizes, x.shape[4], c.shape[4])
    name = choose.lowering(geometry, x.shape, shape, platform, hints)
    # On GPU and TPU the gradient is computed in the dtype of `x`: a float32 result would need
    # float32 copies of all frames.
    spec = _spec("gpu", x.dtype, geometry, hints)
    wide_x, wide_c = _widened(platform, x, c)
    if platform == "cpu" and all(isinstance(n, int) for n in (*x.shape, *c.shape)):
        gradient = winograd.by_kernel if name == "winograd" else _cpu_by_kernel(sizes)
        return gradient(wide_x, wide_c, spec).astype(x.dtype)
    plain = LOWERINGS[name] if platform == "cpu" else _transposable(platform, shape, geometry)
    kernel = jax.ShapeDtypeStruct(shape, wide_x.dtype)
    (gradient,) = jax.linear_transpose(lambda k: plain(wide_x, k, spec), kernel)(wide_c)
    return gradient.astype(x.dtype)


def _cpu_by_kernel(sizes: Any) -> Callable:
    return lambda x, c, spec: cpu.by_kernel(x, c, sizes, spec)


def _defined(name: str, shape: Callable, program: Callable, static: tuple[str, ...]) -> Primitive:
    """Returns a primitive that is lowered to `program`, for the platform it is compiled for."""
    primitive = Primitive(f"eqx_cogvae_{name}")
    primitive.def_abstract_eval(shape)
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=static))

    def lower(platform: str) -> Callable:
        def run(*args: Array, hints: Hints, **static: Any) -> Array:
            return program(hints.platform or platform, *args, hints=hints, **static)

        rule = mlir.lower_fun(run, multiple_results=False)

        def lowered(ctx: Any, *args: Any, **static: Any) -> Any:
            # The program is that of one device. It creates arrays, whose types vary over no axis
            # of a `jax.shard_map`, so those of its arguments may not either.
            avals = (map(without_varying, avals) for avals in (ctx.avals_in, ctx.avals_out))
            avals_in, avals_out = map(tuple, avals)
            return rule(ctx.replace(avals_in=avals_in, avals_out=avals_out), *args, **static)

        return lowered

    mlir.register_lowering(primitive, lower("tpu"))
    for platform in PLATFORMS:
        mlir.register_lowering(primitive, lower(platform), platform=platform)
    return primitive


conv_p = _defined("conv", _conv_shape, _conv, ("geometry", "hints"))
product_p = _defined("conv_product", _conv_shape, _conv, ("geometry", "hints"))
by_input_p = _defined("conv_by_input", _by_input_shape, _by_input, ("size", "geometry", "hints"))
by_kernel_p = _defined(
    "conv_by_kernel", _by_kernel_shape, _by_kernel, ("sizes", "geometry", "hints")
)


# Differentiation rules: the transposes of each bilinear primitive are the other two.


def _product(x: Array, kernel: Array, **static: Any) -> Array:
    return _bind(product_p, x, kernel, **static)


def _to_input(c: Array, x: Any, kernel: Array, **static: Any) -> Array:
    return _bind(by_input_p, c, kernel, size=tuple(x.aval.shape[2:4]), **static)


def _to_kernel(c: Array, x: Array, kernel: Any, **static: Any) -> Array:
    return _bind(by_kernel_p, x, c, sizes=tuple(kernel.aval.shape[:3]), **static)


def _bias_tangent(tangent: Array, x: Array, kernel: Array, bias: Array, **static: Any) -> Array:
    # In float32, so that the gradient by the bias, a sum over all pixels, is summed in float32.
    shape = _conv_shape(*map(jax.typeof, (x, kernel)), **static).shape
    return jnp.broadcast_to(at_least_float32(tangent), shape).astype(x.dtype)


ad.defjvp(
    conv_p,
    lambda tangent, x, kernel, bias, **static: _product(tangent, kernel, **static),
    lambda tangent, x, kernel, bias, **static: _product(x, tangent, **static),
    _bias_tangent,
)
ad.defbilinear(product_p, _to_input, _to_kernel)
ad.defbilinear(
    by_input_p,
    lambda x, c, kernel, *, size, **static: _product(x, kernel, **static),
    lambda x, c, kernel, *, size, **static: _to_kernel(c, x, kernel, **static),
)
ad.defbilinear(
    by_kernel_p,
    lambda kernel, x, c, *, sizes, **static: _to_input(c, x, kernel, **static),
    lambda kernel, x, c, *, sizes, **static: _product(x, kernel, **static),
)


# Batching rules: mapped frames join the clips of the batch, mapped kernels are looped over.


def _batched_as_clips(primitive: Primitive) -> Callable:
    def rule(args: Sequence[Array], dims: Sequence[int | None], **static: Any) -> Any:
        if any(dim is not None for dim in dims[1:]):
            return _batched_in_a_loop(primitive)(args, dims, **static)
        # The clips come first. If devices share them, theirs stay together.
        first = jnp.moveaxis(args[0], dims[0], 1)  # pyright: ignore
        y = primitive.bind(first.reshape(-1, *first.shape[2:]), *args[1:], **static)
        return y.reshape(*first.shape[:2], *y.shape[1:]), 1

    return rule


def _batched_in_a_loop(primitive: Primitive) -> Callable:
    def rule(args: Sequence[Array], dims: Sequence[int | None], **static: Any) -> Any:
        mapped = [jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True) if d is not None]

        def one(slices: list[Array]) -> Array:
            rest = iter(slices)
            each = (a if d is None else next(rest) for a, d in zip(args, dims, strict=True))
            return primitive.bind(*each, **static)

        return lax.map(one, mapped), 0

    return rule


for _primitive in (conv_p, product_p, by_input_p):
    batching.primitive_batchers[_primitive] = _batched_as_clips(_primitive)
batching.primitive_batchers[by_kernel_p] = _batched_in_a_loop(by_kernel_p)


def flops(primitive: str, first: Any, second: Any, *bias: Any, result: Any) -> int:
    """Returns the multiplications and additions of one of the primitives, done directly.

    A lowering may need fewer: Winograd's does 4/9 of the multiplications.

    **Arguments:** the primitive's name, and the shapes of its operands and of its result.
    """
    del bias
    # Every face sums products over the same pairs: a pixel of the result, a tap and two channels.
    frames, kernel = (
        (result, second)
        if primitive in (conv_p.name, product_p.name)
        else ((first, second) if primitive == by_input_p.name else (second, result))
    )
    return 2 * math.prod(kernel[:4]) * math.prod(frames)


__all__ = [
    "LOWERINGS",
    "PLATFORMS",
    "Geometry",
    "causal_conv",
    "conv_shape",
    "flops",
    "pointwise_conv",
    "valid_conv",
]
