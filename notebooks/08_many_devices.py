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
# One frame over eight devices, exactly: without seams, without a change to the model. You will see
# who holds what, what moves between devices, and what each of them saves. The devices are simulated
# on the CPU; the program is cut for them as it would be for real ones. Runs offline, in about a
# minute.

# %%
import os

# JAX reads this when it starts, so it comes first. On a CPU the second halves the time to compile.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
)

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import eqx_cogvae as cv
from eqx_cogvae import training, video

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
clip = jnp.asarray(video.procedural_clip(9, 128, 128, seed=0))
latents = eqx.filter_jit(lambda vae, x: vae.encode(x).mode())(vae, clip)
print(jax.device_count(), "devices, latents", latents.shape)
assert jax.device_count() == 8

# %% [markdown]
# ## A mesh
#
# A mesh is a grid of devices with a name for each axis. `cv.best_mesh` cuts a batch first, since
# its elements have nothing to tell each other, and then height and width, such that the edges
# between the parts are short. Here is one clip, so all eight devices share its frames.

# %%
for shape in (latents.shape, (8, *latents.shape[1:]), (2, *latents.shape[1:])):
    print(shape, "->", dict(cv.best_mesh(shape).shape))
mesh = cv.best_mesh(latents.shape)
assert mesh.size == 8 and mesh.shape["batch"] == 1

# %% [markdown]
# ## Sharded
#
# `cv.sharded` is a transform as the others are: function in, function out. We compile its result
# for one, two, four and eight devices, and look at the programs before we run them.

# %%
AXES = {"batch": "batch", "height": "height", "width": "width"}
decode = cv.framewise(vae.decode_step, 2)


def compiled(count):
    mesh = cv.best_mesh(latents.shape, jax.devices()[:count])
    return eqx.filter_jit(cv.sharded(decode, mesh, **AXES)).lower(latents).compile()


COUNTS = (1, 2, 4, 8)
programs = {count: compiled(count) for count in COUNTS}

# %% [markdown]
# The same numbers come out, to rounding, as from a plain call that knows of no mesh.

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
# The result stays where it was made. On the left a frame, on the right the device that holds each
# of its pixels.

# %%
result = results[8]
owner = np.zeros(result.shape[2:4])
for shard in result.addressable_shards:
    owner[shard.index[2:4]] = shard.device.id
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
assert sorted(np.unique(owner)) == list(range(8))

# %% [markdown]
# ## What moves between devices
#
# XLA's partitioner puts in what is needed. The rows and columns that a convolution sees across an
# edge come from the neighbour: a *collective-permute*. The sums of a norm are added up over all
# devices: an *all-reduce*. To bring a whole frame to one device would take an *all-gather*. Counted
# in the compiled program, with what arrives at each device:

# %%
KINDS = ("collective-permute", "all-reduce", "all-gather", "all-to-all")
text = programs[8].compiled.as_text()
lines = {
    kind: [line for line in text.splitlines() if re.search(rf" {kind}(-start)?\(", line)]
    for kind in KINDS
}


def size(line):
    """The bytes of what an operation returns."""
    types = re.split(rf" (?:{'|'.join(KINDS)})", line.split(" = ", 1)[1])[0]
    shapes = re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", types)
    return sum(
        int(bits) // 8 * math.prod(map(int, s.split(",") if s else ())) for bits, s in shapes
    )


for kind, found in lines.items():
    total = sum(map(size, found)) / 2**20
    print(f"{kind:20}{len(found):5} operations {total:8.2f} MiB")
largest = max(size(line) for found in lines.values() for line in found) / 2**20
channels = vae.config.block_out_channels[1]  # the most there are at full resolution
part = channels * math.prod(whole.shape[1:4]) * 4 / 8 / 2**20
print(f"the largest operation alone: {largest:.2f} MiB")
print(f"a device's part of {channels} channels at full resolution: {part:.2f} MiB")
assert largest < part / 2
assert lines["collective-permute"] and not lines["all-gather"] and not lines["all-to-all"]
# What is summed are the norms, and nothing else.
assert lines["all-reduce"] and all("GroupNorm/reduce_sum" in line for line in lines["all-reduce"])

# %% [markdown]
# Nothing is gathered anywhere. That the sum is as large as it is has its reason: every convolution
# asks for rims, and rims have all its channels, 16 to 56 of them in this small model, where a picture
# has three. Each by itself is small beside what a device holds of the same activations. The rims grow
# with the length of the edge and the parts with its square, so that on a larger frame the share that
# moves is smaller.

# %% [markdown]
# ## Memory per device
#
# What the compiler reserves for temporaries on each device, read off the same four programs. The
# line is the first bar divided by the number of devices. The bars stay a little above it: each
# device holds a rim of its neighbours' rows and columns besides its own.

# %%
reserved = [programs[n].compiled.memory_analysis().temp_size_in_bytes / 2**20 for n in COUNTS]
figure, axes = plt.subplots(figsize=(7, 2.8), dpi=100)
bars = axes.bar([str(count) for count in COUNTS], reserved)
for bar, mib in zip(bars, reserved, strict=True):
    x = bar.get_x() + bar.get_width() / 2
    axes.text(x, 2, f"{mib:.0f}", color="white", weight="bold", ha="center", va="bottom")
axes.plot([reserved[0] / count for count in COUNTS], "k.--", label="shared out evenly")
axes.set(xlabel="devices", ylabel="temporaries, MiB", ylim=(0, 1.15 * reserved[0]))
axes.legend()
figure.tight_layout()
plt.show()
assert all(n * size < 1.5 * reserved[0] for n, size in zip(COUNTS, reserved, strict=True))

# %% [markdown]
# ## Not the same as tiles in parallel
#
# Tiles need no exchange, and so do not know of each other: each normalises by its own moments, and
# none sees beyond its edges. On the left the difference of tiles to the whole decode, on the right
# that of shards, at the same scale. Black is no difference.

# %%
tiles = eqx.filter_jit(cv.tiled(decode, (8, 8), (0.25, 0.25)))(latents)
figure, axes = plt.subplots(1, 2, figsize=(7, 3), dpi=100, layout="constrained")
for ax, other, title in zip(axes, (tiles, result), ("tiles", "shards"), strict=True):
    difference = np.sqrt(np.mean((np.asarray(other) - whole)[0] ** 2, axis=(0, 3)))
    image = ax.imshow(difference, cmap="magma", vmin=0, vmax=0.1)
    ax.set_title(f"{title}: {video.psnr(other, whole):.0f} dB to the whole")
    ax.axis("off")
figure.colorbar(image, ax=axes, label="RMS difference", extend="max")
plt.show()
assert video.psnr(result, whole) > video.psnr(tiles, whole) + 20

# %% [markdown]
# More on tiles in [tiling and memory](03_tiling_and_memory.ipynb). The two go together:
# `cv.tiled(cv.sharded(decode, mesh, **AXES), ...)` shares each tile among all devices.
#
# ## What does not divide
#
# Every device gets an equal part, of two rows and two columns of latents or more. Another size is
# refused, with sizes that would do.

# %%
try:
    cv.sharded(decode, mesh, **AXES)(latents[:, :, :10])
except ValueError as error:
    message = str(error)
print(message)
assert "height of 10 does not divide" in message

# %% [markdown]
# ## Training with the batch over devices
#
# Give a mesh to the trainer, and a batch is cut among its devices. Each works on its clips, the
# gradients are averaged, and all hold the same weights afterwards. To keep this short only the last
# convolution learns, by a loss without noise; the step on one device is there to compare.


# %%
def loss(vae, clips, key):
    del key
    return training.l2(vae(clips), clips), {}


clips = jnp.concatenate([jnp.asarray(video.procedural_clip(9, 32, 32, seed=i)) for i in range(8)])
last = lambda name: name.startswith("decoder.conv_out.")  # noqa: E731
states, metrics = {}, {}
for name, over in {"one": None, "eight": cv.best_mesh((8, 3, 4, 4, 16))}.items():
    trainer = training.Trainer(optax.sgd(0.1), loss, trainable=last, mesh=over)
    states[name], metrics[name] = trainer.step(trainer.init(vae), clips, jax.random.key(0))
    print(f"{name}:", {key: round(float(value), 6) for key, value in metrics[name].items()})
for name in ("loss", "gradient_norm"):
    assert np.isclose(metrics["one"][name], metrics["eight"][name], rtol=1e-4)
weight = states["eight"].model.decoder.conv_out.conv.weight
copies = [np.asarray(shard.data) for shard in weight.addressable_shards]
assert len(copies) == 8 and all(np.array_equal(copy, copies[0]) for copy in copies)
assert not np.array_equal(copies[0], vae.decoder.conv_out.conv.weight)

# %% [markdown]
# ## On real devices
#
# The same lines, without the flag at the top. On a machine with eight GPUs, or a TPU host with
# eight chips, with the weights read onto all of them:
#
# ```python
# mesh = cv.best_mesh((1, 13, 60, 90, 16))  # latents of 49 frames of 480x720
# vae = cv.from_pretrained("zai-org/CogVideoX-5b", dtype=jnp.bfloat16, mesh=mesh)
# decode = cv.sharded(cv.framewise(vae.decode_step, 2), mesh, **AXES)
# decoded = decode(latents)
# ```
#
# The rows of a frame then travel over the links between the chips. We have run this on simulated
# devices only.
#
# ## What to take away
#
# - Sharding is exact to rounding, and the memory of each device falls with their number.
# - What moves is rims of activations and sums of norms. No activation is gathered on one device.
# - The layers know nothing of it: it is a transform, and it nests in the others.
# - A mesh given to a `Trainer` cuts the batch instead.
#
# Next: [numerics and speed](09_numerics_and_speed.ipynb).
