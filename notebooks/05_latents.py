# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Latents
#
# What sixteen channels hold, what happens between two clips, how sure the encoder is, and why a
# diffusion model wants latents scaled. Runs offline, in under a minute.

# %%
import os

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
clip = jnp.asarray(video.procedural_clip(9, 96, 144, seed=0))
encode = eqx.filter_jit(lambda vae, clip: vae.encode(clip))
decode = eqx.filter_jit(lambda vae, latents: vae.decode(latents))

# %%
posterior = encode(vae, clip)
latents = posterior.mode()
print("video", clip.shape, "latents", latents.shape)
print(f"{clip.size / latents.size:.1f} numbers of video for each number of latents")
assert latents.shape[1] == vae.config.latent_frames(clip.shape[1])
assert latents.shape[-1] == vae.config.latent_channels

# %% [markdown]
# ## What the channels hold
#
# The first latent frame, channel by channel. Shapes of the picture come back in most of them:
# latents are a small picture with sixteen colours.

# %%
columns = 8
rows = -(-latents.shape[-1] // columns)
figure, axes = plt.subplots(rows, columns, figsize=(8, 1.0 * rows), dpi=100)
for channel, ax in enumerate(axes.ravel()):
    ax.axis("off")
    if channel < latents.shape[-1]:
        ax.imshow(latents[0, 0, :, :, channel], cmap="gray")
        ax.set_title(channel, fontsize=8, pad=2)
figure.tight_layout(pad=0.3)
plt.show()

# %% [markdown]
# The three directions of largest variance as red, green and blue, beside the frame itself: a quick
# look at latents without a decoder.

# %%
flat = np.asarray(latents).reshape(-1, latents.shape[-1])
centred = flat - flat.mean(0)
_, sizes, directions = np.linalg.svd(centred, full_matrices=False)
colours = (centred @ directions[:3].T).reshape(*latents.shape[:-1], 3)
low, high = np.percentile(colours, [1, 99], axis=(0, 1, 2, 3))
colours = np.clip((colours - low) / (high - low), 0, 1)
share = sizes[:3] ** 2 / np.sum(sizes**2)
figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), dpi=100)
axes[0].imshow((np.asarray(clip[0, 0]) + 1) / 2)
axes[1].imshow(colours[0, 0])
axes[0].set_title("frame")
axes[1].set_title(f"three directions, {share.sum():.0%} of the variance")
for ax in axes:
    ax.axis("off")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What a channel does
#
# Each channel is set to its mean, one at a time, and the clip is decoded. The bars are the error
# this makes; no channel is idle, and none holds everything.

# %%
whole = decode(vae, latents)
errors = []
for channel in range(latents.shape[-1]):
    without = latents.at[..., channel].set(latents[..., channel].mean())
    errors.append(float(jnp.sqrt(jnp.mean((decode(vae, without) - whole) ** 2))))
figure, axes = plt.subplots(figsize=(7, 2.5), dpi=100)
axes.bar(range(len(errors)), errors)
axes.set(xlabel="channel held at its mean", ylabel="RMS change of video, [-1, 1]")
figure.tight_layout()
plt.show()
assert min(errors) > 0

# %% [markdown]
# ## Between two clips
#
# The straight line between the latents of two clips, decoded at five places, the first frame of
# each. Ends are the reconstructions themselves; between them pictures fade into each other, more
# than one would move into the other: latents of this kind are local in space and time.

# %%
other = jnp.asarray(video.procedural_clip(9, 96, 144, seed=1))
ends = latents, encode(vae, other).mode()
steps = [decode(vae, ends[0] + f * (ends[1] - ends[0])) for f in np.linspace(0, 1, 5)]
Image.fromarray(video.filmstrip(jnp.stack([step[:, 0] for step in steps], axis=1), n=5))

# %%
assert jnp.array_equal(steps[0], whole)

# %% [markdown]
# ## How sure the encoder is
#
# The encoder gives a normal distribution in every number. By channel: how far means spread, and how
# wide the distributions are. Where widths are far smaller than spreads, sampling or taking the mode
# hardly differs, which is how VAEs for latent diffusion are trained.

# %%
spread = np.asarray(jnp.std(posterior.mean, axis=(0, 1, 2, 3)))
width = np.asarray(jnp.sqrt(jnp.mean(posterior.std**2, axis=(0, 1, 2, 3))))
figure, axes = plt.subplots(figsize=(7, 2.5), dpi=100)
axes.bar(np.arange(len(spread)) - 0.2, spread, 0.4, label="spread of the means")
axes.bar(np.arange(len(width)) + 0.2, width, 0.4, label="width of the distributions")
axes.set(xlabel="channel", ylabel="latent units", yscale="log")
axes.legend()
figure.tight_layout()
plt.show()

# %%
drawn = posterior.sample(jax.random.key(0))
assert np.isclose(
    float(jnp.std((drawn - posterior.mean) / posterior.std)), 1.0, atol=0.02
)  # as many deviations as a unit normal has
print(f"from the mode:  {video.psnr(whole, clip):.2f} dB")
print(f"from a sample:  {video.psnr(decode(vae, drawn), clip):.2f} dB")

# %% [markdown]
# ## Scaling factors
#
# A diffusion model adds noise of unit deviation and expects latents of about unit deviation, or its
# noise schedule means something else than it was made for. So each checkpoint has a factor. The VAE
# never applies it by itself, and `vae.scale_latents` and `vae.unscale_latents` do.

# %%
for name in ("cogvideox-2b", "cogvideox-5b", "cogvideox1.5-5b", "tiny"):
    config = cv.Config.preset(name)
    print(f"{name:16} {config.scaling_factor:<12} invert: {config.invert_scale_latents}")

# %%
scaled = vae.scale_latents(latents)
print(f"deviation {float(jnp.std(latents)):.2f}, scaled {float(jnp.std(scaled)):.2f}")
assert 0.4 < float(jnp.std(scaled)) < 2.5
assert jnp.allclose(vae.unscale_latents(scaled), latents, rtol=1e-5)

# %% [markdown]
# `invert: True` is CogVideoX1.5's: its image-to-video model was trained on image latents divided by
# the factor, which `vae.scale_latents(z, image_condition=True)` does.
#
# ## What to take away
#
# - Latents are a small video of sixteen channels: crop, concatenate and average them as such.
# - The posterior is narrow; `.mode()` is what to encode with unless a recipe says otherwise.
# - Scale for the diffusion model, unscale for the decoder.
#
# Next: [fine-tune the decoder](06_finetune.ipynb).
