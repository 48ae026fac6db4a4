"""Writes .ci/hashes.txt: the files of constraints.txt by their hashes, as CI installs them.

python scripts/hashes.py           # on the platform and Python of CI
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# What CI downloads: the versions of constraints.txt, as wheels for Linux on x86_64 and Python 3.11,
# torch as its CPU build. Written by scripts/hashes.py.
"""


def resolved():
    """Name, version and SHA-256 of every wheel that pip would take."""
    options = ["--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:"]
    report = ["--report", "-", "-r", ROOT / "constraints.txt"]
    command = [sys.executable, "-m", "pip", "-q", "install", *options, *report]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for found in json.loads(done.stdout)["install"]:
        digest = found["download_info"]["archive_info"]["hashes"]["sha256"]
        yield found["metadata"]["name"], found["metadata"]["version"], digest


def main():
    """One requirement a line."""
    lines = [f"{name}=={version} --hash=sha256:{digest}\n" for name, version, digest in resolved()]
    (ROOT / ".ci" / "hashes.txt").write_text(HEADER + "".join(sorted(lines, key=str.lower)))


if __name__ == "__main__":
    main()
