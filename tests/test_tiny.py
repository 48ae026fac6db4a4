"""The embedded weights: whole, small, the same in diffusers, and pictures better than a blur."""

import json
from pathlib import Path

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
from reference import decode, distance, encode

import eqx_cogvae as cv
from eqx_cogvae import video

FOLDER = Path(cv.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def vae():
    return cv.from_pretrained("tiny", dtype=jnp.float32)


@pytest.fixture(scope="module")
def clip():
    return jnp.asarray(video.procedural_clip(17, 64, 96, seed=100))


def test_what_ships():
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4_000_000
    assert cv.from_pretrained("tiny").dtype == jnp.bfloat16


def test_the_config_is_that_of_the_preset():
    fields = json.loads((FOLDER / "config.json").read_text())
    preset = cv.Config.preset("tiny").to_dict()
    assert {k: v for k, v in fields.items() if k in preset} == preset


def test_diffusers_gives_the_same_pictures(vae, clip):
    model = diffusers.AutoencoderKLCogVideoX.from_pretrained(FOLDER).float().eval()
    posterior = vae.encode(clip)
    mean, logvar = encode(model, clip)
    assert distance(posterior.mean, mean) < 1e-5
    assert distance(posterior.logvar, logvar) < 1e-5
    assert distance(vae.decode(posterior.mean), decode(model, mean)) < 1e-5


def test_reconstructions_are_better_than_a_blur(vae, clip):
    """Than the mean over what one latent cell covers: 8x8 pixels, and four frames but the first."""
    first, rest = np.asarray(clip[:, :1]), np.asarray(clip[:, 1:])
    blocks = rest.reshape(1, 4, 4, 8, 8, 12, 8, 3).mean((2, 4, 6), keepdims=True)
    blurred = np.broadcast_to(blocks, (1, 4, 4, 8, 8, 12, 8, 3)).reshape(rest.shape)
    cell = first.reshape(1, 1, 8, 8, 12, 8, 3).mean((3, 5), keepdims=True)
    cell = np.broadcast_to(cell, (1, 1, 8, 8, 12, 8, 3)).reshape(first.shape)
    blur = video.psnr(np.concatenate([cell, blurred], axis=1), np.asarray(clip))
    assert video.psnr(vae(clip), clip) > blur + 1


def test_latents_are_of_unit_deviation_once_scaled(vae, clip):
    scaled = vae.scale_latents(vae.encode(clip).mean)
    assert 0.5 < float(jnp.std(scaled)) < 2
