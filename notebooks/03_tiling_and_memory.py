# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tiling and memory
#
# What a video costs, before it is run; what tiles save and what they spoil; and how blending hides
# their seams. Runs offline, in about a minute.

# %%
import os

import equinox as eqx
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import eqx_cogvae as cv
from eqx_cogvae import video

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
clip = jnp.asarray(video.procedural_clip(9, 96, 144, seed=0))
latents = eqx.filter_jit(lambda vae, x: vae.encode(x).mode())(vae, clip)

# %% [markdown]
# ## A plan
#
# `cv.plan` compiles each way of encoding and decoding without running it, and reads memory and
# arithmetic off the compiler. Here for our small clip, with tiles of 64x64 pixels.

# %%
plan = cv.plan(vae, clip.shape, tile=(64, 64), overlap=(0.25, 0.25))
print(plan)

# %%
names = [f"encode, {cost.name}" for cost in plan.encode] + [
    f"decode, {cost.name}" for cost in plan.decode
]
peaks = [cost.peak / 2**20 for cost in (*plan.encode, *plan.decode)]
figure, axes = plt.subplots(figsize=(7, 2.6), dpi=100)
axes.barh(names, peaks)
axes.invert_yaxis()
axes.set(xlabel="peak memory, MiB")
figure.tight_layout()
plt.show()
by_name = {cost.name: cost for cost in plan.decode}
assert by_name["tiled"].peak < by_name["whole"].peak
assert by_name["tiled"].flop > by_name["whole"].flop

# %% [markdown]
# Tiles need less memory, and more arithmetic: what overlaps is computed more than once.
#
# ## Seams made visible
#
# `cv.tiled` wraps a function of a whole clip; sizes are in the cells of its input, here latents of
# 8x8 pixels. Without overlap each tile knows nothing of its neighbours. On the right, the
# difference to the decode of the whole: the seams light up.

# %%
decode = cv.framewise(vae.decode_step, 2)
whole = eqx.filter_jit(decode)(latents)


def tiled(overlap):
    return eqx.filter_jit(cv.tiled(decode, (8, 8), (overlap, overlap)))(latents)


def compare(result, title):
    error = jnp.sqrt(jnp.mean((result - whole)[0] ** 2, axis=(0, 3)))
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.7), dpi=100)
    axes[0].imshow(np.clip((np.asarray(result[0, 4]) + 1) / 2, 0, 1))
    image = axes[1].imshow(error, cmap="magma", vmin=0, vmax=0.25)
    figure.colorbar(image, ax=axes[1], label="RMS difference")
    axes[0].set_title(title)
    for ax in axes:
        ax.axis("off")
    figure.tight_layout()
    plt.show()
    return np.asarray(error)


abrupt = compare(tiled(0.0), "tiles without overlap")

# %% [markdown]
# With half of each tile shared with the next, and faded over:

# %%
smooth = compare(tiled(0.5), "tiles that overlap by half")
print(f"largest RMS difference: {abrupt.max():.3f} without overlap, {smooth.max():.3f} with")
assert np.sqrt(np.mean(smooth**2)) < np.sqrt(np.mean(abrupt**2))

# %% [markdown]
# ## Blending
#
# `cv.blend(before, after, extent, axis)` fades the first entries of one array in over the last of
# another, along a line. Here from zeros to ones:

# %%
ramp = cv.blend(jnp.zeros(8), jnp.ones(8), 4, 0)
figure, axes = plt.subplots(figsize=(7, 2.2), dpi=100)
axes.plot(np.asarray(ramp), marker="o")
axes.set(xlabel="entry", ylabel="weight of `after`")
figure.tight_layout()
plt.show()
assert ramp[:4].tolist() == [0.0, 0.25, 0.5, 0.75]

# %% [markdown]
# ## Overlap against quality
#
# Some overlap brings tiles nearer to the whole; more of it costs more tiles and gives little.

# %%
overlaps = [0.0, 0.125, 0.25, 0.5]
nearness = [video.psnr(tiled(overlap), whole) for overlap in overlaps]
cost = [1 / (1 - overlap) ** 2 for overlap in overlaps]
figure, axes = plt.subplots(figsize=(7, 2.8), dpi=100)
axes.plot(cost, nearness, marker="o")
for x, y, overlap in zip(cost, nearness, overlaps, strict=True):
    axes.annotate(f"{overlap}", (x, y), textcoords="offset points", xytext=(6, -10))
axes.set(xlabel="arithmetic, tiles without overlap = 1", ylabel="PSNR to the whole decode, dB")
figure.tight_layout()
plt.show()
assert min(nearness[1:]) > nearness[0]

# %% [markdown]
# Why are tiles not the same as the whole, however much they overlap? Norms. Their statistics run
# over a frame, and a tile has statistics of its own. That is in the nature of tiles; diffusers'
# have it as well.
#
# ## What is exact
#
# Frame batches and slices of the batch are not approximations. Two clips, decoded one at a time:

# %%
pair = jnp.concatenate([latents, latents[:, :, ::-1]])
together = eqx.filter_jit(decode)(pair)
apart = eqx.filter_jit(cv.sliced(decode))(pair)
print("largest difference:", float(jnp.max(jnp.abs(together - apart))))
assert jnp.allclose(together, apart, atol=1e-4)

# %% [markdown]
# And a frame over several devices is exact too: see [many devices](08_many_devices.ipynb).
#
# ## In practice
#
# For 49 frames of 480x720 with the published models, diffusers' geometry:
#
# ```python
# decode = cv.tiled(cv.framewise(vae.decode_step, 2), (30, 45), (1 / 6, 1 / 5))
# encode = cv.tiled(lambda x: vae.encode(x).mode(), (240, 360), (1 / 6, 1 / 5))
# ```
#
# ## What to take away
#
# - Plan first: `cv.plan(vae, shape, memory=...)`, then `plan.best("decode").fn`.
# - Tiles approximate. Use them when streams and slices are not enough, with overlap.
# - Transforms nest: tiles of frame batches, under `jit`, under `grad`.
#
# Next: the VAE within [a diffusers pipeline](04_diffusers_pipeline.ipynb).
