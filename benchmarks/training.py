"""What one training step needs where it is not run, with and without rematerialisation.

    pip install "jax[tpu]==<the jax in use>"
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/training.py [--frames 17 --size HxW]
    JAX_PLATFORMS=cpu python benchmarks/training.py --topology h200 --batch 8

The H200 needs `jax[cuda13]`. The step is that of `eqx_cogvae.training.Trainer` with Adam, of all
weights; these are float32, and `--dtype` is what is computed in. XLA's compiler for CPUs undoes
rematerialisation, so that it shows on an accelerator only.
"""

import argparse
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding
from topologies import devices

import eqx_cogvae as cv
from eqx_cogvae import training

GIB = 2**30


def main() -> None:
    """Compiles, and prints a row for each program as it is done."""
    options = _options()
    device = devices(options.topology)[0]
    print(
        f"{options.model}, {options.batch} x {options.frames} frames of {options.size}, "
        f"{options.dtype}, {device.device_kind}, jax {jax.__version__}\n"
    )
    print("| rematerialised | peak | arguments | temporaries | compiled in |")
    print("|---|---|---|---|---|", flush=True)
    for rematerialise in (False, True):
        _row(rematerialise, options, SingleDeviceSharding(device))


def _row(rematerialise: bool, options: argparse.Namespace, place: Any) -> None:
    trainer = training.Trainer(
        optax.adam(1e-4), dtype=jnp.dtype(options.dtype), rematerialise=rematerialise
    )
    config = cv.Config.preset(options.model)
    vae = eqx.filter_eval_shape(cv.VAE, config, key=jax.random.key(0))
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    is_struct = lambda x: isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    arrays, static = eqx.partition(eqx.filter_eval_shape(trainer.init, vae), is_struct)
    height, width = map(int, options.size.split("x"))
    shape = (options.batch, options.frames, height, width, config.in_channels)
    clips = put(jax.ShapeDtypeStruct(shape, jnp.float32))
    key = put(jax.eval_shape(lambda: jax.random.key(0)))

    def step(arrays, clips, key):
        state, metrics = trainer.step(eqx.combine(arrays, static), clips, key)
        return eqx.filter(state, eqx.is_array), metrics

    begun = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(jax.tree.map(put, arrays), clips, key)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"| {rematerialise} | does not fit | | | |", flush=True)
        return
    seconds, memory = time.perf_counter() - begun, program.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = (peak, memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    sizes = " | ".join(f"{part / GIB:.2f} GiB" for part in parts)
    print(f"| {rematerialise} | {sizes} | {seconds:.0f} s |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="a preset of `Config`")
    parser.add_argument("--batch", type=int, default=1, help="clips of a step")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", default="128x192")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--topology", default="v5e:2x2")
    return parser.parse_args()


if __name__ == "__main__":
    main()
