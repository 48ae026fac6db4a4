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
# After this notebook you can decode one frame on eight devices, without seams and without
# changing the model, and you know what each device holds, what moves between devices, and how
# much memory each needs. The devices are simulated on the CPU. The program is partitioned as for
# real ones. It runs offline.

# %% tags=["setup"]
import math
import os
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import eqx_cogvae as cv
from eqx_cogvae import training, video

# Eight simulated devices, also on a machine with a GPU. JAX must not have run before.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
clip = jnp.asarray(video.procedural_clip(9, 128, 128, seed=0))
latents = eqx.filter_jit(lambda vae, x: vae.encode(x).mode())(vae, clip)
print(jax.device_count(), "devices, latents", latents.shape)
assert jax.device_count() == 8

# %% [markdown]
# ## A mesh
#
# A mesh is a grid of devices with a name for each axis. `cv.best_mesh` splits a batch first,
# because clips exchange nothing, and then height and width, so that the borders between the parts
# are short. Here is one clip, so all eight devices share its frames.

# %%
for shape in (latents.shape, (8, *latents.shape[1:]), (2, *latents.shape[1:])):
    print(shape, "->", dict(cv.best_mesh(shape).shape))
mesh = cv.best_mesh(latents.shape)

# %% tags=["check"]
assert mesh.size == 8 and mesh.shape["batch"] == 1

# %% [markdown]
# ## Sharded
#
# `cv.sharded` is a transform like the others: it takes a function and returns one. We compile the
# result for one, two, four and eight devices, and look at the programs before we run them.

# %%
AXES = {"batch": "batch", "height": "height", "width": "width"}
decode = cv.framewise(vae.decode_step, 2)


def compiled(count):
    mesh = cv.best_mesh(latents.shape, jax.devices()[:count])
    return eqx.filter_jit(cv.sharded(decode, mesh, **AXES)).lower(latents).compile()


COUNTS = (1, 2, 4, 8)
programs = {count: compiled(count) for count in COUNTS}

# %% [markdown]
# All of them give the same numbers as a plain call without a mesh, up to rounding.

# %%
whole = np.asarray(eqx.filter_jit(decode)(latents))
results = {count: programs[count](latents) for count in COUNTS}
for count, result in results.items():
    error = np.linalg.norm(np.asarray(result) - whole) / np.linalg.norm(whole)
    print(f"{count} devices: relative difference {error:.1e}")
    assert error < 1e-5

# %% [markdown]
# ## Who holds what
#
# The result stays on the devices that computed it. The left picture shows a frame. The right one
# shows which device holds each pixel.

# %%
result = results[8]
owner = np.zeros(result.shape[2:4])
for shard in result.addressable_shards:
    owner[shard.index[2:4]] = shard.device.id

# %% tags=["drawing"]
figure, axes = plt.subplots(1, 2, figsize=(7, 3.3), dpi=100)
axes[0].imshow(np.clip((np.asarray(result[0, 4]) + 1) / 2, 0, 1))
axes[1].imshow(owner, cmap="tab10", vmin=-0.5, vmax=9.5)
axes[0].set_title("decoded by eight devices")
axes[1].set_title("the device of each pixel")
for device in range(8):
    y, x = np.argwhere(owner == device).mean(axis=0)
    axes[1].text(x, y, device, color="white", ha="center", va="center")
for ax in axes:
    ax.axis("off")
figure.tight_layout()
plt.show()

# %% tags=["check"]
assert sorted(np.unique(owner)) == list(range(8))

# %% [markdown]
# ## What moves between devices
#
# XLA's partitioner inserts the communication. A convolution needs rows and columns from across a
# border; they come from the neighbour in a *collective-permute*. A norm needs the moments of all
# parts of a frame; an *all-reduce* shares them. Only an *all-gather* would bring a whole frame
# to one device. The table counts them in the compiled program, with the bytes that arrive at
# each device.

# %%
KINDS = ("collective-permute", "all-reduce", "all-gather", "all-to-all")
text = programs[8].compiled.as_text()
lines = {
    kind: [
        line for line in text.splitlines() if re.search(rf" {kind}(-start)?\(", line)
    ]
    for kind in KINDS
}


def size(line):
    """Returns the bytes of an operation's result."""
    types = re.split(rf" (?:{'|'.join(KINDS)})", line.split(" = ", 1)[1])[0]
    shapes = re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", types)
    return sum(
        int(bits) // 8 * math.prod(map(int, s.split(",") if s else ()))
        for bits, s in shapes
    )


for kind, found in lines.items():
    total = sum(map(size, found)) / 2**20
    print(f"{kind:20}{len(found):5} operations {total:8.2f} MiB")
largest = max(size(line) for found in lines.values() for line in found) / 2**20
channels = vae.config.block_out_channels[1]  # the most there are at full resolution
part = channels * math.prod(whole.shape[1:4]) * 4 / 8 / 2**20
print(f"the largest operation alone: {largest:.2f} MiB")
print(f"a device's part of {channels} channels at full resolution: {part:.2f} MiB")

# %% tags=["check"]
assert largest < part / 2
assert (
    lines["collective-permute"] and not lines["all-gather"] and not lines["all-to-all"]
)
# Moments of norms are summed, and nothing else.
assert lines["all-reduce"] and all(
    "GroupNorm/reduce_sum" in line for line in lines["all-reduce"]
)

# %% [markdown]
# Nothing is gathered. The total is large because every convolution exchanges borders with all its
# channels, 16 to 56 in this small model, where a picture has three. Each exchange is small next
# to what a device holds of the same activations. Borders grow with the length of an edge and
# parts with its square, so a larger frame moves a smaller share.

# %% [markdown]
# ## Memory per device
#
# The bars show the temporaries that the compiler reserves on each device, read from the same four
# programs. The line is the first bar divided by the number of devices. The bars stay slightly
# above the line, because each device also holds the borders of its neighbours.

# %%
reserved = [
    programs[n].compiled.memory_analysis().temp_size_in_bytes / 2**20 for n in COUNTS
]

# %% tags=["drawing"]
figure, axes = plt.subplots(figsize=(7, 2.8), dpi=100)
bars = axes.bar([str(count) for count in COUNTS], reserved)
for bar, mib in zip(bars, reserved, strict=True):
    x = bar.get_x() + bar.get_width() / 2
    axes.text(
        x, 2, f"{mib:.0f}", color="white", weight="bold", ha="center", va="bottom"
    )
axes.plot([reserved[0] / count for count in COUNTS], "k.--", label="shared out evenly")
axes.set(xlabel="devices", ylabel="temporaries, MiB", ylim=(0, 1.15 * reserved[0]))
axes.legend()
figure.tight_layout()
plt.show()

# %% tags=["check"]
assert all(
    n * size < 1.5 * reserved[0] for n, size in zip(COUNTS, reserved, strict=True)
)

# %% [markdown]
# ## Shards and tiles differ
#
# Tiles exchange nothing, so they do not know of each other. Each tile normalises by its own
# statistics and sees nothing beyond its edges. The maps show the difference from the whole
# decode, for tiles on the left and for shards on the right, on one scale. Black means no
# difference.

# %%
tiled = cv.tiled(decode, (8, 8), (0.25, 0.25), edges="shift")
tiles = eqx.filter_jit(tiled)(latents)

# %% tags=["drawing"]
figure, axes = plt.subplots(1, 2, figsize=(7, 3), dpi=100, layout="constrained")
for ax, other, title in zip(axes, (tiles, result), ("tiles", "shards"), strict=True):
    difference = np.sqrt(np.mean((np.asarray(other) - whole)[0] ** 2, axis=(0, 3)))
    image = ax.imshow(difference, cmap="magma", vmin=0, vmax=0.1)
    ax.set_title(f"{title}: {video.psnr(other, whole):.0f} dB to the whole")
    ax.axis("off")
figure.colorbar(image, ax=axes, label="RMS difference", extend="max")
plt.show()

# %% tags=["check"]
assert video.psnr(result, whole) > video.psnr(tiles, whole) + 20

# %% [markdown]
# [Tiling and memory](03_tiling_and_memory.ipynb) explains tiles. The two combine:
# `cv.tiled(cv.sharded(decode, mesh, **AXES), ...)` shares each tile among all devices.
#
# ## Sizes that do not divide
#
# Each device gets an equal part of at least two rows and two columns of latents. Other sizes
# raise an error that names sizes that fit.

# %%
try:
    cv.sharded(decode, mesh, **AXES)(latents[:, :, :10])
except ValueError as error:
    message = str(error)
print(message)

# %% tags=["check"]
assert "height of 10 does not divide" in message

# %% [markdown]
# ## Training with the batch over devices
#
# Give a mesh to the trainer, and it splits the batch among the devices. Each device works on its
# clips, gradients are averaged, and all devices hold the same weights afterwards. To keep this
# short, only the last convolution is trained, with a loss without noise. A step on one device
# serves as the reference.


# %%
def loss(vae, clips, key):
    del key
    return training.l2(vae(clips), clips), {}


clips = jnp.concatenate(
    [jnp.asarray(video.procedural_clip(9, 32, 32, seed=i)) for i in range(8)]
)
last = lambda name: name.startswith("decoder.conv_out.")  # noqa: E731
states, metrics = {}, {}
for name, over in {"one": None, "eight": cv.best_mesh((8, 3, 4, 4, 16))}.items():
    trainer = training.Trainer(optax.sgd(0.1), loss, trainable=last, mesh=over)
    states[name], metrics[name] = trainer.step(
        trainer.init(vae), clips, jax.random.key(0)
    )
    print(
        f"{name}:",
        {key: round(float(value), 6) for key, value in metrics[name].items()},
    )
weight = states["eight"].model.decoder.conv_out.conv.weight
copies = [np.asarray(shard.data) for shard in weight.addressable_shards]

# %% tags=["check"]
for name in ("loss", "gradient_norm"):
    assert np.isclose(metrics["one"][name], metrics["eight"][name], rtol=1e-4)
assert len(copies) == 8 and all(np.array_equal(copy, copies[0]) for copy in copies)
assert not np.array_equal(copies[0], vae.decoder.conv_out.conv.weight)

# %% [markdown]
# ## On real devices
#
# Use the same lines without the two settings in the setup cell. On a machine with eight GPUs, or
# a TPU host with eight chips, read the weights onto all of them:
#
# ```python
# mesh = cv.best_mesh((1, 13, 60, 90, 16))  # latents of 49 frames of 480x720
# name = "zai-org/CogVideoX-5b"
# vae = cv.from_pretrained(name, dtype=jnp.bfloat16, mesh=mesh)
# decode = cv.sharded(cv.framewise(vae.decode_step, 2), mesh, **AXES)
# decoded = decode(latents)
# ```
#
# The rows of a frame then travel over the links between the chips. This has been run on simulated
# devices only.
#
# ## What to take away
#
# - Sharding is exact up to rounding, and the memory of each device falls with the number of
#   devices.
# - Devices exchange borders of activations and moments of norms. No activation is gathered on one
#   device.
# - The layers do not know of it. It is a transform, and it nests in the others.
# - A mesh given to a `Trainer` splits the batch instead.
#
# Next: [numerics and speed](09_numerics_and_speed.ipynb). The guide on [many
# devices](../docs/devices.md) covers explicit meshes, split weights and several hosts.
