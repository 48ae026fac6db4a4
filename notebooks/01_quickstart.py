# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# A video autoencoder turns a clip into a much smaller array, its latents, and turns latents back
# into a clip. After this notebook you can load one, encode and decode a clip, judge the result,
# and keep latents in a file. It runs offline.

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

# %% [markdown]
# `cv.from_pretrained` loads a model. `"tiny"` names small weights that come with the package.
# Their pictures are soft, but they need no network. The published weights load with the same
# call, from the Hugging Face hub or from a folder that diffusers wrote:
#
# ```python
# vae = cv.from_pretrained("zai-org/CogVideoX-2b", dtype=jnp.bfloat16)
# ```
#
# Without `dtype` the weights keep the type of the file. On a CPU use float32: bfloat16 saves memory
# there, but no time.
#
# The model is a PyTree. Its leaves are the weights, and its configuration is static.

# %%
weights = jax.tree.leaves(eqx.filter(vae, eqx.is_array))
count = sum(w.size for w in weights)
print(f"{count:,} parameters in {len(weights)} arrays, {vae.dtype}")
for name in ("block_out_channels", "layers_per_block", "latent_channels"):
    print(f"{name:20} {getattr(vae.config, name)}")
print(f"{'pixels per cell':20} {vae.config.spatial_compression} in height and in width")
print(f"{'frames per cell':20} {vae.config.temporal_compression}")

# %% [markdown]
# ## A clip
#
# Video has five axes: batch, time, height, width and channels. Values lie in [-1, 1].
# `video.read` reads a file in this form. Here we compute a clip, so that no file is needed.
#
# ```python
# clip = video.read("in.mp4", frames=49, size=(480, 720))
# ```

# %%
clip = jnp.asarray(video.procedural_clip(17, 96, 144))
b, t, h, w, c = clip.shape
clip.shape

# %% tags=["check"]
assert (b, c) == (1, 3)
assert clip.dtype == jnp.float32
assert jnp.abs(clip).max() <= 1


# %% tags=["drawing"]
def strip(*clips, rows=(), n=5):
    """Shows a film strip with a label on each row."""
    picture = video.filmstrip(*clips, n=n)
    fig, ax = plt.subplots(
        figsize=(7.2, 7.2 * picture.shape[0] / picture.shape[1] + 0.25)
    )
    ax.imshow(picture)
    times = np.linspace(0, clips[0].shape[1] - 1, n).round().astype(int)
    ax.set_xticks(
        (np.arange(n) + 0.5) * clips[0].shape[3], [f"frame {i}" for i in times]
    )
    ax.set_yticks(
        (np.arange(len(rows)) + 0.5) * clips[0].shape[2], rows, rotation=90, va="center"
    )
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    plt.show()


# %%
strip(clip, rows=["clip"])

# %% [markdown]
# ## Encode
#
# `vae.encode` returns a distribution over latents: a Gaussian with a mean and a variance for each
# number. `.mode()` returns its mean, which is the most likely value. `.sample(key)` draws from
# it.

# %%
posterior = vae.encode(clip)
latents = posterior.mode()

cell, config = vae.config.spatial_compression, vae.config
print(f"clip    {clip.shape}  {clip.size:9,} numbers")
print(f"latents {latents.shape}   {latents.size:9,} numbers")
print(f"{clip.size / latents.size:.0f} times fewer")

# %% tags=["check"]
small = (1, config.latent_frames(t), h // cell, w // cell, config.latent_channels)
assert latents.shape == small
assert jnp.array_equal(latents, posterior.mean)

# %% [markdown]
# Read the shape from left to right.
#
# - **Time.** The first frame has a latent frame of its own. After it, four frames share one. So
#   $t$ frames become $t' = 1 + (t - 1) / 4$.
# - **Height and width.** One cell covers 8x8 pixels.
# - **Channels.** Three colours become 16 channels.
#
# The picture shows which frames belong to which latent frame. The first frame is special so that
# an image is a video of one frame. A latent frame also depends on frames before its own four;
# [the next notebook](02_causality_and_the_conv_cache.ipynb) shows which.


# %% tags=["drawing"]
def timeline(t):
    """Draws frames above the latent frames that they share."""
    step, count = config.temporal_compression, config.latent_frames(t)
    fig, ax = plt.subplots(figsize=(7.2, 1.9))
    colors = plt.get_cmap("viridis")(np.linspace(0.1, 0.7, count))
    for i in range(t):
        owner = -(-i // step)
        ax.add_patch(
            plt.Rectangle((i + 0.06, 1.3), 0.88, 0.7, color=colors[owner], alpha=0.75)
        )
        ax.text(i + 0.5, 1.65, i, ha="center", va="center", color="white")
    for j in range(count):
        start, stop = (0, 1) if j == 0 else (step * (j - 1) + 1, step * j + 1)
        middle = (start + stop) / 2
        for edge, tip in ((start + 0.06, middle - 0.44), (stop - 0.06, middle + 0.44)):
            ax.plot([edge, tip], [1.25, 0.75], color=colors[j], lw=1)
        ax.add_patch(plt.Rectangle((middle - 0.44, 0), 0.88, 0.7, color=colors[j]))
        ax.text(middle, 0.35, j, ha="center", va="center", color="white", weight="bold")
    ax.set(xlim=(-0.1, t + 0.1), ylim=(-0.1, 2.1), xticks=[])
    ax.set_yticks([0.35, 1.65], ["latent frame", "frame"])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    plt.show()


# %%
timeline(t)

# %% tags=["check"]
assert config.latent_frames(t) == 1 + (t - 1) // config.temporal_compression
assert config.latent_frames(1) == 1

# %% [markdown]
# ## Decode, and look
#
# `vae.decode` goes back. It does not clip, so some values lie a little outside [-1, 1]. The
# functions of `eqx_cogvae.video` clip them.
#
# The third row is a baseline: each cell of 8x8 pixels and four frames is replaced by its average
# colour. It keeps three numbers for each cell, and the latents keep 16.

# %% tags=["cover"]
decoded = vae.decode(latents)


def averaged(x):
    """Replaces each cell by its mean colour; the first frame is on its own."""
    parts = []
    for part, frames in ((x[:, :1], 1), (x[:, 1:], config.temporal_compression)):
        shape = (
            1,
            part.shape[1] // frames,
            frames,
            h // cell,
            cell,
            w // cell,
            cell,
            3,
        )
        cells = part.reshape(shape)
        parts.append(jnp.broadcast_to(cells.mean((2, 4, 6), keepdims=True), shape))
    return jnp.concatenate([p.reshape(1, -1, h, w, 3) for p in parts], axis=1)


strip(clip, decoded, averaged(clip), rows=["clip", "decoded", "averaged"])

# %% tags=["check"]
assert decoded.shape == clip.shape

# %% [markdown]
# Where is the error? The map shows the error of each pixel, averaged over the colours. Flat areas
# are dark; fine stripes and checks are bright. The number below the map is the correlation
# between the error and the detail of a pixel's cell, which is the distance of the pixel from the
# cell's average colour.

# %%
error = jnp.abs(jnp.clip(decoded, -1, 1) - clip).mean(-1)[0] * 127.5
times = np.linspace(0, t - 1, 5).round().astype(int)

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7.2, 1.35))
shown = ax.imshow(
    np.concatenate(np.asarray(error)[times], axis=1), cmap="inferno", vmin=0, vmax=60
)
ax.set_xticks((np.arange(5) + 0.5) * w, [f"frame {i}" for i in times])
ax.set_yticks([])
ax.tick_params(length=0)
fig.colorbar(shown, label="error, of 255")
plt.show()

# %%
detail = jnp.abs(clip - averaged(clip)).mean(-1)[0] * 127.5
along = np.corrcoef(np.ravel(error), np.ravel(detail))[0, 1]
print(f"correlation of error and detail: {along:.2f}")

# %% tags=["check"]
assert along > 0.2

# %% [markdown]
# The film shows the clip, the reconstruction, and the error multiplied by three.

# %%
film = jnp.concatenate([clip, decoded, 3 * jnp.abs(decoded - clip) - 1], axis=3)
video.show(film, fps=8, width=700)

# %% [markdown]
# ## Measure it
#
# The peak signal-to-noise ratio (PSNR) compares the squared error with the range of the values.
# The range is 2, so its square is 4:
#
# $$\mathrm{PSNR} = 10 \log_{10} \frac{4}{\mathrm{MSE}}$$
#
# The unit is the decibel: 10 dB more means a tenth of the squared error. `video.psnr` computes
# it.

# %%
quality = video.psnr(clip, decoded)
mse = float(jnp.mean(jnp.square(jnp.clip(decoded, -1, 1) - clip)))
print(f"decoded  {quality:.1f} dB")
print(f"averaged {video.psnr(clip, averaged(clip)):.1f} dB")

# %% tags=["check"]
assert abs(quality - 10 * np.log10(4 / mse)) < 1e-3
assert quality > 20
assert quality > video.psnr(clip, averaged(clip)) + 1

# %% [markdown]
# Quality differs from frame to frame. The curve depends on the weights and on the clip: parts
# that move fast, or that were hidden before, are hard. The mean of the squared errors over the
# frames is the squared error of the clip; the mean of the decibels is not its PSNR.

# %%
by_frame = [video.psnr(clip[:, i : i + 1], decoded[:, i : i + 1]) for i in range(t)]

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.plot(by_frame, "o-", label="decoded")
ax.axhline(quality, color="gray", lw=1, ls="--", label="whole clip")
ax.set(xlabel="frame", ylabel="PSNR, dB", xticks=range(0, t, 4))
ax.legend(frameon=False)
plt.show()

# %%
mean = np.mean([4 * 10 ** (-each / 10) for each in by_frame])
print(f"worst frame {min(by_frame):.1f} dB, best {max(by_frame):.1f} dB")
print(f"whole clip  {quality:.1f} dB")

# %% tags=["check"]
assert np.isclose(mean, mse, rtol=1e-3)
assert min(by_frame) > quality - 3

# %% [markdown]
# ## Mode or sample
#
# A diffusion model is usually trained on samples. To look at a reconstruction, take the mode.
# Random numbers come from a key: the same key gives the same sample. The Gaussian is narrow, so
# the picture hardly changes. [Latents](05_latents.ipynb) shows how narrow it is.

# %%
key = jax.random.key(0)
sample = posterior.sample(key)

from_sample = vae.decode(sample)
print(f"spread of the latents      {latents.std():.3f}")
print(f"width of the posterior     {posterior.std.mean():.3f}")
print(f"decoded sample to the mode {video.psnr(from_sample, decoded):.1f} dB")
print(f"decoded mode to the clip   {quality:.1f} dB")

# %% tags=["check"]
assert jnp.array_equal(sample, posterior.sample(key))
assert not jnp.array_equal(sample, latents)
assert posterior.std.mean() < 0.2 * latents.std()
assert video.psnr(from_sample, decoded) > quality

# %% [markdown]
# `vae(clip)` encodes and decodes in one call and uses the mode. `vae(clip, key=key)` uses a
# sample.

# %% tags=["check"]
assert jnp.array_equal(vae(clip), decoded)

# %% [markdown]
# ## Other sizes
#
# Height and width should be multiples of 8. The pixels that do not fill a cell are dropped, and
# `encode` warns. `eqx.filter_eval_shape` returns shapes without computing anything.

# %%
odd = jax.ShapeDtypeStruct((1, t, h + 5, w + 7, 3), jnp.float32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    back = eqx.filter_eval_shape(lambda vae, x: vae(x), vae, odd)
print(odd.shape, "comes back as", back.shape)
print("warning:", caught[0].message)

# %% tags=["check"]
assert back.shape == (1, t, h, w, 3)

# %% [markdown]
# A count of $8k + 1$ frames comes back unchanged. Other counts are encoded too, with a warning.
# The table shows how many frames come back.

# %%
print("frames  latent frames  frames back")
for count in (1, 5, 9, 12, 13, 16, 17, 25, 49):
    back = config.sample_frames(config.latent_frames(count))
    note = "8k + 1" if count % 8 == 1 else ""
    print(f"{count:6}  {config.latent_frames(count):13}  {back:11}  {note}")
    assert back == count or count % 8 != 1

# %% [markdown]
# A count such as 16 also comes back unchanged, but it costs quality, because its first frame has
# no latent frame of its own. `cv.pad_frames` repeats the last frame up to the next $8k + 1$.
# `cv.crop_frames` removes the copies after decoding.

# %%
short = clip[:, :12]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    eqx.filter_eval_shape(lambda vae, x: vae.encode(x).mean, vae, short)
print(caught[0].message)

padded, count = cv.pad_frames(short)
restored = cv.crop_frames(vae(padded), count)
counts = [each.shape[1] for each in (short, padded, restored)]
print("frames: {}, padded to {}, cropped to {}".format(*counts))

# %% tags=["check"]
assert len(caught) == 1
assert padded.shape[1] == 17
assert jnp.array_equal(padded[:, 12:], jnp.repeat(short[:, -1:], 5, axis=1))
assert restored.shape == short.shape
assert video.psnr(restored, short) > 20

# %% [markdown]
# ## Keep the latents
#
# To prepare a dataset, encode each clip once and store its latents. `cv.save_latents` writes a
# safetensors file with one tensor, `latents`, which any language can read. `cv.Latents` holds the
# array and what you know about the clip.

# %%
folder = tempfile.TemporaryDirectory()
path = Path(folder.name, "latents.safetensors")
kept = cv.Latents(
    np.asarray(latents),
    fps=8,
    frames=t,
    height=h,
    width=w,
    fingerprint=cv.fingerprint(vae),
)
cv.save_latents(path, kept)
print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")

# %% [markdown]
# `cv.load_latents` reads the file. It checks that all values are finite and that the channels fit
# the model. The array is the same, bit for bit.

# %%
stored = cv.load_latents(path, channels=config.latent_channels)
print(
    f"latents {stored.array.shape}, {stored.frames} frames at {stored.fps:g} a second"
)
print("fingerprint", stored.fingerprint)
assert np.array_equal(stored.array, latents)

# %% [markdown]
# `cv.fingerprint` identifies the weights, so a program can refuse latents of another model. The
# command line writes and reads the same files:
#
# ```sh
# python -m eqx_cogvae encode clip.mp4 latents.safetensors --model tiny
# python -m eqx_cogvae decode latents.safetensors decoded.mp4 --model tiny
# ```

# %%
assert stored.fingerprint == cv.fingerprint(vae)
assert jnp.array_equal(vae.decode(stored.array), decoded)
folder.cleanup()

# %% [markdown]
# Latents are in the units of the VAE. A diffusion model uses scaled latents. The factor is in the
# configuration, and `vae.scale_latents` applies it.

# %%
scaled = vae.scale_latents(latents)
print(f"standard deviation {latents.std():.2f}, scaled {scaled.std():.2f}")

# %% tags=["check"]
assert jnp.allclose(vae.unscale_latents(scaled), latents, rtol=1e-5, atol=1e-5)

# %% [markdown]
# ## What to take away
#
# - Arrays are `(batch, time, height, width, channels)`, and video lies in [-1, 1].
# - `vae.encode(clip)` returns a distribution, `.mode()` or `.sample(key)` returns latents, and
#   `vae.decode` returns a clip.
# - A cell of 16 channels stands for 8x8 pixels and, after the first frame, four frames.
# - Use $8k + 1$ frames, or `cv.pad_frames` and `cv.crop_frames`.
# - `cv.save_latents` and `cv.load_latents` keep latents as safetensors.
#
# Next: [how a clip is cut along time](02_causality_and_the_conv_cache.ipynb), [how a frame is cut
# into tiles](03_tiling_and_memory.ipynb), or [what the sixteen channels hold](05_latents.ipynb).
