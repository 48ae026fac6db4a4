"""Whole datasets: what is encoded, under which names, and that no accident changes it."""

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_cogvae as cv
from eqx_cogvae import _latents, dataset, video
from eqx_cogvae._cli import dataset as _dataset_commands, main as cli
from eqx_cogvae.dataset import (
    Settings,
    _clips as _dataset_clips,
    _decode as _dataset_decode,
    _encode as _dataset_encode,
    _lock as _dataset_lock,
    _sources as _dataset_sources,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = cv.Config(
    block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4
)
SIZE = (16, 24)
FRAMES = {"a.mp4": 20, "sub/b.mp4": 9, "c.mp4": 17}
NINE = Settings(frames=9)


@pytest.fixture(scope="module")
def vae():
    return cv.VAE(CONFIG, key=jax.random.key(0))


@pytest.fixture(scope="module")
def model(vae, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    cv.save_pretrained(vae, path)
    return path


def write(path, frames, seed=0, size=SIZE, fps=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write(path, video.procedural_clip(frames, *size, seed=seed), fps=fps)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two clips, one and one of nine frames, and what is left."""
    root = tmp_path_factory.mktemp("videos")
    for seed, (name, frames) in enumerate(FRAMES.items()):
        write(root / name, frames, seed)
    return root


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest(root):
    return lines(root / "manifest.jsonl")


def tree(root, under="."):
    """Every file, and its bytes."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files(root / under)}


def files(root):
    return [path for path in root.rglob("*") if path.is_file()]


def load(root, clip):
    return _latents.load_latents(root / clip["file"], channels=4)


def test_clips_are_what_the_model_encodes(vae, videos, tmp_path, monkeypatch):
    summary = dataset.encode(vae, videos, tmp_path, NINE)
    assert (summary.sources, summary.clips, summary.written) == (3, 4, 4)
    clips = manifest(tmp_path)
    assert [(c["source"], c["start"]) for c in clips] == [
        ("a.mp4", 0),
        ("a.mp4", 9),
        ("c.mp4", 0),
        ("sub/b.mp4", 0),
    ]
    for clip in clips:
        pixels = video.read(videos / clip["source"], start=clip["start"], frames=9)
        saved = load(tmp_path, clip)
        due = vae.encode(jnp.asarray(pixels)).mode()
        np.testing.assert_allclose(saved.array, due, rtol=1e-5, atol=1e-5)
        assert list(saved.array.shape) == clip["shape"]
        assert (saved.source, saved.start, saved.fps) == (clip["source"], clip["start"], 12)
        assert (saved.frames, saved.padded, saved.height, saved.width) == (9, 9, *SIZE)
        assert saved.scaling_factor == CONFIG.scaling_factor
        assert saved.fingerprint == clip["fingerprint"] == _latents.fingerprint(vae)

    monkeypatch.setattr(cv, "from_pretrained", lambda name, dtype=None: vae)
    path = tmp_path / clips[1]["file"]
    assert cli.main(["decode", str(path), str(tmp_path / "back.mp4")]) == 0
    assert video.info(tmp_path / "back.mp4") == video.Info(12.0, 9, *SIZE)


def test_a_second_run_does_only_what_is_missing(vae, videos, tmp_path):
    dataset.encode(vae, videos, tmp_path, NINE)
    whole = tree(tmp_path)
    assert dataset.encode(vae, videos, tmp_path, NINE).written == 0
    assert tree(tmp_path) == whole
    lost = manifest(tmp_path)[1]["file"]
    (tmp_path / lost).unlink()
    assert dataset.encode(vae, videos, tmp_path, NINE).written == 1
    assert tree(tmp_path) == whole


def test_order_makes_no_difference(vae, videos, tmp_path):
    settings = Settings(frames=9, latents="sample")
    dataset.encode(vae, videos, tmp_path / "all", settings)
    for name in reversed(FRAMES):
        listed = videos / "one.txt"
        listed.write_text(f"# alone\n\n{name}\n")
        dataset.encode(vae, listed, tmp_path / "each", settings)
        listed.unlink()
    assert tree(tmp_path / "all", "latents") == tree(tmp_path / "each", "latents")
    assert tree(tmp_path / "all", "records") == tree(tmp_path / "each", "records")


def test_what_changes_gets_another_name(vae, videos, tmp_path):
    seen = set()

    def fresh(model=vae, source=videos, **fields):
        summary = dataset.encode(model, source, tmp_path / "z", Settings(**{"frames": 9} | fields))
        ids = {clip["id"] for clip in manifest(tmp_path / "z")}
        new = len(ids - seen)
        seen.update(ids)
        assert summary.written == new
        return new

    assert fresh() == 4
    assert fresh() == fresh(seed=1) == fresh(fps=None) == 0
    for fields in (
        {"fps": 6},
        {"sizes": (SIZE,)},
        {"layout": "BCTHW"},
        {"latents": "sample"},
        {"latents": "sample", "seed": 1},
        {"latents": "posterior"},
        {"tail": "shorten"},
    ):
        assert fresh(**fields) == len(manifest(tmp_path / "z")) > 1
    # As small a change as there is: less than the fingerprint of bfloat16 sees.
    weight = lambda tree: tree.encoder.conv_in.conv.bias  # noqa: E731
    bias = jnp.nextafter(weight(vae), jnp.inf)
    changed = jax.tree.map(lambda leaf: bias if leaf is weight(vae) else leaf, vae)
    assert _latents.fingerprint(changed) == _latents.fingerprint(vae)
    assert fresh(model=changed) == 4
    other = tmp_path / "videos"
    write(other / "a.mp4", 9, seed=0)
    assert fresh(source=other) == 1
    write(other / "a.mp4", 9, seed=9)
    assert fresh(source=other) == 1


def test_samples_are_seeded_by_what_they_are_of(vae, videos, tmp_path):
    def encoded(name, source=videos, **fields):
        dataset.encode(vae, source, tmp_path / name, Settings(frames=9, **fields))
        return [load(tmp_path / name, clip) for clip in manifest(tmp_path / name)]

    posteriors = encoded("posterior", latents="posterior")
    samples = encoded("sample", latents="sample")
    others = encoded("other", latents="sample", seed=1)
    assert len({sample.seed for sample in samples + others}) == 8
    for posterior, sample in zip(posteriors, samples, strict=True):
        found = cv.DiagonalGaussian(jnp.asarray(posterior.array), jnp.asarray(posterior.logvar))
        due = found.sample(dataset.noise_key(sample.seed))
        np.testing.assert_array_equal(sample.array, due)
    for a, b in zip(samples, others, strict=True):
        assert np.abs(a.array - b.array).max() > 1e-3
    write(tmp_path / "renamed" / "x.mp4", 20, seed=0)
    renamed = encoded("renamed-z", tmp_path / "renamed", latents="sample")
    np.testing.assert_array_equal(renamed[0].array, samples[0].array)


def test_layouts(vae, videos, tmp_path):
    plain, torch = tmp_path / "plain", tmp_path / "torch"
    dataset.encode(vae, videos, plain, Settings(frames=9, latents="posterior"))
    dataset.encode(vae, videos, torch, Settings(frames=9, latents="posterior", layout="BCTHW"))
    for a, b in zip(manifest(plain), manifest(torch), strict=True):
        assert (a["shape"], b["shape"]) == ([1, 5, 8, 12, 4], [1, 4, 5, 8, 12])
        a, b = load(plain, a), load(torch, b)
        np.testing.assert_array_equal(a.array, b.array)
        np.testing.assert_array_equal(a.logvar, b.logvar)


@pytest.mark.parametrize(
    ("frames", "tail", "due"),
    [
        (9, "drop", [(0, 9, 9), (9, 9, 9)]),
        (9, "shorten", [(0, 9, 9), (9, 9, 9), (18, 1, 1)]),
        (9, "pad", [(0, 9, 9), (9, 9, 9), (18, 2, 9)]),
        (17, "shorten", [(0, 17, 17), (17, 1, 1)]),
        (25, "shorten", [(0, 17, 17)]),
        (25, "pad", [(0, 20, 25)]),
        (1, "drop", [(i, 1, 1) for i in range(20)]),
        (None, "drop", [(0, 20, 25)]),
    ],
)
def test_clips_of_twenty_frames(frames, tail, due, vae, videos, tmp_path):
    dataset.encode(vae, videos / "a.mp4", tmp_path, Settings(frames=frames, tail=tail))
    clips = manifest(tmp_path)
    assert [(c["start"], c["frames"], c["padded"]) for c in clips] == due
    last, (start, count, _) = clips[-1], due[-1]
    padded, _ = cv.pad_frames(video.read(videos / "a.mp4", start=start, frames=count))
    latents = vae.encode(jnp.asarray(padded)).mode()
    np.testing.assert_allclose(load(tmp_path, last).array, latents, rtol=1e-5, atol=1e-5)


def test_frame_rate_and_buckets(vae, tmp_path):
    write(tmp_path / "v" / "wide.mp4", 18, size=(18, 30))
    write(tmp_path / "v" / "tall.mp4", 18, size=(30, 18))
    settings = Settings(frames=9, fps=6, sizes=((24, 16), SIZE))
    dataset.encode(vae, tmp_path / "v", tmp_path / "z", settings)
    tall, wide = manifest(tmp_path / "z")
    assert (tall["height"], tall["width"], tall["fps"]) == (24, 16, 6.0)
    assert (wide["height"], wide["width"], wide["frames"]) == (*SIZE, 9)
    pixels = video.read(tmp_path / "v" / "wide.mp4", frames=9, fps=6, size=SIZE)
    due = vae.encode(jnp.asarray(pixels)).mode()
    np.testing.assert_allclose(load(tmp_path / "z", wide).array, due, rtol=1e-5, atol=1e-5)
    assert _dataset_clips.fitted((21, 30), (), 8) == (16, 24)


def test_nothing_is_compiled_for_a_clip_of_known_size(vae, videos, tmp_path):
    dataset.encode(vae, videos, tmp_path / "first", Settings(frames=9, tail="pad"))
    compiled = []

    def listen(event, seconds, **rest):
        if event.endswith("backend_compile_duration"):
            compiled.append(seconds)

    for seed in range(3):
        write(tmp_path / "v" / f"{seed}.mp4", 20 + 5 * seed, seed=10 + seed)
    jax.monitoring.register_event_duration_secs_listener(listen)
    dataset.encode(vae, tmp_path / "v", tmp_path / "second", Settings(frames=9, tail="pad"))
    assert len(manifest(tmp_path / "second")) == 10
    assert compiled == []
    # The listener hears of a program that is new.
    jax.jit(lambda x: x * 3.25)(jnp.ones(7))
    assert compiled


def broken_videos(root):
    """Each kind of broken video, and what is said of it."""
    write(root / "cut.mp4", 30)
    content = (root / "cut.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(content[: len(content) // 2])
    (root / "empty.mp4").write_bytes(b"")
    (root / "garbage.mp4").write_bytes(b"garbage" * 99)
    write(root / "short.mp4", 5)
    with av.open(str(root / "small.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.height, stream.width, stream.pix_fmt = 1, 6, "yuv444p"
        frame = av.VideoFrame.from_ndarray(np.zeros((1, 6, 3), np.uint8), "rgb24")
        container.mux([*stream.encode(frame), *stream.encode()])
    return {
        "cut.mp4": "cut.mp4 is truncated: ",
        "empty.mp4": "empty.mp4 is not a video",
        "garbage.mp4": "garbage.mp4 is not a video",
        "short.mp4": "holds 5 frames, a clip 9",
        "small.mp4": "small.mp4 is 1x6, the model needs 2x2: name a size",
    }


def test_broken_videos_are_reported_and_nothing_else_is_lost(vae, videos, tmp_path, model, capsys):
    due = broken_videos(tmp_path / "v")
    for name in FRAMES:
        (tmp_path / "v" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "v" / name).write_bytes((videos / name).read_bytes())
    summary = dataset.encode(vae, tmp_path / "v", tmp_path / "z", NINE)
    assert (summary.sources, summary.clips) == (8, 4)
    skipped = lines(tmp_path / "z" / "skipped.jsonl")
    assert [row["source"] for row in skipped] == sorted(due)
    for row in skipped:
        assert row["reason"].startswith(due[row["source"]])
        assert str(tmp_path) not in row["reason"]
    assert "truncated" in skipped[0]["reason"]
    assert summary.skipped == tuple((row["source"], row["reason"]) for row in skipped)
    whole = tree(tmp_path / "z")
    arguments = ("encode-dataset", tmp_path / "v", tmp_path / "z", "--model", model, "--frames", 9)
    assert run(*arguments) == 0
    assert "skipped garbage.mp4: garbage.mp4 is not a video" in capsys.readouterr().err
    assert run(*arguments, "--strict") == 1
    assert "5 sources were skipped, and --strict allows none" in capsys.readouterr().err
    assert tree(tmp_path / "z") == whole


def test_a_run_in_which_everything_failed(tmp_path, model, capsys):
    """Also for latents; where nothing was skipped, there is nothing to complain of."""
    for command, name in (("encode-dataset", "a.mp4"), ("decode-dataset", "a.safetensors")):
        (tmp_path / name).write_bytes(b"garbage" * 9)
        arguments = (command, tmp_path / name, tmp_path / "z", "--model", model)
        assert run(*arguments) == 1
        said = capsys.readouterr()
        assert "error: all of the 1 sources failed: skipped.jsonl tells why" in said.err
        assert "skipped                      1" in said.out
        assert run(*arguments, "--shard", "1/2", "--strict") == 0


def test_clips_before_a_fault_are_kept(vae, tmp_path, monkeypatch):
    def faulty(path, **options):
        yield from pictures(path, **options)
        raise ValueError(f"{path} is truncated.")

    pictures = video.pictures
    write(tmp_path / "v" / "a.mp4", 12)
    monkeypatch.setattr(video, "pictures", faulty)
    for _ in range(2):
        summary = dataset.encode(vae, tmp_path / "v", tmp_path / "z", NINE)
        assert summary.skipped == (("a.mp4", "a.mp4 is truncated."),)
        assert [clip["start"] for clip in manifest(tmp_path / "z")] == [0]
        assert not (tmp_path / "z" / "records").exists()
    assert summary.written == 0


def test_latents_that_are_not_finite_are_not_written(vae, videos, tmp_path):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, vae)
    summary = dataset.encode(broken, videos, tmp_path, NINE)
    assert (summary.clips, len(summary.skipped)) == (0, 3)
    assert "frames from 0 on: latents hold 1920 NaN" in summary.skipped[0][1]


def test_an_error_of_ours_ends_the_run(vae, videos, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(_dataset_encode, "save_latents", full)
    with pytest.raises(OSError, match="no space left"):
        dataset.encode(vae, videos, tmp_path, NINE)
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]
    assert not (tmp_path / "manifest.jsonl").exists()


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def command(*arguments):
    return [sys.executable, "-m", "eqx_cogvae", *map(str, arguments)]


def environment(**more):
    """Programs that one process compiled serve the others."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    return os.environ | cache | more


def clips_in(root):
    return len(list(root.glob("latents/*/*.safetensors")))


def stopped(arguments, destination, how, due, later=0.0):
    """A run's code and stderr: it gets a signal `later` seconds after `due` clips are there."""
    # A shell's background job is told to ignore this one, and would hand that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(command(*arguments), cwd=ROOT, env=environment(), stderr=words)
        while process.poll() is None and clips_in(destination) < due:
            time.sleep(0.002)
        time.sleep(later)
        process.send_signal(how)
        code = process.wait()
        words.seek(0)
        return code, words.read()


def kill_at_random(arguments, destination, kills, most, rng):
    """Starts a run again and again, each killed at a moment after up to `most` more clips.

    Returns how many clips were done after each kill.
    """
    done = [0]
    for _ in range(kills):
        due = done[-1] + rng.randint(1, most)
        stopped(arguments, destination, signal.SIGKILL, due, rng.uniform(0, 0.03))
        done.append(clips_in(destination))
    return done[1:]


def check_that_kills_change_nothing(tmp_path, model, kills, most, *options):
    arguments = ["--model", model, "--frames", 9, "--latents", "sample", *options]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    due = run("encode-dataset", tmp_path / "v", whole, *arguments)
    killed.mkdir()
    arguments = ["encode-dataset", tmp_path / "v", killed, *arguments]
    done = kill_at_random(arguments, killed, kills, most, random.Random(kills))
    assert run(*arguments) == due == 0
    assert tree(killed) == tree(whole)
    return done


@pytest.mark.parametrize("options", [(), ("--format", "webdataset", "--per-tar", 5)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(options, tmp_path, model):
    for seed in range(12):
        write(tmp_path / "v" / f"{seed}.mp4", 9 + seed % 3, seed)
    (tmp_path / "v" / "broken.mp4").write_bytes(b"garbage")
    check_that_kills_change_nothing(tmp_path, model, 2 if options else 3, 4, *options)


def test_an_interrupted_run_goes_on(tmp_path, model):
    for seed in range(40):  # enough to be still at it, however busy the machine
        write(tmp_path / "v" / f"{seed}.mp4", 9, seed)
    arguments = ["encode-dataset", tmp_path / "v", tmp_path / "z", "--model", model, "--frames", 9]
    for _ in range(3):
        code, words = stopped(arguments, tmp_path / "z", signal.SIGINT, 2)
        if "Exception ignored in" not in words:
            break
        # Python drops an interrupt that comes within a callback of its garbage collector.
        shutil.rmtree(tmp_path / "z")
    assert code == 130 and "interrupted" in words.splitlines()[-1], words
    assert "Traceback" not in words
    assert 2 <= clips_in(tmp_path / "z") < 40
    assert run(*arguments) == 0
    arguments[2] = tmp_path / "whole"
    assert run(*arguments) == 0
    assert tree(tmp_path / "z") == tree(tmp_path / "whole")


@pytest.mark.full
def test_two_hundred_clips_five_broken_killed_ten_times(tmp_path, model):
    for seed in range(195):
        write(tmp_path / "v" / f"{seed:03}.mp4", 9 + seed % 17, seed)
    broken_videos(tmp_path / "v")
    done = check_that_kills_change_nothing(tmp_path, model, 10, 40)
    clips = len(manifest(tmp_path / "killed"))
    print(f"of {clips} clips were done after each kill: {done}")
    assert clips > done[-1] and done == sorted(done)
    assert len(lines(tmp_path / "killed" / "skipped.jsonl")) == 5


def test_shards_are_a_partition(vae, videos, tmp_path):
    dataset.encode(vae, videos, tmp_path / "whole", NINE)
    for i in range(2):
        dataset.encode(vae, videos, tmp_path / "parts", NINE, shard=(i, 2))
    assert tree(tmp_path / "whole", "latents") == tree(tmp_path / "parts", "latents")
    parts = [lines(tmp_path / "parts" / f"manifest-{i}-of-2.jsonl") for i in range(2)]
    assert sorted(map(str, parts[0] + parts[1])) == sorted(map(str, manifest(tmp_path / "whole")))
    assert {c["source"] for c in parts[0]} & {c["source"] for c in parts[1]} == set()
    with pytest.raises(ValueError, match="counted from 0 to n - 1, got 2 of 2"):
        dataset.encode(vae, videos, tmp_path / "parts", NINE, shard=(2, 2))


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_webdataset_in_and_out(vae, videos, tmp_path):
    names = list(FRAMES)
    content = [(videos / name).read_bytes() for name in names]
    (tmp_path / "in").mkdir()
    tar_of(
        tmp_path / "in" / "0.tar",
        {"x/0.mp4": content[0], "x/0.txt": b"a disc\n", "1.mp4": content[1], "1.json": b'{"k": 2}'},
    )
    tar_of(tmp_path / "in" / "1.tar", {"2.mp4": content[2], "3.mp4": b"garbage"})
    (tmp_path / "in" / "2.tar").write_bytes(b"garbage" * 99)
    options = {"container": "webdataset", "per_tar": 3}
    for _ in range(2):
        summary = dataset.encode(vae, tmp_path / "in", tmp_path / "z", NINE, **options)
        assert [name for name, _ in summary.skipped] == ["1.tar/3.mp4", "2.tar"]
        assert "2.tar is not a complete, uncompressed tar" in summary.skipped[1][1]
        assert {p.name for p in files(tmp_path / "z")} >= {
            "latents-000000.tar",
            "latents-000001.tar",
        }
        assert not list((tmp_path / "z").rglob("*.safetensors"))
    assert summary.written == 0

    clips = manifest(tmp_path / "z")
    assert [c.get("caption") for c in clips] == [None, "a disc", "a disc", None]
    assert clips[0]["k"] == 2
    dataset.encode(vae, videos, tmp_path / "plain", NINE)
    due = {(c["source_sha256"], c["start"]): c for c in manifest(tmp_path / "plain")}
    for clip in clips:
        with tarfile.open(tmp_path / "z" / clip["file"]) as tar:
            (tmp_path / "member").write_bytes(tar.extractfile(clip["id"] + ".safetensors").read())
            said = json.loads(tar.extractfile(clip["id"] + ".json").read())
        assert said == {k: v for k, v in clip.items() if k != "file"}
        twin = load(tmp_path / "plain", due[clip["source_sha256"], clip["start"]])
        mine = _latents.load_latents(tmp_path / "member")
        np.testing.assert_array_equal(mine.array, twin.array)
        assert mine.source.startswith(("0.tar/", "1.tar/"))


def test_packing_may_be_cut_off(vae, videos, tmp_path):
    options = {"container": "webdataset", "per_tar": 3}
    dataset.encode(vae, videos, tmp_path / "whole", NINE, **options)
    # Nothing is packed yet, as after a kill before the first tar.
    dataset.encode(vae, videos, tmp_path / "cut", NINE)
    staged = {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*.safetensors")}
    assert dataset.encode(vae, videos, tmp_path / "cut", NINE, **options).written == 0
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    # A tar is there, and so are files that it holds, and the next is not.
    for path, content in staged.items():
        path.write_bytes(content)
    (tmp_path / "cut" / "latents-000001.tar").unlink()
    (tmp_path / "cut" / ".latents-000001.0123abcd.partial.tar").write_bytes(b"half")
    assert dataset.encode(vae, videos, tmp_path / "cut", NINE, **options).written == 0
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_lists_bring_their_columns(vae, videos, tmp_path):
    (videos / "list.jsonl").write_text(
        '{"video": "a.mp4", "caption": "one"}\n\n{"path": "none.mp4"}\n'
    )
    (videos / "list.csv").write_text(f"file_name,caption\n{videos / 'c.mp4'},two\n")
    summary = dataset.encode(vae, videos / "list.jsonl", tmp_path / "a", NINE)
    assert [clip["caption"] for clip in manifest(tmp_path / "a")] == ["one", "one"]
    assert [name for name, _ in summary.skipped] == ["none.mp4"]
    dataset.encode(vae, videos / "list.csv", tmp_path / "b", NINE)
    assert [clip["caption"] for clip in manifest(tmp_path / "b")] == ["two"]


def test_two_captions_of_one_video_are_both_kept(vae, videos, tmp_path):
    listed = videos / "two.csv"
    listed.write_text(
        "path,caption,fps\na.mp4,one,1\na.mp4,two,2\nc.mp4,three,3\n", encoding="utf-8-sig"
    )
    try:
        for container in ("safetensors", "webdataset"):
            root = tmp_path / container
            summary = dataset.encode(vae, listed, root, NINE, container=container)
            assert (summary.sources, summary.clips, summary.written) == (2, 3, 3)
            said = [(c["source"], c["start"], c["caption"]) for c in manifest(root)]
            assert said == [
                *(("a.mp4", start, caption) for start in (0, 9) for caption in ("one", "two")),
                ("c.mp4", 0, "three"),
            ]
            assert len({clip["id"] for clip in manifest(root)}) == 3
    finally:
        listed.unlink()
    with tarfile.open(tmp_path / "webdataset" / "latents-000000.tar") as tar:
        assert len(tar.getnames()) == 6
        said = [json.load(tar.extractfile(n)) for n in tar.getnames() if n.endswith(".json")]
    assert [sample["caption"] for sample in said] == ["one", "one", "three"]
    due = [{"caption": "one", "input_fps": "1"}, {"caption": "two", "input_fps": "2"}]
    assert said[0]["rows"] == due and "rows" not in said[2]


def test_the_users_own_columns_keep_their_values(vae, videos, tmp_path):
    """Under names of the manifest's own, and beside a column that has the name they would get."""
    mine = {name: f"my {name}" for name in ("id", "start", "frames", "fps", "file", "seed")}
    mine |= {"input_id": "more", "k": 1}
    row = json.dumps(mine | {"video": "c.mp4"})
    tar_of(tmp_path / "in.tar", {"c.mp4": (videos / "c.mp4").read_bytes(), "c.json": row.encode()})
    dataset.encode(vae, tmp_path / "in.tar", tmp_path / "z", NINE, container="webdataset")
    due = {f"input_{n}": f"my {n}" for n in ("start", "frames", "fps", "file", "seed")}
    due |= {"input_id": "more", "input_input_id": "my id", "k": 1, "frames": 9, "fps": 12.0}
    (clip,) = manifest(tmp_path / "z")
    assert due.items() <= clip.items() and clip["video"] == "c.mp4"
    assert clip["file"] == "latents-000000.tar"
    # Back again, the columns of the tar come along, and the video's own name is not lost.
    dataset.decode(vae, tmp_path / "z", tmp_path / "back")
    (decoded,) = manifest(tmp_path / "back")
    assert (decoded["input_source"], decoded["id"]) == ("in.tar/c.mp4", clip["id"])
    assert (decoded["input_input_fps"], decoded["input_fps"]) == (12.0, "my fps")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_name_that_is_not_utf8(vae, videos, tmp_path):
    (tmp_path / "v").mkdir()
    raw = os.fsdecode("caf\xe9.mp4".encode("latin-1"))
    (tmp_path / "v" / raw).write_bytes((videos / "c.mp4").read_bytes())
    summary = dataset.encode(vae, tmp_path / "v", tmp_path / "z", NINE)
    assert (summary.clips, summary.skipped) == (1, ())
    (clip,) = manifest(tmp_path / "z")
    assert load(tmp_path / "z", clip).source == clip["source"] == r"caf\udce9.mp4"
    assert dataset.encode(vae, tmp_path / "v", tmp_path / "z", NINE).written == 0


def damage_tar(root):
    """Cuts the second member of the first tar, so that one clip of it is whole."""
    path = root / "latents-000000.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]
    os.truncate(path, third.offset_data + third.size // 2)
    return 2


def empty_tar(root):
    (root / "latents-000000.tar").write_bytes(b"")
    return 3


def zero_tar(root):
    """A crash may leave a file's size, and zeros for its content."""
    path = root / "latents-000001.tar"
    path.write_bytes(bytes(path.stat().st_size))
    return 1


def zero_tail(root):
    """The second half of the first tar: its first clip is whole."""
    path = root / "latents-000000.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]
    content = path.read_bytes()
    path.write_bytes(content[: third.offset] + bytes(len(content) - third.offset))
    return 2


def strange_tar(root):
    """One that another program put there stays as it is, whatever its blocks."""
    tar_of(root / "latents-000007.tar", {"readme": b"1"})
    os.truncate(root / "latents-000007.tar", 2048)
    return 0


def empty_records(root):
    for path in files(root / "records"):
        path.write_bytes(b"")
    return 0


@pytest.mark.parametrize(
    "damage", [damage_tar, empty_tar, zero_tar, zero_tail, strange_tar, empty_records]
)
def test_damaged_outputs_are_done_again(damage, vae, videos, tmp_path):
    options = {"container": "webdataset", "per_tar": 3}
    dataset.encode(vae, videos, tmp_path, NINE, **options)
    whole = tree(tmp_path)
    due = damage(tmp_path)
    assert tree(tmp_path) != whole
    strange = tmp_path / "latents-000007.tar"
    whole |= {strange.name: strange.read_bytes()} if strange.exists() else {}
    assert dataset.encode(vae, videos, tmp_path, NINE, **options).written == due
    assert len(manifest(tmp_path)) == 4
    # A small tar without its second half is a tar of one clip: the others go into another.
    if damage is not zero_tail:
        assert tree(tmp_path) == whole
    for clip in manifest(tmp_path):
        with tarfile.open(tmp_path / clip["file"]) as tar:
            content = tar.extractfile(f"{clip['id']}.safetensors").read()
        (tmp_path / "member").write_bytes(content)
        assert _latents.load_latents(tmp_path / "member").start == clip["start"]


@pytest.mark.parametrize("content", [b"", b"\0" * 900, None], ids=["empty", "zeros", "half"])
def test_damaged_clips_are_done_again(content, vae, videos, tmp_path):
    dataset.encode(vae, videos, tmp_path, NINE)
    whole = tree(tmp_path)
    path = tmp_path / manifest(tmp_path)[1]["file"]
    path.write_bytes(path.read_bytes()[:500] if content is None else content)
    assert dataset.encode(vae, videos, tmp_path, NINE).written == 1
    assert tree(tmp_path) == whole


def test_one_run_at_a_time_in_a_folder(vae, videos, tmp_path, model, capsys):
    with _dataset_lock.held(tmp_path, ""):
        with pytest.raises(
            BlockingIOError, match=rf"written to by process {os.getpid()} on \S+, sin"
        ):
            dataset.encode(vae, videos, tmp_path, NINE, container="webdataset")
        with pytest.raises(BlockingIOError, match="name another folder"):
            dataset.encode(vae, videos, tmp_path, NINE)
        assert run("encode-dataset", videos, tmp_path, "--model", model, "--frames", 9) == 2
        assert capsys.readouterr().err.count("\n") == 1
        # Another shard has lists and tars of its own.
        assert dataset.encode(vae, videos, tmp_path, NINE, shard=(0, 2)).clips == 3
    # What a killed run leaves holds nobody up.
    (tmp_path / ".run.lock").write_text("process 1 on elsewhere")
    assert dataset.encode(vae, videos, tmp_path, NINE).written == 1
    assert not list(tmp_path.glob(".run*"))


def test_a_rate_above_the_videos_own_is_told(vae, videos, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset.encode(vae, videos, tmp_path, Settings(frames=9, fps=24))
    assert {warning.filename for warning in caught} == {__file__}
    told = [str(warning.message) for warning in caught]
    assert told == [
        "a.mp4 has 12 frames a second, fewer than the 24 that were asked for: frames are "
        "repeated. Leave `fps` out to take each as it is.",
        "3 videos have fewer than 24 frames a second: some were repeated.",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.encode(vae, videos, tmp_path / "same", Settings(frames=9, fps=12.1))


def test_a_video_too_large_for_memory_is_skipped(vae, videos, tmp_path, monkeypatch):
    real = _dataset_encode.jitted_step

    def step(pair, cache):
        if pair[1].shape[2] == 24:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return real(pair, cache)

    monkeypatch.setattr(_dataset_encode, "jitted_step", step)
    write(tmp_path / "v" / "large.mp4", 9, size=(24, 16))
    (tmp_path / "v" / "c.mp4").write_bytes((videos / "c.mp4").read_bytes())
    summary = dataset.encode(vae, tmp_path / "v", tmp_path / "z", NINE)
    said = "frames of 24x16 do not fit into memory: name a smaller size."
    assert (summary.clips, summary.skipped) == (1, (("large.mp4", said),))


def test_a_damaged_video_is_listed_by_name(vae, videos, tmp_path):
    """FFmpeg conceals what is lost of a frame, and flags it."""
    write(tmp_path / "v" / "damaged.mp4", 9, size=(64, 96))
    with av.open(str(tmp_path / "v" / "damaged.mp4")) as container:
        packet = max(list(container.demux(video=0))[1:], key=lambda packet: packet.size)
        place, size = packet.pos, packet.size
    content = bytearray((tmp_path / "v" / "damaged.mp4").read_bytes())
    content[place + size // 2 : place + size] = bytes(size - size // 2)
    (tmp_path / "v" / "damaged.mp4").write_bytes(content)
    (tmp_path / "v" / "c.mp4").write_bytes((videos / "c.mp4").read_bytes())
    summary = dataset.encode(vae, tmp_path / "v", tmp_path / "z", Settings(frames=9, sizes=(SIZE,)))
    assert [name for name, _ in summary.skipped] == ["damaged.mp4"]
    assert "damaged.mp4" in summary.skipped[0][1]
    assert [clip["source"] for clip in manifest(tmp_path / "z")] == ["c.mp4"]


def test_devices_share_the_work(model, videos, vae, tmp_path):
    arguments = ("encode-dataset", videos, tmp_path / "two", "--model", model, "--frames", 9)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(XLA_FLAGS=flags), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    dataset.encode(vae, videos, tmp_path / "one", NINE)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_decoding_goes_on_while_the_model_works():
    def slow(item):
        for i in range(5):
            time.sleep(0.02)
            yield item, i

    begun = time.perf_counter()
    seconds = 0.0
    for item, feed in _dataset_clips.prefetched(range(6), slow, 2):
        for i, event in enumerate(feed):
            assert event == (item, i)
            time.sleep(0.02)
        seconds += feed.seconds
    assert seconds >= 0.6
    assert time.perf_counter() - begun < 0.9 * (seconds + 0.6)


def test_an_error_of_a_thread_is_raised_where_it_is_read():
    def faulty(item):
        yield item
        raise RuntimeError("of the thread")

    with pytest.raises(RuntimeError, match="of the thread"):
        [list(feed) for _, feed in _dataset_clips.prefetched([1, 2], faulty, 2)]


def test_summary_and_progress(vae, videos, tmp_path):
    seen = []
    summary = dataset.encode(vae, videos, tmp_path, NINE, progress=seen.append)
    assert [(p.sources, p.of, p.written) for p in seen] == [(1, 3, 2), (2, 3, 3), (3, 3, 4)]
    assert seen[-1].seconds_left == 0 and seen[0].seconds_left > 0
    assert seen[-1].clips_per_second > 0
    assert set(summary.spent) == {"decode", "wait", "encode", "write"}
    inner = sum(summary.spent[name] for name in ("wait", "encode", "write"))
    assert 0 < inner <= summary.seconds
    assert "seconds in encode" in str(summary) and "clips per second" in str(summary)
    assert dataset.Progress(1, 3, 0, 1.0).seconds_left is None


def test_progress_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = _dataset_commands._Line("clips")
    line(dataset.Progress(1, 2, 3, 60.0, 1))
    line(dataset.Progress(2, 2, 6, 120.0, 2))
    assert capsys.readouterr().err == (
        "\r1/2 sources, 3 clips, 0.05 clips/s, 0:01:00 left\x1b[K"
        "\r2/2 sources, 6 clips, 0.05 clips/s, 0:00:00 left\x1b[K\n"
    )


def test_every_option_of_the_command(model, videos, tmp_path, capsys):
    options = "--frames all --fps 6 --buckets 24x16 16x24 --latents sample --seed 3 --tail pad"
    options += " --layout BCTHW --dtype bfloat16 --shard 1/2 --decoders 1"
    options += " --format webdataset --per-tar 1"
    assert run("encode-dataset", videos, tmp_path, "--model", model, *options.split()) == 0
    (clip,) = lines(tmp_path / "manifest-1-of-2.jsonl")
    assert (clip["source"], clip["file"]) == ("c.mp4", "latents-1-of-2-000000.tar")
    assert (clip["frames"], clip["padded"], clip["fps"]) == (9, 9, 6.0)
    assert (clip["shape"], clip["layout"]) == ([1, 4, 5, 8, 12], "BCTHW")
    assert (clip["dtype"], clip["latents"]) == ("bfloat16", "sample") and clip["seed"] > 0
    said = capsys.readouterr()
    assert "clips                        1" in said.out and said.err == ""


def test_decode_dataset(vae, videos, tmp_path, model, capsys):
    dataset.encode(vae, videos, tmp_path / "z", NINE)
    (tmp_path / "z" / "broken.safetensors").write_bytes(b"garbage")
    arguments = ("decode-dataset", tmp_path / "z", tmp_path / "back", "--model", model)
    assert run(*arguments) == 0
    said = capsys.readouterr()
    assert "skipped broken.safetensors: broken.safetensors is not a complete" in said.err
    assert "written now                  4" in said.out
    clips = manifest(tmp_path / "back")
    assert len(clips) == 4
    for clip in clips:
        assert video.info(tmp_path / "back" / clip["file"]) == video.Info(12.0, 9, *SIZE)
    saved = _latents.load_latents(tmp_path / "z" / clips[0]["source"])
    due = vae.decode(jnp.asarray(saved.array))
    assert video.psnr(video.read(tmp_path / "back" / clips[0]["file"]), due) > 25

    whole = tree(tmp_path / "back")
    assert run(*arguments) == 0
    assert "written now                  0" in capsys.readouterr().out
    assert tree(tmp_path / "back") == whole


def test_latents_that_cannot_be_decoded_are_listed(vae, tmp_path, model, capsys):
    good = np.random.default_rng(0).standard_normal((1, 5, 8, 12, 4)).astype(np.float32)
    (tmp_path / "z").mkdir()
    for name, fields in {
        "good": {},
        "huge": {"array": good * np.float32(5e37)},
        "fast": {"fps": 5000.0},
    }.items():
        record = _latents.Latents(**{"array": good, "frames": 9} | fields)
        _latents.save_latents(tmp_path / "z" / f"{name}.safetensors", record)
    arguments = ("decode-dataset", tmp_path / "z", tmp_path / "back", "--model", model)
    for strict, status in (((), 0), (("--strict",), 1)):
        assert run(*arguments, *strict) == status
        skipped = {row["source"]: row["reason"] for row in lines(tmp_path / "back/skipped.jsonl")}
        assert list(skipped) == ["fast.safetensors", "huge.safetensors"]
        assert "`fps` must be a positive number, got 5000" in skipped["fast.safetensors"]
        said = "its latents decode to NaN or infinite values from frame 0 on"
        assert skipped["huge.safetensors"].startswith(said)
        assert [clip["source"] for clip in manifest(tmp_path / "back")] == ["good.safetensors"]
        assert len(files(tmp_path / "back")) == 3
    assert "--strict allows none" in capsys.readouterr().err
    # A crash of the machine may cut a video short.
    (whole,) = (tmp_path / "back").glob("*.mp4")
    before = whole.read_bytes()
    whole.write_bytes(before[:100])
    assert dataset.decode(vae, tmp_path / "z", tmp_path / "back").written == 1
    assert whole.read_bytes() == before


@pytest.mark.parametrize("own", [0.7, 1.15258426, None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaled_latents_are_unscaled_by_their_files_factor(own, dtype, tmp_path, unchecked):
    config = dataclasses.replace(CONFIG, shift_factor=0.25, latents_std=(1.0, 2.0, 3.0, 4.0))
    vae = cv.VAE(config, key=jax.random.key(0))
    z = np.random.default_rng(0).standard_normal((1, 3, 2, 3, 4))
    std = np.array(config.latents_std)
    scaled = (z - 0.25) / std * (own or config.scaling_factor)
    record = _latents.Latents(scaled.astype(dtype), scaled=True, scaling_factor=own, frames=4)
    _latents.save_latents(tmp_path / "z.safetensors", record)
    record = _latents.load_latents(tmp_path / "z.safetensors", channels=4)
    array, count = _dataset_decode.to_decode(vae, record)
    assert (array.dtype, count) == (dtype, 4)
    error = np.linalg.norm(np.float64(array) - z) / np.linalg.norm(z)
    assert error < (1e-6 if dtype == "float32" else 8e-3)


def test_decode_dataset_of_tars_and_of_another_model(vae, videos, tmp_path):
    dataset.encode(vae, videos, tmp_path / "z", NINE, container="webdataset")
    other = cv.VAE(CONFIG, key=jax.random.key(1))
    with pytest.warns(UserWarning, match="4 latents were encoded by model") as caught:
        summary = dataset.decode(other, tmp_path / "z", tmp_path / "back", fps=24)
    assert {warning.filename for warning in caught} == {__file__}
    assert (summary.clips, summary.written, summary.skipped) == (4, 4, ())
    assert manifest(tmp_path / "back")[0]["fps"] == 24
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dataset.decode(vae, tmp_path / "z", tmp_path / "back", fps=24).written == 4


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"frames": 48}, "must be 8k . 1, got 48: the nearest are 41 and 49"),
        ({"frames": 0}, "must be 8k . 1, got 0"),
        ({"sizes": ((0, 8),)}, "in pixels, got"),
        ({"fps": -1}, "positive number, got -1"),
        ({"latents": "mean"}, "one of mode, sample, posterior, got 'mean'"),
        ({"tail": "keep"}, "one of drop, shorten, pad, got 'keep'"),
        ({"layout": "BHWC"}, "one of BTHWC, BCTHW, got 'BHWC'"),
    ],
)
def test_settings_are_checked(fields, match):
    with pytest.raises(ValueError, match=match):
        Settings(**fields)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("none DST", "there is no dataset at none"),
        ("empty DST", "holds nothing that ends in .avi"),
        ("SRC file", "cannot write file: it is a file, name a directory"),
        ("SRC file/a/b", "cannot write file/a/b: file is a file, name a directory"),
        ("file DST", "must be a folder, a .tar, a list"),
        ("bad.jsonl DST", "line 1 of bad.jsonl must hold JSON: Expecting property name"),
        ("bad.csv DST", "row 1 of bad.csv must name a file under one of video, path"),
        ("SRC DST --frames 8", "must be 8k + 1, got 8"),
        ("SRC DST --frames some", "expected 8k + 1 frames or `all`"),
        ("SRC DST --height 16", "--height and --width go together"),
        ("SRC DST --height 21 --width 24", "multiples of 2, got (21, 24): try (20, 24)"),
        (
            "SRC DST --height 16 --width 24 --buckets 8x8",
            "are a size: leave --size and --buckets out",
        ),
        ("SRC DST --buckets 8", "HEIGHTxWIDTH, such as 480x720, got '8'"),
        ("SRC DST --shard 8/8", "a shard is I/N, from 0/N on, such as 0/8, got '8/8'"),
        ("SRC DST --decoders 0", "`decoders` must be at least 1, got 0"),
        ("SRC DST --per-tar 0", "`per_tar` must be at least 1 clip"),
        ("SRC DST --size 16x24 --height 16 --width 24", "leave --size and --buckets out"),
        ("SRC DST --fps 5000", "a frame rate is of 0.001 to 1000, got '5000'"),
        ("latin.csv DST", "latin.csv is not UTF-8 (byte 0xe9 in line 2): save it as UTF-8."),
        ("seven.jsonl DST", "row 1 of seven.jsonl must name a file under one of video, path"),
        ("SRC DST --engine spark", "'spark' is not one of 'local', 'ray'"),
    ],
)
def test_mistakes_are_one_line(arguments, match, videos, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("text")
    Path("bad.jsonl").write_text("{")
    Path("bad.csv").write_text("name\nx\n")
    Path("latin.csv").write_bytes(b"video,caption\na.mp4,caf\xe9\n")
    Path("seven.jsonl").write_text('{"video": 7}')
    try:
        code = run(
            "encode-dataset", *arguments.replace("SRC", str(videos)).split(), "--model", model
        )
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    assert match in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("command", ["encode-dataset", "decode-dataset"])
def test_a_dataset_asks_for_a_model(command, videos, tmp_path, capsys):
    assert run(command, videos, tmp_path / "z") == 2
    said = capsys.readouterr().err
    assert "Missing option '--model'" in said and said.count("\n") == 1
    assert not (tmp_path / "z").exists()


def test_names_are_told_apart(tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("b.mp4\na.mp4\nb.mp4\n")
    found = _dataset_sources.find(listed, _dataset_sources.VIDEOS)
    assert [item.name for item in found] == ["a.mp4", "b.mp4"]


def test_a_missing_ray_is_named(vae, videos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "eqx_cogvae\[ray\]"'):
        dataset.encode(vae, videos, tmp_path, NINE, engine="ray")


def test_ray_gives_the_same_bytes(vae, model, tmp_path):
    for seed in range(8):
        write(tmp_path / "v" / f"{seed}.mp4", 9 + 3 * seed, seed)
    (tmp_path / "v" / "broken.mp4").write_bytes(b"garbage")
    options = ("--model", model, "--frames", 9, "--latents", "sample")
    dataset.encode(vae, tmp_path / "v", tmp_path / "local", Settings(frames=9, latents="sample"))
    arguments = ("encode-dataset", tmp_path / "v", tmp_path / "ray", *options)
    done = subprocess.run(
        command(*arguments, "--engine", "ray", "--actors", 2),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")
