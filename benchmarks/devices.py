"""Predicts how well several devices share a video, from the bytes that they exchange.

    JAX_PLATFORMS=cpu python benchmarks/devices.py --chip h200 --devices 2 4 8
    JAX_PLATFORMS=cpu python benchmarks/devices.py --chip v5e --details 5
    ... devices.py --chip v5e --topology v5e:2x4 --devices 8

Compiles one steady step, 8 frames, for simulated devices, with the lowerings of the chip's
platform, and reads off the program what each device sends; halos count two bytes a number, which
XLA widens for CPUs alone. The exchange's seconds are bytes over
the rate of one link, and a latency for each operation, and nothing is taken to overlap. Computing
takes the seconds of one device over their number; with a topology, for which see topologies.py,
it takes the cycles that the compiler expects of the divided program. The efficiency is one
device's seconds over those of all: one / (number x (compute + exchange)).

A batch axis that divides the clips exchanges nothing: what is compiled here is one clip.
"""

import argparse
import dataclasses
import os
import platform
import time
from collections import defaultdict
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """A device: the lowerings it has, its links, and its seconds for a steady step of 8 frames.

    `seconds` are those of one device, the default configuration, 480x720, in bfloat16.
    """

    platform: str
    link: float
    """Bytes a second of one link, one way."""
    latency: float
    """Seconds of a collective operation besides its bytes."""
    seconds: dict[str, float]
    clock: float = 0
    """Cycles a second."""


CHIPS = {
    # 400 GB/s between chips, both ways, over four links: https://cloud.google.com/tpu/docs/v5e.
    # About 1 us for a hop: https://jax-ml.github.io/scaling-book/tpus. 197e12 operations a second
    # on four matrix units of 128x128 are 1.5 GHz; the cycles are those of docs/performance.md.
    "v5e": Chip("tpu", 50e9, 1e-6, {"decode": 1.32e9 / 1.5e9, "encode": 0.65e9 / 1.5e9}, 1.5e9),
    # NVLink's 900 GB/s both ways: https://www.nvidia.com/en-us/data-center/h200. 10 us is what
    # NCCL takes for a small message within a node. The seconds of 49 frames are measured ones.
    "h200": Chip("gpu", 450e9, 10e-6, {"decode": 0.89 * 8 / 49, "encode": 0.43 * 8 / 49}),
}
SIMULATED = "--xla_force_host_platform_device_count"
STEADY = {"decode": 2, "encode": 8}
FIRST = {"decode": 3, "encode": 9}


def main() -> None:
    """Prints a row for each program as it is compiled."""
    options = _options()
    if SIMULATED not in (flags := os.environ.get("XLA_FLAGS", "")):
        # The programs are not run: the least effort will do to compile them.
        quick = f"{SIMULATED}={max(options.devices)} --xla_backend_optimization_level=0"
        os.environ["XLA_FLAGS"] = f"{flags} {quick}"
    import jax

    chip = CHIPS[options.chip]
    print(
        f"{options.model}, {options.size}, bfloat16, {options.topology} for a {options.chip}, "
        f"jax {jax.__version__}, on {platform.machine()}\n"
    )
    print(
        "| step | devices | rows x columns | permutes | sums | gathers | sent by a device "
        "| compute | exchange | efficiency | peak | compiled in |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for direction in options.steps:
        for count in options.devices:
            _row(direction, count, chip, options)


def _row(direction: str, count: int, chip: Chip, options: argparse.Namespace) -> None:
    from cycles import cycles
    from hlo import exchanges
    from tpu_compile import sizes

    begun = time.perf_counter()
    mesh, program = _compiled(direction, count, chip, options)
    text = program.as_text() or ""
    found = exchanges(text, count, halo_bytes=2 if options.topology == "cpu" else None)
    kinds: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for each in found:
        kinds[each.kind][0] += each.times
        kinds[each.kind][1] += each.times * each.sent
    known = ("collective-permute", "all-reduce")
    others = [sum(kinds[k][i] for k in kinds if k not in known) for i in (0, 1)]
    cells = [
        f"{times:.0f}, {sent / 1e6:.1f} MB" for times, sent in (*(kinds[k] for k in known), others)
    ]
    times, sent = (sum(kinds[k][i] for k in kinds) for i in (0, 1))
    exchange = sent / chip.link + times * chip.latency
    one, compute = chip.seconds[direction], chip.seconds[direction] / count
    if expected := cycles(text):
        compute = expected / chip.clock
    shape = "x".join(str(mesh.shape[axis]) for axis in ("height", "width"))
    cells += [
        f"{sent / 1e6:.1f} MB",
        f"{compute * 1e3:.1f} ms",
        f"{exchange * 1e3:.2f} ms",
        f"{one / count / (compute + exchange):.1%}",
        "" if options.topology == "cpu" else f"{sizes(program)[0] / 2**30:.2f} GiB",
        f"{time.perf_counter() - begun:.0f} s",
    ]
    print(f"| {direction} | {count} | {shape} | {' | '.join(cells)} |", flush=True)
    for each in sorted(found, key=lambda e: e.times * e.sent, reverse=True)[: options.details]:
        print(f"    {each.times} x {each.sent / 1e3:.0f} kB: {each.line[:300]}", flush=True)


def _compiled(
    direction: str, count: int, chip: Chip, options: argparse.Namespace
) -> tuple[Any, Any]:
    """Returns the mesh, and the program of a steady step."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec
    from topologies import devices
    from tpu_compile import lowered_step, placed

    import eqx_cogvae as cv
    from eqx_cogvae._lowering import choose

    config = cv.Config.preset(options.model)
    vae = eqx.filter_eval_shape(cv.VAE, config, key=jax.random.key(0), dtype=jnp.bfloat16)
    cell = config.spatial_compression
    height, width = map(int, options.size.split("x"))
    latents = (1, 2, height // cell, width // cell, config.latent_channels)
    mesh = cv.best_mesh(latents, devices(options.topology)[:count])
    shape = latents if direction == "decode" else (1, 8, height, width, config.in_channels)
    put = lambda tree, spec: jax.tree.map(lambda x: placed(x, mesh, spec), tree)  # noqa: E731
    vae, video = put(vae, PartitionSpec()), PartitionSpec(None, None, "height", "width")
    step = vae.decode_step if direction == "decode" else vae.encode_step

    def batch(frames: int) -> jax.ShapeDtypeStruct:
        return put(jax.ShapeDtypeStruct((1, frames, *shape[2:]), jnp.bfloat16), video)

    limits = choose.thresholds.value
    if options.chunk_elements:
        limits = dataclasses.replace(limits, chunk_elements=options.chunk_elements)
    target = chip.platform if options.topology == "cpu" else None
    with choose.as_if_on(target), choose.thresholds(limits):
        first = lowered_step(step, batch(FIRST[direction]), None, mesh)
        cache = put(first.out_info[1], video)
        steady = lowered_step(step, batch(STEADY[direction]), cache, mesh)
        return mesh, steady.compile()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", default="h200", choices=CHIPS)
    parser.add_argument("--topology", default="cpu", help="of devices to compile for")
    parser.add_argument("--model", default="CogVideoX-5b", help="a preset of `Config`")
    parser.add_argument("--size", default="480x720")
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", nargs="+", default=list(STEADY), choices=STEADY)
    parser.add_argument("--chunk-elements", type=int, help="of arrays that are done in chunks")
    parser.add_argument("--details", type=int, default=0, help="show so many largest exchanges")
    return parser.parse_args()


if __name__ == "__main__":
    main()
