"""`python -m eqx_cogvae`, run in this process on a model of random weights."""

import json
import os
import subprocess
import sys

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from reference import thinned

import eqx_cogvae as cv
from eqx_cogvae import _latents, video
from eqx_cogvae._cli import main as cli, options

CONFIG = cv.Config(
    block_out_channels=(4, 4, 4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    latent_channels=4,
    scaling_factor=0.7,
    invert_scale_latents=True,
)


@pytest.fixture(scope="module")
def vae():
    return thinned(cv.VAE(CONFIG, key=jax.random.key(0)))


@pytest.fixture(autouse=True)
def _loaded(vae, monkeypatch, tmp_path):
    def load(name, *, dtype=None):
        if name != "tiny":
            raise FileNotFoundError(f"there is no model {name!r}.")
        return vae if dtype in (None, jnp.float32) else jax.tree.map(lambda x: x.astype(dtype), vae)

    monkeypatch.setattr(cv, "from_pretrained", load, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "clip.mp4"
    video.write(path, video.procedural_clip(17, 16, 24), fps=12)
    return path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_encode_and_decode_give_what_the_model_gives(vae, source, tmp_path):
    assert run("encode", source, tmp_path / "z.safetensors") == 0
    saved = _latents.load_latents(tmp_path / "z.safetensors", channels=4)
    clip = video.read(source)
    latents = vae.encode(jnp.asarray(clip)).mode()
    np.testing.assert_allclose(saved.array, latents, rtol=1e-5, atol=1e-5)
    assert (saved.fps, saved.height, saved.width) == (12, 16, 24)
    assert (saved.frames, saved.padded) == (17, 17)
    assert (saved.scaling_factor, saved.invert_scale_latents, saved.scaled) == (0.7, True, False)
    assert saved.fingerprint == _latents.fingerprint(vae)

    assert run("decode", tmp_path / "z.safetensors", tmp_path / "a.npy") == 0
    decoded = np.load(tmp_path / "a.npy")
    np.testing.assert_allclose(decoded, vae.decode(latents), rtol=1e-5, atol=1e-5)
    assert run("decode", tmp_path / "z.safetensors", tmp_path / "a.mp4") == 0
    assert video.info(tmp_path / "a.mp4") == video.Info(12.0, 17, 16, 24)
    assert video.psnr(video.read(tmp_path / "a.mp4"), decoded) > 25


def test_reconstruct_without_data(tmp_path, capsys):
    assert run("reconstruct", "--frames", 9, "--size", "16x24", "--seed", 1) == 0
    said = capsys.readouterr()
    assert video.info(tmp_path / "out/procedural.mp4") == video.Info(8.0, 9, 16, 24)
    assert video.info(tmp_path / "out/procedural.png").height == 32
    assert "9 frames of 16x24 from the procedural clip" in said.out
    for word in ("PSNR", " s, of which the first batch", "peak memory", "out/procedural.mp4"):
        assert word in said.out
    assert said.err == ""


def test_reconstruct_a_file(vae, tmp_path, capsys):
    source = tmp_path / "large.mp4"
    video.write(source, video.procedural_clip(17, 32, 48), fps=12)
    arguments = ("--start", 2, "--frames", 9, "--size", "16x24", "--fps", 6)
    assert run("reconstruct", source, tmp_path / "a.npy", *arguments[2:]) == 0
    clip = video.read(source, frames=9, size=(16, 24), fps=6)
    due = vae(jnp.asarray(clip))
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), due, rtol=1e-5, atol=1e-5)
    assert f"PSNR {video.psnr(clip, due):.2f} dB" in capsys.readouterr().out
    assert run("reconstruct", source, tmp_path / "b.mp4", *arguments) == 2
    due = "holds 9 frames at 6 frames a second, asked for frames 2 to 10"
    assert due in capsys.readouterr().err
    assert not list(tmp_path.glob("*b.*"))


def test_a_video_is_not_written_over_by_its_reconstruction(source, capsys):
    before = source.read_bytes()
    assert run("reconstruct", source, source) == 2
    assert "is the video that is read: name another file." in capsys.readouterr().err
    assert source.read_bytes() == before


@pytest.mark.parametrize(("frames", "padded"), [(1, 1), (2, 9), (12, 17), (16, 17)])
def test_frame_counts_that_do_not_round_trip(frames, padded, vae, source, tmp_path, capsys):
    z = tmp_path / "z.safetensors"
    assert run("encode", source, z, "--frames", frames) == 0
    warned = capsys.readouterr().err
    assert (f"{frames} frames do not round-trip" in warned) == (frames != padded)
    saved = _latents.load_latents(z)
    assert (saved.frames, saved.padded) == (frames, padded)
    clip, _ = cv.pad_frames(jnp.asarray(video.read(source, frames=frames)))
    np.testing.assert_allclose(saved.array, vae.encode(clip).mode(), rtol=1e-5, atol=1e-5)
    assert run("decode", z, tmp_path / "a.npy") == 0
    assert np.load(tmp_path / "a.npy").shape == (1, frames, 16, 24, 3)


def test_sampling_is_seeded(source, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run("encode", source, f"{name}.safetensors", "--frames", 1, "--sample", seed) == 0
    a, b, c = (_latents.load_latents(tmp_path / f"{name}.safetensors").array for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.full)])
def test_dtypes(dtype, source, tmp_path, capsys):
    assert run("encode", source, "z.safetensors", "--frames", 9, "--dtype", dtype) == 0
    assert _latents.load_latents(tmp_path / "z.safetensors").array.dtype == dtype
    assert run("decode", "z.safetensors", "a.mp4", "--dtype", dtype) == 0
    assert video.info(tmp_path / "a.mp4").frames == 9
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "command", ["encode SOURCE z.safetensors", "reconstruct SOURCE a.npy", "reconstruct OUT.npy"]
)
def test_one_way_to_name_a_size(command, source, tmp_path, capsys):
    words = command.replace("SOURCE", str(source)).replace("OUT.npy", "").split()
    for size in (("--size", "16x16"), ("--height", 16, "--width", 16)):
        assert run(*words, "--frames", 1, *size) == 0
        assert "1 frames of 16x16 " in capsys.readouterr().out
    for size in (("--height", 16), ("--size", "16x16", "--height", 16, "--width", 16)):
        assert run(*words, *size) == 2
        assert "--height and --width" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--size", 9, "16x24"),
        ("--frames", 9, "--size", "16x24"),
        ("--frames", 9, "--height", 16, "--width", 24),
        ("--size", "16x24", "--frames", "9"),
    ],
)
def test_one_way_to_name_a_size_of_a_plan(options, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cv, "plan", lambda vae, shape, **rest: asked.append(shape))
    assert run("info", *options) == 0
    assert asked == [(1, 9, 16, 24)]


@pytest.mark.parametrize(
    ("words", "due"),
    [
        (["--buckets", "8x8", "16x16", "in"], ["--size", "8x8", "--size", "16x16", "in"]),
        (["--buckets", "x"], ["--size", "x"]),
        (["--buckets"], ["--buckets"]),
        (["--size", "9", "8x8"], ["--size", "9", "8x8"]),
        (["--", "--buckets", "8x8", "16x16"], ["--", "--buckets", "8x8", "16x16"]),
    ],
)
def test_sizes_as_earlier_versions_took_them(words, due, monkeypatch):
    parsed = []
    monkeypatch.setattr(
        click.Command, "parse_args", lambda self, ctx, args: parsed.append(args) or args
    )
    options.Command("encode-dataset").parse_args(click.Context(click.Command("x")), words)
    assert parsed == [due]


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ("--frames 100", "holds 17 frames, asked for frames 0 to 99"),
        ("--start 10 --frames 8", "holds 17 frames, asked for frames 10 to 17"),
        ("--start 17", "holds 17 frames, asked for frame 17 and later"),
        ("--fps 6 --frames 10", "holds 9 frames at 6 frames a second, asked for frames 0 to 9"),
        ("--fps 24 --frames 35", "holds 34 frames at 24 frames a second, asked for frames 0 to 34"),
        ("--fps 29.97 --start 99", "at 29.97 frames a second, asked for frame 99 and later"),
    ],
)
@pytest.mark.parametrize("command", ["encode SOURCE OUT.safetensors", "reconstruct SOURCE OUT.npy"])
def test_frames_that_are_not_there_are_told_at_once(
    command, asked, match, source, monkeypatch, capsys
):
    """Before the model is loaded."""
    monkeypatch.setattr(cv, "from_pretrained", None)
    assert run(*command.replace("SOURCE", str(source)).split(), *asked.split()) == 2
    assert match in capsys.readouterr().err.splitlines()[-1]


def test_frames_that_are_just_there(source, tmp_path):
    for asked in ("--frames 17", "--start 16", "--fps 6 --frames 9", "--fps 24 --frames 34"):
        assert run("encode", source, "z.safetensors", *asked.split()) == 0
        found = _latents.load_latents(tmp_path / "z.safetensors")
        due = video.read(
            source,
            **{n.strip("-"): int(v) for n, v in zip(*[iter(asked.split())] * 2, strict=True)},
        )
        assert found.frames == due.shape[1]


def test_a_rate_above_the_videos_own_is_told(source, capsys):
    assert run("encode", source, "z.safetensors", "--fps", 24, "--frames", 1) == 0
    said = capsys.readouterr().err
    assert "clip.mp4 has 12 frames a second, fewer than --fps 24: frames are repeated" in said
    assert run("encode", source, "z.safetensors", "--fps", 12, "--frames", 1) == 0
    assert capsys.readouterr().err == ""


def test_names_with_colons_and_not_utf8(source, tmp_path):
    for name in ("2024-01-01T12:30:00", os.fsdecode(b"caf\xe9"), "猫"):
        (tmp_path / f"{name}.mp4").write_bytes(source.read_bytes())
        assert run("encode", f"{name}.mp4", f"{name}.safetensors", "--frames", 1) == 0
        assert run("decode", f"{name}.safetensors", f"{name}.mkv") == 0
        assert run("reconstruct", f"{name}.mkv", f"{name}.mov") == 0
        assert video.info(tmp_path / f"{name}.mov").frames == 1


def test_latents_that_decode_to_nan(tmp_path, capsys):
    z = np.random.default_rng(0).standard_normal((1, 3, 2, 3, 4)).astype(np.float32)
    _latents.save_latents("z.safetensors", _latents.Latents(z * np.float32(1e38)))
    for output in ("a.mp4", "a.npy"):
        assert run("decode", "z.safetensors", output) == 2
        assert "decode to NaN or infinite values from frame 0 on" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["z.safetensors"]


def test_a_rate_that_no_file_holds(monkeypatch, capsys):
    """Told before anything is decoded; raw floats have no rate."""
    record = _latents.Latents(np.zeros((1, 1, 2, 3, 4), np.float32), fps=5000.0)
    _latents.save_latents("z.safetensors", record)
    assert run("decode", "z.safetensors", "a.npy") == 0
    monkeypatch.setattr(cv, "streamed", None)
    assert run("decode", "z.safetensors", "a.mp4") == 2
    assert "`fps` must be a positive number, got 5000" in capsys.readouterr().err


def test_latents_are_unscaled_by_their_files_factor(vae, tmp_path):
    z = np.random.default_rng(0).standard_normal((1, 2, 2, 3, 4)).astype(np.float32)
    record = _latents.Latents(z * np.float32(1.15258426), scaled=True, scaling_factor=1.15258426)
    _latents.save_latents("z.safetensors", record)
    assert run("decode", "z.safetensors", "a.npy") == 0
    np.testing.assert_allclose(np.load("a.npy"), vae.decode(jnp.asarray(z)), rtol=1e-5, atol=1e-5)


def test_odd_sizes_are_fitted(tmp_path, capsys):
    video.write(tmp_path / "odd.mp4", video.procedural_clip(1, 21, 30))
    assert run("encode", "odd.mp4", "z.safetensors") == 0
    assert "resized to 16x24, which are multiples of 8" in capsys.readouterr().err
    assert _latents.load_latents(tmp_path / "z.safetensors").array.shape == (1, 1, 2, 3, 4)


def test_the_first_latent_alone(vae, source, tmp_path, capsys):
    """As CogVideoX-Fun decodes: t latents are 4 (t - 1) + 1 frames, for an even t too."""
    z = np.random.default_rng(0).standard_normal((1, 4, 2, 3, 4)).astype(np.float32)
    due = cv.framewise(vae.decode_step, 2, first=1)(jnp.asarray(z))
    assert due.shape[1] == 13
    _latents.save_latents("z.safetensors", _latents.Latents(z))
    assert run("decode", "z.safetensors", "a.npy", "--first", 1) == 0
    assert "latents (1, 4, 2, 3, 4) to 13 frames: a.npy" in capsys.readouterr().out
    np.testing.assert_allclose(np.load("a.npy"), due, rtol=1e-5, atol=1e-5)
    assert run("decode", "z.safetensors", "a.npy") == 0
    plain = np.load("a.npy")
    assert plain.shape[1] == 16

    # A dataset's are decoded anew, to files of other names.
    for first, frames in (("--first", 1), 13), ((), 16), (("--first", 1), 13):
        arguments = ("z.safetensors", "back", "--model", "tiny", *first)
        assert run("decode-dataset", *arguments) == 0
        row = json.loads((tmp_path / "back/manifest.jsonl").read_text())
        assert row["frames"] == frames
        clip = video.read(tmp_path / "back" / row["file"])
        assert clip.shape[1] == frames
        if first:
            assert video.psnr(clip, due) > 20 > video.psnr(clip, plain[:, :13])

    assert run("reconstruct", source, "b.npy", "--frames", 9, "--first", 1) == 0
    latents = vae.encode(jnp.asarray(video.read(source, frames=9))).mode()
    due = cv.framewise(vae.decode_step, 2, first=1)(latents)
    np.testing.assert_allclose(np.load("b.npy"), due, rtol=1e-5, atol=1e-5)
    for command in ("decode a b", "reconstruct", "decode-dataset a b --model tiny"):
        assert run(*command.split(), "--first", 0) == 2
        assert "Invalid value for '--first': 0 is not in the range" in capsys.readouterr().err
    assert run("decode", "--help") == 0
    assert "--first LATENTS" in capsys.readouterr().out


def test_latents_of_others(vae, tmp_path, capsys):
    z = np.random.default_rng(0).standard_normal((1, 2, 2, 3, 4)).astype(np.float32)
    due = vae.decode(jnp.asarray(z))
    safetensors.numpy.save_file(
        {"z": np.ascontiguousarray(z.transpose(0, 4, 1, 2, 3))}, "z.safetensors"
    )
    assert run("decode", "z.safetensors", "a.npy") == 0
    np.testing.assert_allclose(np.load("a.npy"), due, rtol=1e-5, atol=1e-5)
    scaled = _latents.Latents(
        np.asarray(vae.scale_latents(jnp.asarray(z))), scaled=True, fingerprint="0" * 12
    )
    _latents.save_latents("s.safetensors", scaled)
    capsys.readouterr()
    assert run("decode", "s.safetensors", "b.npy") == 0
    np.testing.assert_allclose(np.load("b.npy"), due, rtol=1e-5, atol=1e-5)
    assert "encoded by model 000000000000" in capsys.readouterr().err


def test_info(capsys):
    assert run("info") == 0
    said = capsys.readouterr().out
    leaves = jax.tree.leaves(cv.from_pretrained("tiny"))
    for name, value in (
        ("latent_channels", 4),
        ("parameters", f"{sum(leaf.size for leaf in leaves):,}"),
        ("tensors", len(leaves)),
        ("dtype", "float32"),
    ):
        assert f"{name:28} {value}\n" in said


def test_info_plans(capsys):
    assert run("info", "--size", 9, "16x24", "--memory", 0.5) == 0
    said = capsys.readouterr().out
    assert "decode, whole" in said
    assert "cheapest that fits" in said
    assert "memory: 0.5 GiB" in said


def bad(name, content):
    with open(name, "wb") as file:
        file.write(content)


def latents(**fields):
    array = np.zeros((1, 1, 2, 3, 4), np.float32)
    return {"latents": array} | fields


@pytest.mark.parametrize(
    ("command", "match"),
    [
        ("encode none.mp4 OUT.safetensors", "there is no video at none.mp4"),
        ("encode . OUT.safetensors", "is a directory"),
        ("encode garbage OUT.safetensors", "not a video that FFmpeg can read"),
        ("encode cut.mp4 OUT.safetensors", "truncated"),
        ("encode SOURCE OUT.mp4", "must end in .safetensors"),
        ("encode SOURCE none/OUT.safetensors", "there is no directory none"),
        ("encode SOURCE OUT.safetensors --model none", "there is no model 'none'"),
        (
            "encode SOURCE OUT.safetensors --dtype int8",
            "Invalid value for '--dtype': 'int8' is not one of 'float32'",
        ),
        ("encode SOURCE OUT.safetensors --frames 0", "0 is not in the range 1<=x<=9999999"),
        ("encode SOURCE OUT.safetensors --frames 99", "holds 17 frames, asked for frames 0 to 98"),
        ("encode SOURCE OUT.safetensors --size 20x24", "multiples of 8, such as 16x24"),
        ("encode SOURCE OUT.safetensors --size 20", "HEIGHTxWIDTH, such as 480x720, got '20'"),
        ("reconstruct SOURCE OUT.mp4 --seed 1", "--seed is of the procedural clip"),
        ("encode SOURCE", "Missing argument 'OUT'"),
        ("reconstruct SOURCE OUT.gif", "must end in .mp4 or .mov or .mkv or .npy"),
        ("reconstruct --start 3", "--start is of a video"),
        ("decode none OUT.mp4", "there is no latents file at none"),
        ("decode garbage OUT.mp4", "not a complete safetensors file"),
        ("decode pickle OUT.mp4", "is a pickle or an archive"),
        ("decode nan OUT.mp4", "the latents are broken, not the VAE"),
        ("decode wide OUT.mp4", "no axis for 4 channels"),
        ("decode two OUT.mp4", "holds 2 clips, expected one"),
        ("info none", "there is no model 'none'"),
        ("info tiny --size 9 big", "HEIGHTxWIDTH"),
        ("fly", "No such command 'fly'"),
    ],
)
def test_mistakes_are_one_line(command, match, source, tmp_path, capsys, monkeypatch):
    bad("garbage", b"garbage" * 99)
    bad("pickle", b"\x80\x04")
    bad("cut.mp4", source.read_bytes()[:2000])
    safetensors.numpy.save_file({"latents": np.full((1, 1, 2, 3, 4), np.nan)}, "nan")
    safetensors.numpy.save_file({"latents": np.zeros((1, 1, 2, 3, 9))}, "wide")
    safetensors.numpy.save_file({"latents": np.zeros((2, 1, 2, 3, 4))}, "two")
    try:
        code = run(*command.replace("SOURCE", str(source)).split())
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    assert match in said.err and said.err.count("\n") == 1
    assert not list(tmp_path.rglob("*OUT*")) and not list(tmp_path.rglob("*.partial*"))


def test_an_interruption_leaves_nothing(monkeypatch, source, tmp_path, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    assert run("encode", source, "z.safetensors", "--frames", 9) == 0
    monkeypatch.setattr(cv.VAE, "decode_step", stop)
    assert run("decode", "z.safetensors", "a.mp4") == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["z.safetensors"]


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], ["encode", "--help"]])
def test_help_and_version(words, capsys):
    assert run(*words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    due = ("eqx_cogvae " + cv.__version__) if words == ["--version"] else "--help"
    assert due in said.out
    if words == ["--help"]:
        for command in ("reconstruct", "encode", "decode", "encode-dataset", "decode-dataset"):
            assert f"  {command} " in said.out


LIGHT = """
import sys, time
import eqx_cogvae
begun = time.process_time()
from eqx_cogvae.__main__ import main
code = main({words!r})
spent = time.process_time() - begun
heavy = [m for m in ("av", "diffusers", "optax", "pyarrow", "ray", "torch") if m in sys.modules]
print(code, heavy, spent)
"""


@pytest.mark.parametrize("words", [["--help"], ["encode", "--dtype", "int8"]])
def test_help_and_mistakes_import_nothing_heavy(words):
    """They cost little more than the import does, in processor time, the least of three."""
    seconds = []
    while not seconds or (min(seconds) > 0.2 and len(seconds) < 3):
        command = [sys.executable, "-c", LIGHT.format(words=words)]
        said = subprocess.check_output(command, text=True).splitlines()[-1]
        found, spent = said.rsplit(maxsplit=1)
        assert found == f"{2 * (len(words) > 1)} []"
        seconds.append(float(spent))
    assert min(seconds) < 0.2
