"""Every notebook runs from top to bottom, and what it asserts holds.

The executed notebooks stay in `build/notebooks`, where the site takes them from.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "notebooks"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
CACHE = str(ROOT / ".jax_cache")
# Two minutes on two cores.
CPU_SECONDS = 240


def execute(source, target):
    # A notebook is timed and compiled as its reader would: not by the flags of these tests.
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    own = {
        "EQX_COGVAE_MODEL": "tiny",
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PLATFORMS": "cpu",
        # A process that shares the cache may still be writing the entry: JAX compiles instead.
        "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache entry:UserWarning",
    }
    command = [sys.executable, "-m", "jupytext", "--to", "notebook", "--execute", "--output"]
    return subprocess.run(
        [*command, str(target), str(source)],
        env=inherited | own,
        capture_output=True,
        text=True,
    )


def cpu_seconds():
    """Of this process's children, and theirs, that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(source):
    BUILT.mkdir(parents=True, exist_ok=True)
    target = BUILT / f"{source.stem}.ipynb"
    before = cpu_seconds()
    done = execute(source, target)
    assert done.returncode == 0, done.stderr[-4000:]
    assert cpu_seconds() - before < CPU_SECONDS
    notebook = nbformat.read(target, as_version=4)
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs), "no picture"
    assert [o["text"] for o in outputs if o.get("name") == "stderr"] == []
    assert any("\nassert " in f"\n{cell.source}" for cell in notebook.cells), "nothing is claimed"


@pytest.mark.parametrize("source", NOTEBOOKS[:1], ids=lambda path: path.stem)
def test_a_false_claim_fails(source, tmp_path):
    notebook = jupytext.read(source)
    # Up to the cell that imports: what follows has been executed above.
    first = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    false = nbformat.v4.new_code_cell("assert vae.config.latent_channels == 3")
    notebook.cells = [*notebook.cells[: first + 1], false]
    jupytext.write(notebook, tmp_path / "false.py", fmt="py:percent")
    done = execute(tmp_path / "false.py", tmp_path / "false.ipynb")
    assert done.returncode != 0
    assert "AssertionError" in done.stderr
