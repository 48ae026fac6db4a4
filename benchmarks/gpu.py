"""Memory and seconds on a GPU beside diffusers, each in a process of its own.

    python benchmarks/gpu.py [--model CogVideoX-5b] [--clips 49x480x720 81x768x1360] [--ways ...]

For every clip decode and encode noise in bfloat16, three ways: eqx_cogvae, diffusers, and diffusers
by torch.compile. Prints the first call's seconds (for us without and with what the persistent
compilation cache holds), the median of the next ones, and the peak of the allocator.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

WAYS = ("eqx_cogvae", "eqx_cogvae, cached", "diffusers", "torch.compile")


def main() -> None:
    """Runs a process for each clip, task and way."""
    options = _options()
    if options.child:
        print(json.dumps(_child(options)))
        return
    print("| clip | task | way | first call | next calls | peak |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for clip in options.clips:
            for task in ("decode", "encode"):
                for way in options.ways:
                    row = _measured(clip, task, way, cache, options)
                    print(f"| {clip} | {task} | {way} | {row} |", flush=True)


def _measured(clip: str, task: str, way: str, cache: str, options: argparse.Namespace) -> str:
    same = ["--model", options.model, "--repeats", str(options.repeats)]
    child = [sys.executable, __file__, "--child", way, "--clips", clip, "--task", task, *same]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    done = subprocess.run(child, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{(done.stderr.strip() or 'failed').splitlines()[-1][:60]} | | "
    result = json.loads(done.stdout.splitlines()[-1])
    return f"{result['first']:.1f} s | {result['next']:.2f} s | {result['peak'] / 2**30:.2f} GiB"


def _child(options: argparse.Namespace) -> dict[str, float]:
    frames, height, width = map(int, options.clips[0].split("x"))
    make = _ours if options.child.startswith("eqx") else _theirs
    call, peak = make(options, frames, height, width)
    seconds = []
    for _ in range(1 + options.repeats):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return {"first": seconds[0], "next": statistics.median(seconds[1:]), "peak": peak()}


def _ours(
    options: argparse.Namespace, frames: int, height: int, width: int
) -> tuple[Callable, Callable]:
    import jax
    import jax.numpy as jnp

    import eqx_cogvae as cv

    config = cv.Config.preset(options.model)
    vae = cv.VAE(config, key=jax.random.key(0), dtype=jnp.bfloat16)
    cell = config.spatial_compression
    if options.task == "encode":
        shape = (1, frames, height, width, config.in_channels)
        x = jnp.tanh(jax.random.normal(jax.random.key(1), shape, jnp.bfloat16))
        call = lambda: jax.block_until_ready(vae.encode(x).mean)  # noqa: E731
    else:
        cells = (1, config.latent_frames(frames), height // cell, width // cell)
        z = jax.random.normal(jax.random.key(1), (*cells, config.latent_channels), jnp.bfloat16)
        call = lambda: jax.block_until_ready(vae.decode(z))  # noqa: E731
    device = jax.devices()[0]
    return call, lambda: (device.memory_stats() or {})["peak_bytes_in_use"]


def _theirs(
    options: argparse.Namespace, frames: int, height: int, width: int
) -> tuple[Callable, Callable]:
    import diffusers
    import torch

    import eqx_cogvae as cv

    config = cv.Config.preset(options.model)
    model = diffusers.AutoencoderKLCogVideoX(**config.to_dict()).eval()
    model = model.to("cuda", torch.bfloat16)
    fn, shape = model.encode, (1, config.in_channels, frames, height, width)
    if options.task == "decode":
        cell = config.spatial_compression
        cells = (config.latent_frames(frames), height // cell, width // cell)
        fn, shape = model.decode, (1, config.latent_channels, *cells)
    fn = torch.compile(fn) if options.child == "torch.compile" else fn
    x = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    x = x.tanh() if options.task == "encode" else x

    def call():
        with torch.no_grad():
            fn(x)
        torch.cuda.synchronize()

    return call, torch.cuda.max_memory_allocated


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="CogVideoX-5b", help="a preset of `Config`")
    parser.add_argument("--clips", nargs="+", default=["49x480x720", "81x768x1360"])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--task", default="decode", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
