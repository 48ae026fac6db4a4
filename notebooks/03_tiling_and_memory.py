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
# This notebook is for frames that are too large for the device. After it you can decode a frame
# in tiles, choose tile size and overlap, and compute the memory that a video needs before you run
# anything. It runs offline.

# %% tags=["setup"]
import os

import equinox as eqx
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import eqx_cogvae as cv
from eqx_cogvae import video

plt.rcParams.update(
    {"figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9}
)

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
cell = vae.config.spatial_compression

clip = jnp.asarray(video.procedural_clip(9, 96, 144))
latents = vae.encode(clip).mode()
print("clip", clip.shape, "latents", latents.shape)

# %% [markdown]
# ## A frame in pieces
#
# Along time, the model can be cut without loss, because [the conv
# cache](02_causality_and_the_conv_cache.ipynb) carries what is needed. Across the frame there is
# no cache. A tile is decoded as if it were a picture of its own.
#
# `cv.tiled` wraps a function of a clip. Sizes are in cells of its input. For latents, one cell is
# 8x8 pixels. We begin with tiles of 4x6 cells, which is too small for real use, and without
# overlap.

# %%
decode = cv.framewise(vae.decode_step, 2)
whole = decode(latents)
abrupt = cv.tiled(decode, (4, 6), (0, 0))(latents)


# %% tags=["drawing"]
def compare(result, title):
    """Shows a frame of the result and its difference from the whole decode."""
    error = (
        np.asarray(jnp.sqrt(jnp.mean((result - whole) ** 2, axis=(0, 1, 4)))) * 127.5
    )
    fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.4))
    axes[0].imshow(video.filmstrip(result[:, -1:], n=1))
    picture = axes[1].imshow(error, cmap="inferno", vmin=0, vmax=30)
    fig.colorbar(picture, ax=axes[1], label="RMS difference, of 255")
    axes[0].set_title(title)
    axes[1].set_title("difference from the whole decode")
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    plt.show()
    return error


# %% tags=["check"]
assert abrupt.shape == whole.shape == clip.shape

# %% [markdown]
# The left picture shows the tiled result. The right picture shows its difference from the whole
# decode. The grid in it is the seams.

# %%
seams = compare(abrupt, "9 tiles of 4x6 cells, no overlap")

# %% [markdown]
# Averaged over the height, the seams are peaks at the columns where two tiles meet. The
# difference between the peaks is not zero; "Far from any seam" below explains why.

# %%
edges = np.arange(6 * cell, clip.shape[3], 6 * cell)

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.plot(seams.mean(0))
for edge in edges:
    ax.axvline(edge - 0.5, color="gray", ls="--", lw=1)
ax.set(xlabel="column, pixels", ylabel="RMS difference, of 255", ylim=(0, None))
plt.show()

# %%
near = np.zeros(clip.shape[3], bool)
for edge in edges:
    near[edge - 4 : edge + 4] = True
print(f"within 4 pixels of a seam {seams[:, near].mean():.1f}")
print(f"elsewhere                 {seams[:, ~near].mean():.1f}")

# %% tags=["check"]
assert seams[:, near].mean() > 1.3 * seams[:, ~near].mean()

# %% [markdown]
# ## Blending
#
# Tiles may overlap, and the result fades from one to the next. `cv.blend(before, after, extent,
# axis)` computes the fade, a straight line over the last entries of one array and the first of
# the other. Here one array is all zeros and the other all ones.

# %%
extent = 16
before, after = jnp.zeros(32), jnp.ones(32)
ramp = cv.blend(before, after, extent, 0)

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7, 2.2))
ax.plot(np.arange(32), before, "s", ms=3, label="before")
ax.plot(np.arange(16, 48), after, "^", ms=3, label="after")
ax.plot(np.arange(16, 48), ramp, "o-", ms=3, label="blend(before, after, 16, axis=0)")
ax.axvspan(16, 32, color="0.9", zorder=0)
ax.set(xlabel="pixel", ylabel="value")
ax.legend(frameon=False, loc="center left")
plt.show()

# %% tags=["check"]
assert np.allclose(ramp[:extent], np.arange(extent) / extent)
assert np.all(ramp[extent:] == 1)

# %% [markdown]
# `cv.tiled` blends along the height and then along the width. `overlap` gives fractions of a
# tile's height and width. Here tiles overlap by half:

# %%
smooth = cv.tiled(decode, (4, 6), (1 / 2, 1 / 2), edges="shift")(latents)
faded = compare(smooth, "25 tiles of 4x6 cells, half overlaps")
print(f"difference {seams.mean():.1f} without overlap, {faded.mean():.1f} with it")

# %% tags=["check"]
assert smooth.shape == clip.shape
assert faded.mean() < seams.mean()
assert faded[:, near].mean() < 0.8 * seams[:, near].mean()

# %% [markdown]
# The result has the right size for any tile and overlap. At the far edges a tile may not fit.
# `edges="clip"`, the default, cuts it short, as diffusers does. `edges="shift"` moves it inwards,
# so all tiles have one shape and share one compiled program.
#
# ## Overlap against quality
#
# Overlapping pixels are computed twice. The table and the chart compare two tile sizes and
# several overlaps, by their distance from the whole decode and by their arithmetic. One frame is
# enough for that.


# %%
def arithmetic(size, overlap):
    """Returns the cells computed in shifted tiles, as a multiple of the frame's."""
    count = 1
    for side, tile in zip(latents.shape[2:4], size, strict=True):
        stride = int(round(tile * (1 - overlap), 6))
        count *= -(-(side - tile) // stride) + 1
    return count * size[0] * size[1] / (latents.shape[2] * latents.shape[3])


overlaps = [0, 1 / 3, 1 / 2, 2 / 3]
still, whole_still = latents[:, :1], decode(latents[:, :1])
results = {}
print("tile, cells  overlap  arithmetic  PSNR to the whole  PSNR to the clip")
for size in ((4, 6), (6, 9)):
    for overlap in overlaps:
        result = cv.tiled(decode, size, (overlap, overlap), edges="shift")(still)
        cost, nearness = arithmetic(size, overlap), video.psnr(result, whole_still)
        results[size, overlap] = cost, nearness
        print(
            f"{size[0]:6}x{size[1]}{overlap:12.2f}{cost:12.2f}"
            f"{nearness:16.1f} dB{video.psnr(result, clip[:, :1]):15.1f} dB"
        )

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7, 2.8))
for size, style in (((4, 6), "o-"), ((6, 9), "s--")):
    points = [results[size, overlap] for overlap in overlaps]
    ax.plot(
        *zip(*points, strict=True), style, label=f"tiles of {size[0]}x{size[1]} cells"
    )
    for overlap, point in zip(("0", "1/3", "1/2", "2/3"), points, strict=True):
        ax.annotate(overlap, point, textcoords="offset points", xytext=(5, -11))
ax.set(xlabel="arithmetic, the whole decode = 1", ylabel="PSNR to the whole decode, dB")
ax.margins(y=0.15)
ax.legend(frameon=False, loc="lower right")
plt.show()

# %%
large, most = results[(6, 9), 1 / 3], results[(4, 6), 2 / 3]

# %% tags=["check"]
for size in ((4, 6), (6, 9)):
    without, little, *more = (results[size, overlap][1] for overlap in overlaps)
    assert little - without > 2 * (max(more) - little)
assert large[1] > most[1] + 1 and large[0] < most[0] / 3

# %% [markdown]
# A little overlap helps: the first third gains more than twice as much as all further overlap.
# Larger tiles help more: tiles of 6x9 cells with a third are closer to the whole than tiles of
# 4x6 with two thirds, at a third of the arithmetic. So use the largest tile that fits in memory.
#
# ## Far from any seam
#
# Even with much overlap, tiles differ a little from the whole, for two reasons. A tile does not
# see beyond its edges. And its group norms use the statistics of the tile, not of the frame. To
# separate the two, we need a place that no convolution reaches from a cut. So here is a strip of
# a frame, 2 cells high and 64 wide. We decode it whole, and then decode its first 48 columns
# alone.
#
# Each convolution reaches one of its own pixels further. The sum over the decoder, in cells, is
# the distance that convolutions can see. Left of that line, only the norms can notice the cut.

# %%
config = vae.config
blocks = len(config.block_out_channels)
per_block = 2 * (config.layers_per_block + 1)
# The sum covers the first convolution and four of the middle block, those of each
# block and its upsampler, which works at the next block's resolution, and the last.
reach = 1 + 4 + sum(per_block / 2**i for i in range(blocks))
reach += sum(1 / 2**i for i in range(1, blocks)) + 1 / 2 ** (blocks - 1)

band = jnp.asarray(video.procedural_clip(1, 2 * cell, 64 * cell))
band_latents = vae.encode(band).mode()
all_of_it, part = vae.decode(band_latents), vae.decode(band_latents[:, :, :, :48])
off = np.sqrt(
    np.mean(
        (np.asarray(part) - all_of_it[:, :, :, : 48 * cell]) ** 2, axis=(0, 1, 2, 4)
    )
)
off *= 127.5
beyond = int((48 - reach) * cell)

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.semilogy(off)
ax.axvline(beyond, color="gray", ls="--", lw=1)
ax.text(beyond - 5, off.max(), "norms alone", ha="right", va="top")
ax.text(beyond + 5, off.max(), "norms and edge", va="top")
ax.set(
    xlabel="column, pixels; the cut is at the right", ylabel="RMS difference, of 255"
)
plt.show()

# %%
print(f"convolutions reach {reach:.1f} cells")
print(f"beyond that reach:                 {off[:beyond].mean():.2f} of 255")
print(f"in the four cells before the cut:  {off[-4 * cell :].mean():.2f} of 255")

# %% tags=["check"]
assert beyond > 0
assert off[:beyond].mean() > 0.01
assert off[-4 * cell :].mean() > 2 * off[:beyond].mean()

# %% [markdown]
# The norms change a tile everywhere, but only slightly. The missing surroundings matter more, and
# only near the cut. Overlap helps against the second effect.

# %% [markdown]
# ## Encoding in tiles
#
# Encoding works the same way, with sizes in pixels. They must be multiples of 8, and the error
# says so if they are not.

# %%
encode = cv.framewise(vae.encode_step, 8)
moments = cv.tiled(encode, (48, 72), (1 / 3, 1 / 3), edges="shift")(clip)
mean = cv.DiagonalGaussian.from_moments(moments).mean
difference = jnp.linalg.norm(mean - latents) / jnp.linalg.norm(latents)
print(f"relative difference {difference:.3f}")

try:
    cv.tiled(encode, (50, 72), (1 / 3, 1 / 3))(clip)
except ValueError as error:
    message = str(error)
print(message)

# %% tags=["check"]
assert mean.shape == latents.shape
assert difference < 0.5
assert "give 48 or 56" in message

# %% [markdown]
# ## The memory plan
#
# Do you need tiles at all? `cv.plan` compiles each way to encode and decode a video without
# running it, and reads peak memory and arithmetic from the compiled programs. `memory` is your
# budget in bytes; the default is what the device reports. Tile sizes are in pixels here.

# %%
plan = cv.plan(vae, clip.shape, tile=(48, 72), overlap=(1 / 3, 1 / 3))
costs = {cost.name: cost for cost in plan.decode}
budget = (costs["tiled"].peak + costs["whole"].peak) // 2
tight = cv.Plan(plan.encode, plan.decode, budget)
print(tight)

# %% [markdown]
# We set the budget between the two peaks, so that there is something to decide. The bars in blue
# fit.

# %%
bars = [("encode", cost) for cost in plan.encode] + [
    ("decode", cost) for cost in plan.decode
]

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7, 2.4))
colors = ["tab:blue" if tight.fits(cost) else "0.7" for _, cost in bars]
ax.barh(
    [f"{way}, {c.name}" for way, c in bars],
    [c.peak / 2**20 for _, c in bars],
    color=colors,
)
ax.axvline(budget / 2**20, color="tab:red", ls="--", label="budget")
ax.invert_yaxis()
ax.set(xlabel="peak memory, MiB")
ax.legend(frameon=False)
plt.show()

# %% tags=["check"]
assert tight.best("decode").name == "tiled"
assert not tight.fits(costs["whole"])
assert costs["tiled"].peak < costs["whole"].peak
assert costs["tiled"].flop > costs["whole"].flop

# %% [markdown]
# `plan.best("decode")` is the cheapest way that fits. Its `fn` is the function itself. With
# enough memory, it is the whole decode.

# %%
roomy = cv.Plan(plan.encode, plan.decode, 10 * budget)

# %% tags=["check"]
assert roomy.best("decode").name == "whole"
assert jnp.array_equal(roomy.best("decode").fn(latents), whole)

# %% [markdown]
# For the published models at full size, a plan takes as long as compiling. It needs shapes only,
# so the weights need not be loaded.
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
# "Streamed" saves memory in another way: frames leave the device as they are made. It is exact,
# and its peak does not grow with the length of the clip. Our clip of 9 frames is a single batch,
# so it saves little here.
#
# ## What equals what
#
# Tiles approximate. The other transforms do not. `cv.sliced` decodes a batch one clip at a time,
# `cv.streamed` decodes a clip piece by piece, and transforms nest in each other and in `jax.jit`.


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

# %% tags=["check"]
assert all(value < 1e-5 for _, value in exact)
assert jnp.array_equal(streamed, whole)
assert approximate > 1e-3

# %% [markdown]
# Relative differences below $10^{-5}$ are rounding: the compiler adds in another order for
# another shape. The last line is not rounding.
#
# Several devices can share a larger frame exactly, without seams, with `cv.sharded`: see [many
# devices](08_many_devices.ipynb).
#
# ## What to take away
#
# - Plan first: `cv.plan(vae, shape, memory=...)`, then `plan.best("decode").fn`.
# - `cv.streamed` and `cv.sliced` are exact. Use them before tiles.
# - Tiles approximate. Make them as large as memory allows, with a little overlap. The values of
#   diffusers, 30x45 cells with overlaps of 1/6 and 1/5, are a good start.
# - Encode with tile sizes that are multiples of 8 pixels. The result has the right size for any
#   tile.
#
# Next: use the VAE in [a diffusers pipeline](04_diffusers_pipeline.ipynb).
