"""Convolutions by every lowering, their derivatives, what is chosen where, and chunks."""

import functools
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from reference import distance, from_torch, normal, to_torch

from eqx_cogvae import _layers, _resnet
from eqx_cogvae._lowering import choose, chunked, conv as lowering, loops, resized
from eqx_cogvae._lowering.affine import Affine
from eqx_cogvae._lowering.choose import Geometry, Hints, Spec, Thresholds
from eqx_cogvae._lowering.moments import moments
from eqx_cogvae._lowering.resized import frame_conv
from eqx_cogvae._lowering.units import Taps, Unit
from eqx_cogvae._meshes import Split

KEY = jax.random.key(0)
SAME = Geometry()
STRIDED = Geometry(stride=2, pads=((0, 1), (0, 1)))
DOUBLING = Geometry(doubles=True)
# Sizes at which everything is chunked, or convolved by fewer multiplications.
CHUNKED = Thresholds(chunk_elements=1, band_elements=1)
SPLIT = Hints(Split(height=2))
WINOGRAD = Thresholds(winograd_min_channels=1, winograd_min_pixels=0, winograd_min_work=0)


def around(sizes):
    """The geometry that keeps a frame's size."""
    return Geometry(pads=tuple((n // 2, n // 2) for n in sizes[1:]))


def convolved_by_torch(x, kernel, geometry):
    """The same by torch in float64, and the tensors that gradients are asked of."""
    x, kernel = to_torch(x).double().requires_grad_(), np.asarray(kernel).transpose(4, 3, 0, 1, 2)
    kernel = torch.from_numpy(kernel.astype(np.float64)).requires_grad_()
    seen = x.repeat_interleave(2, 3).repeat_interleave(2, 4) if geometry.doubles else x
    (above, below), (left, right) = geometry.pads
    seen = torch.nn.functional.pad(seen, (left, right, above, below))
    stride = (1, geometry.stride, geometry.stride)
    return torch.nn.functional.conv3d(seen, kernel, stride=stride), x, kernel


DEFAULT = Thresholds()


def by_name(name, x, kernel, geometry, limits=DEFAULT):
    spec = Spec(geometry, jnp.float32, limits)
    return jax.jit(lambda x, kernel: lowering.LOWERINGS[name](x, kernel, spec))(x, kernel)


@pytest.mark.parametrize(
    ("name", "sizes", "frames"),
    [
        ("channels", (3, 3, 3), 4),
        ("channels", (2, 5, 3), 3),
        ("summed", (3, 3, 3), 4),
        ("summed", (2, 5, 3), 3),
        ("products", (3, 3, 3), 4),
        ("products", (2, 5, 3), 3),
        ("products", (3, 1, 1), 3),
        ("sequential", (3, 3, 3), 3),
        ("sequential", (2, 5, 3), 2),
        ("frames", (1, 3, 3), 2),
        ("taps", (3, 3, 3), 4),
        ("taps", (3, 1, 1), 3),
        ("winograd", (3, 3, 3), 4),
        ("winograd", (1, 3, 3), 1),
    ],
)
def test_every_lowering_is_torchs_convolution(name, sizes, frames):
    x, kernel = normal((2, frames, 6, 7, 3)), normal((*sizes, 3, 5), 1)
    due, *_ = convolved_by_torch(x, kernel, around(sizes))
    assert distance(by_name(name, x, kernel, around(sizes)), from_torch(due)) < 1e-6


@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        ("frames", STRIDED),
        ("taps", STRIDED),
        ("frames", DOUBLING),
        ("phases", DOUBLING),
        ("doubled", DOUBLING),
    ],
)
def test_strided_and_doubling_lowerings_are_torchs(name, geometry):
    x, kernel = normal((2, 3, 6, 7, 3)), normal((1, 3, 3, 3, 5), 1)
    due, *_ = convolved_by_torch(x, kernel, geometry)
    assert distance(by_name(name, x, kernel, geometry), from_torch(due)) < 1e-6


@pytest.mark.parametrize(
    ("size", "pads"),
    [
        # Every size and every pads once; the rest of the grid is long tests.
        pytest.param(size, pads, marks=() if i == j else pytest.mark.full)
        for i, size in enumerate([(6, 8), (5, 7), (3, 4)])
        for j, pads in enumerate([((0, 0), (1, 1)), ((1, 1), (1, 1)), ((2, 2), (0, 0))])
    ],
)
def test_fewer_multiplications_make_the_same_convolution(size, pads):
    """Winograd's, in one piece and in bands of rows."""
    x, kernel = normal((2, 4, *size, 8)), normal((3, 3, 3, 8, 12), 1)
    due, *_ = convolved_by_torch(x, kernel, Geometry(pads=pads))
    for band in (2**24, -(-x.size // 3)):
        limits = Thresholds(winograd_band_elements=band)
        got = by_name("winograd", x, kernel, Geometry(pads=pads), limits)
        assert distance(got, from_torch(due)) < 1e-6


@pytest.mark.parametrize("platform", lowering.PLATFORMS)
@pytest.mark.parametrize(
    ("sizes", "geometry", "limits"),
    [
        ((3, 3, 3), SAME, Thresholds()),
        ((3, 3, 3), SAME, WINOGRAD),
        ((2, 5, 3), around((2, 5, 3)), Thresholds()),
        ((3, 3, 3), Geometry(pads=((0, 0), (1, 1))), Thresholds()),
        ((1, 3, 3), STRIDED, Thresholds()),
        ((1, 3, 3), DOUBLING, Thresholds()),
    ],
)
def test_gradients_are_torchs(platform, sizes, geometry, limits):
    x, kernel, bias = normal((2, 4, 6, 7, 3)), normal((*sizes, 3, 5), 1), normal((5,), 2)
    due, *leaves = convolved_by_torch(x, kernel, geometry)
    due = due + torch.from_numpy(np.array(bias))[None, :, None, None, None]
    by_x, by_kernel = torch.autograd.grad(due.square().sum(), leaves)

    def loss(x, kernel, bias):
        return jnp.sum(jnp.square(lowering.valid_conv(x, kernel, bias, geometry)))

    with choose.thresholds(limits), choose.as_if_on(platform):
        grads = jax.jit(jax.grad(loss, (0, 1, 2)))(x, kernel, bias)
    assert distance(grads[0], from_torch(by_x)) < 1e-6
    assert distance(grads[1], by_kernel.numpy().transpose(2, 3, 4, 1, 0)) < 1e-6
    assert distance(grads[2], 2 * due.detach().numpy().sum((0, 2, 3, 4))) < 1e-5


@pytest.mark.parametrize("step", [10 * 7 * 16, 2**21])
def test_winograds_gradient_by_the_kernel_in_steps(step):
    """Frame by frame, rows of some too, and all at once."""
    x, kernel = normal((2, 4, 5, 7, 8)), normal((3, 3, 3, 8, 8), 1)
    due, _, leaf = convolved_by_torch(x, kernel, SAME)
    (by_kernel,) = torch.autograd.grad(due.square().sum(), [leaf])
    from eqx_cogvae._lowering import winograd

    spec = Spec(SAME, jnp.float32, Thresholds(winograd_piece_elements=step))
    cotangent = 2 * jnp.asarray(from_torch(due))
    got = jax.jit(lambda x, c: winograd.by_kernel(x, c, spec))(x, cotangent)
    assert distance(got, by_kernel.numpy().transpose(2, 3, 4, 1, 0)) < 1e-6


def by_lax(geometry):
    """An oracle that JAX differentiates by itself: XLA's convolution in 3D."""

    def convolved(x, kernel, bias):
        if geometry.doubles:
            x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        stride = (1, geometry.stride, geometry.stride)
        names = ("NDHWC", "DHWIO", "NDHWC")
        pads = ((0, 0), *geometry.pads)
        y = lax.conv_general_dilated(x, kernel, stride, pads, dimension_numbers=names)
        return y + bias[None, None, None, None]

    return convolved


def hessian_product(fn):
    """Forward over reverse."""
    grad = jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), (0, 1, 2))
    return lambda args, tangents: jax.jvp(grad, args, tangents)[1]


def gradient_of_a_gradient(fn):
    """Reverse over reverse."""
    loss = lambda *args: jnp.sum(jnp.sin(fn(*args)))  # noqa: E731
    squares = lambda args: sum(  # noqa: E731
        jnp.sum(jnp.square(g)) for g in jax.grad(loss, (0, 1, 2))(*args)
    )
    return lambda args, _: jax.grad(squares)(args)


def hessian(fn):
    loss = lambda kernel, x, bias: jnp.sum(jnp.sin(fn(x, kernel, bias)))  # noqa: E731
    return lambda args, _: jax.hessian(loss)(args[1], args[0][:1, :3], args[2])


def mapped_gradients(fn):
    """`vmap` of a gradient over frames, and over kernels."""
    grads = jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), (0, 1, 2))

    def run(args, tangents):
        x, kernel, bias = (jnp.stack(pair) for pair in zip(args, tangents, strict=True))
        return (
            jax.vmap(grads, (0, None, None))(x, *args[1:]),
            jax.vmap(grads, (None, 0, 0))(args[0], kernel, bias),
            jax.vmap(grads)(x, kernel, bias),
        )

    return run


DERIVATIVES = {
    "jvp": lambda fn: lambda args, tangents: jax.jvp(fn, args, tangents),
    "linearised": lambda fn: lambda args, tangents: jax.linearize(fn, *args)[1](*tangents),
    "jacobian": lambda fn: lambda args, _: jax.jacfwd(fn, 2)(*args),
    "forward over reverse": hessian_product,
    "reverse over reverse": gradient_of_a_gradient,
    "hessian": hessian,
    "mapped": mapped_gradients,
}


@pytest.mark.parametrize(
    ("what", "geometry"),
    [
        *((what, SAME) for what in DERIVATIVES),
        ("forward over reverse", STRIDED),
        ("reverse over reverse", DOUBLING),
        ("mapped", DOUBLING),
    ],
)
def test_derivatives_of_any_order_are_jaxs_own(what, geometry):
    taps = 3 if geometry == SAME else 1
    shapes = (2, 4, 4, 6, 3), (taps, 3, 3, 3, 2), (2,)
    args = tuple(normal(shape, i) for i, shape in enumerate(shapes))
    tangents = tuple(normal(shape, i + 3) for i, shape in enumerate(shapes))
    ours = lambda *args: lowering.valid_conv(*args, geometry)  # noqa: E731
    got, due = (jax.jit(DERIVATIVES[what](fn))(args, tangents) for fn in (ours, by_lax(geometry)))
    for each, expected in zip(*map(jax.tree.leaves, (got, due)), strict=True):
        assert distance(each, expected) < 1e-5


def test_called_outside_of_a_program_it_is_compiled():
    x, kernel, bias = normal((1, 3, 4, 4, 2)), normal((3, 3, 3, 2, 2), 1), normal((2,), 2)
    due = by_lax(SAME)(x, kernel, bias)
    assert distance(lowering.valid_conv(x, kernel, bias, SAME), due) < 1e-6


def test_two_dtypes_are_refused():
    x, kernel = jnp.zeros((1, 3, 4, 4, 2)), jnp.zeros((3, 3, 3, 2, 2), jnp.bfloat16)
    with pytest.raises(TypeError, match="of one dtype, got float32, bfloat16, bfloat16"):
        lowering.valid_conv(x, kernel, jnp.zeros(2, jnp.bfloat16), SAME)


@pytest.mark.parametrize("platform", lowering.PLATFORMS)
def test_every_platform_rounds_half_precision_alike(platform):
    """On a GPU before the bias is added and after it, elsewhere after it only."""
    args = normal((2, 4, 6, 7, 16)), normal((3, 3, 3, 16, 5), 1), normal((5,), 2)
    half = [x.astype(jnp.bfloat16) for x in args]
    due = by_lax(SAME)(*(x.astype(jnp.float32) for x in half))
    with choose.as_if_on(platform):
        got = jax.jit(lambda *args: lowering.valid_conv(*args, SAME))(*half)
    assert got.dtype == jnp.bfloat16
    assert distance(got.astype(jnp.float32), due) < 3e-3


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1)])
@pytest.mark.parametrize("frames", [1, 4])
def test_the_cache_is_the_last_frames(kernel, frames):
    x, bias = normal((2, frames, 6, 7, 3)), normal((5,), 2)
    kernel = normal((*kernel, 3, 5), 1)
    past = len(kernel) - 1
    y, cache = jax.jit(lowering.causal_conv)(x, kernel, bias)
    if not past:
        assert cache is None
        return
    padded = np.concatenate([np.repeat(x[:, :1], past, axis=1), x], axis=1)
    np.testing.assert_array_equal(cache, padded[:, -past:])
    later, _ = jax.jit(lowering.causal_conv)(x, kernel, bias, cache)
    whole = np.concatenate([padded, x], axis=1)
    due, *_ = convolved_by_torch(whole, kernel, around(kernel.shape[:3]))
    together = jnp.concatenate([y, later], axis=1)
    assert distance(together, from_torch(due) + np.asarray(bias)) < 1e-6


# What is chosen.


@pytest.mark.parametrize(
    ("frames", "size", "channels", "name"),
    [
        (3, (8, 12), 512, "taps"),  # transforming the kernel costs what it saves
        (3, (16, 24), 512, "winograd"),
        (9, (64, 96), 128, "winograd"),
        (9, (128, 192), 32, "winograd"),
        (9, (96, 144), 32, "taps"),
        (9, (128, 192), 16, "taps"),
    ],
)
def test_winograd_where_it_pays(frames, size, channels, name):
    x, kernel = (1, frames + 2, *size, channels), (3, 3, 3, channels, channels)
    assert choose.lowering(SAME, x, kernel, "cpu") == name
    assert choose.lowering(SAME, x, kernel, "cpu", SPLIT) == "taps"


BAND = Geometry(pads=((0, 0), (1, 1)), band=True)
UNPADDED = Geometry(pads=((0, 0), (0, 0)))


@pytest.mark.parametrize(
    ("platform", "geometry", "x", "kernel", "name"),
    [
        ("cpu", DOUBLING, (1, 9, 60, 90, 256), (1, 3, 3), "phases"),
        ("cpu", STRIDED, (1, 9, 60, 90, 256), (1, 3, 3), "taps"),
        ("gpu", SAME, (1, 10, 480, 720, 128), (3, 3, 3), "channels"),
        ("gpu", DOUBLING, (1, 8, 60, 90, 256), (1, 3, 3), "frames"),
        ("tpu", DOUBLING, (1, 8, 60, 90, 256), (1, 3, 3), "doubled"),
        ("tpu", STRIDED, (1, 8, 480, 720, 128), (1, 3, 3), "frames"),
        ("tpu", SAME, (1, 4, 60, 90, 512), (3, 3, 3), "products"),
        ("tpu", SAME, (1, 4, 60, 90, 16), (3, 3, 3), "channels"),
        ("tpu", SAME, (1, 10, 480, 720, 128), (3, 3, 3), "channels"),
        ("tpu", SAME, (1, 3, 480, 720, 128), (3, 3, 3), "sequential"),
        ("tpu", BAND, (1, 10, 22, 720, 128), (3, 3, 3), "summed"),
        ("tpu", UNPADDED, (1, 4, 62, 92, 512), (3, 3, 3), "products"),
        ("another", BAND, (1, 10, 22, 720, 128), (3, 3, 3), "summed"),
    ],
)
def test_the_lowering_of_each_platform(platform, geometry, x, kernel, name):
    assert choose.lowering(geometry, x, (*kernel, x[-1], x[-1]), platform) == name
    if name == "products":
        assert choose.lowering(geometry, x, (*kernel, 512, 512), platform, SPLIT) == "summed"


def test_symbolic_sizes_have_the_plain_answer():
    (b, h) = jax.export.symbolic_shape("b, h")
    kernel = (3, 3, 3, 512, 512)
    for x in ((b, 4, 60, 90, 512), (1, 4, h, 90, 512)):
        assert choose.lowering(SAME, x, kernel, "cpu") == "taps"
        assert choose.lowering(SAME, x, kernel, "tpu") == "channels"
        assert not choose.in_chunks(x, Hints(thresholds=CHUNKED))


@pytest.mark.parametrize("means", [1, 3])
def test_derivatives_of_an_affine_map(means):
    """Of a clip's one mean, and of one for each frame."""
    x, mean = normal((2, 3, 4, 6, 5)), normal((2, means, 1, 1, 5), 1)
    affine = Affine(mean, normal((2, 3, 2, 3, 5), 2), normal((2, 3, 2, 3, 5), 3))

    def plain(affine, x):
        scale, shift = (jnp.repeat(jnp.repeat(s, 2, axis=2), 2, axis=3) for s in affine[1:])
        return (x - affine.mean) * scale + shift

    def gradients(fn):
        return jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), (0, 1)))(affine, x)

    pairs = zip(*map(jax.tree.leaves, (gradients(Affine.__call__), gradients(plain))), strict=True)
    assert all(distance(got, due) < 1e-6 for got, due in pairs)


def test_heights_of_bands():
    hints = Hints(thresholds=Thresholds(band_elements=40 * 100))
    heights = {480: 40, 100: 25, 82: 0, 62: 31, 8: 4, 6: 0}
    assert {h: choose.band_height((1, 2, h, 5, 10), 1, hints) for h in heights} == heights
    assert [choose.band_height((1, 2, 8, 5, 10), n, hints) for n in (4, 5)] == [4, 0]
    assert choose.band_height((1, 2, 480, 5, 10), 1, SPLIT) == 0


def test_a_devices_share_decides():
    """Clips and columns that are split leave taller bands, and parts of rows are as clips."""
    limits = Thresholds(chunk_elements=40 * 100, band_elements=40 * 100)
    hints = lambda **split: Hints(Split(**split), limits)  # noqa: E731
    x = (2, 2, 480, 5, 10)
    heights = [choose.band_height(x, 1, hints(**s)) for s in ({}, {"batch": 2}, {"width": 5})]
    assert heights == [20, 40, 96]
    assert choose.band_height((4, 2, 240, 5, 10), 1, hints(height=2).of_parts()) == 20
    assert [choose.in_chunks(x, hints(**{axis: 24})) for axis in ("batch", "height")] == [True] * 2
    assert [choose.in_chunks(x, hints(**{axis: 25})) for axis in ("batch", "height")] == [False] * 2
    assert Split(height=2).further(Split(batch=3)) == Split(batch=3, height=2)


def test_parts_that_devices_hold():
    split = Hints(Split(batch=2, height=4, width=5))
    assert choose.parts((1, 2, 24, 5, 8), split) == (4, 5)
    assert choose.parts((1, 2, 22, 5, 8), split) == (1, 1)
    wide = Geometry(pads=((2, 2), (1, 1)))
    assert choose.parts((1, 2, 8, 5, 8), split, (5, 3), wide) == (4, 5)
    assert choose.parts((1, 2, 4, 5, 8), split, (5, 3), wide) == (1, 1), "beyond the neighbour"
    assert choose.parts((1, 2, 8, 5, 8), split, (3, 3), UNPADDED) == (1, 1), "smaller than before"
    assert choose.parts((1, 2, 8, 10, 8), split, (3, 3), STRIDED) == (4, 5)
    assert choose.parts((1, 2, 12, 10, 8), split, (3, 3), STRIDED) == (1, 1), "out of step"
    assert choose.parts((1, 2, *jax.export.symbolic_shape("h, w"), 8), split) == (1, 1)


@pytest.mark.parametrize(
    ("frames", "full"), [(1, True), (4, True), (5, False), (8, True), (9, False), (16, True)]
)
def test_bands_are_of_as_many_frames_as_fill_a_tpus_rows(frames, full):
    assert bool(choose.band_height((1, frames, 16, 16, 8), 1)) == full


@pytest.mark.parametrize(
    ("frames", "apart"), [(1, False), (3, False), (4, False), (5, True), (9, True), (17, False)]
)
def test_the_first_frame_is_apart_if_the_rest_fills_a_tpus_rows(frames, apart):
    shape, hints = (2, frames, 16, 16, 8), Hints(thresholds=CHUNKED)
    assert choose.is_first_apart(shape, hints) == apart
    assert not choose.is_first_apart(shape), "too small for chunks"
    split = Hints(Split(height=2, width=8), CHUNKED)
    assert choose.is_first_apart(shape, split) == apart
    assert not choose.is_first_apart(shape, Hints(Split(height=8), CHUNKED)), "too few rows"
    assert not choose.is_first_apart((1, 3, 62, 720, 128)), "no bands, of two frames taller ones"


@pytest.mark.parametrize("split", [Split(), Split(height=2, width=4)], ids=["one", "parts"])
@pytest.mark.parametrize("frames", [8, 9])
def test_moments_of_large_arrays(frames, split):
    """With the first frame apart, in float64 by NumPy, and their derivatives by JAX."""
    x, tangent = 3 + 2 * normal((2, frames, 16, 8, 6)), normal((2, frames, 16, 8, 6), 1)

    def run(x):
        with choose.using(Hints(split, CHUNKED)):
            return moments(x, 2)

    def plain(x):
        groups = x.reshape(2, -1, 2, 3)
        found = (fn(groups, axis=(1, 3), keepdims=True) for fn in (jnp.mean, jnp.var))
        return tuple(jnp.repeat(each, 3, axis=3).reshape(2, 1, 1, 1, 6) for each in found)

    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(each, np.float64)) for each in (x, tangent))
        due = [np.asarray(each) for each in jax.tree.leaves(jax.jvp(plain, *((a,) for a in wide)))]
    for got, expected in zip(jax.tree.leaves(jax.jvp(run, (x,), (tangent,))), due, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# Chunks.


def a_unit(latents, frames, cached, added, sizes=(3, 3, 3), dtype=jnp.float32):
    """A unit of 16 channels to 8, in frames of 24x5."""
    draws = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(draws.standard_normal(shape), dtype)  # noqa: E731
    norm = _layers.GroupNorm(16, 4, 1e-6, dtype=dtype)
    norm = eqx.tree_at(lambda n: (n.weight, n.bias), norm, (draw(16), draw(16)))
    x = draw(2, frames, 24, 5, 24 if added == "beyond" else 16)
    own, given = x[..., :16], ()
    if latents:
        given = (draw(2, -(-frames // 2), *latents, 4),)
        spatial = _layers.SpatialNorm(16, 4, 4, key=KEY, dtype=dtype)
        norm = eqx.tree_at(lambda n: n.norm_layer, spatial, norm)
    taps = Taps(draw(*sizes, 16, 8), draw(8))
    cache = draw(2, sizes[0] - 1, 24, 5, 16) if cached else None
    residual = draw(2, frames, 24, 5, 8) if added == "residual" else None
    beside = Taps(draw(1, 1, 1, 16, 8), draw(8)) if added == "beside" else None
    return Unit(norm.affine(own, *given), taps, x, cache, residual, beside)


def close(got, due, within=1e-6):
    for each, expected in zip(*map(jax.tree.leaves, (got, due)), strict=True):
        wide = (a.astype(jnp.float32) for a in (each, expected))
        assert distance(*wide) < within


# Every pair of (latents, frames, cached, added) occurs, and with it each of the loops.
UNITS = [
    (None, 1, False, None),
    (None, 3, True, "residual"),
    (None, 9, False, "beside"),
    (None, 4, True, "beyond"),
    ((12, 5), 9, True, None),
    ((12, 5), 4, False, "residual"),
    ((12, 5), 1, True, "beside"),
    ((12, 5), 3, False, "beyond"),
    ((7, 3), 5, True, "beside"),  # latents that are no divisor
]


@pytest.fixture
def memory_as_it_was(monkeypatch):
    """On a CPU `lax.empty` makes zeros; elsewhere it is whatever the memory held."""
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))


@pytest.mark.usefixtures("memory_as_it_was")
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_chunks_are_the_whole(unit):
    """Frame by frame, and in bands: the first, those with rows above and below, and the last."""
    unit = a_unit(*unit)
    due = jax.jit(functools.partial(chunked.unchunked, jax.nn.silu))(unit)
    if unit.x.shape[1] in (5, 9):  # The first frame is by itself, the others are in bands.
        with choose.thresholds(CHUNKED):
            close(jax.jit(functools.partial(chunked.in_chunks, jax.nn.silu))(unit), due)
    close(jax.jit(functools.partial(loops.by_frames, jax.nn.silu))(unit), due)
    close(jax.jit(functools.partial(loops.by_bands, jax.nn.silu, 8))(unit), due)


@pytest.mark.usefixtures("memory_as_it_was")
@pytest.mark.parametrize(
    "sizes",
    [(1, 3, 3), (3, 1, 1), (3, 9, 3), pytest.param((2, 5, 3), marks=pytest.mark.full)],
)
def test_bands_of_other_kernels(sizes):
    """Of one tap in time, of no rows around, and of many."""
    unit = a_unit((7, 3), 3, False, "beside", sizes)
    due = jax.jit(functools.partial(chunked.unchunked, jax.nn.silu))(unit)
    close(jax.jit(functools.partial(loops.by_bands, jax.nn.silu, 8))(unit), due)


SPLITS = (Split(height=3, width=5), Split(height=2), Split(width=5))


@pytest.mark.usefixtures("memory_as_it_was")
@pytest.mark.parametrize(
    ("unit", "split"),
    [
        pytest.param(unit, split, marks=() if i % 3 == n else pytest.mark.full)
        for i, unit in enumerate(UNITS)
        for n, split in enumerate(SPLITS)
    ],
    ids=str,
)
def test_chunks_of_parts_are_the_whole(unit, split):
    """Of parts that devices would hold, each with the edges of its neighbours."""
    unit = a_unit(*unit)
    due = jax.jit(functools.partial(chunked.unchunked, jax.nn.silu))(unit)
    with choose.using(Hints(split, CHUNKED)):
        close(jax.jit(functools.partial(chunked.in_chunks, jax.nn.silu))(unit), due)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("geometry", [SAME, DOUBLING, STRIDED], ids=["", "doubling", "strided"])
def test_convolutions_of_parts_are_those_of_the_whole(geometry, platform):
    """And their gradients: of two rows and five columns, and at the ends of two columns alone."""
    taps = 3 if geometry == SAME else 1
    x, kernel, bias = normal((2, 4, 8, 20, 6)), normal((taps, 3, 3, 6, 5), 1), normal((5,), 2)

    def results(split):
        run = lambda *args: lowering.valid_conv(*args, geometry)  # noqa: E731
        loss = lambda *args: jnp.sum(jnp.sin(run(*args)))  # noqa: E731
        with choose.using(Hints(split, platform=platform)):
            fn = lambda *args: (run(*args), jax.grad(loss, (0, 1, 2))(*args))  # noqa: E731
            return jax.jit(fn)(x, kernel, bias)

    due = results(Split())
    for split in (Split(height=2, width=5), Split(width=2)):
        close(results(split), due, 1e-5)


@pytest.mark.usefixtures("memory_as_it_was")
@pytest.mark.parametrize("split", [Split(), Split(height=2, width=5)], ids=["one", "parts"])
@pytest.mark.parametrize("geometry", [DOUBLING, STRIDED], ids=["doubling", "strided"])
@pytest.mark.parametrize("frames", [2, 9, 10])
def test_resizing_in_chunks(frames, geometry, split, monkeypatch):
    """In bands of all frames, in bands after a first frame, and frame by frame."""
    x, kernel, bias = normal((2, frames, 32, 20, 6)), normal((3, 3, 6, 5), 1), normal((5,), 2)
    due = jax.jit(lambda *args: lowering.valid_conv(*args, geometry))(x, kernel[None], bias)
    run = functools.partial(frame_conv, geometry=geometry)
    bands = mock.Mock(wraps=resized._resized_by_bands)
    monkeypatch.setattr(resized, "_resized_by_bands", bands)
    with choose.using(Hints(split, CHUNKED)):
        close(jax.jit(run)(x, kernel, bias), due)
    assert bands.call_count == (frames != 10)


@pytest.mark.parametrize("split", [Split(), Split(height=2, width=5)], ids=["one", "parts"])
@pytest.mark.parametrize("geometry", [DOUBLING, STRIDED], ids=["doubling", "strided"])
def test_derivatives_of_resizing_in_chunks(geometry, split):
    """Are those of the whole, and take no memory for each band."""
    x, kernel, bias = normal((1, 5, 64, 20, 6)), normal((3, 3, 6, 5), 1), normal((5,), 2)
    whole = lambda x, kernel, bias: lowering.valid_conv(x, kernel[None], bias, geometry)  # noqa: E731
    args = (x, kernel, bias)

    def gradients(fn):
        loss = lambda *args: jnp.sum(jnp.sin(fn(*args)))  # noqa: E731
        along = lambda *args: jax.jvp(fn, args, args)[1]  # noqa: E731
        return jax.jit(lambda *args: (jax.grad(loss, (0, 1, 2))(*args), along(*args)))

    due = gradients(whole)(*args)
    run = functools.partial(frame_conv, geometry=geometry)
    with choose.using(Hints(split, CHUNKED)):
        close(gradients(run)(*args), due, 1e-5)
        trips = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(run(x, kernel, bias))))(x))
    # The backward pass is a loop over the frames.
    assert "length=5" in trips


@pytest.mark.usefixtures("memory_as_it_was")
@pytest.mark.parametrize("sizes", [(1, 3, 3), (3, 1, 1), (3, 5, 3), (3, 9, 3)])
def test_parts_with_other_kernels(sizes):
    """Of one tap in time, of no edges, of wide ones, and of some that exceed a neighbour."""
    unit = a_unit((7, 3), 3, False, "beside", sizes)
    due = jax.jit(functools.partial(chunked.unchunked, jax.nn.silu))(unit)
    with choose.using(Hints(Split(height=8, width=5), CHUNKED)):
        close(jax.jit(functools.partial(chunked.in_chunks, jax.nn.silu))(unit), due)


@pytest.mark.parametrize("split", [Split(), Split(height=2, width=5)], ids=["one", "parts"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_chunks_where_integers_have_64_bits(dtype, split):
    with jax.enable_x64(True), choose.using(Hints(split, CHUNKED)):
        unit = a_unit((12, 5), 3, True, None, dtype=dtype)
        due = jax.jit(functools.partial(chunked.unchunked, jax.nn.silu))(unit)
        runs = [chunked.in_chunks] if split.devices > 1 else [loops.by_frames, in_bands]
        for run in runs:
            got = jax.jit(functools.partial(run, jax.nn.silu))(unit)
            assert all(y.dtype == dtype for y in got)
            close(got, due)
        resized = jax.jit(functools.partial(frame_conv, geometry=DOUBLING))
        x, kernel, bias = unit.x, unit.taps.kernel[0], unit.taps.bias
        whole = jax.jit(lambda *args: lowering.valid_conv(*args, DOUBLING))(x, kernel[None], bias)
        close(resized(x, kernel, bias), whole)


@pytest.mark.parametrize("split", [Split(), Split(height=2, width=5)], ids=["one", "parts"])
def test_chunks_in_half_precision(split):
    unit = a_unit((12, 5), 8, True, None, dtype=jnp.bfloat16)
    due = jax.jit(functools.partial(chunked.unchunked, jax.nn.silu))(unit)
    runs = [chunked.in_chunks] if split.devices > 1 else [loops.by_frames, in_bands]
    for run in runs:
        with choose.using(Hints(split, CHUNKED)):
            got = jax.jit(functools.partial(run, jax.nn.silu))(unit)
        assert all(y.dtype == jnp.bfloat16 for y in got)
        close(got, due, 1e-2)


def in_bands(act, unit):
    return loops.by_bands(act, 8, unit)


@pytest.mark.parametrize("split", [Split(), Split(height=2, width=5)], ids=["one", "parts"])
def test_a_mean_for_each_frame(split):
    """Of a user's norm, where the first frame is apart."""
    unit = a_unit(None, 5, True, "residual")
    draw = lambda seed: normal((2, 5, 1, 1, 16), seed)  # noqa: E731
    unit = unit._replace(affine=Affine(draw(1), draw(2), draw(3)))
    due = jax.jit(functools.partial(chunked.unchunked, jax.nn.silu))(unit)
    with choose.using(Hints(split, CHUNKED)):
        close(jax.jit(functools.partial(chunked.in_chunks, jax.nn.silu))(unit), due)


@pytest.mark.parametrize("split", [Split(), Split(height=2, width=5)], ids=["one", "parts"])
def test_a_map_for_all_clips(split):
    """Of a user's norm, with a scale for each pixel and one for each square of pixels."""
    unit = a_unit(None, 5, True, "residual")
    for size in ((24, 5), (6, 5)):
        scale, shift = (normal((1, 1, *size, 16), seed) for seed in (1, 2))
        unit = unit._replace(affine=unit.affine._replace(scale=scale, shift=shift))
        due = jax.jit(functools.partial(chunked.unchunked, jax.nn.silu))(unit)
        with choose.using(Hints(split, CHUNKED)):
            close(jax.jit(functools.partial(chunked.in_chunks, jax.nn.silu))(unit), due)


@pytest.mark.parametrize(
    "unit", [pytest.param(UNITS[1], marks=pytest.mark.full), UNITS[4], UNITS[6]], ids=str
)
def test_derivatives_of_chunks_are_the_wholes(unit):
    unit, tangents = a_unit(*unit), jax.tree.map(lambda x: 0.1 * x + 1, a_unit(*unit))
    loss = lambda y: sum(jnp.sum(jnp.sin(part)) for part in jax.tree.leaves(y))  # noqa: E731

    def derivatives(run):
        fn = functools.partial(run, jax.nn.silu)
        grad = jax.grad(lambda unit: loss(fn(unit)))
        return (
            jax.jit(lambda u, t: jax.jvp(fn, (u,), (t,)))(unit, tangents),
            jax.jit(grad)(unit),
            jax.jit(lambda u, t: jax.jvp(grad, (u,), (t,))[1])(unit, tangents),
        )

    due = derivatives(chunked.unchunked)
    with choose.thresholds(CHUNKED):
        close(derivatives(chunked.in_chunks), due, 1e-5)


def test_a_convolution_of_ones_own_is_called():
    """Not replaced by one of chunks, where it is one of ours with a call of its own."""

    class Doubled(_layers.CausalConv3d):
        def __call__(self, x, cache=None):
            y, cache = super().__call__(x, cache)
            return 2 * y, cache

    block = _resnet.ResnetBlock(
        8, 8, groups=4, eps=1e-6, act_fn="silu", latents=None, pad_mode="first", key=KEY
    )
    block = eqx.tree_at(lambda b: b.conv1, block, Doubled(8, 8, key=KEY))
    x = normal((1, 3, 24, 4, 8))
    due = block(x)
    with choose.thresholds(CHUNKED):
        text = str(jax.make_jaxpr(lambda x: block(x))(x))
        assert text.count("scan[") > 0, "nothing was chunked"
        close(eqx.filter_jit(block)(x), due)


@pytest.mark.parametrize(("i", "o"), [(8, 8), (8, 4), (4, 8)])
def test_a_block_in_chunks_is_the_block(i, o):
    """Where its result is written over the shortcut, over its input, and over neither."""
    block = _resnet.ResnetBlock(
        i, o, groups=2, eps=1e-6, act_fn="silu", latents=3, pad_mode="first", key=KEY
    )
    x, latents = normal((1, 5, 24, 4, i)), normal((1, 3, 12, 2, 3), 1)
    run = lambda: eqx.filter_jit(block)(x, latents=latents)  # noqa: E731
    due = run()
    with choose.thresholds(CHUNKED):
        got = run()
    assert jax.tree.structure(got) == jax.tree.structure(due)
    close(got, due)
