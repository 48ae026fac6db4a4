"""Latents for training loops: what each example is, by Grain and by torch's loaders."""

import json
import pickle
import shutil
import tarfile

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import eqx_cogvae as cv
from eqx_cogvae import dataset, video

COUNT = 5
SHAPE = (1, 3, 2, 4, 6)
CONFIG = cv.Config(
    block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=2
)


def normal(seed, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(dtype)


def record(i, **fields):
    return cv.Latents(normal(i), fps=8.0, frames=9, scaling_factor=0.7, **fields)


def make(root, container, layout="BTHWC", save=record):
    """Five clips with captions, as `dataset.encode` lays them out."""
    rows = []
    for i in range(COUNT):
        path = root / f"clip{i}.safetensors"
        cv.save_latents(path, save(i), layout=layout)
        row = {"id": f"clip{i}", "source": f"{i}.mp4", "caption": f"caption {i}", "score": i / 2}
        if container == "webdataset":
            (root / f"clip{i}.json").write_text(json.dumps(row))
            with tarfile.open(root / f"latents-00000{i // 3}.tar", "a") as tar:
                for part in (path, root / f"clip{i}.json"):
                    tar.add(part, part.name)
                    part.unlink()
        rows.append(
            row | {"file": f"latents-00000{i // 3}.tar" if container != "files" else path.name}
        )
    (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        container: make(tmp_path_factory.mktemp(container), container)
        for container in ("files", "webdataset")
    }


@pytest.fixture(scope="module")
def posterior(tmp_path_factory):
    """Every element has a mean of 3 and a standard deviation of 0.5."""
    save = lambda i: cv.Latents(  # noqa: E731
        np.full(SHAPE, 3, np.float32), logvar=np.full(SHAPE, 2 * np.log(0.5), np.float32)
    )
    return make(tmp_path_factory.mktemp("posterior"), "files", save=save)


@pytest.mark.parametrize("container", ["files", "webdataset"])
def test_examples_of_either_container(container, folders):
    root = folders[container]
    for source in (dataset.LatentsSource(root), dataset.LatentsSource(root / "manifest.jsonl")):
        assert len(source) == COUNT
        for i, (latents, caption, metadata) in enumerate(source):
            np.testing.assert_array_equal(latents, normal(i)[0])
            assert caption == f"caption {i}"
            assert metadata == {
                "id": f"clip{i}",
                "source": f"{i}.mp4",
                "score": i / 2,
                "fps": 8.0,
                "frames": 9,
                "scaled": False,
                "scaling_factor": 0.7,
            }
        np.testing.assert_array_equal(source[-1].latents, source[np.int64(COUNT - 1)].latents)


def test_manifests_of_runs_with_other_shards(folders, tmp_path):
    """Each clip once, however many lists name it."""
    root = tmp_path / "latents"
    shutil.copytree(folders["files"], root)
    lines = (root / "manifest.jsonl").read_text()
    (root / "manifest-0-of-2.jsonl").write_text(lines)
    assert len(dataset.LatentsSource(root)) == lines.count("\n")


def test_without_a_manifest(folders, tmp_path):
    """A tar has its captions inside; a lone file has none."""
    for i, (latents, caption, metadata) in enumerate(
        dataset.LatentsSource(folders["webdataset"] / "latents-000001.tar"), 3
    ):
        np.testing.assert_array_equal(latents, normal(i)[0])
        assert (caption, metadata["score"]) == (f"caption {i}", i / 2)
    cv.save_latents(tmp_path / "b.safetensors", record(1))
    (tmp_path / "sub").mkdir()
    cv.save_latents(tmp_path / "sub" / "a.safetensors", record(0))
    source = dataset.LatentsSource(tmp_path)
    assert [example.caption for example in source] == ["", ""]
    np.testing.assert_array_equal(source[1].latents, normal(0)[0])


@pytest.mark.parametrize("layout", ["BTHWC", "BCTHW"])
def test_layout_and_dtype(layout, tmp_path):
    """Whatever the file's own are; by default bfloat16 becomes what torch can collate."""
    save = lambda i: cv.Latents(normal(i).astype(jnp.bfloat16))  # noqa: E731
    make(tmp_path, "files", layout=layout, save=save)
    due = normal(2).astype(jnp.bfloat16)[0]
    got = dataset.LatentsSource(tmp_path)[2].latents
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, due.astype(np.float32))
    assert dataset.LatentsSource(tmp_path, dtype=None)[2].latents.dtype == jnp.bfloat16
    got = dataset.LatentsSource(tmp_path, layout="BCTHW")[2].latents
    np.testing.assert_array_equal(got, np.moveaxis(due, -1, 0).astype(np.float32))


def test_samples_are_the_keys_and_the_numbers_own(posterior):
    mean = dataset.LatentsSource(posterior)
    np.testing.assert_array_equal(mean[0].latents, np.full(SHAPE[1:], 3))
    source = dataset.LatentsSource(posterior, key=jax.random.key(0))
    draws = np.stack([example.latents for example in source])
    assert draws.dtype == np.float32
    # 720 draws: five standard errors of a mean, and of a standard deviation.
    assert abs(draws.mean() - 3) < 5 * 0.5 / 720**0.5
    assert abs(draws.std() - 0.5) < 5 * 0.5 / 1440**0.5
    assert len(np.unique(draws)) == draws.size
    again = dataset.LatentsSource(posterior, key=jax.random.key(0))
    np.testing.assert_array_equal(again[3].latents, draws[3])
    other = source.with_key(jax.random.key(1))
    assert not np.isin(other[3].latents, draws).any()
    np.testing.assert_array_equal(source[3].latents, draws[3])


def test_a_key_leaves_latents_without_a_posterior(folders):
    source = dataset.LatentsSource(folders["files"], key=jax.random.key(0))
    np.testing.assert_array_equal(source[0].latents, normal(0)[0])


def test_grain_shuffles_and_batches(folders):
    source = dataset.LatentsSource(folders["webdataset"])
    assert isinstance(source, grain.sources.RandomAccessDataSource)
    batches = list(grain.MapDataset.source(source).shuffle(seed=0).batch(2))
    assert [len(batch.latents) for batch in batches] == [2, 2, 1]
    order = [int(caption.split()[1]) for batch in batches for caption in batch.caption]
    assert sorted(order) == list(range(COUNT)) != order
    got = np.concatenate([batch.latents for batch in batches])
    np.testing.assert_array_equal(got, np.concatenate([normal(i) for i in order]))
    assert [s for batch in batches for s in batch.metadata["score"]] == [i / 2 for i in order]


def test_grains_loader_resumes(folders):
    source = dataset.LatentsSource(folders["files"])
    sampler = grain.samplers.IndexSampler(COUNT, shuffle=True, seed=0, num_epochs=1)
    loader = grain.DataLoader(data_source=source, sampler=sampler, worker_count=0)
    it = iter(loader)
    first = [next(it).caption for _ in range(2)]
    state = it.get_state()
    rest = [example.caption for example in it]
    it.set_state(state)
    assert [example.caption for example in it] == rest
    assert sorted(first + rest) == [f"caption {i}" for i in range(COUNT)]


@pytest.mark.parametrize("workers", [0, 1])
def test_torchs_loader(workers, folders):
    """A worker is a process of its own that imports all anew, to which the source is pickled."""
    loader = torch.utils.data.DataLoader(
        dataset.LatentsSource(folders["webdataset"]),
        batch_size=2,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    batches = list(loader)
    got = torch.cat([batch.latents for batch in batches]).numpy()
    np.testing.assert_array_equal(got, np.concatenate([normal(i) for i in range(COUNT)]))
    captions = [caption for batch in batches for caption in batch.caption]
    assert captions == [f"caption {i}" for i in range(COUNT)]
    assert torch.cat([batch.metadata["score"] for batch in batches]).tolist() == [0, 0.5, 1, 1.5, 2]


def test_a_pickled_source_draws_the_same(posterior):
    source = dataset.LatentsSource(posterior, key=jax.random.key(7))
    copied = pickle.loads(pickle.dumps(source))
    assert repr(copied) == repr(source) == f"LatentsSource({str(posterior)!r}, 5 clips)"
    np.testing.assert_array_equal(copied[1].latents, source[1].latents)


@pytest.mark.parametrize("container", ["safetensors", "webdataset"])
def test_what_encode_writes(container, tmp_path):
    (tmp_path / "videos").mkdir()
    video.write(tmp_path / "videos" / "a.mp4", video.procedural_clip(18, 16, 16), fps=8)
    rows = [{"file": "videos/a.mp4", "text": "a fox"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vae = cv.VAE(CONFIG, key=jax.random.key(0))
    settings = dataset.Settings(frames=9, latents="posterior", layout="BCTHW")
    out = tmp_path / "out"
    dataset.encode(vae, tmp_path / "list.jsonl", out, settings, container=container)
    source = dataset.LatentsSource(out)
    assert len(source) == 2
    for i, (latents, caption, metadata) in enumerate(source):
        pixels = video.read(tmp_path / "videos" / "a.mp4", start=9 * i, frames=9)
        due = vae.encode(jnp.asarray(pixels)).mode()[0]
        np.testing.assert_allclose(latents, due, rtol=1e-4, atol=1e-5)
        assert (caption, metadata["start"], metadata["height"]) == ("a fox", 9 * i, 16)
    assert not np.array_equal(source.with_key(jax.random.key(0))[0].latents, source[0].latents)


def test_what_is_not_there(folders, tmp_path):
    source = dataset.LatentsSource(folders["files"])
    with pytest.raises(IndexError, match="numbered from 0 to 4, got 5"):
        source[5]
    with pytest.raises(FileNotFoundError, match="no dataset at"):
        dataset.LatentsSource(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds nothing that ends in \.safetensors"):
        dataset.LatentsSource(tmp_path)
    with pytest.raises(ValueError, match="a layout is one of BTHWC, BCTHW, got 'x'"):
        dataset.LatentsSource(folders["files"], layout="x")


BAD_LINES = {
    "no JSON": ("{", "line 1 of .* must be a JSON object"),
    "no file": ('{"id": "a"}', "line 1 of .* under 'file'"),
    "no object": ("3", "line 1 of .* must be a JSON object"),
    "not in its tar": (
        '{"id": "a", "file": "latents-000000.tar"}',
        r"a\.safetensors in .*not there",
    ),
    "no such tar": ('{"id": "a", "file": "b.tar"}', "no dataset at"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_manifests(kind, tmp_path):
    make(tmp_path, "webdataset")
    line, message = BAD_LINES[kind]
    (tmp_path / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dataset.LatentsSource(tmp_path)


def test_bad_clips(tmp_path):
    cv.save_latents(tmp_path / "a.safetensors", cv.Latents(np.zeros((2, *SHAPE[1:]), np.float32)))
    with pytest.raises(ValueError, match=r"a\.safetensors holds 2 clips, expected one"):
        dataset.LatentsSource(tmp_path)[0]
    make(tmp_path, "webdataset")
    (tmp_path / "manifest.jsonl").unlink()
    tar = tmp_path / "latents-000000.tar"
    tar.write_bytes(tar.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"latents-000000\.tar"):
        list(dataset.LatentsSource(tmp_path))
