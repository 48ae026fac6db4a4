"""LoRA: the same function at first, merged and from a file; what is trained; wrong files."""

import dataclasses
import warnings

import diffusers
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch
from reference import SHALLOW, decode, distance, encode, normal, to_torch

import eqx_cogvae as cv
from eqx_cogvae import _layers, training
from eqx_cogvae._checkpoint import tensor_names
from eqx_cogvae._lowering import choose
from eqx_cogvae._lowering.choose import Thresholds

# With every kind of convolution that there is.
CONFIG = dataclasses.replace(SHALLOW, use_quant_conv=True, use_post_quant_conv=True)
VIDEO, LATENTS = (1, 9, 16, 16, 3), (1, 3, 8, 8, 3)


@pytest.fixture(scope="module")
def vae():
    return cv.VAE(CONFIG, key=jax.random.key(0))


def names(vae):
    return jax.tree.leaves(tensor_names(vae))


def named(vae):
    return dict(zip(names(vae), jax.tree.leaves(vae), strict=True))


def moved(vae, scale=0.3):
    """A model with LoRA whose changes are not zero."""
    draws = np.random.default_rng(5)

    def noisy(name, x):
        noise = draws.standard_normal(x.shape, np.float32)
        return x + scale * noise if training.lora_only(name) else x

    return jax.tree.map(noisy, tensor_names(vae), vae)


@pytest.fixture(scope="module")
def changed(vae):
    return moved(training.lora(vae, 2, key=jax.random.key(1)))


def results(vae):
    z, x = normal(LATENTS), normal(VIDEO).clip(-1, 1)
    first, cache = vae.decode_step(z)
    return first, vae.decode_step(z[:, :2], cache)[0], vae.encode(x).mean


def test_the_model_is_the_same_at_first(vae):
    """Bit for bit, and every convolution has a change that can be trained."""
    wrapped = training.lora(vae, 2, key=jax.random.key(1))
    for got, due in zip(results(wrapped), results(vae), strict=True):
        np.testing.assert_array_equal(got, due)
    kernels = {name for name, x in named(vae).items() if name.endswith(".weight") and x.ndim > 1}
    added = set(names(wrapped)) - set(names(vae))
    assert added == {k.replace(".weight", each) for k in kernels for each in (".lora_A", ".lora_B")}
    assert set(names(vae)) < set(names(wrapped))
    tensors = named(wrapped)
    assert all(not tensors[name].any() for name in added if name.endswith("B"))
    assert all(tensors[name].any() for name in added if name.endswith("A"))


def test_a_change_is_two_convolutions_beside_the_first(changed, vae, tmp_path):
    """torch's, with the tensors as they are in the file."""
    training.save_lora(tmp_path / "lora", changed)
    tensors = safetensors.numpy.load_file(tmp_path / "lora")
    down, up = (torch.tensor(tensors[f"encoder.conv_in.conv.lora_{each}"]) for each in "AB")
    assert down.shape == (2, 3, 3, 3, 3) and up.shape == (8, 2, 1, 1, 1)
    x, layer = normal((1, 5, 6, 7, 3)), vae.encoder.conv_in
    padded = torch.nn.functional.pad(to_torch(x), (1, 1, 1, 1))
    padded = torch.cat([padded[:, :, :1]] * 2 + [padded], dim=2)
    conv = torch.nn.functional.conv3d
    kernel = torch.tensor(np.asarray(layer.conv.weight).transpose(4, 3, 0, 1, 2))
    due = conv(padded, kernel, torch.tensor(np.asarray(layer.conv.bias)))
    due = (due + conv(conv(padded, down), up)).permute(0, 2, 3, 4, 1)
    assert distance(changed.encoder.conv_in(x)[0], due) < 1e-5
    assert distance(layer(x)[0], due) > 0.1


def test_a_layer_that_pads_by_replication():
    own = cv.VAE(SHALLOW, key=jax.random.key(0), pad_mode="replicate")
    own = moved(training.lora(own, 2, key=jax.random.key(1)))
    x = normal((1, 5, 6, 7, 3))
    got, due = (each.encoder.conv_in(x)[0] for each in (own, training.merge(own)))
    assert distance(got, due) < 1e-6


def test_merged_it_is_the_same_and_diffusers_loads_it(changed, vae, tmp_path):
    cv.save_pretrained(training.merge(changed), tmp_path / "merged")
    again = cv.from_pretrained(tmp_path / "merged")
    assert eqx.tree_equal(jax.tree.structure(again), jax.tree.structure(vae))
    for got, due in zip(results(changed), results(again), strict=True):
        assert distance(got, due) < 1e-5
    theirs = diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path / "merged").eval()
    z, x = normal(LATENTS), normal(VIDEO).clip(-1, 1)
    got = results(changed)
    assert distance(got[0], decode(theirs, z)) < 1e-5
    assert distance(got[2], encode(theirs, x)[0]) < 1e-5
    assert distance(got[0], vae.decode_step(z)[0]) > 1e-2


def test_large_arrays_go_through_it_in_chunks(changed):
    merged = training.merge(changed)
    due = results(merged)
    with choose.thresholds(Thresholds(chunk_elements=1, band_elements=1)):
        for got, each in zip(results(changed), due, strict=True):
            assert distance(got, each) < 1e-5
        made = [eqx.filter_make_jaxpr(v.decode_step)(normal(LATENTS)) for v in (changed, merged)]
    loops = [str(program).count("scan[") for program, *_ in made]
    assert loops[0] == loops[1] > 5


def test_weights_in_8_bits_take_none(changed, vae, tmp_path):
    small = cv.quantised(vae, "int8")
    training.save_lora(tmp_path / "lora", changed)
    for call in (
        lambda: training.lora(small, 2, key=jax.random.key(0)),
        lambda: training.load_lora(tmp_path / "lora", small),
    ):
        with pytest.raises(ValueError, match="weights held in 8 bits take no LoRA"):
            call()
    with pytest.raises(ValueError, match=r"`training\.merge` it first"):
        cv.quantised(changed, "int8")


def test_a_convolution_of_ones_own_is_left_alone(vae):
    class Doubled(_layers.Conv):
        def taps(self):
            return super().taps()._replace(bias=2 * self.bias)

    where = lambda v: v.decoder.conv_in.conv  # noqa: E731
    key = jax.random.key(3)
    own = eqx.tree_at(where, vae, Doubled((3, 3, 3), 3, 8, key=key))
    changed = training.lora(own, 2, key=key)
    assert type(where(changed)) is Doubled


def test_only_the_changes_are_trained(vae):
    """Against a discriminator, in bfloat16, rematerialised: all at once."""
    last = lambda name: name.startswith(("decoder.up_blocks.1.", "decoder.conv_out."))  # noqa: E731
    wrapped = training.lora(vae, 2, key=jax.random.key(1), where=last)
    trainer = training.Trainer(
        optax.adam(1e-2),
        trainable=training.lora_only,
        dtype=jnp.bfloat16,
        rematerialise=True,
        adversarial=training.Adversarial(optax.adam(1e-3)),
    )
    clips = jnp.tanh(normal((1, 1, 8, 8, 3)))
    judge = training.Discriminator(width=4, levels=2, key=jax.random.key(2))
    state = trainer.init(wrapped, judge)
    due = [name for name in names(wrapped) if training.lora_only(name)]
    assert sum(leaf.ndim > 0 for leaf in jax.tree.leaves(state.optimiser)) == 2 * len(due)
    losses = []
    for _ in range(4):
        state, metrics = trainer.step(state, clips, jax.random.key(0))
        losses.append(metrics)
    assert all(np.isfinite(value) for each in losses for value in each.values())
    assert losses[0]["adversarial_weight"] > 0
    before, after, average = named(wrapped), named(state.model), named(state.average)
    for tensors in (after, average):
        assert {n for n, x in tensors.items() if not np.array_equal(x, before[n])} == set(due)
    assert {x.dtype for x in after.values()} == {jnp.dtype(jnp.float32)}
    assert losses[-1]["l1"] < losses[0]["l1"]
    # A kernel that is held fixed has a last layer's gradient all the same.
    assert "decoder.conv_out.conv.lora_A" in due and "encoder.conv_in.conv.lora_A" not in before


def test_half_precision_below_and_float32_beside(vae):
    """A loaded bfloat16 model is fine-tuned as it is, without a warning."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vae)
    wrapped = training.lora(half, 2, key=jax.random.key(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.Trainer(optax.adam(1e-3), trainable=training.lora_only).init(wrapped)
    assert {named(wrapped)[n].dtype for n in names(wrapped) if training.lora_only(n)} == {
        jnp.dtype(jnp.float32)
    }
    assert wrapped.dtype == jnp.bfloat16
    got = eqx.filter_eval_shape(wrapped.decode, normal(LATENTS))
    assert got.dtype == jnp.bfloat16
    merged = training.merge(moved(wrapped))
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.structure(merged) == jax.tree.structure(half)


def test_plans_fingerprints_and_checkpoints(changed, vae, tmp_path):
    assert cv.plan(changed, (1, 1, 8, 8, 3)).best("decode").flop > 0
    models = changed, vae, training.merge(changed)
    assert len({cv.fingerprint(model) for model in models}) == 3
    with pytest.raises(ValueError, match=r"differs from its config .* such as .*lora_A"):
        cv.save_pretrained(changed, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_plain_model_is_merged_already(vae):
    assert eqx.tree_equal(training.merge(vae), vae)


def test_layers_are_chosen_by_the_names_of_their_kernels(vae):
    seen = []
    where = lambda name: seen.append(name) or "conv_in" in name  # noqa: E731
    wrapped = training.lora(vae, 2, key=jax.random.key(1), where=where)
    assert set(seen) == {n for n, x in named(vae).items() if n.endswith(".weight") and x.ndim > 1}
    added = set(names(wrapped)) - set(names(vae))
    assert {n.rpartition(".")[0] for n in added} == {"encoder.conv_in.conv", "decoder.conv_in.conv"}
    half = training.lora(vae, 2, key=jax.random.key(1), where=training.decoder_only)
    added = set(names(half)) - set(names(vae))
    assert added == {n for n in names(half) if training.lora_only(n) and "encoder." not in n}


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_bad_ranks(rank, vae, unchecked):
    with pytest.raises(ValueError, match=f"`rank` must be a whole number .* got {rank!r}"):
        training.lora(vae, rank, key=jax.random.key(0))


def test_models_that_cannot_be_changed(changed, vae, tmp_path):
    with pytest.raises(ValueError, match=r"none of the \d+ convolutions.*encoder\.conv_in\.conv"):
        training.lora(vae, 2, key=jax.random.key(0), where=lambda name: False)
    training.save_lora(tmp_path / "lora", changed)
    for change in (
        lambda: training.lora(changed, 2, key=jax.random.key(0)),
        lambda: training.load_lora(tmp_path / "lora", changed),
    ):
        with pytest.raises(ValueError, match=r"has LoRA already, such as .*lora_A: `merge` it"):
            change()
    with pytest.raises(ValueError, match="has no LoRA to save: wrap it by `lora`"):
        training.save_lora(tmp_path / "none", vae)
    assert {path.name for path in tmp_path.iterdir()} == {"lora"}


def test_it_comes_back_from_its_file(changed, vae, tmp_path):
    path = tmp_path / "lora.safetensors"
    training.save_lora(path, changed)
    assert eqx.tree_equal(training.load_lora(path, vae), changed)
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(names(changed)) - set(names(vae))
    some = training.lora(vae, 5, key=jax.random.key(3), where=lambda name: "conv_out" in name)
    training.save_lora(path, some)
    assert eqx.tree_equal(training.load_lora(path, vae), some)


def test_a_write_that_fails_leaves_the_old_file(changed, tmp_path, monkeypatch):
    path = tmp_path / "lora"
    training.save_lora(path, changed)
    whole = path.read_bytes()

    def half(partial, *_):
        partial.write_bytes(whole[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eqx_cogvae.training._lora.write_safetensors", half)
    with pytest.raises(OSError, match=r"No space left on device: .*lora'$"):
        training.save_lora(path, changed)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [whole]


DOWN, UP = "decoder.conv_in.conv.lora_A", "decoder.conv_in.conv.lora_B"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(UP), f"1 missing: {UP}"),
        (lambda t: t.pop(DOWN), f"1 missing: {DOWN}"),
        (lambda t: t.clear(), r"\d+ missing: encoder\.conv_in\.conv\.lora_A, .* and \d+ more"),
        (lambda t: t.update(other=np.zeros(3)), r"1 unexpected: other; due are pairs such as "),
        (lambda t: t.update({UP: t[UP][:3]}), r"1 misshapen: .*lora_B \[3, 2, 1, 1, 1\] for \[8, "),
        (lambda t: t.update({DOWN: t[DOWN].astype(np.int32)}), "1 not floating: .*A of int32"),
        (lambda t: t.update({UP: t[UP] * np.nan}), f"1 not finite: {UP}"),
    ],
    ids=["no up", "no down", "empty", "more", "shape", "dtype", "nan"],
)
def test_wrong_files(spoil, message, changed, vae, tmp_path):
    path = tmp_path / "lora"
    training.save_lora(path, changed)
    tensors = safetensors.numpy.load_file(path)
    spoil(tensors)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=f"lora is no LoRA of this model; {message}") as info:
        training.load_lora(path, vae)
    assert "\n" not in str(info.value) and len(str(info.value)) < 800


def test_what_is_no_file_of_lora(changed, vae, tmp_path):
    path = tmp_path / "lora"
    with pytest.raises(FileNotFoundError, match=r"there is no LoRA at .*`save_lora` wrote"):
        training.load_lora(path, vae)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="is a pickle: give a file that `save_lora` wrote"):
        training.load_lora(path, vae)
    cv.save_pretrained(vae, tmp_path / "whole")
    whole = tmp_path / "whole" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"no LoRA of this model; \d+ unexpected: .* and \d+ more"):
        training.load_lora(whole, vae)
    wide = cv.VAE(dataclasses.replace(CONFIG, block_out_channels=(8, 16)), key=jax.random.key(0))
    training.save_lora(path, changed)
    with pytest.raises(ValueError, match=r"\d+ misshapen: .*lora_A \[2, .*give a file that"):
        training.load_lora(path, wide)
