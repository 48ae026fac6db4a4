"""The other frame batching: a clip's first latent alone, as CogVideoX-Fun decodes."""

from typing import NamedTuple

import diffusers
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import CogVideoXUpsample3D
from reference import distance, from_torch, normal, pair, to_torch

import eqx_cogvae as cv
from eqx_cogvae.diffusers import EqxAutoencoderKLCogVideoX

CONFIG = cv.Config(
    block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=3
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return pair(CONFIG, tmp_path_factory.mktemp("vae"))


class Doubling(torch.nn.Module):
    """diffusers' upsampler, for frames of which none is a clip's first: all double in time."""

    def __init__(self, upsampler):
        super().__init__()
        self.conv = upsampler.conv

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2.0)
        frames = [self.conv(x[:, :, i]) for i in range(x.shape[2])]
        return torch.stack(frames, dim=2)


def decoded_by_fun(model: diffusers.AutoencoderKLCogVideoX, latents, size):
    """CogVideoX-Fun's loop: the first latent alone, then batches, of which the last may be short.

    It tells its upsamplers which of both a batch is. Everything else in it is diffusers'.
    """
    z, cache, pieces = to_torch(latents), None, []
    blocks = [b for b in model.decoder.up_blocks if b.upsamplers is not None]
    firsts = [b.upsamplers for b in blocks]
    batches = [z[:, :, :1], *(z[:, :, i : i + size] for i in range(1, z.shape[2], size))]
    try:
        with torch.no_grad():
            for batch in batches:
                frames, cache = model.decoder(batch, conv_cache=cache)
                pieces.append(frames)
                for block, (first,) in zip(blocks, firsts, strict=True):  # pyright: ignore
                    assert isinstance(first, CogVideoXUpsample3D)
                    rest = Doubling(first) if first.compress_time else first
                    block.upsamplers = torch.nn.ModuleList([rest])
    finally:
        for block, upsamplers in zip(blocks, firsts, strict=True):
            block.upsamplers = upsamplers
    return from_torch(torch.cat(pieces, dim=2))


def joined(stream):
    return np.concatenate([np.asarray(piece) for piece in stream], axis=1)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7])
def test_decoding_equals_cogvideox_fun(count, models):
    """In steps, as one program, and as a stream; also where the last latent is alone."""
    vae, model = models
    latents = normal((1, count, 4, 5, 3), count)
    due = decoded_by_fun(model, latents, 2)
    assert due.shape[1] == 4 * (count - 1) + 1
    decode = cv.framewise(vae.decode_step, 2, first=1)
    got = decode(latents)
    assert distance(got, due) < 1e-5
    # Running ahead is a program of its own.
    for ahead in (False, True) if count == 4 else (False,):
        stream = cv.streamed(vae.decode_step, 2, first=1, ahead=ahead)
        np.testing.assert_array_equal(joined(stream(latents)), got)
    if count == 5:
        assert distance(eqx.filter_jit(decode)(latents), due) < 1e-5


@pytest.mark.parametrize("size", [1, 3])
def test_odd_batches_equal_cogvideox_fun(size, models):
    """Where diffusers, without `first`, takes each for a clip's first, and has fewer frames."""
    vae, model = models
    latents = normal((1, 4, 4, 5, 3))
    due = decoded_by_fun(model, latents, size)
    assert due.shape[1] == 13
    assert distance(cv.framewise(vae.decode_step, size, first=1)(latents), due) < 1e-5


class Sum(NamedTuple):
    """A cache like the decoder's, which can be told that no clip begins behind it."""

    total: jax.Array

    def continued(self):
        return Continued(*self)


class Continued(Sum):
    pass


def telling(x, cache):
    """The running sum, and 100 more behind a cache that was told."""
    start = jnp.zeros_like(x[:, :1]) if cache is None else cache.total
    y = start + jnp.cumsum(x, axis=1)
    more = 100.0 if isinstance(cache, Continued) else 0.0
    return y + more, Sum(y[:, -1:])


WRAPPERS = {
    "framewise": lambda whole: whole(telling),
    "a sliced step": lambda whole: whole(cv.sliced(telling)),
    "sliced": lambda whole: cv.sliced(whole(telling)),
    "checkpointed": lambda whole: whole(eqx.filter_checkpoint(telling)),
    "tiled": lambda whole: cv.tiled(whole(telling), (2, 2), (0, 0)),
    "compiled": lambda whole: eqx.filter_jit(whole(telling)),
    "streamed": lambda whole: lambda x: joined(cv.streamed(telling, 2, first=1)(x)),
    "nested": lambda whole: whole(lambda x, c: (lambda y, c: (y, [c]))(*telling(x, c and c[0]))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_only_with_first_a_cache_is_told(wrapper):
    x = normal((2, 4, 2, 4, 1))
    due = np.cumsum(np.asarray(x), axis=1)
    fn = WRAPPERS[wrapper](lambda step: cv.framewise(step, 2, first=1))
    np.testing.assert_allclose(fn(x), due + np.array([0, 100, 100, 100])[:, None, None, None], 1e-5)
    plain = cv.framewise(telling, 1)
    np.testing.assert_allclose(plain(x), due, rtol=1e-5, atol=1e-6)


def test_a_stream_resumes_before_a_lone_last_latent(models, tmp_path):
    vae, _ = models
    latents = normal((1, 4, 4, 5, 3))
    due = cv.framewise(vae.decode_step, 2, first=1)(latents)
    streamed = cv.streamed(vae.decode_step, 2, first=1, ahead=False)
    stream = streamed(latents)
    done = [np.asarray(next(stream)), np.asarray(next(stream))]
    eqx.tree_serialise_leaves(tmp_path / "cache.eqx", stream.cache)
    like = jax.tree.map(jnp.zeros_like, stream.cache)
    cache = eqx.tree_deserialise_leaves(tmp_path / "cache.eqx", like)
    rest = [np.asarray(piece) for piece in streamed(latents[:, stream.frame :], cache=cache)]
    np.testing.assert_array_equal(np.concatenate([*done, *rest], axis=1), due)


def running_sum(x, cache):
    start = 0 if cache is None else cache
    y = start + jnp.cumsum(x, axis=1)
    return y, y[:, -1:]


def noting(sizes):
    def step(x, cache):
        sizes.append(x.shape[1])
        return running_sum(x, cache)

    return step


BATCHES = {(7, 2, 1): [1, 2, 2, 2], (8, 2, 1): [1, 2, 2, 2, 1], (1, 2, 1): [1], (3, 4, 8): [3]}
BATCHES |= {(8, 4, 8): [8], (9, 8, 8): [8, 1], (10, 3, 2): [2, 3, 3, 2]}


@pytest.mark.parametrize("case", BATCHES)
def test_batches(case):
    """Whole, in one program, and streamed from an array and frame by frame."""
    frames, size, first = case
    x = normal((2, frames, 3, 1, 1))
    due = jnp.cumsum(x, axis=1)
    sizes = []
    with jax.disable_jit():
        got = cv.framewise(noting(sizes), size, first=first)(x)
    assert sizes == BATCHES[case]
    np.testing.assert_allclose(got, due, rtol=1e-5, atol=1e-6)
    traced = jax.jit(lambda x: cv.framewise(running_sum, size, first=first)(x))(x)
    np.testing.assert_allclose(traced, due, rtol=1e-5, atol=1e-6)
    for feed in (x, iter([x[:, i] for i in range(frames)]), iter([x[:, :1], x[:, 1:]][:frames])):
        pieces = [np.asarray(p) for p in cv.streamed(running_sum, size, first=first)(feed)]
        assert [p.shape[1] for p in pieces] == BATCHES[case]
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), due, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [0, -1, True, 1.0])
def test_bad_first(first, unchecked):
    for transform in (cv.framewise, cv.streamed):
        with pytest.raises(ValueError, match="`first` must be a whole number of at least 1 frame"):
            transform(running_sum, 2, first=first)


def test_the_adapter_has_it_as_an_attribute(models):
    """diffusers' numbers by default, and no advice on a count of latents that comes back."""
    vae, model = models
    adapter = EqxAutoencoderKLCogVideoX(vae)
    adapter.first_latent_frames_batch_size = 1
    latents = normal((1, 4, 4, 5, 3), 4)
    due = decoded_by_fun(model, latents, 2)
    assert distance(from_torch(adapter.decode(to_torch(latents)).sample), due) < 1e-5
