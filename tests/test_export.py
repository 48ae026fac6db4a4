"""The recipe of `docs/export.md`, as it stands: exported here, run where this package is not."""

import os
import subprocess
import sys

import numpy as np
import pytest
from jax import export
from reference import SHALLOW, decode, distance, encode, normal, pair
from test_examples import ROOT, blocks, run

PAGE = (ROOT / "docs/export.md").read_text()
WRITER, READER = blocks(PAGE)[:2]
# The page's own calls, for what this test reads and writes.
SERVER = f"""
import numpy
clip = numpy.load("clip.npy")
{READER}
import sys
numpy.savez(
    "results.npz", mean=mean, logvar=logvar, video=video, other=decode(numpy.load("latents.npy"))
)
assert not {{"eqx_cogvae", "equinox", "jaxtyping"}} & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def models(folder):
    """Ours and diffusers', of which the page's first block has written the file."""
    models = pair(SHALLOW, folder / "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(WRITER, {})
    return models


def test_a_process_without_this_package_runs_both_steps(models, folder):
    """Any number of clips, of any length; each step in two programs, by way of its cache."""
    clip, latents = normal((2, 25, 16, 24, 3)).clip(-1, 1), normal((1, 7, 8, 12, 3), 1)
    np.save(folder / "clip.npy", clip)
    np.save(folder / "latents.npy", latents)
    (folder / "server.py").write_text(SERVER)
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    subprocess.run([sys.executable, "server.py"], cwd=folder, env=os.environ | settings, check=True)
    with np.load(folder / "results.npz") as results:
        mean, logvar = encode(models.model, clip)
        assert distance(results["mean"], mean) < 1e-5
        assert distance(results["logvar"], logvar) < 1e-5
        assert distance(results["video"], decode(models.model, results["mean"])) < 1e-5
        assert distance(results["other"], decode(models.model, latents)) < 1e-5


@pytest.mark.usefixtures("models")
def test_every_program_is_for_three_platforms_and_any_number_of_clips(folder):
    with np.load(folder / "vae.npz") as file:
        for name in ("encode_first", "encode_steady", "decode_first", "decode_steady"):
            program = export.deserialize(bytearray(file[name]))
            assert program.platforms == ("cpu", "cuda", "tpu")
            weights = sum(key.startswith(f"{name[:6]}_weight") for key in file)
            given = program.in_avals[weights:]
            # The frames, and a cache for a later batch alone.
            assert (len(given) > 1) == name.endswith("steady")
            assert {str(aval.shape[0]) for aval in (*given, *program.out_avals)} == {"b"}
