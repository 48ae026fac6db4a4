"""All that a GPU is needed for, within a budget of seconds; what is done is printed at once.

    python benchmarks/gpu_all.py --budget 720
    python benchmarks/gpu_all.py --budget 300 --stages tests small
    python benchmarks/gpu_all.py --dry-run

Stages come in the order of their worth. Each has a limit of its own, and gets no more than is
left. The exit code is 1 if a stage failed; one that ran out of time is no failure.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
LEAST, MARGIN = 15.0, 8.0
BUDGET = "BUDGET"


class Stage(NamedTuple):
    """A command of Python's, and the seconds that it may take, which stand for `BUDGET` in it."""

    limit: float
    command: tuple[str, ...]

    def within(self, limit: float) -> list[str]:
        """Returns the command as it is given `limit` seconds."""
        # A script ends by itself a little earlier, to print what it has.
        budget = f"{max(limit - MARGIN, 1):.0f}"
        return [budget if each == BUDGET else each for each in self.command]


def _gpu(limit: float, *arguments: str) -> Stage:
    return Stage(limit, (str(HERE / "gpu.py"), "--budget", BUDGET, *arguments))


_OURS, _EAGER, _SMALL, _LARGE = "eqx_cogvae", "diffusers", "49x480x720", "81x768x1360"
STAGES = {
    "tests": Stage(180, ("-m", "pytest", "-v", "-n", "0", str(HERE.parent / "tests/test_gpu.py"))),
    "small": _gpu(150, "--clips", _SMALL, "--ways", _OURS, _EAGER, "--profile"),
    "streams": Stage(100, (str(HERE / "streams.py"), "--clip", _SMALL)),
    "compiled": _gpu(150, "--clips", _SMALL, "--ways", "torch.compile", "--profile"),
    "large": _gpu(150, "--clips", _LARGE, "--ways", _OURS, _EAGER, "--repeats", "1"),
    "autotuned": _gpu(200, "--clips", _SMALL, "--ways", "max-autotune"),
    "large, compiled": _gpu(150, "--clips", _LARGE, "--ways", "torch.compile", "--repeats", "1"),
}


def main() -> None:
    """Runs the stages one after the other, until the budget is spent."""
    options = _options()
    end, failed = time.monotonic() + options.budget, False
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    for name in options.stages:
        stage = STAGES[name]
        limit = min(stage.limit, end - time.monotonic())
        if limit < LEAST:
            print(f"\n## {name}: no time was left", flush=True)
            continue
        command = stage.within(limit)
        print(f"\n## {name}, at most {limit:.0f} s\n\n    {' '.join(command)}\n", flush=True)
        if options.dry_run:
            continue
        begun = time.monotonic()
        code = _run([sys.executable, *command], environment, limit)
        failed = failed or code not in (0, None)
        how = f"ended with {code}" if code is not None else "was ended"
        print(f"\n{name} {how} after {time.monotonic() - begun:.0f} s", flush=True)
    raise SystemExit(int(failed))


def _run(command: list[str], environment: dict[str, str], limit: float) -> int | None:
    """Returns the exit code of a command, or None if it was ended with all that it started."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=720, help="seconds for all stages")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
