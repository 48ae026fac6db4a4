"""Video files of odd kinds, playlists, and a fuzzed command line."""

import os
import random
from fractions import Fraction

import av
import jax
import numpy as np
import pytest
import safetensors.numpy

import eqx_cogvae as cv
from eqx_cogvae import _latents, video
from eqx_cogvae._cli import main as cli

LEVELS = (30, 70, 110, 150, 190)


def grey(h=32, w=48, channels=3):
    """Frame i is of the level that names it; a fourth channel is half transparent."""
    frames = [np.full((h, w, channels), level, np.uint8) for level in LEVELS]
    for frame in frames:
        frame[..., 3:] = 128
    return frames


def encode(path, frames, *, codec="libx264", pix_fmt="yuv420p", milliseconds=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = {"crf": "4"} if codec == "libx264" else {}
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgba" if pixels.shape[2] == 4 else "rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(clip):
    return (clip[0].mean((1, 2, 3)) + 1) * 127.5


KINDS = {
    "10 bits": ("a.mp4", {"pix_fmt": "yuv420p10le"}, {}),
    "4:2:2": ("a.mp4", {"pix_fmt": "yuv422p"}, {}),
    "odd sides": ("a.mp4", {"pix_fmt": "yuv444p"}, {"h": 31, "w": 47}),
    "two pixels": ("a.mp4", {}, {"h": 2, "w": 2}),
    "a variable rate": ("a.mkv", {"milliseconds": (0, 10, 500, 600, 5000)}, {}),
    "alpha": ("a.mov", {"codec": "png", "pix_fmt": "rgba"}, {"channels": 4}),
    "lossless": ("a.mkv", {"codec": "ffv1"}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_odd_kinds_are_read(kind, tmp_path):
    """Alpha is dropped; at no rate of its own, every frame of a variable rate is one."""
    name, options, shape = KINDS[kind]
    frames = grey(**shape)
    path = encode(tmp_path / name, frames, **options)
    clip = video.read(path)
    assert clip.shape == (1, len(LEVELS), *frames[0].shape[:2], 3)
    np.testing.assert_allclose(levels(clip), LEVELS, atol=3)
    found = video.info(path)
    assert (found.frames, found.height, found.width) == (len(LEVELS), *frames[0].shape[:2])


def test_a_variable_rate_is_resampled_by_its_times(tmp_path):
    times = (0, 250, 500, 2000, 2500)
    path = encode(tmp_path / "a.mkv", grey(), milliseconds=times)
    instants = np.arange(0, 3000, 250)
    due = [LEVELS[np.abs(np.subtract(times, t)).argmin()] for t in instants]
    np.testing.assert_allclose(levels(video.read(path, fps=4))[: len(due)], due, atol=3)


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile clip.mp4\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    ],
    ids=["m3u8", "ffconcat", "sdp"],
)
def test_a_playlist_is_no_video(playlist, tmp_path):
    """Its name says mp4, and FFmpeg would open the files that it names."""
    encode(tmp_path / "clip.mp4", grey())
    (tmp_path / "a.mp4").write_text(playlist)
    with pytest.raises(ValueError, match=r"a\.mp4 is not a video that FFmpeg can read"):
        video.read(tmp_path / "a.mp4")


@pytest.mark.parametrize("read", [video.read, video.info, _latents.load_latents])
def test_a_pipe_is_no_file(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is a pipe or a device: copy"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p, z: video.write(p, z, fps=1e-9), "`fps` must be a positive number, got 1e-09"),
        (lambda p, z: video.write(p, z, fps=1e5), "`fps` must .*, got 100000.0: files hold 0.001"),
        (lambda p, z: video.write(p, z, fps=float("nan")), "`fps` must .*, got nan"),
        (lambda p, z: video.write(p, z[:, :, :0]), "1 to 16384 pixels a side, got 0x16"),
        (lambda p, z: video.write(p, np.zeros((1, 20000, 2, 3))), "a side, got 20000x2"),
        (lambda p, z: video.read(p, fps=1e-9), "`fps` must .*, got 1e-09"),
        (lambda p, z: video.read(p, size=(10**6, 8)), r"`size` must .* at most 16384, got \(10"),
        (lambda p, z: video.read(p, frames=10**30), "`frames` must be at least 1, got 1000"),
    ],
)
def test_numbers_that_files_do_not_hold(call, match, tmp_path, unchecked):
    """The first two used to be written, without an error and without frames."""
    with pytest.raises(ValueError, match=match):
        call(tmp_path / "a.mp4", np.zeros((1, 2, 16, 16, 3), np.float32))
    assert not list(tmp_path.iterdir())


# Latents.

CONFIG = cv.Config(
    block_out_channels=(2, 4), norm_num_groups=2, latent_channels=2, layers_per_block=1
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("frames", "-3"), ("frames", "0"), ("frames", "1e3"), ("frames", "9" * 30)),
        *(("fps", "nan"), ("fps", "-1"), ("fps", "inf"), ("fps", "0"), ("height", "x")),
        *(("scaling_factor", "0"), ("scaled", "yes"), ("fingerprint", "../x")),
    ],
)
def test_latents_with_metadata_that_cannot_be(field, value, tmp_path):
    path = tmp_path / "z.safetensors"
    array = np.zeros((1, 1, 2, 3, 2), np.float32)
    metadata = {"layout": "BTHWC", field: value}
    path.write_bytes(safetensors.numpy.save({"latents": array}, metadata))
    with pytest.raises(ValueError, match=rf"z\.safetensors has {field}=.* which cannot be"):
        _latents.load_latents(path, channels=2)


def test_latents_of_a_later_format(tmp_path):
    path = tmp_path / "z.safetensors"
    array, metadata = np.zeros((1, 1, 2, 3, 2)), {"format": "eqx_cogvae.latents.2"}
    path.write_bytes(safetensors.numpy.save({"latents": array}, metadata))
    with pytest.raises(ValueError, match=r"is of format 'eqx_cogvae\.latents\.2', this version"):
        _latents.load_latents(path, channels=2, layout="BTHWC")


# The command line.

WORDS = (
    *("encode", "decode", "reconstruct", "info", "tiny", "clip.mp4", "z.safetensors", "none", "."),
    *("out.mp4", "out.npy", "out.safetensors", "none/out.mp4", "", "-", "--", "\0", "\udc80", "é"),
    *("--model", "--dtype", "--fps", "--layout", "--start", "--frames", "--size", "--seed"),
    *("--sample", "--memory", "float32", "bfloat16", "int8", "BTHWC", "8x8", "16x24", "0x0"),
    *("99999x99999", "999999999999x8", "-1", "0", "1", "9", "10000000", "9" * 30, "9" * 5000),
    *("1e-9", "1e5", "nan", "inf", "1e400", "0.5", "x" * 5000, "a\nb", "--help", "-h", "--x"),
)
COMMANDS = (
    *("encode clip.mp4 out.safetensors", "decode z.safetensors out.mp4", "info tiny"),
    *("reconstruct clip.mp4 out.npy", "reconstruct --frames 1 --size 8x8"),
)
ATTEMPTS = 150


def arguments(rng):
    """A command that works, with words put in, taken out and replaced."""
    words = rng.choice(COMMANDS).split()
    for _ in range(rng.randrange(4)):
        place = rng.randrange(len(words) + 1)
        keep = rng.randrange(2)
        words[place : place + keep] = rng.choices(WORDS, k=rng.randrange(3))
    return words


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with inputs, and a model that answers at once."""
    vae = cv.VAE(CONFIG, key=jax.random.key(0))
    monkeypatch.setattr(cv, "from_pretrained", lambda *_, **__: vae)
    monkeypatch.setattr(cv.VAE, "encode_step", shortcut(2, 4))
    monkeypatch.setattr(cv.VAE, "decode_step", shortcut(0.5, 3))
    monkeypatch.chdir(tmp_path)
    video.write("clip.mp4", video.procedural_clip(9, 16, 24))
    record = _latents.Latents(np.zeros((1, 3, 8, 12, 2), np.float32), fps=8.0, frames=9)
    _latents.save_latents("z.safetensors", record)


def shortcut(factor, channels):
    """A step without a network: arguments are on trial, not the model."""

    def step(self, frames, cache=None):
        b, _, h, w, _ = frames.shape
        t = frames.shape[1] if factor > 1 else 4 * frames.shape[1]
        return np.zeros((b, t, int(h / factor), int(w / factor), channels), np.float32), cache

    return step


@pytest.mark.parametrize("seed", range(3))
def test_fuzzed_arguments(seed, desk, capsys):
    """An exit code, and one line for each mistake: never a traceback, nor half a file."""
    for number in range(ATTEMPTS):
        words = arguments(random.Random(f"{seed}/{number}"))
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            raise AssertionError(words) from error
        said = capsys.readouterr().err
        assert code in (0, 2), words
        assert "Traceback" not in said and len(said) < 2500, words
        errors = [line for line in said.splitlines() if "error:" in line]
        assert len(errors) == (code == 2), (words, said)
        assert not [name for name in os.listdir() if "partial" in name], words
