"""Video files of odd kinds, playlists, and a fuzzed command line."""

import errno
import os
import random
import resource
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


NAMES = (
    *("2024-01-01T12:30:00", "C:x", "pipe:1", "-x", "file:x", "http:x", "subfile,,start,0,,:x"),
    *("a?b#c", "%03d", "caf\u00e9 \u6620\u753b", "a\nb", "a'b", "\udcff"),
)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_that_of_a_file(name, tmp_path, monkeypatch):
    """FFmpeg takes what stands before a colon for a protocol."""
    monkeypatch.chdir(tmp_path)
    clip = np.stack(grey())
    for path in (f"{name}.mp4", f"{name}.MKV"):
        video.write(path, clip, crf=1)
        assert video.info(path).frames == len(LEVELS)
        for read in (video.read(path), np.concatenate(list(video.frames(path)), axis=1)):
            np.testing.assert_allclose(levels(read), LEVELS, atol=3)
        assert len(list(video.pictures(path))) == len(LEVELS)
        with pytest.raises(FileNotFoundError, match="there is no video at other"):
            video.read("other" + path)
    for suffix in (".png", ".PNG"):
        video.filmstrip(clip, path=name + suffix)
    assert sorted(os.listdir()) == sorted(name + s for s in (".mp4", ".MKV", ".png", ".PNG"))


@pytest.mark.parametrize("name", ["pipe:0", "http://localhost/a.mp4", "concat:a.mp4|b.mp4"])
def test_a_url_is_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (video.read, video.info, lambda path: next(video.frames(path))):
        with pytest.raises(FileNotFoundError, match="there is no video at"):
            read(name)


def test_the_command_line_takes_names_with_colons(desk, capsys):
    os.rename("clip.mp4", "12:30:00.mp4")
    assert cli.main(["reconstruct", "12:30:00.mp4", "12:31:00.mp4"]) == 0, capsys.readouterr()
    assert {"12:31:00.mp4", "12:31:00.png"} <= set(os.listdir())
    assert video.info("12:31:00.mp4").frames == 9


@pytest.mark.parametrize("write", ["write", "filmstrip"])
@pytest.mark.parametrize("room", [0, 600])
def test_a_full_disk_names_the_destination(write, room, tmp_path):
    clip = video.procedural_clip(9, 64, 96)
    path = tmp_path / ("a.mp4" if write == "write" else "a.png")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/a\.(mp4|png)'$") as caught:
            video.write(path, clip) if write == "write" else video.filmstrip(clip, path=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path) and not list(tmp_path.iterdir())


def test_errors_of_a_users_frames_pass_unchanged(tmp_path):
    def pieces():
        yield np.zeros((1, 1, 16, 16, 3), np.float32)
        raise OSError(errno.EIO, "Input/output error", "camera")

    with pytest.raises(OSError, match="Input/output error: 'camera'"):
        video.write(tmp_path / "a.mp4", pieces())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["ts", "mkv", "h264"])
def test_the_frame_size_changes_midway(suffix, tmp_path):
    """Streams of two sizes, one after the other; the second is as wide as high."""
    raw = b""
    for i, shape in enumerate(((32, 48), (48, 48))):
        part = encode(tmp_path / f"part{i}.{'ts' if suffix == 'ts' else 'h264'}", grey(*shape))
        raw += part.read_bytes()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(raw)
    if suffix == "mkv":
        path = remuxed(path, tmp_path / "b.mkv")
    for read in (video.read, lambda p: list(video.frames(p)), lambda p: list(video.pictures(p))):
        with pytest.raises(ValueError, match=r"from 32x48 to 48x48 at frame 5: pass `size=`"):
            read(path)
    clip = video.read(path, size=(16, 16))
    np.testing.assert_allclose(levels(clip), LEVELS * 2, atol=3)
    assert video.read(path, frames=5).shape == (1, 5, 32, 48, 3)
    assert video.read(path, start=5).shape == (1, 5, 48, 48, 3)


def remuxed(source, target):
    """The packets of a raw stream in a container, at 8 a second."""
    with av.open(str(source), format="h264") as a, av.open(str(target), "w") as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for i, packet in enumerate(p for p in a.demux(video=0) if p.size):
            packet.pts = packet.dts = i
            packet.time_base, packet.stream = Fraction(1, 8), stream
            b.mux(packet)
    return target


# Damage: a clip of moving stripes, one packet of which is spoilt.

COUNT, SPOILT = 24, 11


def stripes():
    """Frame i is told from the others by the phase of its stripes, which repeats after 24."""
    x = np.arange(96)
    grain = np.random.default_rng(0).normal(0, 8, (COUNT, 64, 96))
    for i in range(COUNT):
        picture = 128 + 80 * np.sin(2 * np.pi * (x / 48 + i / COUNT)) + grain[i]
        yield np.repeat(picture[..., None], 3, 2).clip(0, 255).astype(np.uint8)


def phases(clip):
    """The number of each frame, by its stripes."""
    waves = np.fft.rfft(clip[0, :, :, :, 0].mean(1))[:, 2]
    return (np.rint((np.angle(waves) + np.pi / 2) * COUNT / (2 * np.pi)) % COUNT).tolist()


def zero_half(packet):
    return packet[: len(packet) // 2] + bytes(len(packet) - len(packet) // 2)


def zero_all(packet):
    return bytes(len(packet))


def bad_header(packet):
    return packet[:4] + b"\xff" + packet[5:]


def spoil(path, harm, number=SPOILT):
    """Harms the packet of a frame, by its index among those shown; returns the path."""
    with av.open(str(path)) as container:
        packets = sorted((p for p in container.demux(video=0) if p.size), key=lambda p: p.pts)
        packet = bytes(packets[number])
    data = path.read_bytes()
    assert data.count(packet) == 1
    path.write_bytes(data.replace(packet, harm(packet)))
    return path


OPTIONS = {
    # Every frame for itself, or every second one shown before the one decoded before it.
    "libx264": {"crf": "8", "bf": "0", "g": "1"},
    "libx265": {"x265-params": "log-level=none"},
    "mpeg4": {"bf": "1", "g": "6"},
}


def moving(path, codec):
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = 64, 96
        stream.pix_fmt = {"png": "rgb24", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.options = OPTIONS.get(codec, {})
        for pixels in stripes():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


DAMAGE = {
    "H.264, half a frame": ("a.mp4", "libx264", zero_half, True),
    "H.264, a frame": ("a.mp4", "libx264", zero_all, False),
    "H.264, a header": ("a.mp4", "libx264", bad_header, False),
    "H.264, a header in Matroska": ("a.mkv", "libx264", bad_header, False),
    "MPEG-4, half a frame": ("a.avi", "mpeg4", zero_half, True),
    "PNG, half a frame": ("a.mov", "png", zero_half, False),
    "JPEG, a header": ("a.avi", "mjpeg", zero_all, False),
    "AV1, half a frame": ("a.mp4", "libsvtav1", zero_half, False),
    "AV1, a frame": ("a.mp4", "libsvtav1", zero_all, False),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_frame(kind, tmp_path):
    """Refused by name; left out; or kept where FFmpeg could conceal it."""
    name, codec, harm, concealed = DAMAGE[kind]
    path = moving(tmp_path / name, codec)
    assert phases(video.read(path)) == list(range(COUNT))
    spoil(path, harm)
    for read in (video.read, lambda p: list(video.frames(p)), lambda p: list(video.pictures(p))):
        with pytest.raises(ValueError, match=rf"is damaged at frame {SPOILT} \(.*`corrupt='skip'`"):
            read(path)
    rest = [i for i in range(COUNT) if i != SPOILT]
    skipped = video.read(path, corrupt="skip")
    assert skipped.shape[1] == COUNT - 1
    assert len(list(video.pictures(path, corrupt="skip"))) == COUNT - 1
    assert sum(p.shape[1] for p in video.frames(path, corrupt="skip")) == COUNT - 1
    assert video.read(path, corrupt="keep").shape[1] == COUNT - (not concealed)
    if codec != "libsvtav1":  # whose later frames are predicted from the damaged one
        assert phases(skipped) == rest
    # Before the damage all is well, and times stay those of the file.
    assert phases(video.read(path, frames=SPOILT - 3)) == rest[: SPOILT - 3]
    assert video.read(path, corrupt="skip", fps=8).shape[1] == COUNT
    assert video.info(path).frames == COUNT


@pytest.mark.parametrize("number", [0, 1, COUNT - 2, COUNT - 1])
def test_any_frame_may_be_the_damaged_one(number, tmp_path):
    path = spoil(moving(tmp_path / "a.mp4", "libx264"), zero_all, number)
    with pytest.raises(ValueError, match=rf"is damaged at frame {number} \("):
        video.read(path)
    rest = [i for i in range(COUNT) if i != number]
    assert phases(video.read(path, corrupt="skip")) == rest
    assert (video.info(path).height, video.info(path).width) == (64, 96)


def test_frames_that_are_missing_without_a_word(tmp_path):
    """FFmpeg leaves out frames of HEVC whose header is spoilt, and gives no error."""
    path = spoil(moving(tmp_path / "a.mp4", "libx265"), bad_header)
    with pytest.raises(ValueError, match=r"is damaged at frame \d+ \(undecodable\)"):
        video.read(path)
    left = video.read(path, corrupt="skip")
    assert 1 <= left.shape[1] < COUNT
    assert phases(left) == sorted(phases(left))


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")])
def test_a_truncated_matroska_file(name, codec, tmp_path):
    path = moving(tmp_path / name, codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"is truncated: [\d.]+ of 3\.0 seconds are there"):
        video.read(path)
    left = video.read(path, corrupt="skip")
    assert phases(left) == list(range(left.shape[1]))


def test_what_is_left_of_a_truncated_file_is_read_on_request(tmp_path):
    path = moving(tmp_path / "a.mp4", "libx264")
    with av.open(str(path)) as container:
        begin = sorted(p.pos for p in container.demux(video=0) if p.size)[9]
    path.write_bytes(path.read_bytes()[: begin + 7])
    with pytest.raises(ValueError, match="is truncated: 9 of 24 frames are there"):
        video.read(path)
    with pytest.raises(ValueError, match="is truncated: 9 of 24 frames are there"):
        video.read(path, frames=20)
    for options in ({"corrupt": "skip"}, {"frames": 9}):
        assert phases(video.read(path, **options)) == list(range(9))


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
    with pytest.raises(
        ValueError, match=rf"z\.safetensors has a bad value in its metadata, {field}="
    ):
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
