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
# Why this VAE can work on a clip piece by piece: no frame sees a later one, and what a piece needs
# of its past is a PyTree that you hold in your hands. Runs offline, in about a minute.

# %%
import os
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import eqx_cogvae as cv
from eqx_cogvae import video

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
clip = jnp.asarray(video.procedural_clip(17, 32, 48, seed=0))

# %% [markdown]
# ## A step, and its cache
#
# The model is two functions of one batch of frames: `encode_step` and `decode_step`. Each takes
# frames and a cache and returns a result and the next cache. At the start there is no cache.

# %%
decode_step = eqx.filter_jit(lambda vae, z, cache: vae.decode_step(z, cache))
latents = eqx.filter_jit(lambda vae, x: vae.encode(x).mode())(vae, clip)
first, cache = decode_step(vae, latents[:, :3], None)
second, cache = decode_step(vae, latents[:, 3:], cache)
print(latents.shape, "->", first.shape, "and", second.shape)

# %% [markdown]
# What is in the cache: for every causal convolution the last frames it has seen, `kt - 1` for a
# kernel of `kt` in time. Nothing else is remembered.

# %%
entries = jax.tree_util.tree_leaves_with_path(cache)
for path, leaf in entries[:6]:
    print(f"{jax.tree_util.keystr(path):45} {leaf.shape} {leaf.nbytes / 2**20:.3f} MiB")
print(f"... {len(entries)} in all, {sum(x.nbytes for _, x in entries) / 2**20:.2f} MiB")
assert all(leaf.shape[1] == 2 for _, leaf in entries)

# %% [markdown]
# Chained by hand, the steps give what `vae.decode` gives, whose frame batches are the same.

# %%
whole = vae.decode(latents)
by_hand = jnp.concatenate([first, second], axis=1)
print("largest difference:", float(jnp.max(jnp.abs(whole - by_hand))))
assert jnp.allclose(whole, by_hand, atol=1e-5)

# %% [markdown]
# ## Why 8k + 1 frames
#
# Time is halved twice, and the first frame is kept apart each time: 1 + 8k frames become 1 + 2k
# latent frames. The frame batches are 8 frames of video or 2 of latents, the first of each with
# the remainder. Other counts do not come back as they were:

# %%
print("frames  latent frames  decoded")
for frames in (1, 5, 8, 9, 12, 13, 16, 17, 49):
    hidden = vae.config.latent_frames(frames)
    decoded = vae.config.sample_frames(hidden)
    print(f"{frames:6}{hidden:12}{decoded:13}   {'' if decoded == frames else 'another count'}")
    assert (decoded == frames) or frames % 8 != 1
padded, count = cv.pad_frames(clip[:, :12])
assert padded.shape[1] == 17
assert cv.crop_frames(padded, count).shape[1] == 12

# %% [markdown]
# ## What a frame can see
#
# By gradients: how strongly each latent frame answers to each frame of the video. A row is a latent
# frame, a column a frame of the video, dark where there is no influence at all.
#
# Within a frame batch norms share statistics over all its frames, so that a frame does see a later
# one of its own batch, faintly. It never sees a later batch: there the gradient is exactly zero.

# %%
key = jax.random.key(0)


@eqx.filter_jit
def influence(vae, x, i):
    def probe(x):
        moments = cv.framewise(vae.encode_step, 8)(x)
        chosen = moments[:, i]
        return jnp.sum(chosen * jax.random.normal(key, chosen.shape))

    return jnp.sqrt(jnp.mean(jax.grad(probe)(x) ** 2, axis=(0, 2, 3, 4)))


seen = np.stack([influence(vae, clip, i) for i in range(latents.shape[1])])
figure, axes = plt.subplots(figsize=(7, 2.8), dpi=100)
image = axes.imshow(np.log10(np.maximum(seen / seen.max(), 1e-6)), aspect="auto", cmap="magma")
axes.axvline(8.5, color="white", linestyle="--", linewidth=1)
axes.set(
    xlabel="frame of the video", ylabel="latent frame", title="Influence, log10 of the largest"
)
figure.colorbar(image)
figure.tight_layout()
plt.show()
assert np.all(seen[:3, 9:] == 0)
assert np.all(seen[3:, 9:].max(axis=1) > 0)

# %% [markdown]
# The dashed line is the border of the two frame batches: nothing above it is lit on its right.
# Below it the second batch looks back over the border, through the cache.
#
# Convolutions alone are strictly causal. One of them by itself, with no norm around it:

# %%
conv = vae.encoder.conv_in
slopes = jax.grad(lambda x: jnp.sum(conv(x)[0][:, 4]))(clip[:, :9])
reach = np.asarray(jnp.max(jnp.abs(slopes), axis=(0, 2, 3, 4)))
print("frame 4 of a causal convolution sees frames", np.flatnonzero(reach).tolist())
assert np.flatnonzero(reach).tolist() == [2, 3, 4]

# %% [markdown]
# ## Streams
#
# A clip of any length in constant memory: frames come in pieces from an iterator, results leave as
# they are made. Joined they are bit for bit what `cv.framewise` gives.

# %%
stream = cv.streamed(vae.decode_step, 2)(latents)
pieces = [np.asarray(piece) for piece in stream]
print("pieces of", [piece.shape[1] for piece in pieces], "frames")
assert np.array_equal(np.concatenate(pieces, axis=1), np.asarray(whole))

# %% [markdown]
# A stream can stop, and go on elsewhere: its cache is a PyTree as any other, and goes to disk as one.

# %%
stream = cv.streamed(vae.decode_step, 2)(latents[:, :3])
begun = [np.asarray(piece) for piece in stream]
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "cache.eqx"
    eqx.tree_serialise_leaves(path, stream.cache)
    print(f"the cache on disk: {path.stat().st_size / 2**20:.2f} MiB")
    restored = eqx.tree_deserialise_leaves(path, stream.cache)
rest = [np.asarray(p) for p in cv.streamed(vae.decode_step, 2)(latents[:, 3:], cache=restored)]
assert np.array_equal(np.concatenate(begun + rest, axis=1), np.asarray(whole))
Image.fromarray(video.filmstrip(clip, whole, n=6))

# %% [markdown]
# ## What to take away
#
# - A step is a pure function of frames and a cache; the cache is `kt - 1` frames of each convolution.
# - The past reaches a batch through the cache alone, the future not at all.
# - Statistics of norms are those of a frame batch: its size is part of the model. Keep 8 and 2.
#
# Next: what to do when a frame is too large, in [tiling and memory](03_tiling_and_memory.ipynb).
