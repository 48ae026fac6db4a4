"""Two checkouts in turn: seconds of encode, decode and gradient, and of compiling them.

    git worktree add /tmp/before HEAD~1
    python benchmarks/alternate.py /tmp/before . --size 64x96 --repeats 5

Each checkout has a process of its own. They compute one after the other, never at once, A B A B,
so that a machine whose speed drifts slows both; quote the medians' ratio.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

TASKS = ("encode", "decode", "gradient")


def main() -> None:
    """Prints a row for each task."""
    options = _options()
    if options.child:
        _serve(options)
        return
    sides = [_Side(folder, options) for folder in options.folders]
    print("| task | compile, s | median, s | ratio of medians | per pair |")
    print("|---|---|---|---|---|", flush=True)
    for task in TASKS:
        compiled = [side.ask(task) for side in sides]
        pairs = [[side.ask(task) for side in sides] for _ in range(options.repeats)]
        medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
        ratios = ", ".join(f"{after / before:.3f}" for before, after in pairs)
        print(
            f"| {task} | {compiled[0]:.1f}, {compiled[1]:.1f} | {medians[0]:.2f}, {medians[1]:.2f} "
            f"| {medians[1] / medians[0]:.3f} | {ratios} |",
            flush=True,
        )


class _Side:
    """A process that computes with the package of one folder."""

    def __init__(self, folder: str, options: argparse.Namespace):
        command = [sys.executable, os.path.abspath(__file__), folder, "--child"]
        command += ["--size", options.size, "--frames", str(options.frames)]
        environment = os.environ | {"PYTHONPATH": os.path.abspath(folder)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, task: str) -> float:
        """Returns the seconds of one call."""
        pipes: Any = self._process
        pipes.stdin.write(task + "\n")
        pipes.stdin.flush()
        return json.loads(pipes.stdout.readline())


def _serve(options: argparse.Namespace) -> None:
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import eqx_cogvae as cv

    height, width = map(int, options.size.split("x"))
    vae = cv.VAE(cv.Config(), key=jax.random.key(0))
    video = jnp.zeros((1, options.frames, height, width, 3))
    shape = (1, vae.config.latent_frames(options.frames), height // 8, width // 8, 16)
    latents = jnp.zeros(shape)
    loss = lambda vae, z: jnp.sum(jnp.square(vae.decode_step(z)[0]))  # noqa: E731
    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    calls = {
        "encode": lambda: vae.encode_step(video),
        "decode": lambda: vae.decode_step(latents),
        "gradient": lambda: gradient(vae, latents),
    }
    for line in sys.stdin:
        begun = time.perf_counter()
        jax.block_until_ready(eqx.filter(calls[line.strip()](), eqx.is_array))
        print(json.dumps(time.perf_counter() - begun), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="+", help="two checkouts, the one before and the one after"
    )
    parser.add_argument("--size", default="64x96")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
