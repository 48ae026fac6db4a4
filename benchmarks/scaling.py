"""How seconds grow with frames, pixels, batch and simulated devices, with a fitted exponent.

    python benchmarks/scaling.py [--model tiny] [--devices 1 2 4 8]

Each question doubles one thing and keeps the others. The exponent is the slope of a line through
the logarithms: 1 is in proportion, 0 is for nothing. Simulated devices share the same cores: what
is shown for them is what cutting costs, not what it gains. Medians of `--repeats`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

import eqx_cogvae as cv

FRAMES, SIDE, BATCH = 17, 64, 1


def main() -> None:
    """Measures, one question after another."""
    options = _options()
    if options.child:
        return _on_devices(options)
    vae = _model(options)
    print(f"{options.model}, float32, jax {jax.__version__}, load {os.getloadavg()[0]:.1f}\n")
    print("| decode of | seconds | exponent |\n|---|---|---|")
    questions = {
        "frames": [(BATCH, frames, SIDE, SIDE) for frames in (9, 17, 33, 65)],
        "pixels": [(BATCH, FRAMES, SIDE, side) for side in (32, 64, 128, 256)],
        "batch": [(batch, FRAMES, SIDE, SIDE) for batch in (1, 2, 4, 8)],
    }
    for name, shapes in questions.items():
        sizes = [float(np.prod(shape)) for shape in shapes]
        _report(name, sizes, [_seconds(vae.decode, _latents(vae, s), options) for s in shapes])
    seconds = [_child(count, options) for count in options.devices]
    _report("devices", [float(count) for count in options.devices], seconds)


def _report(name: str, sizes: list[float], seconds: list[float]) -> None:
    exponent = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
    steps = ", ".join(f"{size / sizes[0]:g}x {each:.2f}" for size, each in zip(sizes, seconds))  # noqa: B905
    print(f"| more {name} | {steps} | {exponent:.2f} |", flush=True)


def _model(options: argparse.Namespace) -> cv.VAE:
    return cv.VAE(cv.Config.preset(options.model), key=jax.random.key(0))


def _latents(vae: cv.VAE, shape: tuple[int, ...]) -> jax.Array:
    batch, frames, height, width = shape
    cell, config = vae.config.spatial_compression, vae.config
    cells = (batch, config.latent_frames(frames), height // cell, width // cell)
    return jax.random.normal(jax.random.key(1), (*cells, config.latent_channels))


def _seconds(fn: Callable, z: jax.Array, options: argparse.Namespace) -> float:
    jax.block_until_ready(fn(z))  # compiles
    times = []
    for _ in range(options.repeats):
        begun = time.perf_counter()
        jax.block_until_ready(fn(z))
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _child(count: int, options: argparse.Namespace) -> float:
    """In a process of its own: the number of devices is settled when JAX starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    command = [sys.executable, __file__, "--child", "--model", options.model]
    command += ["--repeats", str(options.repeats)]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return float(subprocess.run(command, env=environment, check=True, stdout=-1, text=True).stdout)


def _on_devices(options: argparse.Namespace) -> None:
    vae = _model(options)
    z = _latents(vae, (BATCH, FRAMES, 2 * SIDE, 4 * SIDE))
    axes = {"batch": "batch", "height": "height", "width": "width"}
    decode = cv.sharded(cv.framewise(vae.decode_step, 2), cv.best_mesh(z.shape), **axes)
    print(_seconds(decode, z, options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="a preset of `Config`")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
