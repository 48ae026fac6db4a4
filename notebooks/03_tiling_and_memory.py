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
# What to do when a frame is too large for the device. You will see the seams that tiles make, how
# blending hides them, what overlap buys and costs, and how to ask for the memory that a video
# takes before anything is run. It runs offline, on a CPU, in under 60 seconds.

# %%
import os

import equinox as eqx
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import eqx_cogvae as cv
from eqx_cogvae import video

plt.rcParams.update({"figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9})

# On a CPU half the time to compile, and about as fast after it: JAX reads it when it first computes.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
cell = vae.config.spatial_compression

clip = jnp.asarray(video.procedural_clip(9, 96, 144))
latents = vae.encode(clip).mode()
print("clip", clip.shape, "latents", latents.shape)

# %% [markdown]
# ## A frame in pieces
#
# Along time the model is cut without loss: [the conv cache](02_causality_and_the_conv_cache.ipynb)
# carries over what is needed. Across the frame there is no such thing, so a tile is decoded as if
# it were a picture of its own.
#
# `cv.tiled` wraps a function of a clip. Sizes are in the cells of its input: here latents, of which
# one is 8x8 pixels. We begin with tiles of 4x6 cells, far too small for real use, and no overlap.

# %%
decode = cv.framewise(vae.decode_step, 2)
whole = decode(latents)
abrupt = cv.tiled(decode, (4, 6), (0, 0))(latents)
assert abrupt.shape == whole.shape == clip.shape


def compare(result, title):
    """A frame of the result, and where and by how much it differs from the whole decode."""
    error = np.asarray(jnp.sqrt(jnp.mean((result - whole) ** 2, axis=(0, 1, 4)))) * 127.5
    fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.4))
    axes[0].imshow(video.filmstrip(result[:, -1:], n=1))
    picture = axes[1].imshow(error, cmap="inferno", vmin=0, vmax=30)
    fig.colorbar(picture, ax=axes[1], label="RMS difference, of 255")
    axes[0].set_title(title)
    axes[1].set_title("difference to the whole decode")
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    plt.show()
    return error


# %% [markdown]
# On the left look for edges that should not be there, on the right for the grid: the seams.

# %%
seams = compare(abrupt, "9 tiles of 4x6 cells, no overlap")

# %% [markdown]
# Averaged over the height, the grid becomes peaks at the columns where two tiles meet. The frame's
# own edges may stand out too, where nothing was cut. And what lies between the peaks is not zero:
# further down, "Far from any seam" tells the reasons apart.

# %%
edges = np.arange(6 * cell, clip.shape[3], 6 * cell)
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.plot(seams.mean(0))
for edge in edges:
    ax.axvline(edge - 0.5, color="gray", ls="--", lw=1)
ax.set(xlabel="column, pixels", ylabel="RMS difference, of 255", ylim=(0, None))
plt.show()

near = np.zeros(clip.shape[3], bool)
for edge in edges:
    near[edge - 4 : edge + 4] = True
print(
    f"within 4 pixels of a seam {seams[:, near].mean():.1f}, elsewhere {seams[:, ~near].mean():.1f}"
)
assert seams[:, near].mean() > 1.3 * seams[:, ~near].mean()

# %% [markdown]
# ## Blending
#
# So let tiles overlap, and fade from one to the next where they do. `cv.blend(before, after,
# extent, axis)` is that fade: a straight line, over the last entries of one array and the first of
# the other. Here one is all zeros and the other all ones; look at the line between them.

# %%
extent = 16
before, after = jnp.zeros(32), jnp.ones(32)
ramp = cv.blend(before, after, extent, 0)
assert np.allclose(ramp[:extent], np.arange(extent) / extent)
assert np.all(ramp[extent:] == 1)

fig, ax = plt.subplots(figsize=(7, 2.2))
ax.plot(np.arange(32), before, "s", ms=3, label="before")
ax.plot(np.arange(16, 48), after, "^", ms=3, label="after")
ax.plot(np.arange(16, 48), ramp, "o-", ms=3, label="blend(before, after, 16, axis=0)")
ax.axvspan(16, 32, color="0.9", zorder=0)
ax.set(xlabel="pixel", ylabel="value")
ax.legend(frameon=False, loc="center left")
plt.show()

# %% [markdown]
# `cv.tiled` does this downwards and then across, and the neighbour that it fades from is already
# blended. `overlap` are fractions of a tile's height and width. With half a tile:

# %%
smooth = cv.tiled(decode, (4, 6), (1 / 2, 1 / 2), edges="shift")(latents)
faded = compare(smooth, "25 tiles of 4x6 cells, half overlaps")
print(f"difference {seams.mean():.1f} without overlap, {faded.mean():.1f} with it")
assert smooth.shape == clip.shape
assert faded.mean() < seams.mean()
assert faded[:, near].mean() < 0.8 * seams[:, near].mean()

# %% [markdown]
# The size of the result is that of the input for every tile and overlap. At the far edges a tile
# may not fit: `edges="clip"`, the default, cuts it short, as diffusers does; `edges="shift"` moves
# it inwards, so that all tiles are of one shape and one program serves them all.
#
# ## Overlap against quality
#
# What is computed twice is the price. Here are two sizes of tiles and several overlaps, by how near
# they come to the whole decode and by the arithmetic that they take.


# %%
def arithmetic(size, overlap):
    """Cells computed, as a multiple of the frame's, for tiles that are shifted."""
    count = 1
    for side, tile in zip(latents.shape[2:4], size, strict=True):
        stride = int(round(tile * (1 - overlap), 6))
        count *= -(-(side - tile) // stride) + 1
    return count * size[0] * size[1] / (latents.shape[2] * latents.shape[3])


overlaps = [0, 1 / 3, 1 / 2, 2 / 3]
results = {}
print("tile, cells  overlap  arithmetic  PSNR to the whole  PSNR to the clip")
for size in ((4, 6), (6, 9)):
    for overlap in overlaps:
        result = cv.tiled(decode, size, (overlap, overlap), edges="shift")(latents)
        cost, nearness = arithmetic(size, overlap), video.psnr(result, whole)
        results[size, overlap] = cost, nearness
        print(
            f"{size[0]:6}x{size[1]}{overlap:12.2f}{cost:12.2f}"
            f"{nearness:16.1f} dB{video.psnr(result, clip):15.1f} dB"
        )

# %%
fig, ax = plt.subplots(figsize=(7, 2.8))
for size, style in (((4, 6), "o-"), ((6, 9), "s--")):
    points = [results[size, overlap] for overlap in overlaps]
    ax.plot(*zip(*points, strict=True), style, label=f"tiles of {size[0]}x{size[1]} cells")
    for overlap, point in zip(("0", "1/3", "1/2", "2/3"), points, strict=True):
        ax.annotate(overlap, point, textcoords="offset points", xytext=(5, -11))
ax.set(xlabel="arithmetic, the whole decode = 1", ylabel="PSNR to the whole decode, dB")
ax.margins(y=0.15)
ax.legend(frameon=False, loc="lower right")
plt.show()
for size in ((4, 6), (6, 9)):
    without, little, *more = (results[size, overlap][1] for overlap in overlaps)
    assert little - without > 2 * (max(more) - little)
large, most = results[(6, 9), 1 / 3], results[(4, 6), 2 / 3]
assert large[1] > most[1] + 1 and large[0] < most[0] / 3

# %% [markdown]
# Two things to read off. A little overlap helps: the first third gains more than twice what all
# further overlap does. And larger tiles are better than more overlap: those of 6x9 cells with a third
# come nearer than those of 4x6 with two thirds, for a third of the arithmetic. Use the largest that
# memory allows.
#
# ## Far from any seam
#
# However much tiles overlap, they stay a little off, for two reasons. A tile does not see beyond its
# edges; and the group norms, whose statistics run over a frame, take those of the tile. To tell the
# two apart takes a place that no convolution reaches from a cut, so here is a strip of a frame, 2
# cells high and 64 wide. We decode it whole, and then its first 48 columns alone.
#
# Each convolution reaches one of its own pixels further. Added up over the decoder, in cells, that
# is how far convolutions see. Left of that line only the norms can tell that something was cut off.

# %%
config = vae.config
blocks = len(config.block_out_channels)
per_block = 2 * (config.layers_per_block + 1)
# The first convolution and four of the middle block; those of each block and its upsampler, which
# works at the next block's resolution; the last one.
reach = 1 + 4 + sum(per_block / 2**i for i in range(blocks))
reach += sum(1 / 2**i for i in range(1, blocks)) + 1 / 2 ** (blocks - 1)

band = jnp.asarray(video.procedural_clip(1, 2 * cell, 64 * cell))
band_latents = vae.encode(band).mode()
all_of_it, part = vae.decode(band_latents), vae.decode(band_latents[:, :, :, :48])
off = np.sqrt(np.mean((np.asarray(part) - all_of_it[:, :, :, : 48 * cell]) ** 2, axis=(0, 1, 2, 4)))
off *= 127.5
beyond = int((48 - reach) * cell)

fig, ax = plt.subplots(figsize=(7, 2.4))
ax.semilogy(off)
ax.axvline(beyond, color="gray", ls="--", lw=1)
ax.text(beyond - 5, off.max(), "norms alone", ha="right", va="top")
ax.text(beyond + 5, off.max(), "norms and edge", va="top")
ax.set(xlabel="column, pixels; the cut is at the right", ylabel="RMS difference, of 255")
plt.show()
print(
    f"convolutions reach {reach:.1f} cells; beyond, {off[:beyond].mean():.2f} of 255 by the norms"
)
print(f"in the last four cells before the cut: {off[-4 * cell :].mean():.2f}")
assert beyond > 0
assert off[:beyond].mean() > 0.01
assert off[-4 * cell :].mean() > 2 * off[:beyond].mean()

# %% [markdown]
# The norms make a tile differ everywhere, however far the seam is, and by little. What the tile does
# not see weighs more, and only near the cut: that is what overlap helps against.

# %% [markdown]
# ## Encoding in tiles
#
# The same, with sizes in pixels. They have to be multiples of 8, and if they are not, it says so.

# %%
encode = cv.framewise(vae.encode_step, 8)
moments = cv.tiled(encode, (48, 72), (1 / 3, 1 / 3), edges="shift")(clip)
mean = cv.DiagonalGaussian.from_moments(moments).mean
print(f"relative difference {jnp.linalg.norm(mean - latents) / jnp.linalg.norm(latents):.3f}")
assert mean.shape == latents.shape
assert jnp.linalg.norm(mean - latents) < 0.5 * jnp.linalg.norm(latents)

try:
    cv.tiled(encode, (50, 72), (1 / 3, 1 / 3))(clip)
except ValueError as error:
    message = str(error)
print(message)
assert "give 48 or 56" in message

# %% [markdown]
# ## The memory plan
#
# Do you need tiles at all? `cv.plan` compiles every way to encode and decode a video without
# running it, and reads peak memory and arithmetic off the programs. `memory` is your budget in
# bytes; without it, it is what the device says it has. Tiles are in pixels here.

# %%
plan = cv.plan(vae, clip.shape, tile=(48, 72), overlap=(1 / 3, 1 / 3))
costs = {cost.name: cost for cost in plan.decode}
budget = (costs["tiled"].peak + costs["whole"].peak) // 2
tight = cv.Plan(plan.encode, plan.decode, budget)
print(tight)

# %% [markdown]
# We have set the budget between the two peaks, so that there is something to decide. Look for the
# bars that end left of the line.

# %%
bars = [("encode", cost) for cost in plan.encode] + [("decode", cost) for cost in plan.decode]
fig, ax = plt.subplots(figsize=(7, 2.4))
colors = ["tab:blue" if tight.fits(cost) else "0.7" for _, cost in bars]
ax.barh([f"{way}, {c.name}" for way, c in bars], [c.peak / 2**20 for _, c in bars], color=colors)
ax.axvline(budget / 2**20, color="tab:red", ls="--", label="budget")
ax.invert_yaxis()
ax.set(xlabel="peak memory, MiB")
ax.legend(frameon=False)
plt.show()

assert tight.best("decode").name == "tiled"
assert not tight.fits(costs["whole"])
assert costs["tiled"].peak < costs["whole"].peak
assert costs["tiled"].flop > costs["whole"].flop

# %% [markdown]
# `plan.best("decode")` is the cheapest way that fits, and its `fn` is that way itself. With room
# enough that is the whole decode.

# %%
roomy = cv.Plan(plan.encode, plan.decode, 10 * budget)
assert roomy.best("decode").name == "whole"
assert jnp.array_equal(roomy.best("decode").fn(latents), whole)

# %% [markdown]
# For the published models at their own size the plan takes as long as compiling does. It needs
# shapes only, so the weights need not be there.
#
# ```python
# import jax
#
# vae = eqx.filter_eval_shape(
#     lambda key: cv.VAE(cv.Config.preset("CogVideoX-2b"), key=key, dtype=jnp.bfloat16),
#     jax.random.key(0),
# )
# print(cv.plan(vae, (1, 49, 480, 720), memory=16 * 2**30))
# ```
#
# "Streamed" is the other way to save: frames leave the device as they are made, and are exact. Its
# peak does not grow with the length of the clip. For our 9 frames, which are one batch, it saves
# hardly anything.
#
# ## What equals what
#
# Tiles approximate. The other transforms do not: a batch can be decoded one clip at a time, by
# `cv.sliced`, and a clip piece by piece, and transforms nest in each other and in `jax.jit`.


# %%
def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


pair = jnp.concatenate([latents, latents[:, ::-1]])
together = decode(pair)
tiles = cv.tiled(decode, (6, 9), (1 / 3, 1 / 3), edges="shift")
tiled = tiles(latents)
streamed = jnp.concatenate(list(cv.streamed(vae.decode_step, 2)(latents)), axis=1)

table = {
    "streamed, to whole": distance(streamed, whole),
    "one tile that holds the frame, to whole": distance(
        cv.tiled(decode, (30, 45), (1 / 6, 1 / 5))(latents), whole
    ),
    "sliced, to the batch": distance(cv.sliced(decode)(pair), together),
    "sliced tiles, to tiles": distance(cv.sliced(tiles)(latents), tiled),
    "tiles under jit, to tiles": distance(eqx.filter_jit(tiles)(latents), tiled),
    "tiles, to whole": distance(tiled, whole),
}
for name, value in table.items():
    print(f"{name:41} {'bit for bit' if value == 0 else f'{value:.1e}'}")
*exact, (_, approximate) = table.items()
assert all(value < 1e-5 for _, value in exact)
assert jnp.array_equal(streamed, whole)
assert approximate > 1e-3

# %% [markdown]
# Relative differences below $10^{-5}$ are rounding: the compiler orders sums otherwise for another
# shape. The last line is not rounding.
#
# Several devices hold a larger frame exactly, without seams, by `cv.sharded`: see
# [many devices](08_many_devices.ipynb).
#
# ## What to take away
#
# - Ask first: `cv.plan(vae, shape, memory=...)`, then `plan.best("decode").fn`.
# - `cv.streamed` and `cv.sliced` are exact. Use them before tiles.
# - Tiles approximate. Make them as large as memory allows, and overlap them by a little: diffusers'
#   30x45 cells by 1/6 and 1/5 are a good start.
# - Encode in multiples of 8 pixels; the result has the right size for any geometry.
#
# Next: the VAE within [a diffusers pipeline](04_diffusers_pipeline.ipynb).
