"""framewise and sliced: against diffusers, against loops, under every trace."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import SHALLOW, decode, distance, encode, normal, pair

import eqx_cogvae as cv


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return pair(SHALLOW, tmp_path_factory.mktemp("vae"))


def running_sum(x, cache):
    """A step whose clip is known: a cumulative sum over frames."""
    start = 0 if cache is None else cache
    y = start + jnp.cumsum(x, axis=1)
    return y, y[:, -1:]


@pytest.mark.parametrize("frames", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("traced", [False, True])
def test_framewise_is_the_whole_clip(frames, size, traced):
    x = normal((2, frames, 3))
    fn = cv.framewise(running_sum, size)
    fn = jax.jit(fn) if traced else fn
    np.testing.assert_allclose(fn(x), jnp.cumsum(x, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, pytest.param(8, marks=pytest.mark.full)])
def test_any_frame_batch_equals_diffusers(size, models):
    vae, model = models
    model.num_latent_frames_batch_size = size
    model.num_sample_frames_batch_size = size
    try:
        latents, video = normal((1, 7, 4, 5, 3)), normal((1, 11, 8, 10, 3))
        assert distance(cv.framewise(vae.decode_step, size)(latents), decode(model, latents)) < 1e-5
        moments = cv.framewise(vae.encode_step, size)(video)
        mean = cv.DiagonalGaussian.from_moments(moments).mean
        assert distance(mean, encode(model, video)[0]) < 1e-5
    finally:
        model.num_latent_frames_batch_size, model.num_sample_frames_batch_size = 2, 8


def test_the_whole_clip_methods_are_framewise(models):
    vae, _ = models
    latents, video = normal((1, 9, 2, 3, 3)), normal((1, 17, 8, 12, 3))
    due = cv.framewise(vae.decode_step, 2)(latents)
    np.testing.assert_array_equal(vae.decode(latents), due)
    moments = cv.framewise(vae.encode_step, 8)(video)
    due = cv.DiagonalGaussian.from_moments(moments)
    np.testing.assert_array_equal(vae.encode(video).mean, due.mean)


def test_steady_batches_share_a_program():
    """Two programs for any length of one remainder; another remainder adds its first batch."""
    traces = []

    def counted(x, cache):
        traces.append(x.shape[1])
        return running_sum(x, cache)

    fn = cv.framewise(counted, 2)
    for frames in (3, 5, 7, 15, 101):
        fn(normal((1, frames, 2)))
    assert traces == [3, 2]
    fn(normal((1, 16, 2)))
    assert traces == [3, 2, 2]


def test_under_jit_the_steady_batches_are_one_scan(models):
    vae, _ = models
    latents = normal((1, 9, 2, 3, 3))
    text = str(jax.make_jaxpr(cv.framewise(vae.decode_step, 2))(latents))
    assert text.count("scan[") == 1
    jitted = eqx.filter_jit(cv.framewise(vae.decode_step, 2))(latents)
    assert distance(jitted, vae.decode(latents)) < 1e-6


@pytest.mark.parametrize("size", [0, -1, True])
def test_bad_frame_batch(size):
    for transform in (cv.framewise, cv.streamed):
        with pytest.raises(ValueError, match=r"whole number of at least 1 frame, got .*trained"):
            transform(running_sum, size)


def test_a_clip_without_frames():
    with pytest.raises(ValueError, match=r"a frame or more, got \(1, 0, 4\)"):
        cv.framewise(running_sum, 2)(jnp.zeros((1, 0, 4)))


@pytest.mark.parametrize("traced", [False, True])
def test_sliced_is_the_function_itself(traced, models):
    vae, _ = models
    latents = normal((2, 3, 2, 3, 3))
    fn = cv.sliced(vae.decode)
    fn = eqx.filter_jit(fn) if traced else fn
    assert distance(fn(latents), vae.decode(latents)) < 1e-6


def test_a_sliced_step_handles_the_cache(models):
    vae, _ = models
    latents = normal((2, 5, 2, 3, 3))
    fn = cv.framewise(cv.sliced(vae.decode_step), 2)
    assert distance(fn(latents), vae.decode(latents)) < 1e-6


def test_sliced_arguments_share_the_batch():
    with pytest.raises(ValueError, match=r"share their first axis, got sizes \[2, 3\]"):
        cv.sliced(jnp.add)(jnp.zeros((2, 1)), jnp.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"share their first axis, got sizes \[2, 3\]"):
        jax.jit(cv.sliced(jnp.add))(jnp.zeros((2, 1)), jnp.zeros((3, 1)))


def test_results_may_be_pytrees():
    def step(x, cache):
        return {"sum": running_sum(x, cache)[0], "twice": (2 * x,)}, running_sum(x, cache)[1]

    x = normal((2, 5, 3))
    for fn in (cv.framewise(step, 2), jax.jit(cv.framewise(step, 2))):
        result = fn(x)
        np.testing.assert_allclose(result["sum"], jnp.cumsum(x, axis=1), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(result["twice"][0], 2 * x)


COMPOSITIONS = {
    "framewise": lambda step: cv.framewise(step, 2),
    "sliced": lambda step: cv.sliced(cv.framewise(step, 2)),
    "tiled": lambda step: cv.tiled(cv.framewise(step, 2), (4, 4), (0, 0.5), edges="shift"),
    "sliced tiled": lambda step: cv.sliced(
        cv.tiled(cv.framewise(step, 2), (4, 4), (0, 0.5), edges="shift")
    ),
    "tiled sliced": lambda step: cv.tiled(
        cv.sliced(cv.framewise(step, 2)), (4, 4), (0, 0.5), edges="shift"
    ),
}


@pytest.mark.parametrize("name", ["tiled", "sliced tiled", "tiled sliced"])
def test_the_order_of_composition_is_free(name, models):
    vae, _ = models
    latents = normal((2, 5, 4, 6, 3))
    due = COMPOSITIONS["tiled"](vae.decode_step)(latents)
    fn = COMPOSITIONS[name](vae.decode_step)
    assert distance(fn(latents), due) < 1e-6
    assert distance(eqx.filter_jit(fn)(latents), due) < 1e-6


# Gradients take long to compile: the encoder's less, and the others are within this one.
_OUTERMOST = "sliced tiled", "encode_step"


@pytest.mark.parametrize(
    ("name", "step"),
    [
        pytest.param(*each, marks=() if each == _OUTERMOST else pytest.mark.full)
        for each in [*((name, "decode_step") for name in COMPOSITIONS), _OUTERMOST]
    ],
)
def test_gradients_flow_and_checkpointing_keeps_them(name, step, models):
    vae, _ = models
    x = normal((2, 5, 4, 6, 3))
    shape = (2, 9, 8, 12, 3) if step == "decode_step" else (2, 3, 2, 3, 6)
    weight = normal(shape, 1)

    @eqx.filter_jit
    def gradients(vae, wrap):
        def loss(vae_and_x):
            vae, x = vae_and_x
            return jnp.mean(weight * COMPOSITIONS[name](wrap(getattr(vae, step)))(x))

        return eqx.filter_value_and_grad(loss)((vae, x))

    plain, plain_grads = gradients(vae, lambda step: step)
    kept, kept_grads = gradients(vae, eqx.filter_checkpoint)
    assert distance(plain, kept) < 1e-5
    flat = [
        np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
        for grads in (plain_grads, kept_grads)
    ]
    assert np.linalg.norm(flat[0]) > 0
    assert distance(*flat) < 1e-5
    # The direction of the gradient is the one in which the loss grows.
    by_x = plain_grads[1]
    fn = COMPOSITIONS[name](getattr(vae, step))
    nudge = 1e-2 * by_x / jnp.linalg.norm(by_x)
    grown = jnp.mean(weight * (fn(x + nudge) - fn(x - nudge)))
    assert distance(grown, 2 * jnp.sum(nudge * by_x)) < 2e-2


def test_the_memory_of_checkpointed_gradients_grows_by_caches_only(models):
    vae, _ = models
    params, static = eqx.partition(vae, eqx.is_array)

    def gradient(frames, wrap):
        def loss(latents, params):
            step = wrap(eqx.combine(params, static).decode_step)
            return jnp.mean(cv.framewise(step, 2)(latents) ** 2)

        return loss, jax.ShapeDtypeStruct((1, frames, 16, 16, 3), jnp.float32)

    def temporaries(frames):
        loss, latents = gradient(frames, eqx.filter_checkpoint)
        compiled = jax.jit(jax.grad(loss)).lower(latents, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def kept_for_backward(frames):
        """Of a plain gradient, in bytes."""
        loss, latents = gradient(frames, lambda step: step)
        return size(jax.eval_shape(lambda *args: jax.vjp(loss, *args)[1], latents, params))

    size = lambda tree: sum(4 * leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    # From three steady batches to seven: by four caches and their frames.
    plain = kept_for_backward(17) - kept_for_backward(9)
    kept = temporaries(17) - temporaries(9)
    batch = jax.ShapeDtypeStruct((1, 2, 16, 16, 3), jnp.float32)
    frames, cache = eqx.filter_eval_shape(lambda z: vae.decode_step(z), batch)
    assert kept <= 4 * (size(cache) + 3 * size(frames))
    assert kept < plain / 3


def test_transforms_are_pytrees(models):
    """The weights are arguments of a jitted composition, not constants of its program."""
    vae, _ = models
    fn = cv.sliced(cv.tiled(cv.framewise(vae.decode_step, 2), (4, 4), (0, 0.5), edges="shift"))
    held = jax.tree.leaves(eqx.filter(fn, eqx.is_array))
    assert len(held) == len(jax.tree.leaves(eqx.filter(vae, eqx.is_array)))
    halved = jax.tree.map(lambda x: x / 2 if eqx.is_array(x) else x, fn)
    latents = normal((1, 3, 4, 4, 3))
    assert distance(halved(latents), fn(latents)) > 0.1
