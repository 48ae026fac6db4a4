"""Convolutions and layers, one by one, against torch and against themselves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_cogvideox as theirs
from diffusers.models.downsampling import CogVideoXDownsample3D
from diffusers.models.upsampling import CogVideoXUpsample3D
from jax.test_util import check_grads
from reference import distance, from_torch, normal, to_torch

from eqx_cogvae import _layers, _resnet
from eqx_cogvae._lowering import convolution as _convolution, winograd as _winograd

KEY = jax.random.key(0)


def variants(fn, *args):
    return [jax.jit(lambda *a, v=v: fn(*a, variant=v))(*args) for v in _convolution.VARIANTS]


@pytest.mark.parametrize("sizes", [(3, 3, 3), (1, 3, 3), (3, 1, 1), (2, 5, 3)])
@pytest.mark.parametrize("frames", [1, 4])
def test_every_lowering_of_a_causal_convolution_agrees(sizes, frames, monkeypatch):
    x, kernel, bias = normal((2, frames, 6, 7, 3)), normal((*sizes, 3, 5), 1), normal((5,), 2)
    (cpu, cpu_cache), *others = variants(_convolution.causal_conv, x, kernel, bias)
    for lowered, _ in others:
        assert distance(lowered, cpu) < 1e-6
    padded = torch.cat([to_torch(x)[:, :, :1]] * (sizes[0] - 1) + [to_torch(x)], dim=2)
    weight = torch.from_numpy(np.asarray(kernel).transpose(4, 3, 0, 1, 2).copy())
    padding = (0, sizes[1] // 2, sizes[2] // 2)
    due = torch.nn.functional.conv3d(
        padded, weight, torch.from_numpy(np.array(bias)), padding=padding
    )
    assert distance(cpu, from_torch(due)) < 1e-6
    # A huge frame alone goes tap by tap.
    monkeypatch.setattr(_convolution, "HUGE", 0)
    for lowered, _ in variants(_convolution.causal_conv, x, kernel, bias):
        assert distance(lowered, cpu) < 1e-6
    for cache in (cpu_cache, *(cache for _, cache in others)):
        if sizes[0] == 1:
            assert cache is None
        else:
            np.testing.assert_array_equal(cache, from_torch(padded)[:, 1 - sizes[0] :])


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 2)])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("pieces", [1, 3])
def test_fewer_multiplications_make_the_same_convolution(size, taps, pieces, monkeypatch):
    """Winograd's, of wide arrays on CPU, by bands of rows; and its gradients."""
    x = normal((2, taps + 4, *size, 32))
    kernel, bias = normal((taps, 3, 3, 32, 48), 1), normal((48,), 2)
    monkeypatch.setattr(_convolution, "LONG", 0)
    monkeypatch.setattr(_convolution, "MANY", 0)
    monkeypatch.setattr(_winograd, "BAND", -(-x.size // pieces))
    # All in one step; or frame by frame, and of some sizes the rows too.
    monkeypatch.setattr(_winograd, "PIECE", taps * x.size if pieces == 1 else 10 * size[1] * 64)
    pads = ((1, 1), (1, 1))

    def squares(partitioned):
        def loss(x, kernel):
            y = _convolution.valid_conv(x, kernel, bias, pads, variant="cpu")
            return jnp.sum(jnp.square(y)), y

        with _convolution.partitioned(partitioned):
            return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernel)

    ((_, fewer), grads), ((_, plain), due) = squares(False), squares(True)
    weight = torch.from_numpy(np.asarray(kernel).transpose(4, 3, 0, 1, 2).copy())
    theirs = torch.nn.functional.conv3d(
        to_torch(x), weight, torch.from_numpy(np.array(bias)), padding=(0, 1, 1)
    )
    assert distance(fewer, from_torch(theirs)) < 1e-6
    assert not np.array_equal(fewer, plain), "the same computation twice"
    for ours, other in zip(grads, due, strict=True):
        assert distance(ours, other) < 1e-6


@pytest.mark.parametrize(
    ("frames", "size", "channels", "worth"),
    [
        (3, (8, 12), 512, False),  # the sums of its kernels cost what they save
        (3, (16, 24), 512, True),
        (9, (64, 96), 128, True),
        (9, (128, 192), 32, True),
        (9, (96, 144), 32, False),
        (9, (128, 192), 16, False),
    ],
)
def test_fewer_multiplications_where_they_pay(frames, size, channels, worth):
    x = jax.ShapeDtypeStruct((1, frames + 2, *size, channels), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, channels, channels), jnp.float32)
    answers = []
    jax.eval_shape(lambda *args: answers.append(_convolution._is_worth_sums(*args)), x, kernel)
    assert answers == [worth]


def test_every_lowering_rounds_half_precision_alike():
    """On a GPU before the bias is added and after it, elsewhere after it only."""
    args = normal((2, 4, 6, 7, 16)), normal((3, 3, 3, 16, 5), 1), normal((5,), 2)
    half = [x.astype(jnp.bfloat16) for x in args]
    due, _ = _convolution.causal_conv(*(x.astype(jnp.float32) for x in half), variant="cpu")
    for lowered, _ in variants(_convolution.causal_conv, *half):
        assert lowered.dtype == jnp.bfloat16
        assert distance(lowered.astype(jnp.float32), due) < 3e-3


def test_every_lowering_of_a_doubling_convolution_agrees():
    x, kernel, bias = normal((2, 3, 5, 4, 6)), normal((3, 3, 6, 7), 1), normal((7,), 2)
    cpu, *others = variants(_convolution.doubling_conv, x, kernel, bias)
    for lowered in others:
        assert distance(lowered, cpu) < 1e-6


def test_small_arrays_are_products_on_tpus(monkeypatch):
    args = normal((2, 4, 6, 7, 3)), normal((3, 3, 5, 3, 5), 1), normal((5,), 2)
    due = variants(_convolution.causal_conv, *args)[0]
    monkeypatch.setattr(_convolution, "_LANES", 1)
    products = lambda *args: _convolution.causal_conv(*args, variant="default")  # noqa: E731
    assert "conv_general" not in str(jax.make_jaxpr(products)(*args))
    for got, expected in zip(products(*args), due, strict=True):
        assert distance(got, expected) < 1e-6


def a_normed_conv(latents, frames, cached, around, height, getkey):
    """Arguments of `normed_conv`; by name, what is added to its result or appended."""
    norm = _resnet._norm(16, 4, 1e-6, latents, key=getkey(), dtype=jnp.float32)
    conv = _layers.CausalConv3d(16, 8, key=getkey())
    wide = 24 if around == "beyond" else 16
    x = jax.random.normal(getkey(), (2, frames, height, 5, wide))
    cache = jax.random.normal(getkey(), (2, 2, height, 5, 16)) if cached else None
    z = jax.random.normal(getkey(), (2, -(-frames // 2), height // 2, 5, 4)) if latents else None
    more = {}
    if around == "onto":
        more["onto"] = jax.random.normal(getkey(), (2, frames, height, 5, 8))
    if around == "beside":
        more["beside"] = _layers.Conv((1, 1, 1), 16, 8, key=getkey())
    return norm, conv, x, cache, z, more


AROUND = pytest.mark.parametrize("around", [None, "onto", "beside", "beyond"])


@pytest.mark.parametrize("latents", [None, 4])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("cached", [False, True])
@AROUND
def test_frames_one_by_one_are_the_frames_at_once(latents, frames, cached, around, getkey):
    """And what is added to them, appended, or lies in further channels."""
    given = a_normed_conv(latents, frames, cached, around, 6, getkey)

    def squares(args, variant):
        norm, conv, *rest, more = args
        y, cache = _resnet.normed_conv(norm, jax.nn.silu, conv, *rest, **more, variant=variant)
        return jnp.sum(jnp.square(y)) + jnp.sum(jnp.square(cache)), (y, cache)

    results = []
    for variant in ("whole", "frames"):
        run = lambda args, v=variant: eqx.filter_value_and_grad(squares, has_aux=True)(args, v)  # noqa: E731
        (_, made), grads = eqx.filter_jit(run)(given)
        results.append((made, grads))
    for whole, one_by_one in zip(*map(jax.tree.leaves, results), strict=True):
        assert distance(one_by_one, whole) < 1e-6


def whole_and_bands(norm, conv, *rest, **more):
    call = eqx.filter_jit(_resnet.normed_conv)
    pair = (
        call(norm, jax.nn.silu, conv, *rest, **more, variant=variant)
        for variant in ("whole", "bands")
    )
    return zip(*map(jax.tree.leaves, pair), strict=True)


@pytest.mark.parametrize("latents", [None, 4])
@pytest.mark.parametrize(("frames", "cached"), [(1, False), (3, True)])
@AROUND
def test_bands_of_rows_are_the_whole(latents, frames, cached, around, getkey, monkeypatch):
    """The first, those that have rows above and below, and the last."""
    monkeypatch.setattr(_convolution, "LARGE", 0)
    *given, more = a_normed_conv(latents, frames, cached, around, 24, getkey)
    assert _convolution.rows_of_bands(given[2], 1) == 8
    for due, bands in whole_and_bands(*given, **more):
        assert distance(bands, due) < 1e-6


@pytest.mark.parametrize("sizes", [(1, 3, 3), (3, 1, 1), (2, 5, 3), (3, 9, 3)])
def test_bands_of_other_kernels(sizes, getkey, monkeypatch):
    """Of one tap in time, of no rows around, and of many; where latents are no divisor."""
    monkeypatch.setattr(_convolution, "LARGE", 0)
    norm, conv, x, _, _, more = a_normed_conv(4, 3, False, "beside", 24, getkey)
    conv = eqx.tree_at(lambda c: c.conv, conv, _layers.Conv(sizes, 16, 8, key=getkey()))
    z = jax.random.normal(getkey(), (2, 2, 7, 3, 4))
    for due, bands in whole_and_bands(norm, conv, x, None, z, **more):
        assert distance(bands, due) < 1e-6


def test_bands_in_half_precision(getkey, monkeypatch):
    monkeypatch.setattr(_convolution, "LARGE", 0)
    args = a_normed_conv(4, 8, True, None, 24, getkey)
    *given, _ = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, args)
    for due, bands in whole_and_bands(*given):
        assert bands.dtype == jnp.bfloat16
        assert distance(bands.astype(jnp.float32), due.astype(jnp.float32)) < 1e-2


def test_a_convolution_of_ones_own_is_called(getkey, monkeypatch):
    """Not replaced by one of bands, where it is one of ours with a call of its own."""

    class Doubled(_layers.CausalConv3d):
        def __call__(self, x, cache=None):
            y, cache = super().__call__(x, cache)
            return 2 * y, cache

    monkeypatch.setattr(_convolution, "LARGE", 0)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    norm, _, *rest, _ = a_normed_conv(None, 3, False, None, 24, getkey)
    given = norm, jax.nn.silu, Doubled(16, 8, key=getkey()), *rest
    due, taken = _resnet.normed_conv(*given, variant="whole"), _resnet.normed_conv(*given)
    for got, expected in zip(taken, due, strict=True):
        assert distance(got, expected) < 1e-6


def test_heights_of_bands(monkeypatch):
    monkeypatch.setattr(_convolution, "LARGE", 40 * 100)
    x = lambda height: jnp.zeros((1, 2, height, 5, 10))  # noqa: E731
    heights = {480: 40, 100: 25, 82: 0, 62: 31, 8: 4, 6: 0}
    assert {h: _convolution.rows_of_bands(x(h), 1) for h in heights} == heights
    assert [_convolution.rows_of_bands(x(8), margin) for margin in (4, 5)] == [4, 0]


@pytest.mark.parametrize(
    ("frames", "full"), [(1, True), (4, True), (5, False), (8, True), (9, False)]
)
def test_bands_are_of_as_many_frames_as_fill_sublanes(frames, full):
    assert bool(_convolution.rows_of_bands(jnp.zeros((1, frames, 16, 16, 8)), 1)) == full


def torch_gradients(fn, *tensors):
    """Of the sum of squares, by each tensor; back in our layouts."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    fn(*tensors).square().sum().backward()
    return [t.grad.numpy() for t in tensors]


@pytest.mark.parametrize("sizes", [(3, 3, 3), (2, 5, 3), (3, 1, 1)])
def test_gradients_of_a_convolution_agree(sizes):
    """The kernel's is our own on CPU."""
    x, kernel, bias = normal((2, 4, 6, 7, 3)), normal((*sizes, 3, 5), 1), normal((5,), 2)
    pads = ((sizes[1] // 2,) * 2, (sizes[2] // 2,) * 2)
    for variant in _convolution.VARIANTS:

        def loss(x, kernel, variant=variant):
            y = _convolution.valid_conv(x, kernel, bias, pads, variant=variant)
            return jnp.sum(jnp.square(y))

        by_x, by_kernel = jax.jit(jax.grad(loss, (0, 1)))(x, kernel)
        due_x, due_kernel = torch_gradients(
            lambda x, k: torch.nn.functional.conv3d(
                x, k, torch.from_numpy(np.array(bias)), padding=(0, pads[0][0], pads[1][0])
            ),
            to_torch(x),
            torch.from_numpy(np.asarray(kernel).transpose(4, 3, 0, 1, 2).copy()),
        )
        assert distance(by_x, np.moveaxis(due_x, 1, -1)) < 1e-6
        assert distance(by_kernel, due_kernel.transpose(2, 3, 4, 1, 0)) < 1e-6


@pytest.mark.parametrize("side", [(8, 10), (9, 7), (2, 3)])
@pytest.mark.parametrize("model", [CogVideoXDownsample3D, CogVideoXUpsample3D])
def test_gradients_of_resampling_agree(model, side):
    down = model is CogVideoXDownsample3D
    layer = (_layers.Downsample if down else _layers.Upsample)(4, True, key=KEY)
    module = model(4, 4, compress_time=True, padding=0 if down else 1)
    copy(module.conv, layer.conv)
    x = normal((2, 3, *side, 4))

    @jax.jit
    @jax.grad
    def gradients(layer_and_x):
        layer, x = layer_and_x
        return jnp.sum(jnp.square(layer(x)))

    ours, by_x = gradients((layer, x))
    (due,) = torch_gradients(module, to_torch(x))
    assert distance(by_x, np.moveaxis(due, 1, -1)) < 1e-6
    module.zero_grad()
    module(to_torch(x)).square().sum().backward()
    due = module.conv.weight.grad.numpy().transpose(2, 3, 1, 0)
    assert distance(ours.conv.weight, due) < 1e-6


@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_a_causal_convolution_in_pieces_is_the_whole(cuts):
    layer = _layers.CausalConv3d(3, 4, key=KEY)
    x = normal((1, 5, 6, 6, 3))
    whole, whole_cache = layer(x)
    pieces, cache = [], None
    for piece in jnp.split(x, np.cumsum(cuts)[:-1], axis=1):
        y, cache = layer(piece, cache)
        assert cache.shape == (1, 2, 6, 6, 3)
        pieces.append(y)
    assert distance(jnp.concatenate(pieces, 1), whole) < 1e-6
    np.testing.assert_array_equal(cache, whole_cache)


def test_a_causal_convolution_sees_no_later_frame():
    layer = _layers.CausalConv3d(3, 4, key=KEY)
    x = normal((1, 5, 6, 6, 3))
    changed = x.at[:, 3:].set(7.0)
    np.testing.assert_array_equal(layer(x)[0][:, :3], layer(changed)[0][:, :3])


def test_unknown_pad_mode():
    with pytest.raises(ValueError, match=r"`pad_mode` must be one of first.*got 'mirror'"):
        _layers.CausalConv3d(3, 4, pad_mode="mirror", key=KEY)


# About 1000, whose next number in float32 is 6.1e-5 away, the mean of rows that were summed in
# float32 is off by 1.8e-4 at most: measured, six seeds, JAX 0.10.0 and 0.10.2. Sums about the
# first row are exact to half of that distance, and take 1.65 GiB more of a TPU at 480x720.
@pytest.mark.parametrize(
    ("offset", "first", "bar"), [(0, 0, 1e-6), (1000, 1e3, 2e-4), (0, 1e4, 1e-6)]
)
def test_group_norm_is_as_exact_as_float64(offset, first, bar):
    """A large mean swamps variances that are not centred first."""
    layer = _layers.GroupNorm(8, 2, 1e-6)
    x = (normal((1, 3, 32, 32, 8)) + offset).at[0, 0, 0, 0].set(first)
    due = torch.nn.functional.group_norm(to_torch(x).double(), 2, eps=1e-6)
    assert distance(layer(x), np.moveaxis(due.numpy(), 1, -1)) < bar


# One latent frame is not split between the first feature frame and others: diffusers fails.
NORMED = [(f, z) for f in (1, 2, 3, 4, 5) for z in (1, 2, 3) if z > 1 or f == 1 or f % 2 == 0]


def spatial_norms():
    ours = _layers.SpatialNorm(8, 3, 2, key=KEY)
    model = theirs.CogVideoXSpatialNorm3D(8, 3, groups=2)
    copy(model.conv_y.conv, ours.conv_y.conv)
    copy(model.conv_b.conv, ours.conv_b.conv)
    return ours, model


@pytest.mark.parametrize(("frames", "latent_frames"), NORMED)
def test_spatial_norm(frames, latent_frames):
    ours, model = spatial_norms()
    x, z = normal((2, frames, 11, 8, 8)), normal((2, latent_frames, 5, 4, 3), 1)
    due, _ = model(to_torch(x), to_torch(z))
    assert distance(ours(x, z), from_torch(due)) < 2e-6


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (3, 2), (4, 2), (4, 3), (5, 3)])
@pytest.mark.parametrize("side", [(10, 8), (11, 8)])
def test_gradients_of_a_spatial_norm_agree(frames, latent_frames, side):
    """By features, latents and weights; of sides that are multiples of the latents', and others."""
    ours, model = spatial_norms()
    x, z = normal((2, frames, *side, 8)), normal((2, latent_frames, 5, 4, 3), 1)
    weights = normal(x.shape, 2)

    @jax.jit
    @jax.grad
    def gradients(args):
        norm, x, z = args
        return jnp.sum(jnp.square(norm(x, z) * weights))

    by_norm, *ours = gradients((ours, x, z))
    due = torch_gradients(lambda x, z: model(x, z)[0] * to_torch(weights), to_torch(x), to_torch(z))
    pairs = [(got, np.moveaxis(theirs, 1, -1)) for got, theirs in zip(ours, due, strict=True)]
    pairs += [
        (by_norm.norm_layer.weight, model.norm_layer.weight.grad),
        (by_norm.norm_layer.bias, model.norm_layer.bias.grad),
    ]
    for got, module in ((by_norm.conv_y, model.conv_y), (by_norm.conv_b, model.conv_b)):
        weight = module.conv.weight.grad.numpy().transpose(2, 3, 4, 1, 0)
        pairs += [(got.conv.weight, weight), (got.conv.bias, module.conv.bias.grad)]
    for got, theirs_ in pairs:
        assert distance(got, np.asarray(theirs_)) < 3e-6


def test_gradients_of_a_norm_in_half_precision():
    """Summed in float32, and rounded once."""
    x, z = normal((2, 3, 40, 32, 8)), normal((2, 2, 5, 4, 3), 1)
    weights = normal(x.shape, 2)
    norm, _ = spatial_norms()

    @jax.jit
    @jax.grad
    def gradients(args):
        norm, x, z = args
        return jnp.sum(norm(x, z).astype(jnp.float32) * weights)

    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (norm, x, z))
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    for got, due in zip(*map(jax.tree.leaves, map(gradients, (half, exact))), strict=True):
        assert got.dtype == jnp.bfloat16
        assert distance(got.astype(jnp.float32), due) < 5e-3


def test_an_overflow_stays_in_its_group():
    x = normal((1, 1, 4, 4, 4)).at[..., :2].mul(1e30)
    y = _layers.GroupNorm(4, 2, 1e-6)(x)
    due = torch.nn.functional.group_norm(to_torch(x[..., 2:]), 1, eps=1e-6)
    assert distance(y[..., 2:], from_torch(due)) < 1e-6


@pytest.mark.parametrize("size", [(3, 10, 8), (4, 7, 5)])
def test_second_derivatives_of_norms(size):
    """Against finite differences, in float64."""
    with jax.enable_x64(True):
        norm = _layers.SpatialNorm(4, 3, 2, key=KEY, dtype=jnp.float64)
        x, z = normal((2, *size, 4), dtype=jnp.float64), normal((2, 2, 5, 4, 3), 1, jnp.float64)
        for fn, args in ((norm, (x, z)), (norm.norm_layer, (x,))):
            check = lambda *args, fn=fn: jax.nn.silu(fn(*map(jnp.asarray, args)))  # noqa: E731
            check_grads(check, args, order=2, modes=["rev"])


def copy(module, conv):
    weight = np.asarray(conv.weight)
    axes = (4, 3, 0, 1, 2) if weight.ndim == 5 else (3, 2, 0, 1)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight.transpose(axes).copy()))
        module.bias.copy_(torch.from_numpy(np.array(conv.bias)))


@pytest.mark.parametrize("compress_time", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 9])
def test_resampling(frames, compress_time):
    x = normal((1, frames, 9, 12, 4))
    for ours, model in (
        (_layers.Downsample(4, compress_time, key=KEY), CogVideoXDownsample3D),
        (_layers.Upsample(4, compress_time, key=KEY), CogVideoXUpsample3D),
    ):
        padding = {"padding": 0} if model is CogVideoXDownsample3D else {"padding": 1}
        module = model(4, 4, compress_time=compress_time, **padding)
        copy(module.conv, ours.conv)
        assert distance(ours(x), from_torch(module(to_torch(x)))) < 1e-6


def test_a_resnet_block_with_spatial_norms_asks_for_latents():
    block = _resnet.ResnetBlock(
        4, 4, groups=2, eps=1e-6, act_fn="silu", latents=3, pad_mode="first", key=KEY
    )
    with pytest.raises(ValueError, match="needs `latents=`"):
        block(normal((1, 1, 4, 4, 4)))
