"""Files that were tampered with: each loads right, or is refused in one line that names it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import eqx_cogvae as cv

HOSTILE = Path(__file__).with_name("hostile.py")


@pytest.mark.parametrize("mutations", [250, pytest.param(2500, marks=pytest.mark.full)])
def test_mutated_files(mutations):
    """In a process of its own: its end by a signal is a failure, and its memory is its own."""
    arguments = [sys.executable, HOSTILE, "--mutations", str(mutations)]
    done = subprocess.run(arguments, cwd=HOSTILE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-4000:])
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["loaded"] + counts["refused"] == mutations
    # The mutations are neither all harmless nor all fatal.
    assert min(counts["loaded"], counts["refused"]) > mutations // 20


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"layers_per_block": 10**400},
            r"`layers_per_block` .* from 1 to 2147483647, got 10+\.\.\.0+\.$",
        ),
        ({"block_out_channels": [2**63]}, "`block_out_channels` .* from 1 to 65536, got 9"),
        ({"block_out_channels": [32] * 99}, "tuple of widths, at most 12, got .*"),
        ({"use_quant_conv": "false"}, "`use_quant_conv` must be True or False, got 'false'"),
        ({"invert_scale_latents": 1}, "`invert_scale_latents` must be True or False, got 1"),
        ({"force_upcast": float("nan")}, "`force_upcast` must be True or False, got nan"),
        ({"shift_factor": "x"}, "`shift_factor` must be a finite number or None, got 'x'"),
        ({"scaling_factor": 10**400}, "`scaling_factor` must be a positive number, got 10+"),
        ({"latents_mean": [float("inf")] * 16}, "`latents_mean` must be finite numbers or None"),
        ({"latents_mean": 7}, "`latents_mean` must be finite numbers or None, got 7"),
        ({"latents_std": [0.0] * 16}, "`latents_std` must be positive"),
        ({"x" * 9999: 1}, "unknown config key 'x+\\.\\.\\.x+': known are"),
        ({"down_block_types": "x" * 9999}, "`down_block_types` must be 4 times .*"),
    ],
)
def test_configs_that_make_no_model(fields, match, unchecked):
    with pytest.raises(ValueError, match=match) as caught:
        cv.Config.from_dict(fields)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
