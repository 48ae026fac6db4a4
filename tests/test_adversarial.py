"""Training against a discriminator: numbers against torch, runs that stay finite and go on."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import torch
from reference import SHALLOW, distance, normal, pair, to_torch

import eqx_cogvae as cv
from eqx_cogvae import training, video
from eqx_cogvae._checkpoint import stored_leaves

START = 2
SMALL = (2, 5, 8, 8, 3)  # two hundred steps of these take seconds


class Mean(eqx.Module):
    """A loss of one's own that draws nothing, so that torch computes the same."""

    def __call__(self, vae, clips, key):
        return self.with_decoded(vae, clips, key)[:2]

    def with_decoded(self, vae, clips, key):
        del key
        decoded = vae.decode(vae.encode(clips).mode())
        return 3 * training.l1(decoded, clips), {"l1": training.l1(decoded, clips)}, decoded


@pytest.fixture(scope="module")
def clips():
    """Two batches of latents, the second with a cache."""
    return jnp.tanh(normal((2, 9, 8, 8, 3), 1))


@pytest.fixture(scope="module")
def discriminator():
    return training.Discriminator(width=4, levels=2, key=jax.random.key(1))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return pair(SHALLOW, tmp_path_factory.mktemp("adversarial"))


@pytest.fixture(scope="module")
def trainer():
    """The one whose program tests share."""
    adversarial = training.Adversarial(optax.adam(1e-3, b1=0.5), weight=0.5, start=START)
    return training.Trainer(optax.adam(3e-3), decay=0.9, adversarial=adversarial)


@pytest.fixture(scope="module")
def exact():
    """One whose steps show the gradients."""
    adversarial = training.Adversarial(optax.sgd(1.0), weight=0.7)
    return training.Trainer(optax.sgd(1.0), Mean(), adversarial=adversarial)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array))])


def in_order(discriminator):
    """The weights of a discriminator, layer by layer, as torch has them."""
    layers = zip(discriminator.convs, (None, *discriminator.norms, None), strict=True)
    return flat([(x.weight, x.bias) for pair in layers for x in pair if x is not None])


def in_torch(discriminator):
    """The same network of torch's layers, on BCTHW."""
    layers = []
    for conv, norm in zip(discriminator.convs, (None, *discriminator.norms, None), strict=True):
        shape = conv.weight.shape
        layer = torch.nn.Conv3d(shape[1], shape[0], 3, conv.stride, 1)
        layer.weight.data = torch.tensor(np.asarray(conv.weight))
        layer.bias.data = torch.tensor(np.asarray(conv.bias)).reshape(-1)
        norms = [] if norm is None else [torch.nn.GroupNorm(norm.groups, shape[0])]
        layers += [layer, *norms, torch.nn.LeakyReLU(0.2)]
    return torch.nn.Sequential(*layers[:-1])


def torchs(both, discriminator, clips, weight):
    """The metrics and both gradients, by autograd; the gradients by names and in order."""
    model, judge, x = both.model, in_torch(discriminator), to_torch(clips)
    decoded = model.decode(model.encode(x).latent_dist.mode()).sample
    loss, term = 3 * (decoded - x).abs().mean(), -judge(decoded).mean()
    last = model.decoder.conv_out.conv.weight
    by_loss, by_term = (torch.autograd.grad(y, last, retain_graph=True)[0] for y in (loss, term))
    adaptive = weight * torch.clamp(by_loss.norm() / (by_term.norm() + 1e-4), 0, 1e4).detach()
    model.zero_grad()
    (loss + adaptive * term).backward()
    grads = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    judge.zero_grad()
    real, fake = judge(x), judge(decoded.detach())
    own = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    own.backward()
    metrics = {
        **{"loss": loss + adaptive * term, "adversarial": term, "adversarial_weight": adaptive},
        **{"discriminator": own, "logits_real": real.mean(), "logits_fake": fake.mean()},
    }
    metrics = {name: value.item() for name, value in metrics.items()}
    return metrics, grads, [p.grad.numpy().ravel() for p in judge.parameters()]


def check(both, discriminator, clips, state, metrics):
    """A step of `exact` against torch: losses, the adaptive weight, and both gradients."""
    due, grads, judge_grads = torchs(both, discriminator, clips, 0.7)
    assert 0.01 < due["adversarial_weight"] < 1e3
    for name, value in due.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    before, after = stored_leaves(both.vae), stored_leaves(state.model)
    moved = [np.transpose(x - after[name][0], axes) for name, (x, axes) in before.items()]
    due_moves = np.concatenate([grads[name].ravel() for name in before])
    assert distance(np.concatenate([np.ravel(x) for x in moved]), due_moves) < 1e-4
    moved = in_order(discriminator) - in_order(state.discriminator)
    assert distance(moved, np.concatenate(judge_grads)) < 1e-4


def test_a_step_is_torchs(both, discriminator, clips, exact):
    state = exact.init(both.vae, discriminator)
    state, metrics = exact.step(state, clips, jax.random.key(0))
    check(both, discriminator, clips, state, metrics)


def test_hinge_is_torchs():
    real, fake = normal((2, 3, 4, 4, 1)), normal((2, 3, 4, 4, 1), 1)
    due = torch.relu(1 - torch.tensor(np.asarray(real))).mean()
    due = (due + torch.relu(1 + torch.tensor(np.asarray(fake))).mean()) / 2
    assert training.hinge(real, fake) == pytest.approx(due.item(), rel=1e-6)
    assert training.hinge(real.astype(jnp.bfloat16), fake).dtype == jnp.float32


def test_two_hundred_steps_stay_finite_and_reduce_the_loss(trainer, discriminator):
    """The first of them without the discriminator, which does not move until it is asked."""
    vae = cv.VAE(SHALLOW, key=jax.random.key(0))
    clips = np.concatenate([video.procedural_clip(5, 8, 8, seed=i) for i in range(SMALL[0])])
    state, metrics = trainer.init(vae, discriminator), []
    for step in range(200):
        state, each = trainer.step(state, clips, jax.random.key(0))
        metrics.append(jax.device_get(each))
        if step < START:
            np.testing.assert_array_equal(flat(state.discriminator), flat(discriminator))
            assert not any(map(np.any, jax.tree.leaves(state.discriminator_optimiser)))
    series = {name: np.array([each[name] for each in metrics]) for name in metrics[0]}
    assert all(np.isfinite(values).all() for values in series.values())
    assert all(np.isfinite(flat(each)).all() for each in (state.model, state.discriminator))
    assert (series["adversarial_weight"][:START] == 0).all()
    assert (series["adversarial_weight"][START:] > 0).all()
    np.testing.assert_allclose(series["loss"][0], series["l1"][0] + 1e-6 * series["kl"][0], 1e-6)
    assert series["l1"][-10:].mean() < 0.5 * series["l1"][:10].mean()
    assert series["discriminator"][START : START + 20].mean() > series["discriminator"][-20:].mean()


def test_a_run_that_was_cut_off_goes_on_to_the_same_losses(trainer, discriminator, tmp_path):
    """Bit for bit, across the step from which the discriminator is trained."""
    vae, key = cv.VAE(SHALLOW, key=jax.random.key(0)), jax.random.key(5)
    clips = jnp.tanh(normal(SMALL, 1))

    def run(state, steps):
        losses = []
        for _ in range(steps):
            state, metrics = trainer.step(state, clips, key)
            losses.append(jax.device_get(metrics))
        return state, losses

    whole, losses = run(trainer.init(vae, discriminator), START + 4)
    part, before = run(trainer.init(vae, discriminator), START + 2)
    training.save_state(tmp_path / "state", part)
    del part
    like = trainer.init(vae, training.Discriminator(width=4, levels=2, key=jax.random.key(7)))
    again, after = run(training.load_state(tmp_path / "state", like), 2)
    assert before + after == losses
    np.testing.assert_array_equal(flat(again), flat(whole))
    assert not np.array_equal(flat(whole.discriminator), flat(discriminator))


def test_less_memory_and_a_mesh_change_nothing(discriminator, both, exact):
    """Parts that hold the same clip have the same adaptive weight, so torch's step is due again.

    The mesh is one as `jax.make_mesh` makes them, with explicit axes.
    """
    twice = jnp.tanh(jnp.concatenate([normal((1, *SMALL[1:]), 2)] * 2))
    mesh = jax.make_mesh((1,), ("batch",), devices=jax.devices()[:1])
    less = dataclasses.replace(exact, accumulate=2, rematerialise=True, mesh=mesh)
    state = less.init(both.vae, discriminator)
    state, metrics = less.step(state, twice, jax.random.key(0))
    check(both, discriminator, twice, state, metrics)


def test_states_without_a_discriminator_are_as_before(trainer, discriminator, tmp_path):
    vae = cv.VAE(SHALLOW, key=jax.random.key(0))
    plain = training.Trainer(optax.adam(3e-3))
    training.save_state(tmp_path / "plain", plain.init(vae))
    with safetensors.safe_open(tmp_path / "plain", "numpy") as file:
        places = {name.split(".")[1].partition("[")[0] for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {
            "format": "eqx_cogvae.state.1",
            "optimiser": "ScaleByAdamState",
        }
    assert places == {"model", "average", "optimiser", "step"}
    with pytest.raises(ValueError, match=r"is not a state of .*due is \.discriminator") as info:
        training.load_state(tmp_path / "plain", trainer.init(vae, discriminator))
    assert "\n" not in str(info.value)


def test_another_optimiser_of_the_discriminator(trainer, discriminator, tmp_path):
    """Of the same names and shapes, which other numbers would be read into."""
    vae = cv.VAE(SHALLOW, key=jax.random.key(0))
    training.save_state(tmp_path / "state", trainer.init(vae, discriminator))
    other = training.Adversarial(optax.adabelief(1e-3))
    like = training.Trainer(trainer.optimiser, adversarial=other).init(vae, discriminator)
    with pytest.raises(ValueError, match=r"an optimiser of .*ByAdamState.*of .*ByBeliefState"):
        training.load_state(tmp_path / "state", like)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "`weight` must be at least 0, got -1.0"),
        ({"start": -1}, "`start` must be at least 0 steps, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        training.Adversarial(optax.sgd(1.0), **options)


def test_what_does_not_fit_together(unchecked, trainer, discriminator):
    vae = cv.VAE(SHALLOW, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"need each other: give both, as in `trainer\.init\(vae"):
        trainer.init(vae)
    with pytest.raises(ValueError, match="need each other"):
        training.Trainer(optax.sgd(1.0)).init(vae, discriminator)
    with pytest.raises(TypeError, match=r"`optimiser` must be an optax transformation .* got 0\.1"):
        training.Adversarial(0.1)
    with pytest.raises(TypeError, match=r"must be a `training\.Adversarial\(optimiser\)`, got 1"):
        training.Trainer(optax.sgd(1.0), adversarial=1)
    with pytest.raises(TypeError, match=r"`with_decoded\(vae, clips, key\).*such as `ClipLoss`"):
        training.Trainer(
            optax.sgd(1.0), lambda vae, clips, key: (0.0, {}), adversarial=trainer.adversarial
        )


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_a_discriminator_takes_clips_of_any_size(frames):
    judge = training.Discriminator(width=20, key=jax.random.key(0), dtype=jnp.bfloat16)
    logits = eqx.filter_eval_shape(judge, jnp.zeros((2, frames, 24, 42, 3)))
    assert logits.shape == (2, -(-frames // 8), 3, 6, 1)
    assert logits.dtype == jnp.bfloat16


def test_bad_discriminators(unchecked):
    with pytest.raises(ValueError, match="must be at least 1, got 3, 0 and 3"):
        training.Discriminator(width=0, key=jax.random.key(0))
    judge = training.Discriminator(width=2, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"of 3 channels, got shape \(1, 1, 8, 8, 4\): make it"):
        judge(jnp.zeros((1, 1, 8, 8, 4)))
