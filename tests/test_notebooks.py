"""Every notebook runs from top to bottom, and what it asserts holds.

The executed notebooks stay in `build/notebooks`, where the site takes them from.
"""

import os
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


def execute(source, target):
    # A notebook is timed and compiled as its reader would: not by the flags of these tests.
    own = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": CACHE}
    command = [sys.executable, "-m", "jupytext", "--to", "notebook", "--execute", "--output"]
    return subprocess.run(
        [*command, str(target), str(source)],
        env=os.environ | own,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(source):
    BUILT.mkdir(parents=True, exist_ok=True)
    target = BUILT / f"{source.stem}.ipynb"
    done = execute(source, target)
    assert done.returncode == 0, done.stderr[-4000:]
    notebook = nbformat.read(target, as_version=4)
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs), "no picture"
    assert [o["text"] for o in outputs if o.get("name") == "stderr"] == []
    assert any("\nassert " in f"\n{cell.source}" for cell in notebook.cells), "nothing is claimed"


def test_a_false_claim_fails(tmp_path):
    source = tmp_path / "false.py"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell("assert 1 + 1 == 3")]
    jupytext.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), source)
    done = execute(source, tmp_path / "false.ipynb")
    assert done.returncode != 0
    assert "AssertionError" in done.stderr
