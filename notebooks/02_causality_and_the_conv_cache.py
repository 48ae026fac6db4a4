# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Causality and the conv cache
#
# This VAE can work on a clip piece by piece. A piece needs a small part of the past, the cache,
# and nothing of the future. After this notebook you can read the cache, say which frame depends
# on which, and stream a clip, stop, and resume from disk. It runs offline.

# %% tags=["setup"]
import os
import tempfile
import warnings
from pathlib import Path

import equinox as eqx
import jax
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
config = vae.config
clip = jnp.asarray(video.procedural_clip(17, 64, 96))

# %% [markdown]
# ## A step and its cache
#
# The model is two functions of one batch of frames: `vae.encode_step` and `vae.decode_step`. Each
# takes frames and a cache, and returns a result and the next cache. A clip starts with no cache.
#
# Encoding takes 8 frames at a time. Decoding takes 2 latent frames at a time, which stand for the
# same 8 frames. The remainder joins the first batch: 17 frames are split into 9 and 8, and their
# 5 latent frames into 3 and 2.

# %%
latents = vae.encode(clip).mode()

first, cache = vae.decode_step(latents[:, :3])
second, cache = vae.decode_step(latents[:, 3:], cache)
decoded = jnp.concatenate([first, second], axis=1)
print(clip.shape, "->", latents.shape, "->", first.shape, "and", second.shape)

# %% tags=["check"]
assert decoded.shape == clip.shape

# %% [markdown]
# `vae.decode` does no more than this. It is `cv.framewise(vae.decode_step, 2)`, which cuts the
# clip, passes the cache on, and joins the results. `vae.encode` is the same with
# `vae.encode_step` and 8.

# %% tags=["check"]
assert jnp.allclose(vae.decode(latents), decoded, rtol=1e-5, atol=1e-5)
assert jnp.array_equal(cv.framewise(vae.decode_step, 2)(latents), vae.decode(latents))

# %% [markdown]
# What is in the cache? A causal convolution over three frames needs two frames before its first.
# So each convolution keeps the last two frames of its input. Nothing else is kept.


# %%
def entries(cache):
    """Returns the cache's arrays by name."""
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}


total = sum(x.nbytes for x in entries(cache).values())
for name, x in entries(cache).items():
    print(f"{name:35} {x.shape!s:20} {x.nbytes / 2**20:6.3f} MiB")
print(f"{'in all':56} {total / 2**20:6.3f} MiB")

# %% tags=["check"]
assert all(x.shape[1] == 2 for x in entries(cache).values())

# %% [markdown]
# The size of the cache depends on the height and width of the video, not on its length. We can
# compute it from shapes alone, without weights. The chart shows the published 2B model at 480x720
# in bfloat16. Most of the memory belongs to the last block, which works at full resolution.

# %%
full = eqx.filter_eval_shape(
    lambda key: cv.VAE(cv.Config.preset("CogVideoX-2b"), key=key, dtype=jnp.bfloat16),
    jax.random.key(0),
)
z = jax.ShapeDtypeStruct((1, 3, 60, 90, 16), jnp.bfloat16)
large = entries(eqx.filter_eval_shape(lambda vae, z: vae.decode_step(z)[1], full, z))
sizes = {}
for name, x in large.items():
    part = name.split(".resnets")[0].split(".conv")[0]
    sizes[part] = sizes.get(part, 0) + x.size * x.dtype.itemsize / 2**20

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.barh(list(sizes), list(sizes.values()))
ax.invert_yaxis()
ax.set(xlabel="cache of the decoder at 480x720, MiB", title="CogVideoX-2b in bfloat16")
plt.show()

# %%
print(f"{len(large)} arrays, {sum(sizes.values()) / 2**10:.2f} GiB")

# %% tags=["check"]
assert max(sizes, key=sizes.get) == "up_blocks[3]"

# %% [markdown]
# ## What the cache does
#
# With the cache, a convolution gives the same result for the pieces as for the whole, wherever we
# cut. Without it, a piece uses copies of its own first frame as its past, and the result is
# wrong.

# %%
conv = eqx.filter_jit(vae.encoder.conv_in)
whole, _ = conv(clip)
left, past = conv(clip[:, :9])
right, _ = conv(clip[:, 9:], past)
lost, _ = conv(clip[:, 9:])
for name, piece in (("with", right), ("without", lost)):
    worst = jnp.abs(piece - whole[:, 9:]).max((0, 2, 3, 4))[:4]
    errors = " ".join(f"{each:.5f}" for each in worst)
    print(f"{name:8} the cache, errors of frames 9 to 12: {errors}")

# %% tags=["check"]
assert past.shape[1] == 2
assert jnp.array_equal(past, clip[:, 7:9])
assert jnp.allclose(jnp.concatenate([left, right], axis=1), whole, rtol=1e-5, atol=1e-5)
assert not jnp.allclose(lost[:, :2], whole[:, 9:11], rtol=1e-3, atol=1e-3)
assert jnp.allclose(lost[:, 2:], whole[:, 11:], rtol=1e-5, atol=1e-5)

# %% [markdown]
# Only the first two frames of the piece are wrong, because a kernel over three frames reaches no
# further.
#
# ## What a frame can see
#
# The network stacks many such convolutions, with norms between them. A gradient tells which
# frames reach which result: take one latent frame, multiply its numbers by random weights, and
# differentiate by each frame of the video. A frame with zero gradient has no influence.
#
# The group norms also connect frames. They compute mean and variance over all frames of the
# batch, so a frame depends slightly on later frames of its own batch. To separate the two
# effects, we build a second model with the same weights whose norms treat each frame alone. The
# model is a PyTree, so this takes a few lines.

# %%
GroupNorm = type(vae.encoder.norm_out)


class FrameNorm(GroupNorm):
    """Normalises each frame by its own statistics."""

    def affine(self, x):
        affine = super().affine(x.reshape(-1, 1, *x.shape[2:]))
        mean, scale = (
            m.reshape(*x.shape[:2], 1, 1, -1) for m in (affine.mean, affine.scale)
        )
        return affine._replace(mean=mean, scale=scale)


def by_frame(model):
    def replaced(norm):
        if not isinstance(norm, GroupNorm):
            return norm
        new = FrameNorm(norm.weight.size, norm.groups, norm.eps)
        return eqx.tree_at(lambda n: (n.weight, n.bias), new, (norm.weight, norm.bias))

    return jax.tree.map(replaced, model, is_leaf=lambda x: isinstance(x, GroupNorm))


@eqx.filter_jit
def influence(step, size, x, i):
    """Returns each frame's influence on result frame `i`: the gradient's norm."""

    def probe(x):
        y = cv.framewise(step, size)(x)
        weights = jax.random.normal(jax.random.key(0), y.shape)
        return jnp.sum((y * weights)[:, i])

    return jnp.sqrt(jnp.sum(jax.grad(probe)(x) ** 2, axis=(0, 2, 3, 4)))


small = clip[:, :, 16:40, 32:64]
frames = jnp.arange(latents.shape[1])
trained = np.stack([influence(vae.encode_step, 8, small, i) for i in frames])
# One batch compiles in half the time, and without shared statistics gives the same.
strict = np.stack([influence(by_frame(vae).encode_step, 17, small, i) for i in frames])

# %% [markdown]
# Each row is a latent frame and each column a frame of the video. Gray means exactly zero. A
# white line marks the end of a latent frame's own four frames, and the dashed line marks the end
# of the first batch.
#
# On the left is the model itself. A latent frame sees all frames of its own batch, the later ones
# faintly, and nothing beyond the batch. On the right, with norms of each frame alone, nothing
# lies to the right of the white line.


# %% tags=["drawing"]
def heat(ax, seen, title, own, border):
    """Draws influence on a logarithmic scale, gray where it is exactly zero."""
    shown = np.log10(np.where(seen > 0, seen, np.nan) / seen.max())
    cmap = plt.get_cmap("magma").copy()
    cmap.set_bad("0.75")
    rows, columns = seen.shape
    picture = ax.imshow(
        shown, cmap=cmap, vmin=-4, vmax=0, aspect="auto", interpolation="nearest"
    )
    if own is not None:
        ax.step(
            [*own, own[-1]],
            np.arange(rows + 1) - 0.5,
            where="pre",
            color="white",
            lw=1.5,
        )
    for edge in border:
        ax.axvline(edge - 0.5, color="cyan", ls="--", lw=1)
    ax.set(title=title or "", xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    return picture


# %%
own = config.temporal_compression * np.arange(latents.shape[1]) + 0.5

# %% tags=["drawing", "cover"]
fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.4), sharey=True)
heat(axes[0], trained, "as it is", own, [9])
picture = heat(axes[1], strict, "with norms by frame", own, [9])
axes[0].set(ylabel="latent frame", yticks=frames)
for ax in axes:
    ax.set(xlabel="frame of the video", xticks=range(0, 17, 4))
fig.colorbar(picture, ax=axes, label="log10 of influence")
plt.show()

# %% tags=["check"]
for j in range(5):
    end = 1 + config.temporal_compression * j
    assert np.all(strict[j, end:] == 0)
    assert strict[j, end - 1] > 0
assert np.all(trained[:3, 9:] == 0)
assert np.all(trained[:3, :9] > 0)
assert np.all(trained[3:, :9].sum(axis=1) > 0)

# %% [markdown]
# So **convolutions never see the future, and norms see the frame batch.** No later batch
# influences an earlier one. This is what makes streaming possible.
#
# The decoder behaves alike. Here we change one latent frame, decode, and measure how much each
# decoded frame changes. The upper right block would mean that the past depends on the future. It
# is zero, bit for bit.

# %%
whole = vae.decode(latents)
pokes = [vae.decode(latents.at[:, j].add(0.5)) - whole for j in range(latents.shape[1])]
moved = np.stack(
    [jnp.sqrt(jnp.mean(poke**2, axis=(0, 2, 3, 4))) for poke in pokes], axis=1
)

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(4.6, 3.4))
picture = heat(ax, moved, None, None, [3])
ax.axhline(8.5, color="cyan", ls="--", lw=1)
ax.set(
    xlabel="latent frame that was altered",
    ylabel="decoded frame",
    yticks=range(0, 17, 4),
)
fig.colorbar(picture, label="log10 of change")
plt.show()

# %% tags=["check"]
assert np.all(moved[:9, 3:] == 0)
assert np.all(moved[:9, :3] > 0)
assert np.all(moved[9:, 3:] > 0)

# %% [markdown]
# ## The frame batch is part of the model
#
# The size of a frame batch therefore matters. If all 17 frames are encoded in one batch, the
# latents differ: slightly for a steady clip, and more for a clip whose second half is darker.
# With norms of each frame alone, they are equal up to rounding.


# %%
def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


darker = clip.at[:, 9:].multiply(0.3)
by_itself = by_frame(vae)
changes = {}
for name, model in (("as it is", vae), ("norms by frame", by_itself)):
    for kind, x in (("steady", clip), ("darker", darker)):
        batches = cv.framewise(model.encode_step, 8)(x)
        at_once = cv.framewise(model.encode_step, 17)(x)
        change = distance(at_once, batches)
        print(f"{name:15} {kind} clip: 17 and 9 + 8 frames differ by {change:.1e}")
        assert change < 1e-5 if model is not vae else change > 1e-4
        changes[name, kind] = change

# %% tags=["check"]
assert changes["as it is", "darker"] > changes["as it is", "steady"]

# %% [markdown]
# With such norms, does the place of the cut matter? Convolutions and cache allow any cut. The
# pooling in time does not: it averages pairs of frames, twice. The first batch must have one
# frame more than a multiple of four, and each later batch a multiple of four. Otherwise the wrong
# frames are averaged.

# %%
at_once = cv.framewise(by_itself.encode_step, 17)(clip)
for sizes in ((1, 8, 8), (8, 9)):
    cache, pieces, start = None, [], 0
    for size in sizes:
        piece, cache = by_itself.encode_step(clip[:, start : start + size], cache)
        pieces.append(piece)
        start += size
    change = distance(jnp.concatenate(pieces, axis=1), at_once)
    print(f"17 frames and {' + '.join(map(str, sizes))} differ by {change:.1e}")
    assert change > 1e-3 if sizes == (8, 9) else change < 1e-5

# %% [markdown]
# The published weights were trained with batches of 8 frames and 2 latent frames, and diffusers
# uses the same sizes. Keep them, unless you trained with others.
#
# ## Why 8k + 1 frames
#
# The encoder halves the time axis twice. If the number of frames is odd, it keeps the first frame
# and averages the rest in pairs. If it is even, it averages all in pairs. So a first batch of 9
# frames becomes 3 latent frames, and the first of them holds the first frame alone. Each later
# batch of 8 frames becomes 2. The decoder does the reverse.

# %%
print("frames  latent frames  frames back")
for count in (1, 8, 9, 12, 13, 16, 17, 49, 53):
    hidden = config.latent_frames(count)
    print(f"{count:6}  {hidden:13}  {config.sample_frames(hidden):11}")
    assert count % 8 != 1 or config.sample_frames(hidden) == count

# %% tags=["check"]
assert config.sample_frames(config.latent_frames(13)) == 16

# %% [markdown]
# A multiple of 8 also keeps its count. But its first batch is even, so the first frame is
# averaged with the second, and the model was not trained for that. The chart compares 16 frames
# encoded as 16 with the same frames encoded as part of 17.

# %%
rebuilt = vae(clip)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of the count
    without = vae(clip[:, :16])


def by_time(x):
    return [video.psnr(x[:, i : i + 1], clip[:, i : i + 1]) for i in range(x.shape[1])]


# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.plot(by_time(rebuilt), "o-", label="of 17 frames")
ax.plot(by_time(without), "s--", label="of 16 frames")
ax.set(xlabel="frame", ylabel="PSNR, dB", xticks=range(0, 17, 4))
ax.legend(frameon=False)
plt.show()

# %% tags=["check"]
assert by_time(without)[0] < by_time(rebuilt)[0]
assert video.psnr(without, clip[:, :16]) < video.psnr(rebuilt[:, :16], clip[:, :16])

# %% [markdown]
# ## Streams
#
# `cv.streamed` is `cv.framewise` as an iterator: it takes frames as they arrive and yields
# results as they are ready. Joined, they equal the result of `cv.framewise` bit for bit.

# %%
pieces = [np.asarray(piece) for piece in cv.streamed(vae.decode_step, 2)(latents)]
print("pieces of", [piece.shape[1] for piece in pieces], "frames")

# %% tags=["check"]
assert np.array_equal(np.concatenate(pieces, axis=1), vae.decode(latents))

# %% [markdown]
# One stream can feed another. Here 65 frames stay on the host and are encoded and decoded batch
# by batch. After each step we add up all arrays on the device, once while results are dropped
# after use and once while all are kept. Keeping them grows with the clip. Streaming does not.


# %%
def held():
    """Returns the bytes of all arrays on the device."""
    return sum(x.nbytes for x in jax.live_arrays())


def round_trip(clip, keep):
    """Returns the PSNR of each piece, and the MiB on the device when it arrived."""
    moments = cv.streamed(vae.encode_step, 8, ahead=False)(clip)
    encoding = (cv.DiagonalGaussian.from_moments(each).mode() for each in moments)
    before, done, kept, quality, memory = held(), 0, [], [], []
    for piece in cv.streamed(vae.decode_step, 2)(encoding):
        memory.append((held() - before) / 2**20)
        due = clip[:, done : done + piece.shape[1]]
        quality.append(video.psnr(np.asarray(piece), due))
        done += piece.shape[1]
        kept += [piece] if keep else []
    assert done == clip.shape[1]
    return quality, memory


long = video.procedural_clip(65, 64, 96)
quality, streaming = round_trip(long, keep=False)
_, keeping = round_trip(long, keep=True)

ends = range(9, 66, 8)

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.plot(ends, keeping, "s--", label="results kept")
ax.plot(ends, streaming, "o-", label="results let go")
ax.set(xlabel="frames done", ylabel="on the device, MiB", xticks=list(ends))
ax.set_ylim(0, 1.1 * max(keeping))
ax.legend(frameon=False)
plt.show()

# %% tags=["check"]
assert max(streaming[1:]) <= 1.01 * streaming[1]
assert keeping[-1] > keeping[1] + 6 * 8 * 64 * 96 * 3 * 4 / 2**20 - 0.1
assert min(quality) > 15

# %% [markdown]
# The same works from file to file, in constant memory. An iterator does not know its number of
# frames, so the file is asked for 49. Without a count, the first batch takes the remainder of the
# first piece, and a video whose count is not $8k + 1$ ends in an error at its last frames. A
# stream also takes the count as `length=`.
#
# ```python
# frames = video.frames("in.mp4", frames=49, size=(480, 720))
# moments = cv.streamed(vae.encode_step, 8)(frames)
# latents = (cv.DiagonalGaussian.from_moments(m).mode() for m in moments)
# video.write("out.mp4", cv.streamed(vae.decode_step, 2)(latents), fps=8)
# ```
#
# ## Stop, and go on
#
# The cache is a PyTree of arrays, so it can be saved like any other. A stream that receives a
# cache continues after the batch that the cache came from. We stop after the first batch, write
# the cache to disk, and read it again. Reading needs only the shapes, as in a new process.

# %%
stream = cv.streamed(vae.decode_step, 2)(latents)
begun = np.asarray(next(stream))
shapes = eqx.filter_eval_shape(
    lambda vae, z: vae.decode_step(z)[1], vae, latents[:, :3]
)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "cache.eqx"
    eqx.tree_serialise_leaves(path, stream.cache)
    print(
        f"after {begun.shape[1]} frames: {path.stat().st_size / 2**20:.2f} MiB on disk"
    )
    restored = eqx.tree_deserialise_leaves(path, shapes)

resumed = cv.streamed(vae.decode_step, 2)(latents[:, 3:], cache=restored)
joined = np.concatenate([begun, *(np.asarray(piece) for piece in resumed)], axis=1)

# %% tags=["check"]
assert np.array_equal(joined, vae.decode(latents))

# %% [markdown]
# Without the cache, the second part starts as a clip of its own. The second row is the clip
# decoded in one go. The third row starts anew at frame 9. The last row is their difference,
# multiplied by five.

# %%
anew = vae.decode(latents[:, 3:])
whole = decoded[:, 9:]
picture = video.filmstrip(
    clip[:, 9:], whole, anew, jnp.clip(5 * jnp.abs(whole - anew) - 1, -1, 1), n=5
)

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7, 4))
ax.imshow(picture)
rows = ["clip", "with cache", "without", "difference"]
ax.set_yticks((np.arange(4) + 0.5) * clip.shape[2], rows)
ax.set_xticks(
    (np.arange(5) + 0.5) * clip.shape[3], [f"frame {9 + i}" for i in (0, 2, 4, 5, 7)]
)
ax.tick_params(length=0)
ax.spines[:].set_visible(False)
plt.show()

# %%
due = clip[:, 9:]
print(f"with the cache    {video.psnr(whole, due):.1f} dB")
print(f"without the cache {video.psnr(anew, due):.1f} dB")

# %% tags=["check"]
assert not jnp.allclose(whole, anew, atol=1e-2)
assert video.psnr(whole, due) > video.psnr(anew, due)

# %% [markdown]
# ## What to take away
#
# - A step is a pure function of frames and a cache. The cache holds two frames for each
#   convolution.
# - The past reaches a frame batch through the cache alone. The future does not reach it.
# - Norms share statistics within a batch. So the sizes of frame batches, 8 and 2, are part of the
#   model.
# - Use $8k + 1$ frames, so that the first frame has a latent frame of its own.
# - `cv.streamed` equals `cv.framewise` bit for bit, in constant memory, and resumes from disk.
#
# Next: [tiling and memory](03_tiling_and_memory.ipynb) is for frames that are too large for the
# device.
