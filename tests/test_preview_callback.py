"""Previews from inside a pipeline: which steps, of which latents, and that nothing else changes."""

from types import SimpleNamespace

import diffusers
import equinox as eqx
import jax
import numpy as np
import pytest
import torch
from PIL import Image
from reference import normal

import eqx_cogvae as cv
from eqx_cogvae import preview, video
from eqx_cogvae.diffusers import EqxAutoencoderKLCogVideoX, PreviewCallback

CONFIG = cv.Config(
    block_out_channels=(4, 4),
    layers_per_block=1,
    norm_num_groups=2,
    temporal_compression_ratio=2,
    sample_height=8,
    sample_width=8,
    scaling_factor=0.7,
)
FRAMES, SIDE, STEPS = 5, 8, 3


@pytest.fixture(scope="module")
def tiny():
    """Random, and with more contrast than torch's initialisation has."""
    return jax.tree.map(lambda x: 1.8 * x, preview.Preview(key=jax.random.key(0)))


@pytest.fixture(scope="module")
def pipe():
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=SIDE // 2,
        sample_height=SIDE // 2,
        sample_frames=FRAMES,
        temporal_compression_ratio=2,
        max_text_seq_length=4,
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=EqxAutoencoderKLCogVideoX(cv.VAE(CONFIG, key=jax.random.key(0))),
        transformer=transformer.eval(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generated(pipe, callback, batch=2):
    """The latents, (b, t, c, h, w)."""
    embeds = torch.ones(batch, 4, 8)
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=-embeds,
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=callback,
    ).frames


def test_film_strips_of_chosen_steps(pipe, tiny, tmp_path):
    """After every second step, and the last: a row for each of two clips."""
    plain = generated(pipe, None)
    latents = generated(pipe, PreviewCallback(tiny, tmp_path / "{step:02d}.png", every=2, frames=3))
    assert torch.equal(plain, latents)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01.png", "02.png"]
    clips = tiny.decode(latents.permute(0, 1, 3, 4, 2).contiguous().numpy() / 0.7)
    assert clips.shape == (2, 9, 32, 32, 3)
    due = np.concatenate([np.concatenate(clip[[0, 4, 8]], axis=1) for clip in np.asarray(clips)])
    strip = np.asarray(Image.open(tmp_path / "02.png"))
    assert strip.std() > 10
    assert np.abs(strip - (due + 1) * 127.5).max() < 0.51
    assert not np.array_equal(strip, np.asarray(Image.open(tmp_path / "01.png")))


def fake(patch_size_t=None, steps=1):
    """A pipeline as the callback sees it."""
    transformer = SimpleNamespace(config=SimpleNamespace(patch_size_t=patch_size_t))
    vae = SimpleNamespace(config=CONFIG)
    return SimpleNamespace(transformer=transformer, vae=vae, num_timesteps=steps)


def test_a_video_has_the_clips_side_by_side(tiny, tmp_path):
    latents = torch.from_numpy(np.array(normal((2, 3, 16, 4, 4)))).bfloat16()
    tensors = {"latents": latents}
    callback = PreviewCallback(tiny, tmp_path / "{step}.mp4", fps=12)
    assert callback(fake(), 0, None, tensors) is tensors
    due = np.asarray(tiny.decode(latents.float().permute(0, 1, 3, 4, 2).contiguous().numpy() / 0.7))
    video.write(tmp_path / "due.mp4", np.concatenate(due, axis=2), fps=12)
    assert (tmp_path / "0.mp4").read_bytes() == (tmp_path / "due.mp4").read_bytes()
    assert video.read(tmp_path / "0.mp4").shape == (1, 9, 32, 64, 3)


def test_the_vae_as_a_preview(tmp_path):
    """Its frames leave [-1, 1] where latents are noisy, and are clipped, as pipelines clip them."""
    vae = cv.VAE(CONFIG, key=jax.random.key(0))
    vae = eqx.tree_at(lambda v: v.decoder.conv_out.conv.weight, vae, replace_fn=lambda x: 100 * x)
    latents = torch.from_numpy(np.array(normal((1, 3, 16, 4, 4))))
    PreviewCallback(vae, tmp_path / "{step}.png")(fake(), 0, None, {"latents": latents})
    clip = vae.decode(latents.permute(0, 1, 3, 4, 2).contiguous().numpy() / 0.7)
    assert abs(clip).max() > 10
    video.filmstrip(clip.clip(-1, 1), path=tmp_path / "due.png")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "due.png").read_bytes()


def test_latents_that_the_pipeline_drops(tiny, tmp_path):
    """CogVideoX 1.5 puts one in front of three."""
    latents = torch.from_numpy(np.array(normal((1, 4, 16, 4, 4))))
    strips = {}
    for name, z, patch in (("padded", latents, 2), ("bare", latents[:, 1:], None)):
        callback = PreviewCallback(tiny, tmp_path / f"{name}{{step}}.png")
        callback(fake(patch), 0, None, {"latents": z})
        strips[name] = np.asarray(Image.open(tmp_path / f"{name}0.png"))
    np.testing.assert_array_equal(strips["padded"], strips["bare"])


@pytest.mark.parametrize(
    ("path", "options", "kind", "message"),
    [
        ("{step}.gif", {}, ValueError, r"must end in one of \.png, \.mp4.*got '.*\{step\}\.gif'"),
        ("a.png", {}, ValueError, r"a place for the number of the step.*'.*a\.png'"),
        ("{step}{clip}.png", {}, ValueError, "may have {step} between braces and nothing else"),
        ("{step}.png", {"every": 0}, ValueError, "`every` must be a whole number.*got 0"),
        ("none/{step}.png", {}, FileNotFoundError, "there is no directory .*none"),
    ],
)
def test_bad_arguments_are_heard_before_the_pipeline_runs(
    path, options, kind, message, tiny, tmp_path
):
    with pytest.raises(kind, match=message):
        PreviewCallback(tiny, tmp_path / path, **options)
