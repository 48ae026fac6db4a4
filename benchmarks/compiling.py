"""How long the first call compiles: processor's seconds for each program of a model.

    JAX_PLATFORMS=cpu python benchmarks/compiling.py [--model tiny] [--size 64x96] [--gradient]
    XLA_FLAGS=--xla_backend_optimization_level=1 JAX_PLATFORMS=cpu python benchmarks/compiling.py

Each step once for the first batch, no cache, in the weights' dtype; with `--gradient` that of a
decode by all weights too. Nothing is read from a cache on disk. Prints the operations handed to
XLA, seconds to trace them and to compile, and the median milliseconds of five calls.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

import eqx_cogvae as cv


def main() -> None:
    """Prints a row for each program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="`tiny`, a path or a hub id")
    parser.add_argument("--size", default="64x96")
    parser.add_argument("--gradient", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    vae = cv.from_pretrained(options.model)
    height, width = map(int, options.size.split("x"))
    cell = vae.config.spatial_compression
    frames = jnp.zeros((1, 9, height, width, vae.config.in_channels))
    latents = jnp.zeros((1, 3, height // cell, width // cell, vae.config.latent_channels))
    loss = lambda vae, z: jnp.sum(jnp.square(vae.decode_step(z)[0]))  # noqa: E731
    programs = {
        "encode": (lambda vae, x: vae.encode_step(x), frames),
        "decode": (lambda vae, z: vae.decode_step(z), latents),
    }
    if options.gradient:
        programs["gradient"] = (eqx.filter_grad(loss), latents)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {vae.dtype}, {options.size}\n")
    print("| program | operations | traced in, s | compiled in, s | a call, ms |")
    print("|---|---|---|---|---|")
    for name, (fn, x) in programs.items():
        print(f"| {name} | {_row(fn, vae, x)} |", flush=True)


def _row(fn: Callable, vae: cv.VAE, x: jax.Array) -> str:
    times = [time.process_time()]
    lowered = eqx.filter_jit(fn).lower(vae, x)
    times.append(time.process_time())
    program = lowered.compile()
    times.append(time.process_time())
    traced, compiled = (after - before for before, after in itertools.pairwise(times))
    calls = []
    for _ in range(6):
        begun = time.perf_counter()
        jax.block_until_ready(program(vae, x))
        calls.append(time.perf_counter() - begun)
    operations = lowered.as_text().count("\n")
    call = 1e3 * statistics.median(calls[1:])
    return f"{operations} | {traced:.1f} | {compiled:.1f} | {call:.0f}"


if __name__ == "__main__":
    main()
