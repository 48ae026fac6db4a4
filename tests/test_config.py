"""The configuration against diffusers' defaults, and what it refuses."""

import inspect
import json

import diffusers
import pytest
import torch
from hypothesis import given, strategies as st

import eqx_cogvae as cv


def test_defaults_are_diffusers():
    ours = cv.Config().to_dict()
    theirs = inspect.signature(diffusers.AutoencoderKLCogVideoX.__init__).parameters
    assert ours.keys() == theirs.keys() - {"self"}
    for name, value in ours.items():
        due = theirs[name].default
        assert value == (list(due) if isinstance(due, tuple) else due), name


def test_round_trip_through_json():
    config = cv.Config(latents_mean=(0.5,) * 16, scaling_factor=0.7)
    assert cv.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(cv.Config.from_dict(config.to_dict()))


def test_keys_of_diffusers_own_are_ignored():
    fields = {"_class_name": "AutoencoderKLCogVideoX", "_diffusers_version": "0.42.1"}
    assert cv.Config.from_dict(fields) == cv.Config()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_chanels": 16}, "'latent_chanels': did you mean 'latent_channels'"),
        ({"zzz": 1}, "unknown config key 'zzz': known are in_channels"),
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKLCogVideoX, got a 'AutoencoderKL'"),
        ({"block_out_channels": ()}, "tuple of widths"),
        ({"block_out_channels": (30, 32)}, "`norm_num_groups`=32 must divide.*30"),
        ({"act_fn": "tanh"}, "`act_fn` must be one of silu.*'tanh'"),
        ({"norm_eps": 0}, "`norm_eps` must be a positive number, got 0"),
        ({"temporal_compression_ratio": 0.5}, "at least 1, got 0.5"),
        ({"latent_channels": 0}, "whole numbers from 1 to 65536, got 0"),
        ({"latents_mean": (1.0,)}, "16 entries, one per latent channel, got 1"),
        ({"down_block_types": ("DownBlock2D",) * 4}, "4 times 'CogVideoXDownBlock3D'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        cv.Config.from_dict(fields)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("CogVideoX-2b", 1.15258426), ("THUDM/CogVideoX-5b", 0.7), ("CogVideoX1.5-5B", 0.7)],
)
def test_presets(name, factor):
    assert cv.Config.preset(name).scaling_factor == factor
    assert cv.Config.preset(name).spatial_compression == 8
    assert cv.Config.preset(name).invert_scale_latents == ("1.5" in name)


def test_unknown_preset():
    with pytest.raises(ValueError, match="no preset 'cogvideox-9b', there are"):
        cv.Config.preset("cogvideox-9b")


@given(frames=st.integers(1, 200), blocks=st.integers(1, 4), ratio=st.sampled_from([1, 2, 4, 8]))
def test_frame_counts_are_those_of_the_batches(frames, blocks, ratio):
    """By pooling real frames as diffusers' samplers do."""
    config = cv.Config(block_out_channels=(32,) * blocks, temporal_compression_ratio=ratio)
    levels = min(blocks - 1, {1: 0, 2: 1, 4: 2, 8: 3}[ratio])
    assert config.temporal_compression == 2**levels
    assert config.spatial_compression == 2 ** (blocks - 1)

    def pooled(t):
        x = torch.zeros(t)
        for _ in range(levels):
            odd = len(x) % 2
            x = (
                torch.cat([x[:odd], torch.nn.functional.avg_pool1d(x[None, odd:], 2)[0]])
                if (len(x) > 1)
                else x
            )
        return len(x)

    count = max(frames // 8, 1)
    batches = [frames - 8 * (count - 1)] + [8] * (count - 1)
    assert config.latent_frames(frames) == sum(map(pooled, batches))
    if frames % 8 == 1 and ratio <= 4:
        assert config.sample_frames(config.latent_frames(frames)) == frames


def test_frame_counts_of_another_first_batch():
    """By CogVideoX-Fun's rule, 4 (t - 1) + 1; behind the first batch each latent gives four."""
    config = cv.Config()
    assert [config.sample_frames(t, 1) for t in (1, 2, 3, 22)] == [1, 5, 9, 85]
    assert [config.sample_frames(t, 4) for t in (3, 4, 5)] == [9, 16, 20]
