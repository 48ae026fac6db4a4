"""What the steps need on accelerators that are not there: memory, cycles, seconds to compile.

    pip install "jax[tpu]==<the jax in use>"
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/tpu_compile.py
    ... tpu_compile.py --topology v6e:2x2 --size 768x1360 --steps decode --batches steady
    ... tpu_compile.py --topology v5e:2x2 --size 768x1360 --mesh 2x2 --steps decode
    ... tpu_compile.py --topology h200 --size 768x1360
    ... tpu_compile.py --topology cpu --model tiny --size 384x512 --mesh 8x1

Topologies to try are v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2; h200, a GPU, which needs
`jax[cuda13]`; and `cpu`, the simulated devices of
XLA_FLAGS=--xla_force_host_platform_device_count=8. Peak is arguments, temporaries and outputs less
what they share, of one device. The cache is given away, as `framewise` and `streamed` do. Cycles
are those that XLA for TPUs expects, see cycles.py.
"""

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from cycles import cycles
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from topologies import devices

import eqx_cogvae as cv

FRAMES = {"first": {"encode": 9, "decode": 3}, "steady": {"encode": 8, "decode": 2}}
VIDEO = PartitionSpec(None, None, "height", "width")
GIB = 2**30


def main() -> None:
    """Compiles, and prints a row for each program as it is done."""
    options = _options()
    rows, columns = map(int, options.mesh.split("x"))
    found = devices(options.topology)
    if len(found) < rows * columns:
        raise SystemExit(f"{options.topology} has {len(found)} devices, too few for {options.mesh}")
    chips = np.array(found[: rows * columns]).reshape(rows, columns)
    mesh = Mesh(chips, ("height", "width"))
    height, width = map(int, options.size.split("x"))
    print(
        f"{options.model}, {height}x{width}, {options.dtype}, {chips.size} x "
        f"{chips.flat[0].device_kind}, jax {jax.__version__}, on {platform.machine()}\n"
    )
    print("| program | peak | arguments | temporaries | outputs | shared | cycles | compiled in |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for direction in options.steps:
        _steps(direction, options, mesh, (height, width))


def _steps(direction: str, options: argparse.Namespace, mesh: Mesh, size: tuple[int, int]) -> None:
    """The program of the first frame batch, and the steady ones', which get its cache."""
    config = cv.Config.preset(options.model)
    vae = eqx.filter_eval_shape(
        cv.VAE, config, key=jax.random.key(0), dtype=jnp.dtype(options.dtype)
    )
    vae, cache = jax.tree.map(lambda x: placed(x, mesh, PartitionSpec()), vae), None
    cell, channels = config.spatial_compression, config.in_channels
    if direction == "decode":
        size, channels = (size[0] // cell, size[1] // cell), config.latent_channels
    for name, frames in FRAMES.items():
        shape = jax.ShapeDtypeStruct((1, frames[direction], *size, channels), vae.dtype)
        step = vae.encode_step if direction == "encode" else vae.decode_step
        begun = time.perf_counter()
        lowered = lowered_step(step, placed(shape, mesh, VIDEO), cache, mesh)
        if name in options.batches:
            _row(f"{direction}, {name}", lowered, begun)
        cache = jax.tree.map(lambda s: placed(s, mesh, VIDEO), lowered.out_info[1])


def lowered_step(step: Callable, x: Any, cache: Any, mesh: Mesh) -> jax.stages.Lowered:
    """Traces a step on a mesh, which gives its cache away; `x` and the weights are shapes."""
    weights, static = eqx.partition(step, _is_struct)

    def run(weights, x, cache):
        fn = eqx.combine(weights, static)
        if mesh.size > 1:
            fn = cv.sharded(fn, mesh, height="height", width="width")
        return fn(x, cache)

    return jax.jit(run, donate_argnums=2).lower(weights, x, cache)


def _row(name: str, lowered: jax.stages.Lowered, begun: float) -> None:
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"| {name} | does not fit | | | | | | |", flush=True)
    else:
        seconds = time.perf_counter() - begun
        figures = " | ".join(f"{size / GIB:.2f} GiB" for size in sizes(program))
        expected = cycles(program.as_text() or "")
        noted = f"{expected:.2e}" if expected else ""
        print(f"| {name} | {figures} | {noted} | {seconds:.0f} s |", flush=True)


def sizes(program: Any) -> list[int]:
    """Returns the bytes of a device: peak, arguments, temporaries, outputs, shared."""
    memory = program.memory_analysis()
    parts = [
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
    ]
    return [sum(parts[:3]) - parts[3], *parts]


def placed(x: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Returns a shape as one that lies on the mesh; anything else as it is."""
    if not _is_struct(x):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def _is_struct(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="CogVideoX-5b", help="a preset of `Config`")
    parser.add_argument("--size", default="480x720")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--mesh", default="1x1", help="rows x columns of devices")
    parser.add_argument("--steps", nargs="+", default=["encode", "decode"], choices=FRAMES["first"])
    parser.add_argument("--batches", nargs="+", default=list(FRAMES), choices=FRAMES)
    return parser.parse_args()


if __name__ == "__main__":
    main()
