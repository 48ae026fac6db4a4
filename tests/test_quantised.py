"""Weights in 8 bits: what they round to, what they hold exactly, and that all else works."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.torch
import torch
from jax import export
from reference import SHALLOW, distance, normal, pair, thinned

import eqx_cogvae as cv
from eqx_cogvae import training
from eqx_cogvae._flops import flops
from eqx_cogvae._layers import CausalConv3d
from eqx_cogvae._lowering import choose
from eqx_cogvae._lowering.choose import Thresholds
from eqx_cogvae._resnet import ResnetBlock
from eqx_cogvae.diffusers import EqxAutoencoderKLCogVideoX

LATENTS, VIDEO = (1, 3, 8, 8, 3), (1, 9, 16, 16, 3)
FLOATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
E4M3 = "float8_e4m3fn"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return pair(SHALLOW, tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="module")
def vae(both):
    return thinned(both.vae)


@pytest.fixture(scope="module")
def small(vae):
    return cv.quantised(vae, E4M3)


@pytest.fixture(scope="module")
def plain(small):
    """The same weights in plain convolutions, whose results the tests of the model hold."""
    return cv.dequantised(small)


def equal(got, due):
    assert jax.tree.structure(got) == jax.tree.structure(due)
    for each, expected in zip(*map(jax.tree.leaves, (got, due)), strict=True):
        assert each.dtype == expected.dtype
        np.testing.assert_array_equal(each, expected)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def named(tree):
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def rounded(kernel, form):
    """The first convolution of a block of 5 to 7 channels, quantised."""
    options = {"groups": 1, "eps": 1e-6, "act_fn": "silu", "latents": None, "pad_mode": "first"}
    block = ResnetBlock(5, 7, **options, key=jax.random.key(0), dtype=kernel.dtype)
    block = eqx.tree_at(lambda block: block.conv1.conv.weight, block, kernel)
    return cv.quantised(block, form).conv1.conv


def kernel(dtype):
    """A kernel whose channels lie magnitudes apart, one of them of zeros."""
    magnitudes = jnp.logspace(-5, 1, 7)[None, None, None, None]
    return (normal((3, 3, 3, 5, 7)) * magnitudes).at[..., 3].set(0).astype(dtype)


# The numbers.


@pytest.mark.parametrize("form", FLOATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_float8_rounds_as_torch_does(form, dtype):
    """The scale is the least power of two that keeps its channel within the format."""
    weights = kernel(dtype)
    got = rounded(weights, form)
    wide = np.asarray(weights, np.float32)
    largest = np.abs(wide).max(axis=(0, 1, 2, 3)) / torch.finfo(FLOATS[form]).max
    scale = np.where(largest > 0, np.exp2(np.ceil(np.log2(largest + (largest == 0)))), 1)
    np.testing.assert_array_equal(np.asarray(got.scale, np.float64), scale)
    theirs = torch.from_numpy(wide / scale.astype(np.float32)).to(FLOATS[form])
    np.testing.assert_array_equal(got.bits, theirs.view(torch.uint8).numpy())
    due = theirs.float().numpy() * scale.astype(np.float32)
    assert got.weight.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got.weight, np.float32), due)


def test_int8_is_off_by_half_a_step_at_most():
    weights = kernel(jnp.float32)
    got = np.asarray(rounded(weights, "int8").weight)
    step = np.abs(weights).max(axis=(0, 1, 2, 3)) / 127
    assert np.all(np.abs(got - weights) <= step * (0.5 + 1e-5))
    # A 254th of the largest number is more than float8 is off by, where numbers are small.
    error = [distance(rounded(weights, form).weight, weights) for form in (E4M3, "int8")]
    assert error[1] < error[0] / 2


@pytest.mark.parametrize("form", FLOATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_published_float8_weights_are_held_exactly(form, dtype, both, tmp_path):
    both.model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    tensors = {k: v.to(FLOATS[form]) if v.ndim > 1 else v for k, v in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    loaded = cv.from_pretrained(tmp_path, dtype=dtype)
    equal(cv.dequantised(cv.quantised(loaded, form)), loaded)


def test_other_weights_stay(vae, small):
    """Those that are not of the two convolutions of a residual block, and all biases."""
    before, after = named(vae), named(small)
    of_blocks = {n for n in before if re.search(r"\.resnets\[\d+\]\.conv[12]\.conv\.weight", n)}
    assert before.keys() - after.keys() == of_blocks
    bits = {after[name.removesuffix("weight") + "bits"].dtype for name in of_blocks}
    assert bits == {jnp.dtype(jnp.uint8)}
    for name in before.keys() & after.keys():
        np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.28), ("bfloat16", 0.52)])
def test_weights_take_little_memory(dtype, share):
    """Of the default configuration, in shapes alone."""
    shapes = eqx.filter_eval_shape(
        lambda: cv.VAE(cv.Config(), key=jax.random.key(0), dtype=jnp.dtype(dtype))
    )
    less = eqx.filter_eval_shape(cv.quantised, shapes, E4M3)
    assert nbytes(less) < share * nbytes(shapes)


# The model.


def test_results_are_those_of_the_rounded_weights(vae, small, plain):
    x, z = normal(VIDEO).clip(-1, 1), normal(LATENTS)
    assert distance(small.encode(x).mean, plain.encode(x).mean) < 1e-6
    (got, own_cache), (due, cache) = (each.decode_step(z) for each in (small, plain))
    assert distance(got, due) < 1e-6
    assert 1e-3 < distance(got, vae.decode(z)) < 0.2
    got, due = small.decode_step(z[:, :2], own_cache)[0], plain.decode_step(z[:, :2], cache)[0]
    assert distance(got, due) < 1e-6


@pytest.mark.parametrize(
    "transform",
    [
        lambda vae: lambda z: jnp.concatenate(list(cv.streamed(vae.decode_step, 2)(z)), axis=1),
        lambda vae: cv.sliced(cv.framewise(vae.decode_step, 2)),
        lambda vae: eqx.filter_jit(vae.decode),
        lambda vae: cv.sharded(
            vae.decode_step, cv.best_mesh(LATENTS, jax.devices()[:1]), height="height"
        ),
    ],
    ids=["streamed", "sliced", "jit", "sharded"],
)
def test_transforms_take_it(transform, small, plain):
    z = normal(LATENTS)
    got = transform(small)(z)
    assert distance(got[0] if isinstance(got, tuple) else got, plain.decode(z)) < 1e-6


def test_tiles_of_it(small, plain):
    z = jnp.tile(normal(LATENTS), (1, 1, 1, 2, 1))
    got, due = (cv.tiled(v.decode, (8, 8), (0, 0))(z) for v in (small, plain))
    assert distance(got, due) < 1e-6


def test_it_runs_in_chunks(small, plain):
    """As one does that offers the kernel: a replaced layer without it would run as a whole."""
    z = normal(LATENTS)
    with choose.thresholds(Thresholds(chunk_elements=1, band_elements=1)):
        program = eqx.filter_make_jaxpr(small.decode_step)(z)[0]
        due = eqx.filter_make_jaxpr(plain.decode_step)(z)[0]
        assert distance(small.decode_step(z)[0], plain.decode(z)) < 1e-5
    loops = [str(each).count("scan[") for each in (program, due)]
    assert loops[0] == loops[1] > 5


def test_weights_are_arguments_in_8_bits(small):
    """The program reads the bits, and holds no kernel of its own."""
    z = normal(LATENTS)
    text = eqx.filter_jit(lambda vae, z: vae.decode_step(z)[0]).lower(small, z).as_text()
    (entry,) = [line for line in text.splitlines() if "func.func public @main" in line]
    held = [name for name in named(small.decoder) if name.endswith(".bits")]
    assert entry.count("xui8>") == len(held) > 5


def test_gradients_by_latents_and_by_other_weights(small, plain):
    x, z = normal((1, 3, 8, 8, 8)), normal(LATENTS)

    @eqx.filter_jit
    def gradients(block):
        loss = lambda given: jnp.mean(jnp.square(given[0](x, latents=given[1])[0]))  # noqa: E731
        return eqx.filter_grad(loss)((block, z))

    blocks = [each.decoder.mid_block.resnets[0] for each in (small, plain)]
    (by_small, by_z), (by_plain, due) = map(gradients, blocks)
    assert distance(by_z, due) < 1e-5
    assert by_small.conv1.conv.bits is None
    norms = [grads.norm1.norm_layer.weight for grads in (by_small, by_plain)]
    assert distance(*norms) < 1e-5


def test_the_dtype_is_that_of_what_is_computed(vae, small):
    assert small.dtype == jnp.float32
    less = cv.quantised(jax.tree.map(lambda x: x.astype(jnp.bfloat16), vae), E4M3)
    assert less.dtype == jnp.bfloat16
    assert jax.eval_shape(less.decode, jnp.zeros(LATENTS)).dtype == jnp.bfloat16
    assert jax.eval_shape(less.encode_step, jnp.zeros(VIDEO))[0].dtype == jnp.bfloat16


def test_half_a_model(vae, small):
    decoder = cv.quantised(eqx.tree_at(lambda v: v.encoder, vae, None), E4M3)
    equal(decoder.decoder, small.decoder)


def test_it_is_planned(small, plain):
    best = cv.plan(small, (1, 1, 16, 16)).best("decode")
    program = eqx.filter_make_jaxpr(plain.decode_step)(normal((1, 1, 8, 8, 3)))[0]
    assert best.flop == flops(program)
    assert best.fn.step.model is small


def test_it_is_exported_for_three_platforms(small, plain):
    conv, x = small.encoder.mid_block.resnets[0].conv1, normal((1, 2, 4, 4, 8))
    run = jax.jit(lambda conv, x: conv(x)[0])
    made = export.export(run, platforms=("cpu", "cuda", "tpu"))(conv, x)
    due = run(plain.encoder.mid_block.resnets[0].conv1, x)
    assert distance(made.call(conv, x), due) < 1e-6


def test_it_is_written_and_read_as_a_tree(vae, small, tmp_path):
    eqx.tree_serialise_leaves(tmp_path / "small.eqx", small)
    like = eqx.filter_eval_shape(cv.quantised, vae, E4M3)
    equal(eqx.tree_deserialise_leaves(tmp_path / "small.eqx", like), small)


def test_dequantised_it_is_saved(both, tmp_path):
    small = cv.quantised(both.vae, E4M3)
    with pytest.raises(ValueError, match=r"8 bits.* save `cv\.dequantised\(vae\)`"):
        cv.save_pretrained(small, tmp_path / "vae")
    assert not (tmp_path / "vae").exists()
    cv.save_pretrained(cv.dequantised(small), tmp_path / "vae")
    equal(cv.from_pretrained(tmp_path / "vae"), cv.dequantised(small))


def test_fingerprints_tell_them_apart(vae, small, plain):
    assert len({cv.fingerprint(each) for each in (vae, small, plain)}) == 3


# Casts, torch and training.


def test_casts_leave_the_bits_or_say_so(small):
    cast = lambda kind: jax.tree.map(  # noqa: E731
        lambda x: x.astype(jnp.bfloat16) if kind(x) else x, small
    )
    half = cast(eqx.is_inexact_array)
    assert half.dtype == jnp.bfloat16
    conv, own = (v.decoder.mid_block.resnets[0].conv1.conv for v in (half, small))
    np.testing.assert_array_equal(np.asarray(conv.weight, np.float32), own.weight)
    with pytest.raises(TypeError, match=r"cast to bfloat16, .*by `eqx\.is_inexact_array`"):
        cast(eqx.is_array).decode(normal(LATENTS))


def test_diffusers_stand_in_takes_it(small):
    vae = EqxAutoencoderKLCogVideoX(small)
    z = torch.from_numpy(np.moveaxis(np.array(normal(LATENTS)), -1, 1).copy())
    with torch.no_grad():
        got = np.moveaxis(vae.decode(z).sample.numpy(), 1, -1)
    np.testing.assert_array_equal(got, small.decode(normal(LATENTS)))
    half = vae.to(torch.bfloat16).vae
    assert half.dtype == jnp.bfloat16
    bits = [v.decoder.mid_block.resnets[0].conv1.conv.bits for v in (half, small)]
    np.testing.assert_array_equal(*bits)


class LowRank(eqx.Module):
    """A convolution with a trained pointwise one of low rank beside it."""

    conv: CausalConv3d
    down: jax.Array
    up: jax.Array

    def __call__(self, x, cache=None):
        y, cache = self.conv(x, cache)
        return y + x @ self.down @ self.up, cache


def test_only_other_weights_are_trained(small):
    for trainable in (None, training.decoder_only):
        with pytest.raises(ValueError, match=r"8 bits cannot be trained: train `cv\.dequantised"):
            training.Trainer(optax.sgd(1e-2), trainable=trainable).init(small)
    where = lambda vae: vae.encoder.mid_block.resnets[0].conv1  # noqa: E731
    own = eqx.tree_at(where, small, LowRank(where(small), normal((8, 2)), normal((2, 8))))
    trainable = lambda name: name.endswith((".down", ".up"))  # noqa: E731
    loss = lambda vae, clips, key: (jnp.mean(vae.encode_step(clips)[0] ** 2), {})  # noqa: E731
    trainer = training.Trainer(optax.sgd(1e-2), loss, trainable, dtype=jnp.bfloat16)
    clips = normal((1, 1, 8, 8, 3)).clip(-1, 1)
    state, _ = trainer.step(trainer.init(own), clips, jax.random.key(0))
    equal(where(state.model).conv, where(own).conv)
    equal(state.model.decoder, own.decoder)
    assert distance(where(state.model).down, where(own).down) > 0


# What is refused.


@pytest.mark.parametrize("dtype", ["bfloat16", "float7", jnp.int16, 8])
def test_other_formats_are_refused(dtype, vae):
    with pytest.raises(ValueError, match=r"`dtype` must be one of float8_e4m3fn, .*, got "):
        cv.quantised(vae, dtype)


def test_a_format_may_be_a_dtype(vae, small):
    equal(cv.quantised(vae, jnp.float8_e4m3fn), small)


def test_quantised_twice_and_nothing_to_quantise(vae, small):
    with pytest.raises(ValueError, match=r"already: quantise `cv\.dequantised\(vae\)`"):
        cv.quantised(small, "int8")
    with pytest.raises(ValueError, match=r"a GroupNorm without residual blocks .* give a VAE"):
        cv.quantised(vae.encoder.norm_out, E4M3)
    equal(cv.dequantised(vae), vae)
