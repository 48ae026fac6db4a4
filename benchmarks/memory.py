"""What a video costs in memory: whole, streamed and in tiles, by `eqx_cogvae.plan`.

    python benchmarks/memory.py [--size HxW] [--frames N] [--dtype D] [--topology v5p:2x2x1]

Needs no weights, and with `--topology` no TPU either: `pip install "jax[tpu]"` at the version of
jax, and set `JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1`. Prints a table for the documentation.
"""

import argparse
import platform
import time

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.experimental import topologies

import eqx_cogvae as cv


def main() -> None:
    """Plans, and prints the plan."""
    options = _options()
    config = cv.Config.preset(options.model)
    vae = eqx.filter_eval_shape(
        cv.VAE, config, key=jax.random.key(0), dtype=jnp.dtype(options.dtype)
    )
    device = jax.devices()[0]
    if options.topology:
        found = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
        device = found.devices[0]
    height, width = map(int, options.size.split("x"))
    begun = time.perf_counter()
    found = cv.plan(vae, (1, options.frames, height, width), device=device)
    seconds = time.perf_counter() - begun
    print(f"{options.model}, {options.frames} frames of {height}x{width}, {options.dtype}")
    print(
        f"compiled for {device.device_kind} by jax {jax.__version__} in {seconds:.0f} s, ", end=""
    )
    print(f"on {platform.machine()}")
    print(found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="CogVideoX-5b", help="a preset of `Config`")
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--size", default="480x720")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--topology", help="of TPUs to compile for, such as v5p:2x2x1")
    return parser.parse_args()


if __name__ == "__main__":
    main()
