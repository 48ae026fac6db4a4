"""What a video costs in memory: whole, streamed and in tiles, by `eqx_cogvae.plan`.

    python benchmarks/memory.py [--size HxW] [--frames N] [--dtype D] [--topology v5p:2x2x1]
    python benchmarks/memory.py --gradients --model tiny --size 64x96 --dtype float32

Needs no weights, and with `--topology` no TPU either: `pip install "jax[tpu]"` at the version of
jax, and set `JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1`; nor a GPU, with `--topology h200` and
`jax[cuda13]`. Prints a table for the documentation.
"""

import argparse
import platform
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from topologies import devices

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
        device = devices(options.topology)[0]
    height, width = map(int, options.size.split("x"))
    if options.gradients:
        return _gradients(vae, device, height, width)
    begun = time.perf_counter()
    found = cv.plan(vae, (1, options.frames, height, width), device=device)
    seconds = time.perf_counter() - begun
    print(f"{options.model}, {options.frames} frames of {height}x{width}, {options.dtype}")
    print(
        f"compiled for {device.device_kind} by jax {jax.__version__} in {seconds:.0f} s, ", end=""
    )
    print(f"on {platform.machine()}")
    print(found)


def _gradients(vae: cv.VAE, device: object, height: int, width: int) -> None:
    """Temporaries of a decode's gradient by its latents, against the count of frame batches."""
    place = jax.sharding.SingleDeviceSharding(device)
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    is_struct = lambda x: isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    params, static = eqx.partition(vae, is_struct)
    params, cell = jax.tree.map(put, params), vae.config.spatial_compression

    def temporaries(frames: int, wrap: Callable) -> int:
        def loss(latents, params):
            step = wrap(eqx.combine(params, static).decode_step)
            return jnp.mean(cv.framewise(step, 2)(latents) ** 2)

        shape = (1, frames, height // cell, width // cell, vae.config.latent_channels)
        latents = put(jax.ShapeDtypeStruct(shape, vae.dtype))
        program = jax.jit(jax.grad(loss)).lower(latents, params).compile()
        return program.memory_analysis().temp_size_in_bytes

    print("latent frames, batches, MiB of temporaries: as it is, and with the step checkpointed")
    for frames in (3, 5, 9, 17):
        plain, kept = (
            temporaries(frames, lambda step: step),
            temporaries(frames, eqx.filter_checkpoint),
        )
        print(f"{frames:13}{(frames - 1) // 2:9}{plain / 2**20:12.1f}{kept / 2**20:12.1f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="CogVideoX-5b", help="a preset of `Config`")
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--size", default="480x720")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--topology", help="of TPUs to compile for, such as v5p:2x2x1")
    parser.add_argument("--gradients", action="store_true", help="of a decode, instead")
    return parser.parse_args()


if __name__ == "__main__":
    main()
