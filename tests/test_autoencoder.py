"""The model against diffusers, over random configurations and shapes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from programs import forget_if_many
from reference import (
    SHALLOW,
    decode,
    distance,
    encode,
    from_torch,
    normal,
    pair,
    quietly,
    reference,
    to_torch,
)

import eqx_cogvae as cv
from eqx_cogvae import _layers
from eqx_cogvae._lowering import choose
from eqx_cogvae._lowering.choose import Thresholds
from eqx_cogvae._meshes import Split

# diffusers differs from itself by up to 3e-6 from one memory format to another.
EQUAL = 1e-5


@st.composite
def configs(draw):
    blocks = draw(st.integers(1, 4))
    return cv.Config(
        block_out_channels=tuple(draw(st.sampled_from([4, 8, 12])) for _ in range(blocks)),
        layers_per_block=draw(st.integers(1, 2)),
        norm_num_groups=draw(st.sampled_from([2, 4])),
        latent_channels=3,  # with in_channels, what diffusers' quant_conv needs to run
        act_fn=draw(st.sampled_from(["silu", "swish", "mish", "gelu", "relu"])),
        temporal_compression_ratio=draw(st.sampled_from([1, 2, 4, 8])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
        use_quant_conv=draw(st.booleans()),
        use_post_quant_conv=draw(st.booleans()),
    )


def sides(config):
    return st.integers(2 * config.spatial_compression, 5 * config.spatial_compression + 1)


def exact_pair(config, path, seed):
    """With diffusers in float64: where groups are of few numbers, in float32 it is 8e-6 off."""
    vae, model = pair(config, path, seed=seed)
    return vae, model.double()


def assert_agrees(config, path, frames, batch, height, width, seed):
    vae, model = exact_pair(config, path, seed)
    video = normal((batch, frames, height, width, 3), seed)
    posterior = quietly(vae.encode, video)
    mean, logvar = encode(model, video)
    assert distance(posterior.mean, mean) < EQUAL
    assert distance(posterior.logvar, logvar) < EQUAL
    assert mean.shape[1] == config.latent_frames(frames)
    decoded = decode(model, mean)
    assert distance(vae.decode(jnp.asarray(mean)), decoded) < EQUAL
    assert decoded.shape[1] == config.sample_frames(mean.shape[1])


# Every value of every field, both values of any two switches together, and frames of every
# remainder by a batch's: each compiles programs of its own. `..._at_length` draws at random.
CONFIGS = {
    "one level": (dict(block_out_channels=(4,), layers_per_block=2, act_fn="silu"), 1, (1, 5, 3)),
    "narrowing": (dict(block_out_channels=(12, 4), act_fn="mish", norm_num_groups=4), 2, (9, 9, 5)),
    "every level": (
        dict(block_out_channels=(4, 8, 12), act_fn="gelu", norm_eps=1e-3),
        4,
        (12, 8, 13),
    ),
    "more time than levels": (
        dict(block_out_channels=(8, 4), act_fn="relu", layers_per_block=2, norm_eps=1e-3),
        8,
        (6, 4, 7),
    ),
    "as published": (dict(block_out_channels=(4, 4, 8, 4), act_fn="swish"), 4, (17, 16, 24)),
}
# quant_conv, post_quant_conv and a batch of two: of any two, both, either and none are on.
SWITCHES = ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1))


@pytest.mark.parametrize(("name", "switches"), list(zip(CONFIGS, SWITCHES, strict=True)))
def test_any_configuration_agrees(name, switches, tmp_path):
    fields, compression, (frames, height, width) = CONFIGS[name]
    quant, post, two = map(bool, switches)
    own = dict(latent_channels=3, layers_per_block=1, norm_num_groups=2)
    own |= dict(use_quant_conv=quant, use_post_quant_conv=post)
    config = cv.Config(**own | fields, temporal_compression_ratio=compression)
    assert_agrees(config, tmp_path, frames, 1 + two, height, width, seed=frames)


@pytest.mark.full
@given(data=st.data())
@settings(max_examples=80)
def test_any_configuration_agrees_at_length(data, tmp_path_factory):
    config = data.draw(configs())
    frames = data.draw(st.integers(1, 34))
    height, width = data.draw(sides(config)), data.draw(sides(config))
    seed = data.draw(st.integers(0, 1000))
    assert_agrees(config, tmp_path_factory.mktemp("vae"), frames, 2, height, width, seed)
    forget_if_many()


@pytest.mark.parametrize("frames", [1, 2, 5, 8, 9, 12, 17])
def test_frame_counts_agree(frames, small_pair):
    vae, model = small_pair
    video = normal((1, frames, 16, 24, 3), frames)
    posterior = quietly(vae.encode, video)
    mean, _ = encode(model, video)
    assert distance(posterior.mean, mean) < EQUAL
    assert distance(vae.decode(jnp.asarray(mean)), decode(model, mean)) < EQUAL


@pytest.fixture(scope="module")
def small_config():
    return cv.Config(
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=3,
        use_quant_conv=True,
        use_post_quant_conv=True,
    )


@pytest.fixture(scope="module")
def small_pair(small_config, tmp_path_factory):
    return pair(small_config, tmp_path_factory.mktemp("small"))


def test_gradients_agree(small_pair):
    vae, model = small_pair
    assert_gradients_agree(vae, model, normal((1, 9, 16, 24, 3), 1))


# Shallow, for compiling a gradient takes long; any activation, any count of frames.
shallow = st.builds(
    cv.Config,
    block_out_channels=st.sampled_from([(4,), (4, 8), (8, 4)]),
    layers_per_block=st.just(1),
    norm_num_groups=st.just(2),
    latent_channels=st.just(3),
    act_fn=st.sampled_from(["silu", "mish", "gelu", "relu"]),
    temporal_compression_ratio=st.sampled_from([1, 2]),
    use_quant_conv=st.booleans(),
    use_post_quant_conv=st.booleans(),
)


@pytest.mark.parametrize(
    ("channels", "act_fn", "compression", "frames", "side"),
    [
        ((8, 4), "relu", 2, 6, 9),
        pytest.param((4,), "gelu", 1, 3, 4, marks=pytest.mark.full),
    ],
)
def test_gradients_of_any_configuration_agree(
    channels, act_fn, compression, frames, side, tmp_path
):
    config = cv.Config(
        block_out_channels=channels,
        act_fn=act_fn,
        temporal_compression_ratio=compression,
        use_post_quant_conv=len(channels) == 1,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=3,
    )
    models = exact_pair(config, tmp_path, frames)
    assert_gradients_agree(*models, normal((1, frames, side, side + 1, 3), frames))


@pytest.mark.full
@given(config=shallow, frames=st.integers(1, 17), side=st.integers(4, 9), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_gradients_of_any_configuration_agree_at_length(
    config, frames, side, seed, tmp_path_factory
):
    models = exact_pair(config, tmp_path_factory.mktemp("vae"), seed)
    assert_gradients_agree(*models, normal((1, frames, side, side + 1, 3), seed))
    forget_if_many()


def assert_gradients_agree(vae, model, video):
    """By every tensor and by the video, of a loss through encoder and decoder."""
    weight = normal(quietly(vae, video).shape, 2)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradients(vae_and_video):
        vae, video = vae_and_video
        posterior = quietly(vae.encode, video)
        return jnp.mean(weight * vae.decode(posterior.mean)) + jnp.mean(posterior.logvar**2)

    ours, ours_video = gradients((vae, video))
    theirs_video = to_torch(video).to(model.dtype).requires_grad_()
    posterior = model.encode(theirs_video).latent_dist
    loss = (to_torch(weight).to(model.dtype) * model.decode(posterior.mean).sample).mean()
    loss = loss + (posterior.logvar**2).mean()
    loss.backward()
    assert distance(ours_video, from_torch(theirs_video.grad)) < 1e-4
    theirs = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    leaves = jax.tree_util.tree_flatten_with_path(eqx.filter(ours, eqx.is_array))[0]
    assert len(leaves) == len(theirs)
    got, due = [], []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        grad = theirs.pop(name).numpy()
        axes = {5: (2, 3, 4, 1, 0), 4: (2, 3, 1, 0), 1: (0,)}[grad.ndim]
        got.append(np.asarray(leaf).ravel())
        due.append(grad.transpose(axes).ravel())
    assert not theirs
    assert distance(np.concatenate(got), np.concatenate(due)) < 1e-4
    # A bias before a norm of its own group is all rounding; every other tensor on its own.
    scale = max(np.abs(d).max() for d in due)
    for g, d in zip(got, due, strict=True):
        if np.abs(d).max() > 1e-4 * scale:
            assert distance(g, d) < 1e-4


def test_bfloat16_is_as_near_as_diffusers(small_config, tmp_path):
    """Both from weights that bfloat16 holds, against float32, over draws of the rounding."""
    errors = [bfloat16_errors(small_config, tmp_path / str(seed), seed) for seed in range(4)]
    ours_mean, their_mean, ours_video, their_video = np.sqrt(np.mean(np.square(errors), axis=0))
    assert ours_mean <= their_mean
    assert ours_video <= their_video


def bfloat16_errors(config, path, seed):
    model = reference(config, seed).to(torch.bfloat16).float()
    truth, _ = pair(config, path, model=model)
    ours = cv.from_pretrained(path, dtype=jnp.bfloat16)
    theirs = model.to(torch.bfloat16)
    video = normal((1, 9, 16, 24, 3), seed, jnp.bfloat16)
    mean = truth.encode(video.astype(jnp.float32)).mean
    latents = mean.astype(jnp.bfloat16)
    with torch.no_grad():
        encoded = theirs.encode(to_torch(video.astype(jnp.float32)).bfloat16()).latent_dist.mean
        decoded = theirs.decode(to_torch(latents.astype(jnp.float32)).bfloat16()).sample
    our_mean, our_video = ours.encode(video).mean, ours.decode(latents)
    assert our_mean.dtype == our_video.dtype == jnp.bfloat16
    due = truth.decode(latents.astype(jnp.float32))
    return (
        distance(our_mean, mean),
        distance(from_torch(encoded), mean),
        distance(our_video, due),
        distance(from_torch(decoded), due),
    )


def test_replicate_padding_agrees(tmp_path):
    """diffusers does not hand the mode to the encoder's down blocks: here it does."""
    _, model = pair(SHALLOW, tmp_path)
    for module in model.modules():
        if hasattr(module, "pad_mode"):
            module.pad_mode = "replicate"
            module.conv.padding = (0, 0, 0)
    loaded = cv.from_pretrained(tmp_path)
    blank = cv.VAE(SHALLOW, key=jax.random.key(0), pad_mode="replicate")
    vae = jax.tree.unflatten(jax.tree.structure(blank), jax.tree.leaves(loaded))
    video = normal((1, 5, 8, 12, 3))
    mean, _ = encode(model, video)
    assert distance(vae.encode(video).mean, mean) < EQUAL
    assert distance(vae.decode(jnp.asarray(mean)), decode(model, mean)) < EQUAL
    _, cache = eqx.filter_eval_shape(vae.encode_step, video)
    assert not jax.tree.leaves(cache)


def test_the_step_takes_and_gives_the_cache(small_pair):
    vae, _ = small_pair
    latents = normal((1, 4, 4, 6, 3))
    first, cache = vae.decode_step(latents[:, :2])
    second, last = vae.decode_step(latents[:, 2:], cache)
    joined = jnp.concatenate([first, second], axis=1)
    assert jax.tree.structure(cache) == jax.tree.structure(last)
    np.testing.assert_array_equal(joined, vae.decode(latents))
    # Nothing else remembers: the same call gives the same again.
    np.testing.assert_array_equal(second, vae.decode_step(latents[:, 2:], cache)[0])


def results_of_halves(vae):
    """Of both, and the decoder's gradient, compiled anew."""
    video, latents = normal((1, 5, 32, 32, 3)), normal((1, 3, 16, 16, 3), 1)
    loss = lambda vae, z: jnp.sum(jnp.square(vae.decoder(z)[0]))  # noqa: E731
    decoded = eqx.filter_jit(lambda vae, z: vae.decoder(z))(vae, latents)
    encoded = eqx.filter_jit(lambda vae, x: vae.encoder(x))(vae, video)
    return decoded, encoded, eqx.filter_jit(eqx.filter_grad(loss))(vae, latents).decoder


@pytest.fixture(scope="module")
def shallow_vae(tmp_path_factory):
    return pair(SHALLOW, tmp_path_factory.mktemp("shallow")).vae


@pytest.fixture(scope="module")
def at_once(shallow_vae):
    return results_of_halves(shallow_vae)


# `eight_devices` has rows that are split, and `test_doors` bands on a CPU.
@pytest.mark.parametrize(
    ("split", "platform"),
    [
        pytest.param(Split(), "cpu", id="bands-cpu", marks=pytest.mark.full),
        pytest.param(Split(), "tpu", id="bands-tpu"),
        pytest.param(Split(height=2), "cpu", id="parts-cpu", marks=pytest.mark.full),
        pytest.param(Split(height=2), "tpu", id="parts-tpu", marks=pytest.mark.full),
    ],
)
def test_large_videos_in_chunks(split, platform, shallow_vae, at_once):
    """In bands of rows, and in bands of the parts that two devices hold: gradients too."""
    vae = shallow_vae
    names = ("chunk_elements", "band_elements", "huge_frame_pixels")
    limits = Thresholds(**dict.fromkeys(names, 1), product_min_channels=1)
    with choose.using(choose.Hints(split, limits, platform)):
        latents = normal((1, 3, 16, 16, 3), 1)
        assert "while" in eqx.filter_jit(lambda z: vae.decoder(z)).lower(latents).as_text()
        got = results_of_halves(vae)
    for each, expected in zip(*map(jax.tree.leaves, (got, at_once)), strict=True):
        assert distance(each, expected) < 1e-5


def test_reconstruction(small_pair):
    vae, _ = small_pair
    video = normal((1, 9, 16, 24, 3))
    posterior = vae.encode(video)
    np.testing.assert_array_equal(vae(video), vae.decode(posterior.mode()))
    key = jax.random.key(1)
    np.testing.assert_array_equal(vae(video, key=key), vae.decode(posterior.sample(key)))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((9, 16, 16, 3), jnp.float32, r"five axes.*got shape \(9, 16, 16, 3\).*batch axis"),
        ((1, 3, 9, 16, 16), jnp.float32, "looks like BCTHW.*moveaxis"),
        ((1, 9, 16, 16, 4), jnp.float32, r"3 channels last.*alpha channel with `x\[\.\.\., :3\]`"),
        ((1, 9, 16, 16, 1), jnp.float32, r"repeat grey video with `jnp.repeat\(x, 3, -1\)`"),
        ((1, 9, 16, 16, 7), jnp.float32, "config says `in_channels=3`"),
        ((1, 9, 16, 16, 3), jnp.uint8, "floating dtype, got uint8.*127.5"),
        ((1, 9, 2, 16, 3), jnp.float32, "4x4 in height and width"),
        ((1, 0, 16, 16, 3), jnp.float32, "one frame"),
    ],
)
def test_bad_video(shape, dtype, message, small_pair, unchecked):
    with pytest.raises(ValueError, match=message):
        small_pair[0].encode(jnp.zeros(shape, dtype))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda vae, video: vae.encode(video), r"DiagonalGaussian: take its `.mode\(\)`"),
        (lambda _, video: to_torch(video), "torch's Tensor: `eqx_cogvae.diffusers.to_jax` makes"),
        (lambda _, video: video.tolist(), "must be a JAX or NumPy array, got builtins's list"),
    ],
)
def test_what_is_no_array(make, message, small_pair, unchecked):
    vae, _ = small_pair
    given = make(vae, jnp.zeros((1, 1, 16, 16, 3)))
    with pytest.raises(TypeError, match=message):
        vae.decode(given)


def test_padding_wants_five_axes(unchecked):
    for fn in (cv.pad_frames, lambda x: cv.crop_frames(x, 1)):
        with pytest.raises(ValueError, match=r"five axes.*got shape \(9, 16, 16, 3\)"):
            fn(jnp.zeros((9, 16, 16, 3)))


def test_a_video_with_nan(small_pair):
    with pytest.raises(ValueError, match="video holds NaN"):
        small_pair[0].encode(jnp.full((1, 9, 16, 16, 3), jnp.nan))


def test_pixel_values_are_out_of_range(small_pair):
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\], got values up to 255"):
        small_pair[0].encode(jnp.full((1, 9, 16, 16, 3), 255.0))


def test_a_clip_may_be_a_constant_of_a_trace(small_pair):
    vae, _ = small_pair
    video = jnp.clip(normal((1, 9, 16, 24, 3)), -1, 1)
    got = jax.jit(lambda scale: vae.encode(video).mean * scale)(2.0)
    assert distance(got, 2 * vae.encode(video).mean) < 1e-6
    bright = 100 * jnp.ones_like(video)
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
        jax.jit(lambda scale: vae.encode(bright).mean * scale)(2.0)


def test_clips_may_be_numpys(small_pair):
    vae, _ = small_pair
    video = np.clip(np.asarray(normal((1, 9, 16, 24, 3))), -1, 1)
    mean = vae.encode(video).mean
    assert jnp.array_equal(mean, vae.encode(jnp.asarray(video)).mean)
    assert jnp.array_equal(vae.decode(np.asarray(mean)), vae.decode(mean))
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
        jax.jit(lambda scale: vae.encode(100 * np.ones_like(video)).mean * scale)(2.0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 3, 4, 4), "looks like BCTHW"),
        ((1, 4, 4, 4, 16), "3 channels last.*`encode` makes latents"),
        ((3, 4, 4, 3), "five axes"),
    ],
)
def test_bad_latents(shape, message, small_pair, unchecked):
    with pytest.raises(ValueError, match=message):
        small_pair[0].decode(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("frames", "outcome", "near"),
    [
        (13, "come back as 16", "9 and 17"),
        (16, "have no first frame that is encoded alone", "9 and 17"),
        (53, "come back as 56", "49 and 57"),
    ],
)
def test_frame_counts_that_do_not_round_trip_warn(frames, outcome, near):
    vae = cv.VAE(
        cv.Config(block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=2),
        key=jax.random.key(0),
    )
    video = jax.ShapeDtypeStruct((1, frames, 4, 4, 3), jnp.float32)
    with pytest.warns(UserWarning, match=f"{frames} frames {outcome}.*{near}.*pad_frames"):
        mean = eqx.filter_eval_shape(lambda video: vae.encode(video).mean, video)
    assert mean.shape[1] == vae.config.latent_frames(frames)


@pytest.mark.parametrize(("frames", "padded"), [(1, 1), (2, 9), (9, 9), (13, 17), (48, 49)])
def test_padding_is_undone(frames, padded):
    video = normal((1, frames, 2, 2, 3))
    longer, count = cv.pad_frames(video)
    assert longer.shape[1] == padded
    np.testing.assert_array_equal(longer[:, frames:], jnp.repeat(video[:, -1:], padded - frames, 1))
    np.testing.assert_array_equal(cv.crop_frames(longer, count), video)


def test_random_weights_are_drawn_as_torch_draws_them():
    """Uniform, within one over the square root of a kernel's inputs; under `jit` and `vmap` too."""
    config = cv.Config(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=4)
    keys = jax.random.split(jax.random.key(0))
    vae = cv.VAE(config, key=keys[0])
    kernels = [leaf for leaf in jax.tree.leaves(vae) if leaf.ndim > 1]
    scaled = np.concatenate([np.ravel(k) * np.sqrt(np.prod(k.shape[:-1])) for k in kernels])
    assert 0.999 < scaled.max() <= 1 and -1 <= scaled.min() < -0.999
    assert abs(scaled.mean()) < 3e-3
    assert np.std(scaled) == pytest.approx(3**-0.5, rel=3e-3)
    assert len(np.unique(scaled)) > 0.9 * scaled.size
    draw = lambda key: _layers.Conv((3, 3, 3), 64, 64, key=key)  # noqa: E731
    drawn = draw(keys[0]), eqx.filter_jit(draw)(keys[0]), eqx.filter_vmap(draw)(keys)
    for due, got, two in zip(*map(jax.tree.leaves, drawn), strict=True):
        np.testing.assert_array_equal(got, due)
        np.testing.assert_array_equal(two[0], due)
        assert due.ndim == 1 or not np.array_equal(*two)


def test_cropping_to_more_than_there_is():
    with pytest.raises(ValueError, match="cannot crop 9 frames to 10"):
        cv.crop_frames(jnp.zeros((1, 9, 2, 2, 3)), 10)


@pytest.mark.parametrize("invert", [False, True])
def test_scaling_of_latents(invert):
    statistics = {"latents_mean": (0.5, -0.5), "latents_std": (2.0, 4.0)}
    config = cv.Config(
        block_out_channels=(4,),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=2,
        scaling_factor=0.5,
        shift_factor=0.25,
        invert_scale_latents=invert,
        **statistics,
    )
    vae = cv.VAE(config, key=jax.random.key(0))
    z = normal((1, 3, 2, 2, 2))
    centred = (np.asarray(z) - 0.25 - [0.5, -0.5]) / [2.0, 4.0]
    np.testing.assert_allclose(vae.scale_latents(z), centred * 0.5, rtol=1e-5, atol=1e-6)
    due = centred / 0.5 if invert else centred * 0.5
    pictured = vae.scale_latents(z, image_condition=True)
    np.testing.assert_allclose(pictured, due, rtol=1e-5, atol=1e-6)
    for condition in (False, True):
        there = vae.scale_latents(z, image_condition=condition)
        back = vae.unscale_latents(there, image_condition=condition)
        np.testing.assert_allclose(back, z, rtol=1e-5, atol=1e-6)
