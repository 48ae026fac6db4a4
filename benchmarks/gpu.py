"""Memory and seconds on a GPU beside diffusers, each in a process of its own.

    python benchmarks/gpu.py [--model CogVideoX-5b] [--clips 49x480x720 81x768x1360] [--ways ...]
    python benchmarks/gpu.py --clips 49x480x720 --profile --budget 300
    python benchmarks/gpu.py --device cpu --model tiny --dtype float32 --clips 9x32x48 --profile

For every clip decode and encode noise, in these ways:

- `eqx_cogvae`, and `eqx_cogvae, cached`: ours, without and with what JAX's persistent compilation
  cache holds;
- `diffusers`: as it comes;
- `torch.compile`, and `max-autotune`: diffusers in the memory format channels_last_3d, compiled,
  in torch's usual mode and in that one.

Prints a row as each is done: the first call's seconds, the median of the next ones, and the peak
of the allocator. Then a table with a column for each way and, with `--profile`, one of the seconds
of a call by kind of kernel. What does not come to its end within the budget is said so.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from kernels import KINDS, by_kind, profiled_by_jax, profiled_by_torch

WAYS = ("eqx_cogvae", "eqx_cogvae, cached", "diffusers", "torch.compile", "max-autotune")
TASKS = ("decode", "encode")
LARGEST_SHOWN = 8
Results = dict[tuple[str, str, str], dict[str, Any]]


def main() -> None:
    """Runs a process for each clip, way and task."""
    options = _options()
    if options.child:
        print(json.dumps(_child(options)))
        return
    end = time.monotonic() + options.budget
    results: Results = {}
    print("| clip | task | way | first call | next calls | peak |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for clip in options.clips:
            for way in options.ways:
                for task in options.tasks:
                    result = _measured(clip, task, way, cache, end, options)
                    results[clip, task, way] = result
                    print(f"| {clip} | {task} | {way} | {_cells(result)} |", flush=True)
    _beside_each_other(results, options)
    if options.profile:
        _profiles(results)


def _measured(
    clip: str, task: str, way: str, cache: str, end: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns what a process of its own measured, or the error that it ended with."""
    left = end - time.monotonic()
    if left < 1:
        return {"error": "no time was left"}
    same = [f"--{name}={getattr(options, name)}" for name in ("model", "dtype", "device")]
    same += ["--repeats", str(options.repeats), *(["--profile"] if options.profile else [])]
    child = [sys.executable, __file__, "--child", way, "--clips", clip, "--tasks", task, *same]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    limit = min(left, options.limit)
    try:
        done = subprocess.run(
            child, env=environment, capture_output=True, text=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {limit:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip() or "failed").splitlines()[-1][:60]}
    return json.loads(done.stdout.splitlines()[-1])


def _cells(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{result['error']} | | "
    return f"{result['first']:.1f} s | {result['next']:.2f} s | {result['peak'] / 2**30:.2f} GiB"


def _beside_each_other(results: Results, options: argparse.Namespace) -> None:
    """Prints seconds and peaks of all ways, and the ratio of each way's seconds to ours."""
    print(f"\n| clip | task | {' | '.join(options.ways)} |\n|---|---|{'---|' * len(options.ways)}")
    for clip, task in dict.fromkeys((clip, task) for clip, task, _ in results):
        row = [results[clip, task, way] for way in options.ways]
        ours = results.get((clip, task, "eqx_cogvae"), {}).get("next")
        print(
            f"| {clip} | {task} | {' | '.join(_beside(each, ours) for each in row)} |", flush=True
        )


def _beside(result: dict[str, Any], ours: float | None) -> str:
    if "error" in result:
        return result["error"]
    ratio = f" ({result['next'] / ours:.2f}x)" if ours else ""
    return f"{result['next']:.2f} s{ratio}, {result['peak'] / 2**30:.2f} GiB"


def _profiles(results: Results) -> None:
    print(f"\n| clip | task | way | {' | '.join(KINDS)} |\n|---|---|---|{'---|' * len(KINDS)}")
    done = {key: each["profile"] for key, each in results.items() if "profile" in each}
    for key, profile in done.items():
        cells = [f"{profile['kinds'][kind] * 1e3:.1f} ms" for kind in KINDS]
        print(f"| {' | '.join([*key, *cells])} |")
    for key, profile in done.items():
        print(f"\nthe largest of {', '.join(key)}:")
        for name, seconds in profile["largest"]:
            print(f"{seconds * 1e3:9.1f} ms  {name}", flush=True)


def _child(options: argparse.Namespace) -> dict[str, Any]:
    frames, height, width = map(int, options.clips[0].split("x"))
    is_ours = options.child.startswith("eqx")
    call, peak = (_ours if is_ours else _theirs)(options, frames, height, width)
    seconds = []
    for _ in range(1 + options.repeats):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    result = {"first": seconds[0], "next": statistics.median(seconds[1:]), "peak": peak()}
    if options.profile:
        kernels = (profiled_by_jax if is_ours else profiled_by_torch)(call)
        largest = [(name[:120], each) for name, each in kernels[:LARGEST_SHOWN]]
        result["profile"] = {"kinds": by_kind(kernels), "largest": largest}
    return result


def _ours(
    options: argparse.Namespace, frames: int, height: int, width: int
) -> tuple[Callable, Callable]:
    import jax
    import jax.numpy as jnp

    import eqx_cogvae as cv

    config, dtype = cv.Config.preset(options.model), jnp.dtype(options.dtype)
    vae = cv.VAE(config, key=jax.random.key(0), dtype=dtype)
    cell = config.spatial_compression
    if options.tasks == ["encode"]:
        shape = (1, frames, height, width, config.in_channels)
        x = jnp.tanh(jax.random.normal(jax.random.key(1), shape, dtype))
        call = lambda: jax.block_until_ready(vae.encode(x).mean)  # noqa: E731
    else:
        cells = (1, config.latent_frames(frames), height // cell, width // cell)
        z = jax.random.normal(jax.random.key(1), (*cells, config.latent_channels), dtype)
        call = lambda: jax.block_until_ready(vae.decode(z))  # noqa: E731
    device = jax.devices()[0]
    on_gpu = lambda: (device.memory_stats() or {})["peak_bytes_in_use"]  # noqa: E731
    return call, on_gpu if options.device == "cuda" else _resident


def _theirs(
    options: argparse.Namespace, frames: int, height: int, width: int
) -> tuple[Callable, Callable]:
    import diffusers
    import torch

    import eqx_cogvae as cv

    config, dtype = cv.Config.preset(options.model), getattr(torch, options.dtype)
    model = diffusers.AutoencoderKLCogVideoX(**config.to_dict()).eval().to(options.device, dtype)
    shape = (1, config.in_channels, frames, height, width)
    if options.tasks == ["decode"]:
        cell = config.spatial_compression
        cells = (config.latent_frames(frames), height // cell, width // cell)
        shape = (1, config.latent_channels, *cells)
    x = torch.randn(shape, dtype=dtype, device=options.device)
    x = x.tanh() if options.tasks == ["encode"] else x
    if compiled := options.child != "diffusers":
        model = model.to(memory_format=torch.channels_last_3d)
        x = x.to(memory_format=torch.channels_last_3d)
    fn = model.encode if options.tasks == ["encode"] else model.decode
    mode = "max-autotune" if options.child == "max-autotune" else "default"
    fn = torch.compile(fn, mode=mode) if compiled else fn

    def call():
        with torch.no_grad():
            fn(x)
        if options.device == "cuda":
            torch.cuda.synchronize()

    return call, torch.cuda.max_memory_allocated if options.device == "cuda" else _resident


def _resident() -> int:
    """The most memory that the process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="CogVideoX-5b", help="a preset of `Config`")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--clips", nargs="+", default=["49x480x720", "81x768x1360"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="seconds by kind of kernel")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one process")
    parser.add_argument("--budget", type=float, default=7200, help="seconds for all of them")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
