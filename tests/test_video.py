"""Video files, film strips, PSNR and the procedural clip."""

import subprocess
import sys
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_cogvae as cv
from eqx_cogvae import video
from eqx_cogvae._cli import main as cli
from eqx_cogvae._pixels import from_pixels, quantised
from eqx_cogvae.video import _read


@pytest.fixture(scope="module")
def clip():
    return video.procedural_clip(17, 48, 64, seed=3)


@pytest.fixture(scope="module")
def file(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    video.write(path, clip, fps=8, crf=4)
    return path


def levels(t, h=32, w=32):
    """Frame i is grey, of a level that names it."""
    return np.broadcast_to(np.linspace(-0.9, 0.9, t)[:, None, None, None], (t, h, w, 3))


def frame_numbers(read, t):
    means = read.mean((0, 2, 3, 4))
    return np.abs(means[:, None] - np.linspace(-0.9, 0.9, t)).argmin(1).tolist()


@pytest.mark.parametrize(
    "shape", [(1, 9, 32, 48, 3), (9, 32, 48, 3), (5, 31, 45, 3), (1, 1, 8, 8, 3)]
)
def test_written_is_read(shape, tmp_path):
    grey = video.procedural_clip(*shape[-4:-1]).mean(-1, keepdims=True)
    clip = np.repeat(grey, 3, axis=-1).reshape(shape)
    path = tmp_path / "clip.mp4"
    video.write(path, clip, crf=2)
    read = video.read(path)
    assert read.shape == (1, *shape[-4:]) and read.dtype == np.float32
    assert np.abs(read).max() <= 1
    assert video.psnr(read.reshape(shape), clip) > 44
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.float16, jnp.bfloat16, "jax"])
def test_write_takes_dtypes(dtype, tmp_path):
    grey = np.full((3, 16, 16, 3), 64)
    given = grey.astype(np.uint8) if dtype is np.uint8 else grey / 127.5 - 1
    given = jnp.asarray(given, jnp.float32) if dtype == "jax" else given.astype(dtype)
    video.write(tmp_path / "a.mkv", given)
    pixels = (video.read(tmp_path / "a.mkv") + 1) * 127.5
    np.testing.assert_allclose(pixels, 64, atol=1.5)


@pytest.mark.parametrize("module", [np, jnp])
def test_pixels_are_converted_in_one_place(module):
    """All 256 levels, there and back, in NumPy and in JAX."""
    levels = module.arange(256, dtype=module.uint8)
    values = from_pixels(levels)
    assert isinstance(values, module.ndarray) and values.dtype == np.float32
    np.testing.assert_allclose(values, np.arange(256) / 127.5 - 1, atol=1e-7)
    back = quantised(values)
    assert isinstance(back, module.ndarray) and back.dtype == np.uint8
    np.testing.assert_array_equal(back, levels)
    np.testing.assert_array_equal(quantised(3 * values[::255]), [0, 255])


def test_colours_survive(tmp_path):
    colours = np.random.default_rng(0).uniform(-1, 1, (3, 4, 3))
    image = np.kron(colours, np.ones((16, 16, 1)))
    video.write(tmp_path / "a.mp4", np.stack([image] * 3), crf=2)
    error = (video.read(tmp_path / "a.mp4")[0, 0] - image).reshape(3, 16, 4, 16, 3)
    assert np.abs(error[:, 4:12, :, 4:12]).max() < 4 / 127.5


def test_pieces_give_the_same_file(clip, file, tmp_path):
    video.write(tmp_path / "a.mp4", iter(np.split(clip, [9], axis=1)), fps=8, crf=4)
    assert (tmp_path / "a.mp4").read_bytes() == file.read_bytes()


def test_info(file):
    assert video.info(file) == video.Info(fps=8.0, frames=17, height=48, width=64)


@pytest.mark.parametrize(
    "options", [{}, {"start": 3, "frames": 11}, {"size": (24, 24)}, {"fps": 5}]
)
def test_frames_are_read_in_pieces(file, options):
    pieces = list(video.frames(file, batch=4, **options))
    assert pieces[0].shape[1] == 5 and {p.shape[1] for p in pieces[1:-1]} <= {4}
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), video.read(file, **options))


@pytest.mark.parametrize(
    ("fps", "due"),
    [
        (8, [0, 1, 2, 3, 4]),
        (4, [0, 2, 4]),
        (16, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        (6, [0, 1, 3, 4]),
        (1.6, [0]),
    ],
)
def test_frame_rate_takes_the_nearest(fps, due, tmp_path):
    video.write(tmp_path / "a.mp4", levels(5), fps=8, crf=0)
    assert frame_numbers(video.read(tmp_path / "a.mp4", fps=fps), 5) == due


def test_range_counts_frames_of_the_new_rate(tmp_path):
    video.write(tmp_path / "a.mp4", levels(9), fps=8, crf=0)
    read = video.read(tmp_path / "a.mp4", fps=4, start=1, frames=3)
    assert frame_numbers(read, 9) == [2, 4, 6]


def test_resize_crops_about_the_centre(tmp_path):
    wide = np.full((2, 32, 96, 3), -1.0)
    wide[:, :, 32:64] = 1
    video.write(tmp_path / "a.mp4", wide, crf=0)
    assert video.read(tmp_path / "a.mp4", size=(16, 16)).min() > 0.9
    tall = video.read(tmp_path / "a.mp4", size=(16, 8))
    assert tall.shape == (1, 2, 16, 8, 3) and tall.min() > 0.9
    assert video.read(tmp_path / "a.mp4", size=(16, 48)).min() < -0.9


def test_resize_is_antialiased(tmp_path):
    stripes = np.ones((1, 64, 64, 3))
    stripes[:, :, ::2] = -1
    video.write(tmp_path / "a.mp4", stripes, crf=0)
    inner = video.read(tmp_path / "a.mp4", size=(16, 16))[:, :, 2:-2, 2:-2]
    assert np.abs(inner).max() < 0.02


def truncated(path, file):
    """The index first, then half of the data."""
    moved = path.with_name("moved.mp4")
    with av.open(str(file)) as a, av.open(str(moved), "w", options={"movflags": "faststart"}) as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(a.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                b.mux(packet)
    path.write_bytes(moved.read_bytes()[: moved.stat().st_size // 2])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p, f: None, FileNotFoundError, r"there is no video at .*a\.mp4"),
        (lambda p, f: p.mkdir(), IsADirectoryError, "is a directory, name a video in it"),
        (lambda p, f: p.write_bytes(b""), ValueError, "not a video that FFmpeg can read"),
        (
            lambda p, f: p.write_bytes(b"garbage" * 999),
            ValueError,
            "not a video that FFmpeg can read",
        ),
        (lambda p, f: p.write_bytes(f.read_bytes()[:3000]), ValueError, "truncated"),
        (truncated, ValueError, "truncated"),
    ],
)
def test_bad_files(make, error, match, file, tmp_path):
    path = tmp_path / "a.mp4"
    make(path, file)
    with pytest.raises(error, match=match) as caught:
        video.read(path)
    assert "\n" not in str(caught.value)


def test_a_title_in_any_encoding(file, tmp_path):
    path, title = tmp_path / "a.mkv", "café"
    with av.open(str(file)) as source, av.open(str(path), "w") as copy:
        copy.metadata["title"] = title
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    data = path.read_bytes()
    assert data.count(title.encode()) == 1
    # As many bytes: the sizes in the file still hold.
    path.write_bytes(data.replace(title.encode(), title.encode("latin-1") + b"\xff"))
    assert video.read(path).shape[1] == video.info(path).frames == 17


def test_cut_between_frames_is_truncation(file, tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(file)) as container:
        keep = sorted(p.pos or 0 for p in container.demux(video=0) if p.size)[9]
    path.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is truncated: 9 of 17 frames are there"):
        video.read(path)


@pytest.mark.parametrize("cover", [False, True])
@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "aac"), ("a.mp3", "libmp3lame"), ("a.flac", "flac")]
)
def test_audio_is_no_video(name, codec, cover, tmp_path):
    """A cover picture, in the same file, is none either."""
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        audio = container.add_stream(codec, rate=44100)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width = picture.height = 32
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
            container.mux([*picture.encode(black), *picture.encode()])
        silence = np.zeros((2, 44100), np.float32 if codec != "flac" else np.int16)
        sample = "fltp" if codec != "flac" else "s16p"
        frame = av.AudioFrame.from_ndarray(silence, layout="stereo", format=sample)
        frame.sample_rate = 44100
        container.mux([*audio.encode(frame), *audio.encode()])
    for read in (video.read, video.info, lambda p: list(video.pictures(p))):
        with pytest.raises(ValueError, match=rf"{name} has no video stream"):
            read(path)


@pytest.mark.parametrize(
    ("suffix", "match"), [("mkv", "holds no frames"), ("mp4", "no video stream, or an empty one")]
)
def test_video_without_frames(suffix, match, tmp_path):
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 16
        container.start_encoding()
    with pytest.raises(ValueError, match=match):
        video.read(path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"frames": 18}, "holds 17 frames, asked for frames 0 to 17"),
        ({"start": 17}, "holds 17 frames, asked for frame 17 and later"),
        ({"start": 10, "frames": 8}, "holds 17 frames, asked for frames 10 to 17"),
        ({"start": -1}, "`start` must be at least 0, got -1"),
        ({"frames": 0}, "`frames` must be at least 1, got 0"),
        ({"size": (0, 8)}, r"`size` must be \(height, width\)"),
        ({"fps": 0}, "`fps` must be a positive number, got 0"),
        ({"corrupt": "drop"}, "`corrupt` must be 'raise', 'skip' or 'keep', got 'drop'"),
        (
            {"fps": 16, "frames": 35},
            "holds 34 frames at 16 frames a second, asked for frames 0 to 34",
        ),
        (
            {"fps": 4, "start": 9},
            "holds 9 frames at 4 frames a second, asked for frame 9 and later",
        ),
    ],
)
def test_bad_ranges(file, options, match, unchecked, monkeypatch):
    """Told at once: nothing is decoded, and `frames` does not wait for the first piece."""
    monkeypatch.setattr(_read, "decoded", None)
    for read in (video.read, video.frames):
        with pytest.raises(ValueError, match=match):
            read(file, **options)


@pytest.mark.parametrize("fps", [None, 5, 8, 24])
def test_the_last_frames_are_no_frames_too_many(fps, file):
    there = video.read(file, fps=fps).shape[1]
    assert video.read(file, fps=fps, frames=there).shape[1] == there
    assert video.read(file, fps=fps, start=there - 1).shape[1] == 1


def test_the_command_line_tells_of_too_many_frames_at_once(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cv, "from_pretrained", None)
    for command in ("encode", "reconstruct"):
        output = tmp_path / ("z.safetensors" if command == "encode" else "a.mp4")
        for rate in ([], ["--fps", "16"]):
            assert cli.main([command, str(file), str(output), "--frames", "100", *rate]) == 2
            holds = "34 frames at 16 frames a second" if rate else "17 frames"
            assert f"clip.mp4 holds {holds}, asked for" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.*"))


@pytest.mark.parametrize(
    ("clip", "match"),
    [
        (np.zeros((2, 3, 16, 16, 3)), "one clip at a time, got a batch of 2"),
        (np.zeros((16, 16, 3)), r"got shape \(16, 16, 3\)"),
        (np.zeros((9, 16, 16, 4)), r"got shape \(9, 16, 16, 4\)"),
        (np.zeros((1, 3, 9, 16, 16)), r"on axis 1, use `moveaxis\(video, 1, -1\)`"),
        (np.zeros((9, 3, 16, 16)), r"on axis 1, use `moveaxis\(video, 1, -1\)`"),
        (np.zeros((1, 0, 16, 16, 3)), "no frames to write"),
        (np.zeros((1, 2, 16, 16, 3), int), "must be floating in .* got int64"),
        (np.full((1, 2, 16, 16, 3), 255.0), r"got values up to 255: scale by `x / 127.5 - 1`"),
        (np.full((1, 2, 16, 16, 3), np.nan), "NaN or infinite"),
        (iter([np.zeros((1, 2, 16, 16, 3)), np.zeros((1, 2, 16, 24, 3))]), "of one size"),
        (iter([]), "no frames to write"),
    ],
)
def test_bad_clips_leave_no_file(clip, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        video.write(tmp_path / "a.mp4", clip)
    assert not list(tmp_path.iterdir())


def test_a_failing_iterator_leaves_the_old_file(tmp_path):
    def pieces():
        yield np.zeros((1, 9, 16, 16, 3))
        raise RuntimeError("interrupted")

    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="interrupted"):
        video.write(path, pieces())
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "options", "error", "match"),
    [
        ("a.gif", {}, ValueError, r"must end in \.mp4, \.mov, \.mkv, got 'a\.gif'"),
        ("none/a.mp4", {}, FileNotFoundError, "there is no directory"),
        ("a.mp4", {"fps": 0}, ValueError, "`fps` must be a positive number"),
        ("a.mp4", {"crf": 52}, ValueError, "`crf` must lie in 0 to 51, got 52"),
    ],
)
def test_bad_targets(name, options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        video.write(tmp_path / name, np.zeros((1, 2, 16, 16, 3)), **options)
    assert not list(tmp_path.iterdir())


def test_show_embeds_an_mp4(clip):
    html = video.show(clip, width=320)._repr_html_()
    assert html.startswith("<video controls") and 'width="320"' in html
    assert "data:video/mp4;base64," in html and "http" not in html


def test_filmstrip(clip, tmp_path):
    path = tmp_path / "strip.png"
    strip = video.filmstrip(clip, -clip, n=5, path=path)
    assert strip.shape == (2 * 48, 5 * 64, 3) and strip.dtype == np.uint8
    last = np.rint((clip[0, -1] + 1) * 127.5)
    np.testing.assert_allclose(strip[:48, -64:], last, atol=1)
    assert path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]
    saved = np.rint((video.read(path)[0, 0] + 1) * 127.5)
    np.testing.assert_array_equal(saved, strip)
    assert video.filmstrip(clip[:, :3]).shape == (48, 3 * 64, 3)


def test_filmstrip_refuses(clip, tmp_path):
    with pytest.raises(ValueError, match="must be of one shape"):
        video.filmstrip(clip, clip[:, :9])
    with pytest.raises(ValueError, match="needs a video"):
        video.filmstrip()
    with pytest.raises(ValueError, match=r"must end in \.png"):
        video.filmstrip(clip, path=tmp_path / "a.jpg")


def test_psnr():
    a = np.zeros((1, 2, 8, 8, 3), np.float32)
    assert video.psnr(a, a) == np.inf
    assert video.psnr(a, a + 0.2) == pytest.approx(20, abs=1e-5)
    assert video.psnr(a + 1, a + 7) == np.inf
    assert video.psnr(jnp.asarray(a, jnp.bfloat16), a + 0.5) == pytest.approx(12.0412, abs=1e-3)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 8, 8, 3\) and \(1, 1, 8, 8, 3\)"):
        video.psnr(a, a[:, :1])
    with pytest.raises(ValueError, match="scale by"):
        video.psnr(a.astype(np.uint8), a)


def test_procedural_clip():
    clip = video.procedural_clip(9, 48, 72)
    assert clip.shape == (1, 9, 48, 72, 3) and clip.dtype == np.float32
    assert -1 <= clip.min() < -0.7 and 0.7 < clip.max() <= 1
    np.testing.assert_array_equal(clip, video.procedural_clip(9, 48, 72, seed=0))
    np.testing.assert_array_equal(clip[:, :5], video.procedural_clip(5, 48, 72))
    assert np.abs(clip - video.procedural_clip(9, 48, 72, seed=1)).mean() > 0.1
    assert 0.01 < np.abs(np.diff(clip, axis=1)).mean() < 0.2
    with pytest.raises(ValueError, match="`height` must be at least 1, got 0"):
        video.procedural_clip(9, 0, 72)


def test_import_leaves_av_alone():
    code = "import sys, eqx_cogvae, eqx_cogvae.video; sys.exit('av' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_missing_av_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "eqx_cogvae\[video\]"'):
        video.write(tmp_path / "a.mp4", np.zeros((1, 2, 16, 16, 3)))
