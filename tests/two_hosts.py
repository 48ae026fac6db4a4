"""One of two processes that share a decode and an encode; `test_hosts.py` starts both.

Writes how far its own parts of the results are from what it computes alone.
"""

import json
import sys
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

import eqx_cogvae as cv

CONFIG = cv.Config(
    block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, latent_channels=3
)
AXES = {"batch": "batch", "height": "height", "width": "width"}


def main(coordinator, index, path):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=int(index))
    found = {"devices": [jax.device_count(), jax.local_device_count()]}

    vae = cv.VAE(CONFIG, key=jax.random.key(0))
    latents = noise(1, 5, 8, 8, 3)
    mesh = cv.best_mesh(latents.shape)
    decode = cv.framewise(vae.decode_step, 2)
    found["decode"] = compared(cv.sharded(decode, mesh, **AXES)(latents), decode(latents))

    video = noise(1, 9, 16, 16, 3)
    encode = cv.framewise(vae.encode_step, 8)
    cut = eqx.filter_jit(cv.sharded(encode, mesh, **AXES))
    found["encode"] = compared(cut(video), encode(video))
    # Not to stdout, where gloo has its say as well.
    Path(path).write_text(json.dumps(found))


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def distance(got, due):
    return np.linalg.norm(np.asarray(got) - due) / np.linalg.norm(due)


def compared(ours, due):
    """How many parts of the result are here, and the largest error."""
    due = np.asarray(due)
    parts = [(shard.data, due[shard.index]) for shard in ours.addressable_shards]
    assert ours.shape == due.shape and all(a.shape != due.shape for a, _ in parts)
    return len(parts), max(float(distance(a, b)) for a, b in parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
