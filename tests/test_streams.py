"""Streams: bit for bit what framewise gives, at constant memory, and resumable."""

import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import SHALLOW, normal

import eqx_cogvae as cv


@pytest.fixture(scope="module")
def vae():
    return cv.VAE(SHALLOW, key=jax.random.key(0))


def counting(x, cache):
    start = 0 if cache is None else cache
    return start + jnp.cumsum(x, axis=1), start + jnp.sum(x, axis=1, keepdims=True)


def joined(stream):
    return np.concatenate([np.asarray(piece) for piece in stream], axis=1)


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_equals_framewise_bit_for_bit(frames, vae):
    latents = normal((1, frames, 4, 4, 3))
    due = vae.decode(latents)
    np.testing.assert_array_equal(joined(cv.streamed(vae.decode_step, 2)(latents)), due)


def test_encoding_equals_framewise_bit_for_bit(vae):
    video = normal((1, 25, 16, 12, 3))
    due = cv.framewise(vae.encode_step, 8)(video)
    np.testing.assert_array_equal(joined(cv.streamed(vae.encode_step, 8)(video)), due)


FEEDS = {
    "host array": lambda x: np.asarray(x),
    "single frames": lambda x: (np.asarray(x)[:, i] for i in range(x.shape[1])),
    "batches": lambda x: iter([x[:, :3], *(x[:, i : i + 2] for i in range(3, 9, 2))]),
    "one odd piece after another": lambda x: iter([x[:, :5], x[:, 5:6], x[:, 6:]]),
    "a list": lambda x: [x[:, :4], x[:, 4:]],
}


@pytest.mark.parametrize("feed", FEEDS)
def test_takes_arrays_and_iterators(feed, vae):
    latents = normal((1, 9, 4, 4, 3))
    got = joined(cv.streamed(vae.decode_step, 2)(FEEDS[feed](latents)))
    np.testing.assert_array_equal(got, vae.decode(latents))


def test_an_even_count_of_single_frames_says_its_length():
    x = normal((1, 8, 1, 1, 1))
    single = lambda: (x[:, i] for i in range(8))  # noqa: E731
    due = cv.framewise(counting, 2)(x)
    np.testing.assert_array_equal(joined(cv.streamed(counting, 2)(single(), length=8)), due)
    with pytest.raises(ValueError, match=r"stopped at frame 7.*1 frames are left.*`length=`"):
        joined(cv.streamed(counting, 2)(single()))


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_short_clips_of_unknown_length(frames):
    x = normal((1, frames, 1, 1, 1))
    got = joined(cv.streamed(counting, 4)(x[:, i] for i in range(frames)))
    np.testing.assert_array_equal(got, cv.framewise(counting, 4)(x))


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_saved_cache_resumes_bit_for_bit(batches, vae, tmp_path):
    latents = normal((1, 9, 4, 4, 3))
    due = vae.decode(latents)
    stream = cv.streamed(vae.decode_step, 2)(latents)
    done = [np.asarray(next(stream)) for _ in range(batches)]
    eqx.tree_serialise_leaves(tmp_path / "cache.eqx", stream.cache)
    frame, like = stream.frame, jax.tree.map(jnp.zeros_like, stream.cache)
    del stream
    cache = eqx.tree_deserialise_leaves(tmp_path / "cache.eqx", like)
    resumed = cv.streamed(vae.decode_step, 2)
    for _ in range(2):  # the caller's cache is not given away
        rest = joined(resumed(latents[:, frame:], cache=cache))
        np.testing.assert_array_equal(np.concatenate([*done, rest], axis=1), due)


def test_the_cache_is_donated(vae):
    stream = cv.streamed(vae.decode_step, 2)(normal((1, 5, 4, 4, 3)))
    next(stream)
    given = jax.tree.leaves(stream.cache)
    next(stream)
    assert all(leaf.is_deleted() for leaf in given)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(stream.cache))


def test_the_callers_video_is_not_donated(vae):
    latents = normal((1, 3, 4, 4, 3))
    joined(cv.streamed(vae.decode_step, 3)(latents))
    vae.decode(latents)
    assert not latents.is_deleted()


def test_pixels_before_they_leave_the_device(vae):
    latents = 3 * normal((1, 5, 4, 4, 3))
    got = joined(cv.streamed(cv.as_uint8(vae.decode_step), 2)(latents))
    due = np.asarray(vae.decode(latents), np.float64)
    assert got.dtype == np.uint8
    assert got.min() < 100 < 155 < got.max()
    assert np.abs(got - np.clip((due + 1) * 127.5, 0, 255)).max() <= 0.5 + 1e-4


def test_progress_is_shown_on_request(vae, capsys):
    joined(cv.streamed(counting, 2, progress=True)(normal((1, 9, 1))))
    assert "9/9" in capsys.readouterr().err
    joined(cv.streamed(counting, 2)(normal((1, 9, 1))))
    assert not capsys.readouterr().err


def test_a_stream_that_fails_has_given_what_it_finished():
    def feed():
        for i in range(5):
            yield np.full((1, 1, 2, 2, 1), float(i), np.float32)
        raise OSError("the disk is gone")

    stream, done = cv.streamed(counting, 2)(feed()), []
    with pytest.raises(RuntimeError, match=r"stopped at frame 5.*the disk is gone") as caught:
        done.extend(np.asarray(piece) for piece in stream)
    assert isinstance(caught.value.__cause__, OSError)
    np.testing.assert_array_equal(np.concatenate(done, 1)[0, :, 0, 0, 0], [0, 1, 3, 6, 10])
    assert stream.frame == 5
    rest = cv.streamed(counting, 2)(np.ones((1, 2, 2, 2, 1), np.float32), cache=stream.cache)
    np.testing.assert_array_equal(joined(rest)[0, :, 0, 0, 0], [11, 12])


def test_a_step_that_fails_midway_says_where():
    def step(x, cache):
        if cache is not None:
            raise ArithmeticError("no")
        return counting(x, cache)

    with pytest.raises(RuntimeError, match="stopped at frame 3; the frames before it are done: no"):
        joined(cv.streamed(step, 2)(normal((1, 5, 1))))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_cache_that_was_given_to_a_step_that_failed_says_so(ahead):
    """A stream that runs ahead has it still."""

    def step(x, cache):
        return counting(eqx.error_if(x, jnp.max(x) > 3, "too large"), cache)

    stream = cv.streamed(step, 2, ahead=ahead)(jnp.arange(6.0).reshape(1, 6, 1))
    with pytest.raises(RuntimeError, match=r"stopped at frame 4; the frames before .*: too large$"):
        joined(stream)
    assert stream.frame == 4
    if ahead:
        (rest,) = cv.streamed(counting, 2)(jnp.ones((1, 2, 1)), cache=stream.cache)
        assert rest.ravel().tolist() == [7, 8]
        return
    with pytest.raises(AttributeError, match="given to the step that failed at frame 4: resume"):
        _ = stream.cache


def test_a_step_that_fails_at_once_is_heard_itself(vae):
    with pytest.raises(ValueError, match="looks like BCTHW"):
        joined(cv.streamed(vae.decode_step, 2)(jnp.zeros((1, 3, 3, 4, 4))))


@pytest.mark.parametrize(
    ("pieces", "options", "message"),
    [
        ([(1, 3, 4, 4, 1), (1, 2, 4, 5, 1)], {}, r"frame 3.*\(1, 4, 4, 1\) to \(1, 4, 5, 1\)"),
        ([(1, 3, 4, 4, 1), (1, 1, 4, 4, 1)], {"length": 5}, "frame 3.*1 frames are left"),
        ([], {}, "a frame or more, got none"),
        ([(4,)], {}, r"frames \(b, h, w, c\) or pieces.*got shape \(4,\)"),
    ],
)
def test_bad_streams(pieces, options, message):
    feed = (np.zeros(shape, np.float32) for shape in pieces)
    with pytest.raises(ValueError, match=message):
        joined(cv.streamed(counting, 2)(feed, **options))


def test_a_resumed_array_has_no_remainder():
    with pytest.raises(ValueError, match="in multiples of 2, got 3"):
        joined(cv.streamed(counting, 2)(jnp.zeros((1, 3, 1)), cache=jnp.zeros((1, 1, 1))))


MEMORY = """
import gc, jax, numpy as np, eqx_cogvae as cv

config = cv.Config(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
vae = cv.VAE(config, key=jax.random.key(0))
frames = (np.zeros((1, 1, 32, 32, 3), np.float32) + i / 2001 for i in range(2001))

def held():
    gc.collect()  # what waits for it comes and goes, by some 20 MB
    # Without the pages of files, such as libraries' code, which the system takes and brings back.
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * 4096 / 2**20

for i, moments in enumerate(cv.streamed(vae.encode_step, 8)(frames)):
    assert np.isfinite(np.asarray(moments)).all()
    if i in (50, 249):
        print(held())
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="memory is read from /proc, which Linux has",
)
def test_two_thousand_frames_hold_their_memory_flat():
    """The frames are 25 MB, their moments 33 MB; from batch 50 to the last, nothing is kept."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)], capture_output=True, text=True, check=True
    )
    early, late = map(float, done.stdout.split())
    assert late - early < 16
