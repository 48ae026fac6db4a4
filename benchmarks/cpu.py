"""Seconds beside diffusers, in one process, interleaved: encode, decode, gradient of a decode.

    python benchmarks/cpu.py [--model CogVideoX-5b] [--sizes 128x192 ...] [--frames 9]
    python benchmarks/cpu.py --model tiny --compiled      # diffusers by torch.compile as well
    python benchmarks/cpu.py --device cuda --dtypes bfloat16 --sizes 480x720 --frames 49

Prints, for each dtype and size, medians in seconds and the ratio of theirs to ours. Random
weights, the same in both. On a GPU JAX must leave memory to torch:
XLA_PYTHON_CLIENT_PREALLOCATE=false. See gpu.py for memory.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import diffusers
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch

import eqx_cogvae as cv
from eqx_cogvae import video


def main() -> None:
    """Measures, and prints a row as each is done."""
    options = _options()
    print(
        f"{options.model}, {options.frames} frames, {jax.devices()[0].device_kind}, "
        f"{os.cpu_count()} cores of {platform.machine()}, load {os.getloadavg()[0]:.1f}; "
        f"jax {jax.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}\n"
    )
    kinds = ["diffusers", "torch.compile"] if options.compiled else ["diffusers"]
    print(f"| | dtype | size | eqx_cogvae | {' | '.join(f'{k} | ratio' for k in kinds)} |")
    print("|---|---|---|---|" + "---|---|" * len(kinds), flush=True)
    model = diffusers.AutoencoderKLCogVideoX(**cv.Config.preset(options.model).to_dict()).eval()
    model = model.to(options.device)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        vae = cv.from_pretrained(folder, dtype=jnp.float32)
    for dtype in options.dtypes:
        ours = jax.tree.map(lambda x, d=dtype: x.astype(d) if eqx.is_array(x) else x, vae)
        theirs = model.to(getattr(torch, dtype))
        for size in options.sizes:
            height, width = map(int, size.split("x"))
            clip = video.procedural_clip(options.frames, height, width)
            for name, contenders in _contenders(ours, theirs, clip, options).items():
                _row([name, dtype, size], contenders, options.repeats)


def _contenders(vae: cv.VAE, model: Any, clip: Any, options: argparse.Namespace) -> dict:
    """For each task ours, diffusers', and diffusers' compiled; each waits for its result."""
    x = jnp.asarray(clip).astype(vae.dtype)
    z = jax.block_until_ready(vae.encode(x).mean)
    tx, tz = (_tensor(array, model) for array in (x, z))
    grads = eqx.filter_jit(jax.grad(lambda z, vae: jnp.sum(vae.decode(z).astype(jnp.float32))))
    tasks = {
        "encode": [lambda: jax.block_until_ready(vae.encode(x).mean)],
        "decode": [lambda: jax.block_until_ready(vae.decode(z))],
        "gradient of a decode": [lambda: jax.block_until_ready(grads(z, vae))],
    }
    wraps = [lambda fn: fn, torch.compile] if options.compiled else [lambda fn: fn]
    for wrap in wraps:
        encode, decode = wrap(model.encode), wrap(model.decode)
        tasks["encode"].append(_quietly(lambda f=encode: f(tx).latent_dist.mean))
        tasks["decode"].append(_quietly(lambda f=decode: f(tz).sample))
        tasks["gradient of a decode"].append(lambda f=decode: _gradient(f, tz))
    return {name: tasks[name] for name in tasks if name.split()[0] in options.tasks}


def _quietly(call: Callable) -> Callable:
    def run():
        with torch.no_grad():
            return _waited(call())

    return run


def _gradient(decode: Callable, z: torch.Tensor) -> torch.Tensor:
    z = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(decode(z).sample.float().sum(), z)
    return _waited(grad)


def _waited(x: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        torch.cuda.synchronize()
    return x


def _tensor(x: jax.Array, model: Any) -> torch.Tensor:
    array = np.moveaxis(np.asarray(x.astype(jnp.float32)), -1, 1)
    return torch.from_numpy(array.copy()).to(model.device, model.dtype)


def _row(labels: list[str], contenders: list[Callable], repeats: int) -> None:
    for call in contenders:
        call()  # compiles, and warms what is cached
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats):
        for call, times in zip(contenders, seconds, strict=True):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
    ours, *theirs = map(statistics.median, seconds)
    cells = [f"{ours:.2f} s", *(f"{each:.2f} s | {each / ours:.2f}" for each in theirs)]
    print(f"| {' | '.join([*labels, *cells])} |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="CogVideoX-5b", help="a preset of `Config`")
    parser.add_argument("--sizes", nargs="+", default=["64x96", "128x192"])
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tasks", nargs="+", default=["encode", "decode", "gradient"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well")
    parser.add_argument("--device", default="cpu", help="torch's")
    return parser.parse_args()


if __name__ == "__main__":
    main()
