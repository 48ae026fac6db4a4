"""Writes .ci/hashes.txt: the files of constraints.txt by their hashes, as CI installs them.

python scripts/hashes.py           # on the platform and Python of CI
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# What CI downloads: the versions of constraints.txt, as wheels for Linux on x86_64 and Python 3.11.
# Of torch a build for CPU, where pip is told of one, or its index's. Written by scripts/hashes.py.
"""


def resolved(*options):
    """Pinned name and SHA-256 of each wheel that pip would take."""
    options = ("--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:", *options)
    report = ["--report", "-", "-r", ROOT / "constraints.txt"]
    command = [sys.executable, "-m", "pip", "-q", "install", *options, *report]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for found in json.loads(done.stdout)["install"]:
        version = found["metadata"]["version"].partition("+")[0]
        digest = found["download_info"]["archive_info"]["hashes"]["sha256"]
        yield f"{found['metadata']['name']}=={version}", digest


def main():
    """One requirement a line, with and without what pip is told of by its environment."""
    hashes = {}
    for pin, digest in (*resolved(), *resolved("--isolated")):
        hashes.setdefault(pin, set()).add(f"--hash=sha256:{digest}")
    lines = [f"{pin} {' '.join(sorted(found))}\n" for pin, found in hashes.items()]
    (ROOT / ".ci" / "hashes.txt").write_text(HEADER + "".join(sorted(lines, key=str.lower)))


if __name__ == "__main__":
    main()
