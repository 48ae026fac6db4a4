"""Runs a part of the tests on the lowest and the highest versions that are supported.

    python scripts/matrix.py                      # the cheap part, in every row
    python scripts/matrix.py lowest tests/test_streams.py

Each row is an environment of its own below build/matrix, kept for the next run. A row whose
Python is not on this machine is named and left out, and the exit code is then 3.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CHEAP = (
    *("tests/test_layers.py", "tests/test_autoencoder.py", "tests/test_transforms.py"),
    *("tests/test_config.py", "tests/test_latents.py", "tests/test_video.py"),
)
# The lower bounds of pyproject.toml, but Ray's; test tools as they are.
LOWEST = (
    *("jax==0.10.0", "equinox==0.13.1", "jaxtyping==0.3.6", "numpy==2.0.0", "safetensors==0.5.0"),
    *("huggingface_hub==0.34.0", "torch==2.6.0", "diffusers==0.35.0", "transformers==4.50.0"),
    *("accelerate==1.0.0", "av==18.1.0", "optax==0.2.5", "click==8.2.0"),
)
LEFT_OUT = 3


class Row(NamedTuple):
    """A Python, and what is asked of pip beside the package."""

    pythons: tuple[str, ...]
    pins: tuple[str, ...]


ROWS = {
    "lowest": Row(("python3.11",), LOWEST),
    "pinned": Row(("python3.11",), ("-c", "constraints.txt")),
    # JAX 0.11 needs Python 3.12.
    "highest": Row(("python3.14", "python3.13", "python3.12"), ("jax>=0.11,<0.12",)),
}


def environment(name, row, python):
    """The row's interpreter, with the package and its tests' needs."""
    folder = ROOT / "build" / "matrix" / name
    inside = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        pip = [inside, "-m", "pip", "-q", "install"]
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
        tested = ["-e", ".[diffusers,video,train]", "--group", "test"]
        subprocess.run([*pip, *row.pins, *tested], cwd=ROOT, check=True)
        (folder / "ready").touch()
    return inside


def run(name, row, tests):
    """The tests' exit code; None where there is no such Python."""
    python = next(filter(None, map(shutil.which, row.pythons)), None)
    if python is None:
        print(f"{name}: none of {', '.join(row.pythons)} is here: left out")
        return None
    inside = environment(name, row, python)
    versions = "import sys, jax, equinox; print(sys.version.split()[0], jax.__version__, end=' ')"
    print(f"{name}: Python and JAX", flush=True)
    subprocess.run([inside, "-c", versions], check=True)
    return subprocess.run([inside, "-m", "pytest", "-q", "-n", "0", *tests], cwd=ROOT).returncode


def main():
    """1 where a row fails, 3 where one was left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help=f"rows ({', '.join(ROWS)}), and test files")
    options = parser.parse_args()
    names = [word for word in options.what if word in ROWS] or list(ROWS)
    tests = [word for word in options.what if word not in ROWS] or CHEAP
    codes = {name: run(name, ROWS[name], tests) for name in names}
    for name, code in codes.items():
        print(f"{name}: {'left out' if code is None else 'failed' if code else 'passed'}")
    if any(codes.values()):
        return 1
    return LEFT_OUT if None in codes.values() else 0


if __name__ == "__main__":
    sys.exit(main())
