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
# A video autoencoder turns a clip into a much smaller array, its latents, and back. Here you load
# one, encode a clip, look at what comes back, and keep the latents in a file. Everything is
# asserted on the way. It runs offline, on a CPU, in under 60 seconds.

# %%
import io
import os
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import safetensors.numpy
from safetensors import safe_open

import eqx_cogvae as cv
from eqx_cogvae import video
from eqx_cogvae.__main__ import main

plt.rcParams.update({"figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9})

# On a CPU half the time to compile, and about as fast after it: JAX reads it when it first computes.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)

# %% [markdown]
# `"tiny"` are small weights that ship with the package. Their pictures are soft, and they need no
# network. The published weights load by the same line, from the hub or from a directory that
# diffusers wrote:
#
# ```python
# vae = cv.from_pretrained("zai-org/CogVideoX-2b", dtype=jnp.bfloat16)
# ```
#
# Without `dtype` the weights stay as they are stored. On a CPU float32 is the faster choice.
#
# The model is a PyTree: its arrays are the weights, and its configuration is static.

# %%
weights = jax.tree.leaves(eqx.filter(vae, eqx.is_array))
print(f"{sum(w.size for w in weights):,} parameters in {len(weights)} arrays, {vae.dtype}")
for name in ("block_out_channels", "layers_per_block", "latent_channels"):
    print(f"{name:20} {getattr(vae.config, name)}")
print(f"{'pixels per cell':20} {vae.config.spatial_compression} in height and in width")
print(f"{'frames per cell':20} {vae.config.temporal_compression}")

# %% [markdown]
# ## A clip
#
# Video has five axes: batch, time, height, width, channels. Values lie in [-1, 1]. `video.read`
# gives a file in this form; here we use a clip that is computed, so that no file is needed.
#
# ```python
# clip = video.read("in.mp4", frames=49, size=(480, 720))
# ```

# %%
clip = jnp.asarray(video.procedural_clip(17, 96, 144))
b, t, h, w, c = clip.shape
assert (b, c) == (1, 3)
assert clip.dtype == jnp.float32
assert jnp.abs(clip).max() <= 1
clip.shape


# %%
def strip(*clips, rows=(), n=5):
    """A film strip with a label on each row."""
    picture = video.filmstrip(*clips, n=n)
    fig, ax = plt.subplots(figsize=(7.2, 7.2 * picture.shape[0] / picture.shape[1] + 0.25))
    ax.imshow(picture)
    times = np.linspace(0, clips[0].shape[1] - 1, n).round().astype(int)
    ax.set_xticks((np.arange(n) + 0.5) * clips[0].shape[3], [f"frame {i}" for i in times])
    ax.set_yticks((np.arange(len(rows)) + 0.5) * clips[0].shape[2], rows, rotation=90, va="center")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    plt.show()


strip(clip, rows=["clip"])

# %% [markdown]
# ## Encode
#
# `vae.encode` does not return latents but a distribution over them: a Gaussian with a mean and a
# variance for every element. `.mode()` is its most likely value, the mean. `.sample(key)` draws.

# %%
posterior = vae.encode(clip)
latents = posterior.mode()

cell, config = vae.config.spatial_compression, vae.config
assert latents.shape == (1, config.latent_frames(t), h // cell, w // cell, config.latent_channels)
assert jnp.array_equal(latents, posterior.mean)
print(f"clip    {clip.shape}  {clip.size:9,} numbers")
print(
    f"latents {latents.shape}   {latents.size:9,} numbers, {clip.size / latents.size:.0f} x fewer"
)

# %% [markdown]
# Read the shape from left to right.
#
# - **Time**: the first frame has a latent frame to itself, every four frames after it share one.
#   $t$ frames become $t' = 1 + (t - 1) / 4$.
# - **Height and width**: a cell covers 8x8 pixels.
# - **Channels**: 3 colours become 16 channels.
#
# The picture shows which frames go into which latent frame. The first one is special so that an
# image is a video of one frame. A latent frame sees more than its own four frames;
# [the next notebook](02_causality_and_the_conv_cache.ipynb) shows what.


# %%
def timeline(t):
    """Frames above, the latent frames that they share below."""
    step, count = config.temporal_compression, config.latent_frames(t)
    fig, ax = plt.subplots(figsize=(7.2, 1.9))
    colors = plt.get_cmap("viridis")(np.linspace(0.1, 0.7, count))
    for i in range(t):
        owner = -(-i // step)
        ax.add_patch(plt.Rectangle((i + 0.06, 1.3), 0.88, 0.7, color=colors[owner], alpha=0.75))
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


timeline(t)
assert config.latent_frames(t) == 1 + (t - 1) // config.temporal_compression
assert config.latent_frames(1) == 1

# %% [markdown]
# ## Decode, and look
#
# `vae.decode` goes back. Its result is not clipped, so values a little outside of [-1, 1] occur;
# everything in `eqx_cogvae.video` clips them.
#
# For a sense of scale there is a third row: every cell of 8x8 pixels and four frames replaced by
# its average colour. It spends three numbers on a cell, and the latents spend 16.

# %%
decoded = vae.decode(latents)
assert decoded.shape == clip.shape


def averaged(x):
    """Each cell's mean colour, the first frame by itself."""
    parts = []
    for part, frames in ((x[:, :1], 1), (x[:, 1:], config.temporal_compression)):
        shape = (1, part.shape[1] // frames, frames, h // cell, cell, w // cell, cell, 3)
        cells = part.reshape(shape)
        parts.append(jnp.broadcast_to(cells.mean((2, 4, 6), keepdims=True), shape))
    return jnp.concatenate([p.reshape(1, -1, h, w, 3) for p in parts], axis=1)


strip(clip, decoded, averaged(clip), rows=["clip", "decoded", "averaged"])

# %% [markdown]
# Where does it err? The map shows how far each pixel is off, averaged over the colours. Flat areas
# are dark; fine stripes and checks are bright. In a number: the error goes along with the detail of
# a pixel's cell, that is, with how far the pixel is from the cell's average colour.

# %%
error = jnp.abs(jnp.clip(decoded, -1, 1) - clip).mean(-1)[0] * 127.5
times = np.linspace(0, t - 1, 5).round().astype(int)
fig, ax = plt.subplots(figsize=(7.2, 1.35))
shown = ax.imshow(np.concatenate(np.asarray(error)[times], axis=1), cmap="inferno", vmin=0, vmax=60)
ax.set_xticks((np.arange(5) + 0.5) * w, [f"frame {i}" for i in times])
ax.set_yticks([])
ax.tick_params(length=0)
fig.colorbar(shown, label="error, of 255")
plt.show()
detail = jnp.abs(clip - averaged(clip)).mean(-1)[0] * 127.5
along = np.corrcoef(np.ravel(error), np.ravel(detail))[0, 1]
print(f"error and detail, pixel by pixel, are correlated by {along:.2f}")
assert along > 0.2

# %% [markdown]
# The same as a film, to be played: the clip, what came back, and the error, three times as strong.

# %%
film = jnp.concatenate([clip, decoded, 3 * jnp.abs(decoded - clip) - 1], axis=3)
video.show(film, fps=8, width=700)

# %% [markdown]
# ## A number for it
#
# The peak signal-to-noise ratio compares the squared error to the range of the values, which is 2
# here, so its square is 4:
#
# $$\mathrm{PSNR} = 10 \log_{10} \frac{4}{\mathrm{MSE}}$$
#
# It is in decibels: 10 dB more are a tenth of the squared error. `video.psnr` computes it.

# %%
quality = video.psnr(clip, decoded)
mse = float(jnp.mean(jnp.square(jnp.clip(decoded, -1, 1) - clip)))
assert abs(quality - 10 * np.log10(4 / mse)) < 1e-3
assert quality > 20
assert quality > video.psnr(clip, averaged(clip)) + 1
print(f"decoded  {quality:.1f} dB")
print(f"averaged {video.psnr(clip, averaged(clip)):.1f} dB")

# %% [markdown]
# Frame by frame, quality is not even. The curve depends on the weights and on the clip: what moves
# fast or is hidden, and comes forth, is hard. What holds for any of them is the mean, if it is taken
# of the squared errors and not of the decibels: it is that of the whole clip. No frame here falls far
# behind it.

# %%
by_frame = [video.psnr(clip[:, i : i + 1], decoded[:, i : i + 1]) for i in range(t)]
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.plot(by_frame, "o-", label="decoded")
ax.axhline(quality, color="gray", lw=1, ls="--", label="whole clip")
ax.set(xlabel="frame", ylabel="PSNR, dB", xticks=range(0, t, 4))
ax.legend(frameon=False)
plt.show()
mean = np.mean([4 * 10 ** (-each / 10) for each in by_frame])
print(
    f"worst frame {min(by_frame):.1f} dB, best {max(by_frame):.1f} dB, whole clip {quality:.1f} dB"
)
assert np.isclose(mean, mse, rtol=1e-3)
assert min(by_frame) > quality - 3

# %% [markdown]
# ## The mode or a sample
#
# Training a diffusion model on latents usually draws them; to look at a reconstruction one takes
# the mode. Random numbers come from a key: the same key, the same sample. The posterior is narrow,
# so the picture hardly changes. [Latents](05_latents.ipynb) shows how narrow.

# %%
key = jax.random.key(0)
sample = posterior.sample(key)
assert jnp.array_equal(sample, posterior.sample(key))
assert not jnp.array_equal(sample, latents)

from_sample = vae.decode(sample)
print(f"spread of the latents      {latents.std():.3f}")
print(f"width of the posterior     {posterior.std.mean():.3f}")
print(f"decoded sample to the mode {video.psnr(from_sample, decoded):.1f} dB")
print(f"decoded mode to the clip   {quality:.1f} dB")
assert posterior.std.mean() < 0.2 * latents.std()
assert video.psnr(from_sample, decoded) > quality

# %% [markdown]
# `vae(clip)` is the round trip in one call, by the mode, and `vae(clip, key=key)` by a sample.

# %%
assert jnp.array_equal(vae(clip), decoded)

# %% [markdown]
# ## Other sizes
#
# Height and width should be multiples of 8: what does not fill a cell is lost, and `encode` warns.
# `eqx.filter_eval_shape` gives shapes without computing anything.

# %%
odd = jax.ShapeDtypeStruct((1, t, h + 5, w + 7, 3), jnp.float32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    back = eqx.filter_eval_shape(lambda vae, x: vae(x), vae, odd)
print(odd.shape, "comes back as", back.shape)
print("warning:", caught[0].message)
assert back.shape == (1, t, h, w, 3)

# %% [markdown]
# Of frame counts those of the form $8k + 1$ come back as they were. Others are encoded all the
# same, with a warning. The table says what becomes of a count.

# %%
print("frames  latent frames  frames back")
for count in (1, 5, 9, 12, 13, 16, 17, 25, 49):
    back = config.sample_frames(config.latent_frames(count))
    note = "8k + 1" if count % 8 == 1 else ""
    print(f"{count:6}  {config.latent_frames(count):13}  {back:11}  {note}")
    assert back == count or count % 8 != 1

# %% [markdown]
# Some other counts keep their number too, such as 16, and still lose something: there the first
# frame has no latent frame of its own. `cv.pad_frames` repeats the last frame up to the next
# $8k + 1$, and `cv.crop_frames` undoes it after decoding.

# %%
short = clip[:, :12]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    eqx.filter_eval_shape(lambda vae, x: vae.encode(x).mean, vae, short)
print(caught[0].message)

padded, count = cv.pad_frames(short)
restored = cv.crop_frames(vae(padded), count)
print(f"{short.shape[1]} frames, padded to {padded.shape[1]}, cropped to {restored.shape[1]}")
assert len(caught) == 1
assert padded.shape[1] == 17
assert jnp.array_equal(padded[:, 12:], jnp.repeat(short[:, -1:], 5, axis=1))
assert restored.shape == short.shape
assert video.psnr(restored, short) > 20

# %% [markdown]
# ## Keep the latents
#
# Encoding once and reading latents ever after is how datasets are prepared. In a shell:
#
# ```sh
# python -m eqx_cogvae encode clip.mp4 latents.safetensors --model tiny
# python -m eqx_cogvae decode latents.safetensors decoded.mp4 --model tiny
# ```
#
# The same from Python, since we are here. The file is plain safetensors with one tensor,
# `latents`, and any language reads it. Its metadata tell how the clip was made.

# %%
folder = tempfile.TemporaryDirectory()
source, target = Path(folder.name, "clip.mp4"), Path(folder.name, "latents.safetensors")
video.write(source, clip, fps=8)
with redirect_stdout(io.StringIO()):
    status = main(["encode", str(source), str(target), "--model", MODEL])
assert status == 0

stored = safetensors.numpy.load_file(target)["latents"]
with safe_open(target, framework="numpy") as file:
    metadata = file.metadata()
for name in ("layout", "dtype", "frames", "height", "width", "fps", "scaled", "fingerprint"):
    print(f"{name:12} {metadata[name]}")
print(f"{'latents':12} {stored.shape}, {target.stat().st_size / 1024:.0f} KiB")

# %% [markdown]
# They are those of the video file, bit for bit: the command streams the file through the model
# and joins what comes out, and `vae.encode` does the same with the whole clip.

# %%
assert np.array_equal(stored, vae.encode(jnp.asarray(video.read(source))).mode())

# %% [markdown]
# The other way round, `decode` takes latents from anywhere, as long as it can tell the layout.
# A name that ends in `.npy` keeps the raw floats, so that we can compare them exactly.

# %%
mine, frames = Path(folder.name, "mine.safetensors"), Path(folder.name, "decoded.npy")
safetensors.numpy.save_file({"latents": np.asarray(latents)}, mine)
with redirect_stdout(io.StringIO()):
    status = main(["decode", str(mine), str(frames), "--model", MODEL])
assert status == 0
assert np.array_equal(np.load(frames), decoded)
folder.cleanup()

# %% [markdown]
# Latents are in the VAE's own units. The diffusion model's are one multiplication away, and the
# factor is in the configuration.

# %%
scaled = vae.scale_latents(latents)
assert jnp.allclose(vae.unscale_latents(scaled), latents, rtol=1e-5, atol=1e-5)
print(f"spread {latents.std():.2f} in the VAE's units, {scaled.std():.2f} in the diffusion model's")

# %% [markdown]
# ## What to take away
#
# - Everything is `(batch, time, height, width, channels)`, video in [-1, 1].
# - `vae.encode(clip)` is a distribution; `.mode()` or `.sample(key)` are latents; `vae.decode` goes
#   back.
# - 8x8 pixels and, after the first frame, four frames make a cell of 16 channels.
# - Use $8k + 1$ frames, or `cv.pad_frames` and `cv.crop_frames`.
# - Latents files are safetensors.
#
# Next: [how a clip is cut along time](02_causality_and_the_conv_cache.ipynb),
# [and across the frame](03_tiling_and_memory.ipynb), or
# [what the sixteen channels hold](05_latents.ipynb).
