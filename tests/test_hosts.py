"""The same program on several hosts: two processes here, joined by gloo's collectives."""

import json
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


def test_two_processes_give_what_one_gives(tmp_path):
    address = f"localhost:{free_port()}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Compiling is nearly all of the time.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), address, str(index), str(tmp_path / str(index))],
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
    for index, (_, err) in enumerate(said):
        assert processes[index].returncode == 0, err
        found = json.loads((tmp_path / str(index)).read_text())
        assert found["devices"] == [4, 2]
        for what in ("decode", "encode"):
            parts, error = found[what]
            assert parts == 2 and error < 1e-5
