"""The same program on several hosts: two processes here, joined by gloo's collectives."""

import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("two_hosts.py")
ROOT = SCRIPT.parents[1]
SECONDS = 300


def free_port():
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return bound.getsockname()[1]


def test_two_processes_give_what_one_gives():
    address = f"localhost:{free_port()}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), address, str(index)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err
        # gloo has its say as well.
        lines = [line.split() for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert lines[0] == ["devices", "4", "of", "which", "mine", "2"]
        assert [line[:2] for line in lines[1:]] == [["decode", "2"], ["encode", "2"]]
        assert all(float(line[2]) < 1e-5 for line in lines[1:]), out
