"""One of two processes that share a decode and an encode; `test_hosts.py` starts both.

Prints how far its own parts of the results are from what it computes alone.
"""

import sys

import equinox as eqx
import jax
import numpy as np
from reference import distance, normal

import eqx_cogvae as cv

CONFIG = cv.Config(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=3
)
AXES = {"batch": "batch", "height": "height", "width": "width"}


def main(coordinator, index):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=int(index))
    print("devices", jax.device_count(), "of which mine", jax.local_device_count())

    vae = cv.VAE(CONFIG, key=jax.random.key(0))
    latents = np.asarray(normal((1, 5, 8, 8, 3), 0))
    mesh = cv.best_mesh(latents.shape)
    decode = cv.framewise(vae.decode_step, 2)
    report("decode", cv.sharded(decode, mesh, **AXES)(latents), decode(latents))

    video = np.asarray(normal((1, 9, 16, 16, 3), 1))
    encode = cv.framewise(vae.encode_step, 8)
    cut = eqx.filter_jit(cv.sharded(encode, mesh, **AXES))
    report("encode", cut(video), encode(video))


def report(name, ours, due):
    due = np.asarray(due)
    parts = [(shard.data, due[shard.index]) for shard in ours.addressable_shards]
    assert ours.shape == due.shape and all(a.shape != due.shape for a, _ in parts)
    print(name, len(parts), max(distance(a, b) for a, b in parts))


if __name__ == "__main__":
    main(*sys.argv[1:])
