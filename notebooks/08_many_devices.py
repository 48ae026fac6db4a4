# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Many devices
#
# One frame over eight devices, exactly: without seams, without a change to the model. The devices
# are simulated on the CPU, the program is the one that real ones would run. Runs offline, in about
# a minute.

# %%
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import eqx_cogvae as cv
from eqx_cogvae import video

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
clip = jnp.asarray(video.procedural_clip(9, 128, 128, seed=0))
latents = eqx.filter_jit(lambda vae, x: vae.encode(x).mode())(vae, clip)
decode = cv.framewise(vae.decode_step, 2)
whole = eqx.filter_jit(decode)(latents)
print(jax.device_count(), "devices, latents", latents.shape)
assert jax.device_count() == 8

# %% [markdown]
# ## A mesh
#
# `cv.best_mesh` names axes for batch, height and width that divide the latents, with the shortest
# edges between the parts.

# %%
mesh = cv.best_mesh(latents.shape)
print(dict(mesh.shape))
assert mesh.size == 8

# %% [markdown]
# ## Sharded
#
# `cv.sharded` is a transform as the others are. The result stays where it was made: each device
# holds its part of every frame.

# %%
AXES = {"batch": "batch", "height": "height", "width": "width"}
result = cv.sharded(decode, mesh, **AXES)(latents)
error = jnp.linalg.norm(np.asarray(result) - whole) / jnp.linalg.norm(whole)
print(f"relative difference to one device: {float(error):.1e}")
assert error < 1e-5
assert len(result.sharding.device_set) == 8

# %% [markdown]
# Who holds what:

# %%
owner = np.zeros(result.shape[2:4])
for shard in result.addressable_shards:
    rows, columns = shard.index[2:4]
    owner[rows, columns] = shard.device.id
figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), dpi=100)
axes[0].imshow(np.clip((np.asarray(result[0, 4]) + 1) / 2, 0, 1))
image = axes[1].imshow(owner, cmap="tab10", vmin=-0.5, vmax=9.5)
axes[0].set_title("decoded by eight devices")
axes[1].set_title("the device of each pixel")
for ax in axes:
    ax.axis("off")
figure.tight_layout()
plt.show()
assert sorted(np.unique(owner)) == list(range(8))

# %% [markdown]
# ## What moves between devices
#
# XLA's partitioner puts in what is needed: rows that a convolution sees across an edge are sent to
# the neighbour (collective-permute), moments of norms are summed over all (all-reduce). No device
# ever gathers a whole frame. Counted in the compiled program of the first frame batch:


# %%
def compiled(mesh):
    step = cv.sharded(lambda z: vae.decode_step(z)[0], mesh, **AXES)
    return eqx.filter_jit(lambda z: step(z)).lower(latents).compile()


program = compiled(mesh)
text = program.compiled.as_text()
kinds = ("collective-permute", "all-reduce", "all-gather", "all-to-all")
counts = {kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in kinds}
print(counts)
assert counts["collective-permute"] > 0
assert counts["all-gather"] == counts["all-to-all"] == 0

# %% [markdown]
# ## Memory per device
#
# What the compiler reserves for temporaries on each device, for one, two, four and eight of them.

# %%
numbers, sizes = (1, 2, 4, 8), []
for number in numbers:
    part = cv.best_mesh(latents.shape, jax.devices()[:number])
    sizes.append(compiled(part).compiled.memory_analysis().temp_size_in_bytes / 2**20)
figure, axes = plt.subplots(figsize=(7, 2.6), dpi=100)
axes.bar([str(number) for number in numbers], sizes)
axes.set(xlabel="devices", ylabel="temporaries per device, MiB")
figure.tight_layout()
plt.show()
assert sizes[-1] < sizes[0] / 4

# %% [markdown]
# ## Not the same as tiles in parallel
#
# Tiles over devices need no exchange, and so do not know of each other: their norms differ, and
# their edges. On the left the difference of tiles to the whole decode, on the right that of shards,
# at the same scale.

# %%
tiles = eqx.filter_jit(cv.tiled(decode, (8, 8), (0.25, 0.25)))(latents)
figure, axes = plt.subplots(1, 2, figsize=(7, 3), dpi=100)
for ax, other, title in zip(axes, (tiles, result), ("tiles", "shards"), strict=True):
    difference = np.sqrt(np.mean((np.asarray(other) - whole)[0] ** 2, axis=(0, 3)))
    ax.imshow(difference, cmap="magma", vmin=0, vmax=0.1)
    ax.set_title(f"{title}: {video.psnr(other, whole):.0f} dB to the whole")
    ax.axis("off")
figure.tight_layout()
plt.show()
assert video.psnr(result, whole) > video.psnr(tiles, whole) + 20

# %% [markdown]
# ## On real devices
#
# The same lines, without the flag at the top. On a machine with several GPUs, or a TPU host:
#
# ```python
# mesh = cv.best_mesh((1, 13, 60, 90, 16))
# vae = cv.from_pretrained("zai-org/CogVideoX-5b", dtype=jnp.bfloat16, mesh=mesh)
# decode = cv.sharded(cv.framewise(vae.decode_step, 2), mesh, **AXES)
# ```
#
# To train with the batch over devices, give the mesh to the trainer:
# `training.Trainer(..., mesh=mesh)`.
#
# ## What to take away
#
# - Sharding is exact, and memory falls with the number of devices.
# - The layers know nothing of it: it is a transform.
# - Sides must divide, into two rows and columns of latents or more; the error lists sizes that do.
#
# Next: [numerics and speed](09_numerics_and_speed.ipynb).
