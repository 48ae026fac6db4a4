"""Extreme inputs in every dtype, and JAX at its strictest."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import decode, encode, from_torch, normal, pair, quietly, to_torch

import eqx_cogvae as cv

CONFIG = cv.Config(
    block_out_channels=(4, 8), norm_num_groups=2, latent_channels=2, layers_per_block=1
)
SHALLOW = cv.Config(
    block_out_channels=(4,), norm_num_groups=2, latent_channels=2, layers_per_block=1
)
CLIP, LATENTS = (1, 9, 8, 8, 3), (1, 3, 4, 4, 2)
DTYPES = ("float16", "bfloat16", "float32")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return pair(CONFIG, tmp_path_factory.mktemp("vae"))


def cast(models, dtype):
    """Both in a dtype; the one of diffusers is a copy."""
    vae, model = models
    other = type(model)(**CONFIG.to_dict()).eval()
    other.load_state_dict(model.state_dict())
    ours = jax.tree.map(lambda x: x.astype(dtype), vae)
    return ours, other.to(getattr(torch, dtype))


CLIPS = {
    "black": np.full(CLIP, -1.0),
    "grey": np.zeros(CLIP),
    "white": np.ones(CLIP),
    "saturated": np.sign(np.random.default_rng(0).standard_normal(CLIP)),
    "one pixel": np.pad(np.ones((1, 1, 1, 1, 3)), [(0, 0), (4, 4), (3, 4), (3, 4), (0, 0)]),
    "denormal": np.full(CLIP, 1e-40),
    "the largest that is taken": 16 * np.sign(np.random.default_rng(1).standard_normal(CLIP)),
}
# float16 ends at 65504, and a sum of squares of 256 exceeds it: moments are held in float32.
SCALES = (0.0, 1e-30, 1.0, 30.0, 300.0, 3e3, 3e4, 1e10, 1e30)


def finite(x):
    return bool(np.isfinite(np.asarray(x, np.float64)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_clips_are_finite_where_diffusers_is(dtype, models):
    vae, model = cast(models, dtype)
    theirs = {}
    for name, clip in CLIPS.items():
        with torch.no_grad():
            posterior = model.encode(to_torch(clip).to(model.dtype)).latent_dist
        theirs[name] = finite(from_torch(posterior.mean)), finite(from_torch(posterior.logvar))
    for name, clip in CLIPS.items():
        posterior = quietly(vae.encode, jnp.asarray(clip, jnp.float32))
        assert finite(posterior.mean) >= theirs[name][0], name
        assert finite(posterior.logvar) >= theirs[name][1], name
    # And that is no empty promise.
    assert all(all(each) for each in theirs.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_latents_are_finite_where_diffusers_is(dtype, models):
    vae, model = cast(models, dtype)
    noise = np.asarray(normal(LATENTS), np.float32)
    finites = []
    for scale in SCALES:
        latents = noise * np.float32(scale)
        with torch.no_grad():
            theirs = finite(from_torch(model.decode(to_torch(latents).to(model.dtype)).sample))
        ours = finite(vae.decode(jnp.asarray(latents)))
        assert ours >= theirs, scale
        finites.append(ours)
    # What float16 cannot hold comes out as NaN or infinity; the command line refuses it.
    assert finites[:4] == [True] * 4
    assert all(finites[:7]) == (dtype != "float16")


@pytest.mark.parametrize("scale", [30.0, 3e3])
def test_large_latents_agree_with_diffusers(scale, models):
    vae, model = models
    latents = np.asarray(normal(LATENTS), np.float32) * np.float32(scale)
    due = decode(model, latents)
    got = np.asarray(vae.decode(jnp.asarray(latents)))
    assert np.linalg.norm(got - due) < 1e-5 * np.linalg.norm(due)


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_constant_clips_agree_with_diffusers(level, models):
    """The variance within a group is then near 0, and the epsilon decides."""
    vae, model = models
    clip = np.full(CLIP, level, np.float32)
    due, _ = encode(model, clip)
    got = np.asarray(vae.encode(jnp.asarray(clip)).mean)
    assert np.linalg.norm(got - due) < 1e-5 * np.linalg.norm(due)


# Switches of JAX.


@contextlib.contextmanager
def doubled():
    with jax.enable_x64(True):
        yield


STRICT = {
    "x64": doubled,
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "raising rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "no implicit transfers": lambda: jax.transfer_guard("disallow"),
    "checked leaks": lambda: jax.checking_leaks(),
}


@pytest.mark.parametrize("switch", STRICT)
def test_strict_modes_run_clean(switch):
    """By concrete calls, and in the modes that look at values or dtypes in the backward pass."""
    vae, key = cv.VAE(SHALLOW, key=jax.random.key(0)), jax.random.key(1)
    clip, latents = jax.random.uniform(key, (1, 9, 4, 4, 3), minval=-1.0), normal(LATENTS)
    due = vae.decode(latents)
    with STRICT[switch]():
        posterior = vae.encode(clip)
        sample = posterior.sample(key)
        values = posterior.kl(), posterior.nll(sample), posterior.std
        got = vae.decode(latents)
        pieces = list(cv.streamed(vae.decode_step, 2)(latents))
        if switch in ("x64", "debug_nans"):
            grads = eqx.filter_jit(eqx.filter_grad(mean_square))(vae, latents)
            values = *values, *jax.tree.leaves(grads)
        scaled = vae.unscale_latents(vae.scale_latents(latents))
        tile = cv.tiled(cv.framewise(vae.decode_step, 3), (2, 4), (0.5, 0))(latents)
    np.testing.assert_array_equal(got, due)
    np.testing.assert_allclose(scaled, latents, rtol=1e-5, atol=1e-6)
    assert tile.shape == due.shape and sum(piece.shape[1] for piece in pieces) == due.shape[1]
    assert {value.dtype.name for value in (sample, tile, *values)} == {"float32"}


def mean_square(vae, latents):
    return jnp.mean(jnp.square(vae.decode(latents)))


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        vae = cv.VAE(SHALLOW, key=jax.random.key(0), dtype=jnp.float64)
        decoded = vae.decode(normal(LATENTS, dtype=jnp.float64))
        single = jax.tree.map(lambda x: x.astype(jnp.float32), vae)
        near = np.asarray(single.decode(normal(LATENTS, dtype=jnp.float64)))
    assert decoded.dtype == jnp.float64
    assert near.dtype == jnp.float32
    assert np.linalg.norm(np.asarray(decoded) - near) < 1e-5 * np.linalg.norm(decoded)
