"""What the model says of clips that it takes and that will not come back as they were."""

import re
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_cogvae as cv
from eqx_cogvae import _checks

CONFIG = cv.Config(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2)
HERE = Path(__file__).name


@pytest.fixture(scope="module")
def vae():
    return cv.VAE(CONFIG, key=jax.random.key(0))


def heard(call):
    """The warnings of a call as (message, file, line)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [(str(each.message), Path(each.filename).name, each.lineno) for each in caught]


def messages(call):
    return [message for message, _, _ in heard(call)]


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_frame_counts_warn_unless_every_batch_but_the_first_is_even(ratio):
    """By the rule of the causal convolutions: an odd count keeps its first frame at each level."""
    config = cv.Config(
        block_out_channels=(4,) * 4, norm_num_groups=2, temporal_compression_ratio=ratio
    )
    for t in range(1, 70):
        odd_all_through = ratio == 1 or t % (2 * ratio) == 1
        said = messages(lambda t=t: _checks.warn_of_frames(t, config))
        assert bool(said) == (not odd_all_through), t
        if said:
            low, high = map(int, re.search(r"counts are (\d+) and (\d+)", said[0]).groups())
            assert low <= t <= high
            for good in (low, high):
                assert not messages(lambda good=good: _checks.warn_of_frames(good, config))


@pytest.mark.parametrize(("latents", "frames", "low", "high"), [(4, 16, 9, 17), (2, 8, 1, 9)])
def test_latent_frames_of_no_good_count(latents, frames, low, high):
    (said,) = messages(lambda: _checks.warn_of_latent_frames(latents, cv.Config()))
    assert f"{latents} latent frames come back as {frames}" in said
    assert f"frames are {low} and {high} (8k + 1)" in said
    assert not messages(lambda: _checks.warn_of_latent_frames(latents + 1, cv.Config()))


@pytest.mark.parametrize("size", [(8, 9), (9, 8), (11, 13), (8, 8)])
def test_sizes_that_are_cropped(size, vae):
    video = jnp.zeros((1, 1, *size, 3))
    said = messages(lambda: eqx.filter_eval_shape(lambda vae: vae.encode(video).mean, vae))
    kept = tuple(side // 2 * 2 for side in size)
    due = f"frames of {size[0]}x{size[1]} come back as {kept[0]}x{kept[1]}: sides that are no mult"
    assert [message.startswith(due) for message in said] == [True] * (size != kept)
    latents = jnp.zeros((1, 1, *size, vae.config.latent_channels))
    assert not messages(lambda: eqx.filter_eval_shape(lambda vae: vae.decode(latents), vae))


RANGES = {
    "in [0, 1]": (np.linspace(0, 1, 48), True),
    "bright": (np.linspace(0.25, 0.75, 48), True),
    "in [0, 2]": (np.linspace(0, 2, 48), True),
    "in [-1, 1]": (np.linspace(-1, 1, 48), False),
    "a little below 0": (np.linspace(-0.01, 1, 48), False),
    "dark": (np.linspace(-1, 0, 48), False),
    "white": (np.ones(48), False),
    "grey": (np.zeros(48), False),
    "half grey": (np.full(48, 0.5), False),
}


@pytest.mark.parametrize("values", RANGES)
@pytest.mark.parametrize("kind", ["numpy", "jax", "bfloat16"])
def test_clips_without_a_value_below_zero(values, kind):
    array, warned = RANGES[values]
    video = array.reshape(1, 1, 4, 4, 3).astype(np.float32)
    if kind != "numpy":
        video = jnp.asarray(video, "bfloat16" if kind == "bfloat16" else "float32")
    said = messages(lambda: _checks.check_range(video))
    assert len(said) == warned
    if warned:
        assert "must lie in [-1, 1]" in said[0] and "scale it by `2 * x - 1`" in said[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 255.0, -255.0])
@pytest.mark.parametrize("xp", [np, jnp])
def test_values_that_are_no_video(bad, xp):
    video = xp.asarray(np.where(np.arange(48) == 7, bad, 0).reshape(1, 1, 4, 4, 3), "float32")
    due = "got values up to 255" if np.isfinite(bad) else "NaN or infinite"
    with pytest.raises(ValueError, match=due):
        _checks.check_range(video)


def line_of(text):
    lines = Path(__file__).read_text().splitlines()
    return 1 + next(i for i, line in enumerate(lines) if line.rstrip().endswith(text))


@eqx.filter_jit
def jitted(fn, x):
    return fn(x)  # user's line, jitted


def test_warnings_point_at_the_callers_line(vae):
    video = jnp.tile(jnp.linspace(0, 1, 3), (1, 6, 5, 4, 1))

    def plain():
        vae.encode(video)  # user's line, plain

    said = heard(plain)
    assert len(said) == 3
    assert {each[1:] for each in said} == {(HERE, line_of("# user's line, plain"))}

    def reconstructed():
        vae(video)  # user's line, called

    said = heard(reconstructed)
    assert {each[1:] for each in said} == {(HERE, line_of("# user's line, called"))}
    said = heard(lambda: jitted(vae.encode, video))
    assert {each[1:] for each in said} == {(HERE, line_of("# user's line, jitted"))}
