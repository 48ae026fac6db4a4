"""Writes .ci/hashes.txt and .ci/cuda.txt: the files of constraints.txt by their hashes, for CI.

python scripts/hashes.py           # on CI's platform, where pip finds a build of torch for CPU
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints.txt"
HEADER = """\
# What CI downloads: the versions of constraints.txt, as wheels for Linux on x86_64 and Python 3.11.
# Of torch a build for CPU, where pip is told of one, or its index's. Written by scripts/hashes.py.
"""
CUDA = """\
# What the index's build of torch needs besides. Written by scripts/hashes.py.
"""


def resolved(*wanted):
    """Pinned name and hash of each wheel that pip would take."""
    options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--report", "-"]
    command = [sys.executable, "-m", "pip", "-q", "install", *options, *wanted]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for found in json.loads(done.stdout)["install"]:
        version = found["metadata"]["version"].partition("+")[0]
        digest = found["download_info"]["archive_info"]["hashes"]["sha256"]
        yield f"{found['metadata']['name']}=={version}", f"--hash=sha256:{digest}"


def write(name, header, hashes):
    """One requirement a line."""
    lines = [f"{pin} {' '.join(sorted(found))}\n" for pin, found in hashes.items()]
    (ROOT / ".ci" / name).write_text(header + "".join(sorted(lines, key=str.lower)))


def main():
    """With and without what pip is told of by its environment."""
    here = (sys.version_info[:2], sys.platform, platform.machine())
    if here != ((3, 11), "linux", "x86_64"):
        sys.exit(f"CI runs Python 3.11 on Linux, x86_64: wheels for {here} have other hashes")
    pinned, cuda = {}, {}
    for options in ((), ("--isolated",)):
        for pin, digest in resolved(*options, "--no-deps", "-r", PINS):
            pinned.setdefault(pin, set()).add(digest)
    for pin, digest in resolved("--isolated", "-c", PINS, "torch"):
        if pin not in pinned:
            cuda[pin] = {digest}
    write("hashes.txt", HEADER, pinned)
    write("cuda.txt", CUDA, cuda)


if __name__ == "__main__":
    main()
