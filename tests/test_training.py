"""Losses against torch and algebra; steps against plain gradient descent; runs cut off."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from reference import SHALLOW, distance, normal

import eqx_cogvae as cv
from eqx_cogvae import training, video
from eqx_cogvae._checkpoint import tensor_names
from eqx_cogvae.training import _trainer


@pytest.fixture(scope="module")
def vae():
    return cv.VAE(SHALLOW, key=jax.random.key(0))


@pytest.fixture(scope="module")
def pixels():
    """Of the shape and dtype that tests of whole steps share, and so their program."""
    return to_pixels(np.clip(0.5 * np.asarray(normal((4, 5, 16, 16, 3), 1)), -1, 1))


@pytest.fixture(scope="module")
def clips(pixels):
    return jnp.asarray(pixels.astype(np.float32) / np.float32(127.5) - 1)


@pytest.fixture(scope="module")
def trainer():
    return training.Trainer(optax.adam(3e-3), training.ClipLoss(l2=1.0), decay=0.9)


def of_latents(vae, clips, key):
    """A loss of the encoder alone, whose gradient compiles in a fraction of the time."""
    del key
    mean = vae.encode(clips).mean
    return jnp.mean(jnp.square(mean)), {"mean": jnp.mean(mean)}


def to_pixels(clips):
    return np.rint((clips + 1) * 127.5).astype(np.uint8)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array))])


def changed(before, after):
    """Names of the tensors that differ."""
    names = jax.tree.leaves(tensor_names(before))
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return {n for n, (a, b) in zip(names, pairs, strict=True) if not np.array_equal(a, b)}


def test_losses_of_known_clips():
    a, b = normal((2, 3, 6, 8, 3)), normal((2, 3, 6, 8, 3), 1)
    error = np.asarray(a - b, np.float64)
    assert training.l1(a, b) == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert training.l2(a, b) == pytest.approx((error**2).mean(), rel=1e-5)
    temporal = np.abs(np.diff(error, axis=1)).mean()
    assert training.temporal(a, b) == pytest.approx(temporal, rel=1e-5)
    one = np.abs(np.diff(error, axis=2)).mean() + np.abs(np.diff(error, axis=3)).mean()
    half = error.reshape(2, 3, 3, 2, 4, 2, 3).mean((3, 5))
    two = np.abs(np.diff(half, axis=2)).mean() + np.abs(np.diff(half, axis=3)).mean()
    assert training.gradient(a, b, scales=1) == pytest.approx(one, rel=1e-5)
    assert training.gradient(a, b) == pytest.approx((one + two) / 2, rel=1e-5)


def test_losses_that_forgive_a_shift():
    a = normal((1, 3, 8, 8, 3))
    assert training.gradient(a + 0.5, a) < 1e-6
    assert training.temporal(a + normal((1, 1, 8, 8, 3), 1), a) < 1e-6
    assert training.temporal(a[:, :1] + 0.5, a[:, :1]) == 0


def test_kl_is_per_element_of_the_video():
    posterior = cv.DiagonalGaussian(jnp.ones((2, 1, 1, 1, 4)), jnp.zeros((2, 1, 1, 1, 4)))
    assert training.kl(posterior, jnp.zeros((2, 4, 2, 2, 3))) == pytest.approx(4 / 96)


def test_losses_compare_one_shape(unchecked):
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 2, 2, 3\).*8k \+ 1"):
        training.l1(jnp.zeros((1, 2, 2, 2, 3)), jnp.zeros((1, 1, 2, 2, 3)))


def test_a_loss_of_ones_own_is_weighed_with_the_others(vae, clips):
    """It sees float32, whatever is computed in, and the sum has its weight."""
    given = []

    def own(factor, decoded, clips):
        given.append((decoded.dtype, clips.dtype))
        return factor * jnp.mean(jnp.square(decoded - clips))

    loss = training.ClipLoss(
        l1=2.0, kl=0.0, perceptual=jax.tree_util.Partial(own, jnp.asarray(3.0)), perceptual_weight=5
    )
    total, terms = loss(vae, clips, jax.random.key(0))
    assert terms["perceptual"] == pytest.approx(3 * float(terms["l2"]), rel=1e-5)
    assert total == pytest.approx(2 * float(terms["l1"]) + 15 * float(terms["l2"]), rel=1e-5)
    plain, others = training.ClipLoss(l1=2.0, kl=0.0)(vae, clips, jax.random.key(0))
    assert plain == pytest.approx(2 * float(terms["l1"]), rel=1e-5)
    assert set(terms) - set(others) == {"perceptual"}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vae)
    eqx.filter_eval_shape(loss, half, clips, jax.random.key(0))
    assert set(sum(given, ())) == {jnp.dtype(jnp.float32)}


def test_what_is_no_loss_of_ones_own(vae, clips, unchecked):
    with pytest.raises(TypeError, match=r"of \(decoded, clips\), and its weight .* got 0\.1"):
        training.ClipLoss(perceptual=0.1)
    per_clip = training.ClipLoss(perceptual=lambda a, b: jnp.mean(a - b, axis=(1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"must return a scalar, got shape \(4,\): take its mean"):
        eqx.filter_eval_shape(per_clip, vae, clips, jax.random.key(0))


def test_a_step_is_that_of_the_optimiser(vae, clips, pixels, trainer):
    """Of clips in uint8, which are scaled on the device."""
    key = jax.random.key(3)
    state = trainer.init(vae)
    after, metrics = trainer.step(state, pixels, key)
    # The state is given away, and the model is not.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.optimiser))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(eqx.filter(vae, eqx.is_array)))

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def gradient(vae):
        return trainer.loss(vae, clips, jax.random.fold_in(key, 0))

    (value, terms), grads = gradient(vae)
    optimiser = optax.adam(3e-3)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimiser.update(grads, optimiser.init(eqx.filter(vae, eqx.is_array)))
    assert distance(flat(after.model), flat(eqx.apply_updates(vae, updates))) < 1e-5
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["l1"] == pytest.approx(float(terms["l1"]), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(np.linalg.norm(flat(grads)), rel=1e-4)
    # (1 + 0) / (10 + 0) of the old, the rest of the new.
    due = 0.1 * flat(vae) + 0.9 * flat(after.model)
    assert distance(flat(after.average), due) < 1e-6
    assert int(after.step) == 1


def test_training_reduces_the_loss(vae, trainer):
    clips = [video.procedural_clip(5, 16, 16, seed=i) for i in range(4)]
    clips = to_pixels(np.concatenate(clips))
    state, losses = trainer.init(vae), []
    for _ in range(12):
        state, metrics = trainer.step(state, clips, jax.random.key(0))
        losses.append(float(metrics["l1"]))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_an_optimiser_that_remembers_where_it_began(vae, clips):
    """Gives away neither the model that it began at nor the clips."""
    trainer = training.Trainer(optax.contrib.prodigy(), of_latents)
    state = trainer.init(vae)
    trainer.step(state, clips, jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.optimiser))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(eqx.filter(vae, eqx.is_array)))
    assert not clips.is_deleted()


def test_the_same_step_with_less_memory(vae, clips):
    """Of a loss that samples nothing: parts draw other noise than the whole."""
    steps = [
        training.Trainer(optax.sgd(1.0), of_latents, **each).step(
            training.Trainer(optax.sgd(1.0), of_latents).init(vae), clips, jax.random.key(0)
        )
        for each in ({}, {"accumulate": 2}, {"rematerialise": True})
    ]
    due, *moved = (flat(state.model) - flat(vae) for state, _ in steps)
    exact, *losses = (metrics["loss"] for _, metrics in steps)
    assert np.linalg.norm(due) > 0
    for got, value in zip(moved, losses, strict=True):
        assert distance(got, due) < 1e-4
        assert distance(value, exact) < 1e-5


def test_every_resnet_block_is_rematerialised(vae, clips):
    """What it saves is the accelerators' compilers' doing: XLA's for CPU undoes it."""

    def blocks(wrap):
        encode = jax.make_jaxpr(lambda x: wrap(vae).encode_step(x)[0])(clips)
        decode = jax.make_jaxpr(lambda z: wrap(vae).decode_step(z)[0])(normal((1, 2, 4, 4, 3)))
        return [str(jaxpr).count("= remat2[") for jaxpr in (encode, decode)]

    assert blocks(lambda vae: vae) == [0, 0]
    # One for each level, two in the middle; the decoder has one more for each level.
    assert blocks(training.rematerialised) == [4, 6]


def momenta(state):
    """How many arrays the optimiser holds: Adam holds two for each that is trained."""
    return sum(leaf.ndim > 0 for leaf in jax.tree.leaves(state.optimiser))


def test_only_what_is_chosen_is_trained(vae, clips):
    trainer = training.Trainer(
        optax.adam(1e-3), of_latents, trainable=lambda name: name.startswith("encoder.mid_block.")
    )
    state, _ = trainer.step(trainer.init(vae), clips, jax.random.key(0))
    names = jax.tree.leaves(tensor_names(vae))
    due = {name for name in names if name.startswith("encoder.mid_block.")}
    assert changed(vae, state.model) == changed(vae, state.average) == due
    assert momenta(state) == 2 * len(due) > 0


@pytest.mark.parametrize(
    ("trainable", "part"),
    [(training.decoder_only, "decoder."), (lambda name: "norm" in name, "norm")],
    ids=["decoder", "norms"],
)
def test_any_names_may_be_chosen(trainable, part, vae):
    trainer = training.Trainer(optax.adam(1e-3), trainable=trainable)
    names = jax.tree.leaves(tensor_names(vae))
    due = {name for name in names if part in name}
    assert {name for name in names if trainable(name)} == due
    assert momenta(trainer.init(vae)) == 2 * len(due) > 0


class Shifted(eqx.Module):
    """A layer of one's own that holds more than arrays of floats."""

    conv: eqx.Module
    act: object
    count: jax.Array

    def __call__(self, x, cache=None):
        y, cache = self.conv(x, cache)
        return self.act(y), cache


def test_functions_and_whole_numbers_are_never_trained(vae):
    own = Shifted(vae.decoder.conv_in, jnp.tanh, jnp.arange(3))
    own = eqx.tree_at(lambda v: v.decoder.conv_in, vae, own)
    trainer = training.Trainer(optax.adam(1e-3), trainable=lambda name: "conv_in" in name)
    assert momenta(trainer.init(own)) == 2 * 4


def test_bfloat16_computes_and_float32_remembers(vae, clips):
    """The gradient is of the encoder alone, the losses of clips are computed beside it."""
    dtypes, key = [], jax.random.key(0)

    def loss(vae, clips, key):
        del key
        dtypes.append(vae.dtype)
        decoded = jax.lax.stop_gradient(vae)(clips)
        return of_latents(vae, clips, None)[0], {"l1": training.l1(decoded, clips)}

    trainer = training.Trainer(optax.adam(1e-3), loss, dtype=jnp.bfloat16)
    state, rounded = trainer.step(trainer.init(vae), clips, key)
    assert set(dtypes) == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.model)} == {jnp.dtype("float32")}
    assert len(changed(vae, state.model)) > 0
    full, terms = loss(vae, clips, key)
    assert float(rounded["l1"]) == pytest.approx(float(terms["l1"]), rel=2e-2)
    assert float(rounded["loss"]) == pytest.approx(float(full), rel=2e-2)


def test_a_run_that_was_cut_off_goes_on_to_the_same_losses(vae, trainer, tmp_path):
    """Bit for bit: the state from disk, the batches and the noise by the count of steps."""
    source = training.Source(video.procedural_clip(20, 24, 24)[0])
    crops = training.Crops([source], batch=4, frames=5, size=(16, 16), strides=(1, 2))
    key = jax.random.key(5)

    def run(state, steps):
        losses = []
        for _, batch in zip(range(steps), crops.batches(int(state.step)), strict=False):
            state, metrics = trainer.step(state, batch, key)
            losses.append(float(metrics["loss"]))
        return state, losses

    whole, losses = run(trainer.init(vae), 6)
    part, before = run(trainer.init(vae), 3)
    training.save_state(tmp_path / "state", part)
    del part
    fresh = trainer.init(vae)
    loaded = training.load_state(tmp_path / "state", fresh)
    # Otherwise the same step would compile once more.
    for leaf, like in zip(jax.tree.leaves(loaded), jax.tree.leaves(fresh), strict=True):
        assert (leaf.sharding, leaf.committed) == (like.sharding, like.committed)
    again, after = run(loaded, 3)
    assert before + after == losses
    np.testing.assert_array_equal(flat(again), flat(whole))


def test_a_state_of_another_model(vae, trainer, tmp_path):
    path = tmp_path / "state.eqx"
    with pytest.raises(FileNotFoundError, match="no training state at"):
        training.load_state(path, trainer.init(vae))
    with pytest.raises(IsADirectoryError, match="is a directory: name the file"):
        training.load_state(tmp_path, trainer.init(vae))
    training.save_state(path, trainer.init(vae))
    other = cv.VAE(cv.Config(block_out_channels=(4, 4), norm_num_groups=4), key=jax.random.key(0))
    with pytest.raises(ValueError, match="not a state of this model and optimiser"):
        training.load_state(path, trainer.init(other))
    whole = path.read_bytes()
    for content in (whole[:1000], whole[:-4], whole + b"1234", b"", b"\x93NUMPY\x01\0"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a state of this model and .*not a complete"):
            training.load_state(path, trainer.init(vae))
    safetensors.numpy.save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"it holds a of float64\[3\], .*the format None; due is "):
        training.load_state(path, trainer.init(vae))


MOMENTUM = optax.sgd(1e-3, momentum=0.9)


@pytest.mark.parametrize(
    ("saved", "like", "match"),
    [
        (optax.rmsprop(1e-3), MOMENTUM, r"it holds \.optimiser\[0\]\.nu\S+.* due is .*\.trace"),
        (MOMENTUM, optax.rmsprop(1e-3), r"it holds \.optimiser\[0\]\.trace.* due is .*\.nu"),
        (optax.sgd(1e-3), MOMENTUM, r"it holds .*; due is \.optimiser\[0\]\.trace"),
        (MOMENTUM, optax.sgd(1e-3), r"it holds \.optimiser\[0\]\.trace\S+ of"),
        # The same names, and other numbers.
        (optax.adam(1e-3), optax.adabelief(1e-3), "an optimiser of ScaleByAdamState; due is an o"),
    ],
    ids=["rmsprop", "momentum", "nothing", "to nothing", "the same names"],
)
def test_a_state_of_another_optimiser(saved, like, match, vae, tmp_path):
    training.save_state(tmp_path / "state", training.Trainer(saved).init(vae))
    with pytest.raises(ValueError, match=match) as info:
        training.load_state(tmp_path / "state", training.Trainer(like).init(vae))
    assert "\n" not in str(info.value) and len(str(info.value)) < 1500


def test_a_state_of_another_format_of_8_bits(vae, tmp_path):
    """Whose tensors have the same names, shapes and dtypes."""
    trainer = training.Trainer(optax.sgd(1e-3), trainable=lambda name: "conv_in" in name)
    first, other = (trainer.init(cv.quantised(vae, f)) for f in ("float8_e4m3fn", "int8"))
    training.save_state(tmp_path / "state", first)
    with pytest.raises(ValueError, match="is not a state of this model"):
        training.load_state(tmp_path / "state", other)


def test_an_average_in_half_precision_moves():
    old, new = jnp.zeros((), jnp.bfloat16), jnp.ones((), jnp.bfloat16)
    got = _trainer._mixed(old, new, jnp.asarray(0.999))
    assert got.dtype == jnp.bfloat16 and abs(float(got) - 0.001) < 1e-5


@pytest.mark.parametrize(
    "optimiser",
    [
        optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.adamw(1e-3)),
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    ],
    ids=["a key", "numbers"],
)
def test_states_of_other_kinds_come_back(optimiser, vae, tmp_path):
    state = training.Trainer(optimiser, trainable=training.decoder_only).init(vae)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.average)
    state = eqx.tree_at(lambda s: (s.average, s.step), state, (half, jnp.int32(7)))
    training.save_state(tmp_path / "state", state)

    def blank(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.zeros_like(leaf)

    like = jax.tree.map(lambda leaf: blank(leaf) if eqx.is_array(leaf) else leaf, state)
    assert not eqx.tree_equal(like, state)
    assert eqx.tree_equal(training.load_state(tmp_path / "state", like), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "at least 1, got 0"),
        ({"decay": 1.0}, r"\[0, 1\), got 1.0.*0.999"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        training.Trainer(optax.sgd(1.0), **options)


def test_what_is_no_optimiser_and_no_filter(unchecked):
    with pytest.raises(TypeError, match=r"an optax transformation such as .*, got 0\.1"):
        training.Trainer(0.1)
    with pytest.raises(TypeError, match=r"such as `decoder_only`, got 'decoder'"):
        training.Trainer(optax.sgd(1.0), trainable="decoder")


def test_bad_batches_and_filters(vae, clips):
    trainer = training.Trainer(optax.sgd(1.0), accumulate=3)
    with pytest.raises(ValueError, match="batch of 4 clips does not divide into 3 parts"):
        trainer.step(trainer.init(vae), clips, jax.random.key(0))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vae)
    with pytest.warns(UserWarning, match=r"weights are bfloat16.*`dtype=jnp\.float32`") as caught:
        training.Trainer(optax.sgd(1.0)).init(half)
    assert [each.filename for each in caught] == [__file__]
    with pytest.raises(ValueError, match="chooses no tensor"):
        training.Trainer(optax.sgd(1.0), trainable=lambda name: False).init(vae)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for i, frames in enumerate((20, 140)):
        clip = video.procedural_clip(frames, 32, 48, seed=i)
        video.write(folder / f"{i}.mp4", clip, crf=4)
    return [folder / "0.mp4", folder / "1.mp4"]


def test_crops_depend_on_their_index_alone(files):
    options = {"batch": 3, "frames": 9, "size": (16, 24), "strides": (1, 2, 3), "seed": 7}
    sources = [training.Source(files[0], 24), training.Source(files[1])]
    due = [training.Crops(sources, workers=1, **options).batch(i) for i in range(6)]
    assert {batch.shape for batch in due} == {(3, 9, 16, 24, 3)}
    assert not np.array_equal(due[0], due[1])
    # With no memory to speak of, every segment is decoded again.
    crops = training.Crops(sources, workers=3, memory=1, **options)
    for start in (0, 4):
        for got, expected in zip(crops.batches(start), due[start:], strict=False):
            np.testing.assert_array_equal(got, expected)
    other = training.Crops(sources, **options | {"seed": 8})
    assert not np.array_equal(other.batch(0), due[0])


def test_crops_are_of_the_clip(files):
    """Each lies somewhere in it, at its stride, as it is or mirrored."""
    clip = np.arange(30 * 6 * 8 * 3).reshape(30, 6, 8, 3) % 251
    clip = clip.astype(np.uint8)
    crops = training.Crops(
        [training.Source(clip)], batch=8, frames=3, size=(6, 8), strides=(2,), seed=1
    )
    flipped = 0
    for crop in crops.batch(0):
        starts = [t for t in range(26) if np.array_equal(clip[t : t + 5 : 2], crop)]
        mirrored = [t for t in range(26) if np.array_equal(clip[t : t + 5 : 2, :, ::-1], crop)]
        assert len(starts) + len(mirrored) == 1
        flipped += len(mirrored)
    assert 0 < flipped < 8
    decoded = video.read(files[1], start=128, frames=12)[0]
    last = training.Crops([training.Source(files[1])], batch=1, frames=9, size=(32, 48))
    pixels = last._clips[0].decode(1)
    assert pixels.shape == (76, 32, 48, 3)
    np.testing.assert_allclose(pixels[64:] / 127.5 - 1, decoded, atol=1e-6)


def test_crops_that_do_not_fit(files):
    options = {"batch": 1, "frames": 9, "size": (16, 16)}
    with pytest.raises(ValueError, match=r"64x16.*do not fit into 0\.mp4, which has 20 of 32x48"):
        training.Crops([training.Source(files[0])], **options | {"size": (64, 16)})
    with pytest.raises(ValueError, match=r"33 frames .*do not fit"):
        training.Crops([training.Source(files[0])], **options | {"frames": 33})
    with pytest.raises(ValueError, match="nothing to cut crops from"):
        training.Crops([], **options)
    with pytest.raises(ValueError, match="`height` resizes files"):
        training.Crops([training.Source(np.zeros((9, 16, 16, 3), np.uint8), 8)], **options)


def test_a_broken_file_is_heard(tmp_path, files):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="not a video that FFmpeg can read"):
        training.Crops([training.Source(tmp_path / "a.mp4")], batch=1, frames=1, size=(8, 8))
