"""Convolutions and layers, one by one, against torch and against themselves."""

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
from eqx_cogvae._meshes import Split, split

KEY = jax.random.key(0)


def exact(x):
    """A tensor of float64: torch's sums of float32 are off by 1e-6, by how many threads it has."""
    return to_torch(x).double()


def torch_gradients(fn, *tensors):
    """Of the sum of squares, by each tensor; back in our layouts."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    fn(*tensors).square().sum().backward()
    return [t.grad.numpy() for t in tensors]


@pytest.mark.parametrize(
    ("model", "side"),
    [
        pytest.param(model, side, marks=() if side in due else pytest.mark.full)
        for model, due in (
            (CogVideoXDownsample3D, ((8, 10), (9, 7))),
            (CogVideoXUpsample3D, ((9, 7), (2, 3))),
        )
        for side in ((8, 10), (9, 7), (2, 3))
    ],
)
def test_gradients_of_resampling_agree(model, side):
    down = model is CogVideoXDownsample3D
    layer = (_layers.Downsample if down else _layers.Upsample)(4, True, key=KEY)
    module = model(4, 4, compress_time=True, padding=0 if down else 1).double()
    copy(module.conv, layer.conv)
    x = normal((2, 3, *side, 4))

    @jax.jit
    @jax.grad
    def gradients(layer_and_x):
        layer, x = layer_and_x
        return jnp.sum(jnp.square(layer(x)))

    ours, by_x = gradients((layer, x))
    (due,) = torch_gradients(module, exact(x))
    assert distance(by_x, np.moveaxis(due, 1, -1)) < 1e-6
    module.zero_grad()
    module(exact(x)).square().sum().backward()
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
@pytest.mark.parametrize("cut", [Split(), Split(height=2, width=4), Split(height=3)])
def test_group_norm_is_as_exact_as_float64(cut, offset, first, bar):
    """A large mean swamps variances that are not centred first, in parts of frames too."""
    layer = _layers.GroupNorm(8, 2, 1e-6)
    x = (normal((1, 3, 32, 32, 8)) + offset).at[0, 0, 0, 0].set(first)
    due = torch.nn.functional.group_norm(exact(x), 2, eps=1e-6)
    with split(cut):
        assert distance(layer(x), np.moveaxis(due.numpy(), 1, -1)) < bar


# One latent frame is not split between the first feature frame and others: diffusers fails.
NORMED = [(f, z) for f in (1, 2, 3, 4, 5) for z in (1, 2, 3) if z > 1 or f == 1 or f % 2 == 0]
# Every count of either; the others are long tests.
SOME = ((1, 1), (2, 3), (3, 2), (4, 1), (5, 3))


def spatial_norms():
    ours = _layers.SpatialNorm(8, 3, 2, key=KEY)
    model = theirs.CogVideoXSpatialNorm3D(8, 3, groups=2).double()
    copy(model.conv_y.conv, ours.conv_y.conv)
    copy(model.conv_b.conv, ours.conv_b.conv)
    return ours, model


@pytest.mark.parametrize(
    ("frames", "latent_frames"),
    [pytest.param(*n, marks=() if n in SOME else pytest.mark.full) for n in NORMED],
)
def test_spatial_norm(frames, latent_frames):
    ours, model = spatial_norms()
    x, z = normal((2, frames, 11, 8, 8)), normal((2, latent_frames, 5, 4, 3), 1)
    due, _ = model(exact(x), exact(z))
    assert distance(ours(x, z), from_torch(due)) < 2e-6


@pytest.mark.parametrize(
    ("frames", "latent_frames", "side"),
    [
        pytest.param(*n, side, marks=() if n in due else pytest.mark.full)
        for side, due in (((10, 8), ((1, 1), (3, 2), (4, 3))), ((11, 8), ((4, 2), (5, 3))))
        for n in ((1, 1), (3, 2), (4, 2), (4, 3), (5, 3))
    ],
)
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
    due = torch_gradients(lambda x, z: model(x, z)[0] * exact(weights), exact(x), exact(z))
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
    due = torch.nn.functional.group_norm(exact(x[..., 2:]), 1, eps=1e-6)
    assert distance(y[..., 2:], from_torch(due)) < 1e-6


@pytest.mark.parametrize("size", [(3, 10, 8), (4, 7, 5)])
def test_second_derivatives_of_norms(size):
    """Against finite differences, in float64."""
    with jax.enable_x64(True):
        norm = _layers.SpatialNorm(4, 3, 2, key=KEY, dtype=jnp.float64)
        x, z = normal((2, *size, 4), dtype=jnp.float64), normal((2, 2, 5, 4, 3), 1, jnp.float64)
        for fn, args in ((norm, (x, z)), (norm.norm_layer, (x,))):
            check = jax.jit(lambda *args, fn=fn: jax.nn.silu(fn(*args)))
            check_grads(check, args, order=2, modes=["rev"])


def copy(module, conv):
    weight = np.asarray(conv.weight)
    axes = (4, 3, 0, 1, 2) if weight.ndim == 5 else (3, 2, 0, 1)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight.transpose(axes).copy()))
        module.bias.copy_(torch.from_numpy(np.array(conv.bias)))


@pytest.mark.parametrize(
    ("frames", "compress_time"),
    [
        pytest.param(n, time, marks=() if time or n in (1, 4) else pytest.mark.full)
        for n in (1, 2, 3, 4, 9)
        for time in (False, True)
    ],
)
def test_resampling(frames, compress_time):
    x = normal((1, frames, 9, 12, 4))
    for ours, model in (
        (_layers.Downsample(4, compress_time, key=KEY), CogVideoXDownsample3D),
        (_layers.Upsample(4, compress_time, key=KEY), CogVideoXUpsample3D),
    ):
        padding = {"padding": 0} if model is CogVideoXDownsample3D else {"padding": 1}
        module = model(4, 4, compress_time=compress_time, **padding).double()
        copy(module.conv, ours.conv)
        assert distance(ours(x), from_torch(module(exact(x)))) < 1e-6


def test_a_resnet_block_with_spatial_norms_asks_for_latents():
    block = _resnet.ResnetBlock(
        4, 4, groups=2, eps=1e-6, act_fn="silu", latents=3, pad_mode="first", key=KEY
    )
    with pytest.raises(TypeError, match="latents"):
        block(normal((1, 1, 4, 4, 4)))
