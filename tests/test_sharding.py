"""sharded and best_mesh, on eight simulated devices.

JAX has to be told of the devices before it starts, so the cases run in a process of their own,
and all other tests keep their one device.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("eight_devices.py")
# Compiling is nearly all of the time, so the flags of `make test` hold here too.
FLAGS = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    )
)


@pytest.mark.timeout(1800)  # some sixty tests
@pytest.mark.parametrize("which", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_on_eight_devices(which):
    options = ["-n", "0", "-rA", "--no-header", "-m", which]
    command = [sys.executable, "-m", "pytest", *options, str(CASES)]
    environment = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    root = CASES.parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
