"""Every notebook runs from top to bottom, and what it asserts holds.

The executed notebooks stay in `build/notebooks`, where the site takes them from.
"""

import ast
import os
import re
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
CPU_SECONDS = 150
OWN = {
    "EQX_COGVAE_MODEL": "tiny",
    "HF_HUB_OFFLINE": "1",
    "JAX_COMPILATION_CACHE_DIR": CACHE,
    # Notebooks share programs with each other, also those that compile quickly.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PLATFORMS": "cpu",
    # A process that shares the cache may still be writing the entry: JAX compiles instead.
    "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache entry:UserWarning",
}
# Compiling is most of a notebook's time. Threads of torch would burn time waiting for each other
# while another process has a core.
COMPILES = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    "OMP_NUM_THREADS": "1",
}
# These decode often, train, search, or compare speeds. Their programs take half the time to
# compile, and run as fast as a reader's; torch has all cores too.
RUNS = {
    "XLA_FLAGS": "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false",
    "OMP_WAIT_POLICY": "PASSIVE",
}
LONG_RUNS = ("05", "06", "07", "09", "11")


def execute(source, target):
    own = OWN | (RUNS if source.stem[:2] in LONG_RUNS else COMPILES)
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "jupytext", "--to", "notebook", "--execute", "--output"]
    return subprocess.run(
        [*command, str(target), str(source)],
        env=inherited | own,
        capture_output=True,
        text=True,
    )


def cpu_seconds():
    """Returns the CPU seconds of this process's children that have ended, and of theirs."""
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


# Tags of the code that the site folds.
FOLDED = {"setup", "check", "drawing"}


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_written_for_the_site(source):
    """Opens with what it is for, folds what only sets up or checks, and ends with what is next."""
    cells = jupytext.read(source).cells
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert re.search(r"you\s(can|know)", prose[0])
    assert "Next: " in prose[-1]
    assert code[0].metadata["tags"] == ["setup"]
    for cell in code:
        tags = set(cell.metadata.get("tags", []))
        assert tags <= FOLDED | {"cover"}
        only_asserts = all(isinstance(node, ast.Assert) for node in ast.parse(cell.source).body)
        assert not only_asserts or "check" in tags, cell.source
        assert max(map(len, cell.source.splitlines())) <= 88, "too wide for the site"
        assert "XLA_FLAGS" not in cell.source, "a reader's GPU would take it too"


@pytest.mark.parametrize("source", NOTEBOOKS[:1], ids=lambda path: path.stem)
def test_a_false_claim_fails(source, tmp_path):
    notebook = jupytext.read(source)
    # The cell that imports is enough: the test above executes the rest.
    first = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    false = nbformat.v4.new_code_cell("assert vae.config.latent_channels == 3")
    notebook.cells = [*notebook.cells[: first + 1], false]
    jupytext.write(notebook, tmp_path / "false.py", fmt="py:percent")
    done = execute(tmp_path / "false.py", tmp_path / "false.ipynb")
    assert done.returncode != 0
    assert "AssertionError" in done.stderr
