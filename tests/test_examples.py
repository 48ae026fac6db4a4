"""The examples of docstrings, README and docs, run as they stand but for smaller numbers."""

import ast
import doctest
import re
import textwrap
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import SHALLOW

import eqx_cogvae as cv
from eqx_cogvae import training, video

ROOT = Path(__file__).resolve().parents[1]
# Blocks marked `py` instead are shown and not run: they need a network or a GPU.
_BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
# What a reader has, and this machine has not, beside what stands for it. `small` is a checkpoint
# of two levels, which compile in a third of the time of four.
_SMALLER = {
    '"zai-org/CogVideoX-2b"': '"small"',
    '"tiny"': '"small"',
    "frames=49, size=(480, 720)": "frames=17, size=(16, 24)",
    "frames=count, size=(480, 720)": "frames=count, size=(16, 24)",
    "procedural_clip(17, 96, 144)": "procedural_clip(17, 16, 24)",
    "procedural_clip(17, 64, 96)": "procedural_clip(17, 16, 24)",
    "height=64, width=96": "height=16, width=24",
    "(30, 45)": "(8, 8)",
    "memory=16 * 2**30": "tile=(16, 16)",
    "cv.best_mesh(latents.shape)": "cv.best_mesh(latents.shape, devices)",
}
PAGES = (
    "README.md",
    "docs/api/index.md",
    "docs/api/video.md",
    "docs/datasets.md",
    "docs/devices.md",
    "docs/dtypes.md",
    "docs/export.md",
    "docs/index.md",
    "docs/layers.md",
    "docs/long-videos.md",
    "docs/memory.md",
    "docs/previews.md",
    "docs/recipes.md",
    "docs/training.md",
)


def docstrings():
    """Every docstring of the package that has an example, by where it is."""
    for path in sorted((ROOT / "eqx_cogvae").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if _BLOCK.search(text):
                    where = path.relative_to(ROOT / "eqx_cogvae").with_suffix("")
                    yield pytest.param(text, id=f"{where}:{getattr(node, 'name', 'module')}")


def blocks(text):
    return [block for _, block in _BLOCK.findall(text) if ">>>" not in block]


def run(text, names):
    for long, short in _SMALLER.items():
        text = text.replace(long, short)
    exec(compile(textwrap.dedent(text), "example", "exec"), names)


@pytest.fixture(scope="module")
def names():
    """What an example may take for granted."""
    vae = cv.VAE(SHALLOW, key=jax.random.key(0))
    clip = jnp.asarray(video.procedural_clip(17, 16, 24))
    return {
        "clip": clip,
        "cv": cv,
        "devices": jax.devices()[:1],  # what `_SMALLER` puts in
        "eqx": eqx,
        "jax": jax,
        "jnp": jnp,
        "key": jax.random.key(0),
        "latents": vae.encode(clip).mode(),
        "np": np,
        "optax": optax,
        "training": training,
        "vae": vae,
        "video": video,
    }


@pytest.fixture(scope="module")
def trained():
    """A picture and a model of one level, whose gradients compile in a third of the time."""
    config = cv.Config(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, latent_channels=3
    )
    clip = jnp.asarray(video.procedural_clip(1, 16, 24))
    return {"vae": cv.VAE(config, key=jax.random.key(0)), "clip": clip}


class _Crops:
    def batches(self, start):
        return [np.zeros((1, 1, 16, 24, 3), np.uint8)] * 2


class _Writer:
    def write(self, frames):
        assert frames.ndim == 5


@pytest.mark.parametrize("text", list(docstrings()))
def test_docstrings(text, names, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = names | {"crops": _Crops(), "writer": _Writer()}
    names |= trained if "training." in text else {}
    for block in blocks(text):
        run(block, names)
    examples = doctest.DocTestParser().get_doctest(text, dict(names), "example", None, None)
    assert not doctest.DocTestRunner().run(examples).failed


@pytest.mark.parametrize("page", PAGES)
def test_pages(page, names, trained, tmp_path, monkeypatch):
    """A page's blocks follow on each other, and import what they use."""
    names = names | (trained if page == "docs/training.md" else {})
    found = blocks((ROOT / page).read_text())
    assert found
    monkeypatch.chdir(tmp_path)
    video.write("in.mp4", names["clip"], fps=8)
    cv.save_pretrained(names["vae"], "small")
    known = {name: names[name] for name in ("clip", "devices", "latents", "vae")}
    for block in found:
        run(block, known)


def test_no_page_with_examples_is_left_out():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = {str(page.relative_to(ROOT)) for page in pages if blocks(page.read_text())}
    assert found == set(PAGES)
