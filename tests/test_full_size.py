"""The published configuration, through the command line, beside diffusers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from eqx_cogvae import video

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_the_published_configuration_agrees(tmp_path):
    video.write(tmp_path / "clip.mp4", video.procedural_clip(17, 64, 96))
    script = [sys.executable, "benchmarks/parity.py", str(tmp_path / "clip.mp4")]
    command = [*script, "--frames", "17", "--size", "64x96"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "436 tensors, 215,583,907 parameters" in done.stdout
    encode, decode = map(float, re.search(r"encode (\S+), decode (\S+)\n", done.stdout).groups())
    assert encode < 1e-5
    assert decode < 1e-5
