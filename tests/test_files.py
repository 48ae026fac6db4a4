"""Names that no file or folder can have, at every function that takes one."""

import re

import jax
import numpy as np
import pytest
from reference import SHALLOW

import eqx_cogvae as cv
from eqx_cogvae import _files, dataset, preview, video

NUL = "a\0b"
CLIP = np.zeros((1, 1, 8, 8, 3), np.float32)


@pytest.fixture(scope="module")
def vae():
    return cv.VAE(SHALLOW, key=jax.random.key(0))


@pytest.mark.parametrize(
    "call",
    [
        lambda vae: video.info(f"{NUL}.mp4"),
        lambda vae: video.read(f"{NUL}.mp4"),
        lambda vae: video.write(f"{NUL}.mp4", CLIP),
        lambda vae: video.filmstrip(CLIP, path=f"{NUL}.png"),
        lambda vae: cv.load_latents(NUL),
        lambda vae: cv.save_latents(NUL, cv.Latents(CLIP)),
        lambda vae: cv.from_pretrained(NUL),
        lambda vae: cv.from_pretrained(f"{NUL}/vae"),
        lambda vae: cv.from_pretrained("tiny", config=f"{NUL}.json"),
        lambda vae: cv.from_original(f"{NUL}.pt"),
        lambda vae: cv.save_pretrained(vae, f"run/{NUL}"),
        lambda vae: preview.load(f"{NUL}.pth"),
        lambda vae: dataset.encode(vae, NUL, "out"),
        lambda vae: dataset.encode(vae, "a.mp4", NUL),
        lambda vae: dataset.decode(vae, NUL, "out"),
        lambda vae: dataset.LatentsSource(NUL),
    ],
)
def test_a_nul_byte_is_named(call, vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"a\\x00b\S* holds a NUL byte, which no file.*: corr"
    ) as info:
        call(vae)
    assert "\0" not in str(info.value) and "\n" not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("check", "name", "place"),
    [
        (_files.check_folder, "file", "it"),
        (_files.check_folder, "file/a", "file"),
        (_files.check_folder, "file/a/b/c", "file"),
        (_files.check_writable, "file/a.mp4", "file"),
        (_files.check_writable, "file/a/b.mp4", "file"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_named(check, name, place, tmp_path):
    (tmp_path / "file").write_text("")
    place = place if place == "it" else str(tmp_path / place)
    due = f"cannot write {tmp_path / name}: {place} is a file, name a directory."
    with pytest.raises(NotADirectoryError, match=f"^{re.escape(due)}$"):
        check(tmp_path / name)
