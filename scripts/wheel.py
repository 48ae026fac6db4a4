"""Builds the wheel and the sdist, looks at what is in them, and runs the demo from the wheel.

    pip install build cyclonedx-bom
    python scripts/wheel.py                      # builds and looks
    python scripts/wheel.py --demo --out dist    # what is released, with its bill of materials

`--demo` installs the wheel with `[video]` into an environment of its own, and lists in CycloneDX's
format what is there then, pip included. Without `--out` nothing is kept.
"""

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
ELSEWHERE = re.compile(r"(^|/)(\.git|\.venv|\.jax_cache|__pycache__|build|\.hypothesis)/|\.pyc$")


def due():
    """The files of the wheel, by git: what is not committed is stray."""
    tracked = subprocess.check_output(["git", "ls-files", "eqx_cogvae"], cwd=ROOT, text=True)
    return set(tracked.split())


def check_wheel(path):
    """The package as it is committed, its metadata, its licence, and nothing else."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        sizes = {info.filename: info.file_size for info in wheel.infolist()}
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert package == due(), package ^ due()
    assert {f"eqx_cogvae/tiny/{name}" for name in TINY} <= package
    kinds = {Path(name).suffix for name in package}
    assert kinds <= {".py", ".typed", ".md", ".json", ".safetensors"}, kinds
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    return sum(sizes.values())


def check_sdist(path):
    """Enough to build the wheel and to run the tests, and nothing that was built."""
    with tarfile.open(path) as sdist:
        names = [member.name.partition("/")[2] for member in sdist if member.isfile()]
    stray = [name for name in names if ELSEWHERE.search(name)]
    assert not stray, stray
    needed = {"pyproject.toml", "LICENSE", "tests/conftest.py", ".ci/hashes.txt"}
    assert due() | needed <= set(names)
    return len(names)


def demo(wheel, folder):
    """In an environment where nothing else is, from a folder where no sources are."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pins = ["-c", ROOT / "constraints.txt"]
    subprocess.run([python, "-m", "pip", "-q", "install", *pins, f"{wheel}[video]"], check=True)
    command = ["reconstruct", "--frames", "9", "--size", "32x48"]
    subprocess.run([python, "-m", "eqx_cogvae", *command], cwd=folder, check=True)
    assert (folder / "out" / "procedural.mp4").stat().st_size
    return python


def write_bill(python, path):
    """The software bill of materials of an environment, and how many packages it lists."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"]
    described = ["--pyproject", ROOT / "pyproject.toml", "--mc-type", "library"]
    subprocess.run([*command, *described, "-o", path, python], check=True)
    bill = json.loads(path.read_text())
    assert bill["metadata"]["component"]["name"] == "eqx_cogvae"
    assert all(part.get("version") for part in bill["components"])
    return len(bill["components"])


def build(out, with_demo):
    """Into a folder, each looked at."""
    subprocess.run([sys.executable, "-m", "build", "-o", out, ROOT], check=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    print(f"{wheel.name}: {check_wheel(wheel):,} bytes unpacked, nothing stray")
    print(f"{sdist.name}: {check_sdist(sdist)} files, nothing stray")
    if not with_demo:
        return
    with tempfile.TemporaryDirectory() as folder:
        python = demo(wheel, Path(folder))
        print("the demo ran from an environment with the wheel alone")
        bill = wheel.with_suffix(".cdx.json")
        print(f"{bill.name}: {write_bill(python, bill)} packages")


def main():
    """Prints what was found to be right; an `AssertionError` names what was not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", action="store_true", help="install it, and run the demo")
    parser.add_argument("--out", type=Path, help="a folder to keep it all in, empty or not there")
    options = parser.parse_args()
    if options.out and options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty")
    if options.out:
        build(options.out.absolute(), options.demo)
    else:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), options.demo)


if __name__ == "__main__":
    main()
