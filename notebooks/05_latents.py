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
# After this notebook you know what the sixteen channels hold, what each does to the picture, what
# lies between two clips, how sure the encoder is, and why a diffusion model needs scaled latents.
# It runs offline.

# %% tags=["setup"]
import os

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
channels = vae.config.latent_channels

clips = [jnp.asarray(video.procedural_clip(9, 80, 120, seed=seed)) for seed in range(4)]
posteriors = [vae.encode(clip) for clip in clips]
clip, posterior = clips[0], posteriors[0]
latents = posterior.mode()
decoded = vae.decode(latents)
print("clip", clip.shape, "latents", latents.shape)
assert latents.shape[-1] == channels

# %% [markdown]
# ## Sixteen pictures
#
# Latents have the shape of a small video with 16 channels, so we can look at them. Below is a
# frame, and each channel of its latent frame, relative to the channel's mean: blue is below, red
# above. Nearly every channel shows the shapes of the frame, each in its own way.

# %%
values = np.asarray(latents)
mean, std = values.mean((0, 1, 2, 3)), values.std((0, 1, 2, 3))

columns = 6
rows = -(-channels // columns)

# %% tags=["drawing"]
fig = plt.figure(figsize=(7.4, 1.05 * rows + 2.4))
top, bottom = fig.subfigures(2, 1, height_ratios=[2.2, 1.05 * rows])
ax = top.subplots()
ax.imshow(video.filmstrip(clip[:, :1], n=1))
ax.set(xticks=[], yticks=[], title="frame 0")
axes = bottom.subplots(rows, columns)
for channel, ax in enumerate(axes.ravel()):
    ax.axis("off")
    if channel < channels:
        shown = (values[0, 0, ..., channel] - mean[channel]) / std[channel]
        ax.imshow(shown, cmap="RdBu_r", vmin=-3, vmax=3)
        ax.set_title(f"{channel}: std {std[channel]:.1f}", fontsize=8, pad=2)
plt.show()

# %% tags=["check"]
assert mean.shape == std.shape == (channels,)

# %% [markdown]
# ## Three colours for sixteen channels
#
# The channels are correlated. A principal component analysis finds the directions of largest
# variance over all cells of all clips: the rows of $V$ in the singular value decomposition $Z = U
# \Sigma V$ of the centred latents. Shown as red, green and blue, the first three components give
# a view of latents without a decoder.

# %%
cells = np.concatenate([np.asarray(p.mode()).reshape(-1, channels) for p in posteriors])
centre = cells.mean(0)
_, singular, directions = np.linalg.svd(cells - centre, full_matrices=False)
share = singular**2 / np.sum(singular**2)


def colours(z):
    """Returns the first three components as a video of the clip's size."""
    scores = (np.asarray(z) - centre) @ directions[:3].T
    spread = singular[:3] / len(cells) ** 0.5
    small = np.clip(scores / (2.5 * spread), -1, 1).astype(np.float32)
    cell = vae.config.spatial_compression
    return small.repeat(cell, 2).repeat(cell, 3)


step = vae.config.temporal_compression

# %% tags=["drawing", "cover"]
fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), width_ratios=[1.2, 1])
pairs = [(clips[i][:, ::step], colours(posteriors[i].mode())) for i in (0, 1)]
axes[0].imshow(np.concatenate([video.filmstrip(*pair, n=3) for pair in pairs]))
axes[0].set(xticks=[], yticks=[], title="frames, and their latents as colours")
axes[1].bar(range(1, channels + 1), share, label="each")
axes[1].plot(
    range(1, channels + 1),
    np.cumsum(share),
    "o-",
    ms=3,
    color="tab:orange",
    label="up to",
)
axes[1].set(xlabel="component", ylabel="share of the variance", ylim=(0, 1.05))
axes[1].set_xticks(range(1, channels + 1, 3))
axes[1].legend(frameon=False)
plt.show()

# %%
print(f"three components hold {share[:3].sum():.0%} of the variance")

# %% tags=["check"]
assert np.allclose(directions @ directions.T, np.eye(channels), atol=1e-4)
assert np.isclose(np.sum(singular**2) / len(cells), cells.var(0).sum(), rtol=1e-3)

# %% [markdown]
# Does the rest matter? We keep the first components, set the others to their mean, and decode.

# %%
kept = (1, 2, 4, 8, channels)
versions = []
for count in kept:
    basis = directions[:count]
    versions.append(vae.decode((values - centre) @ basis.T @ basis + centre))
nearness = [video.psnr(version, clip) for version in versions]

picture = np.concatenate(
    [video.filmstrip(v[:, -1:], n=1) for v in (versions[0], *versions[2:], clip)],
    axis=1,
)
names = [f"{k} kept\n{q:.1f} dB" for k, q in zip(kept, nearness, strict=True)]
names = [names[0], *names[2:], "clip"]

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7.4, 1.4))
ax.imshow(picture)
ax.set_xticks((np.arange(len(names)) + 0.5) * clip.shape[3], names)
ax.set_yticks([])
ax.tick_params(length=0)
ax.spines[:].set_visible(False)
plt.show()

# %% tags=["check"]
assert nearness[0] < nearness[2] < nearness[4]
assert video.psnr(versions[-1], decoded) > 50

# %% [markdown]
# All of them matter. The variance of a component does not measure its share of the picture:
# components of small variance hold detail that the others lack.
#
# ## What a channel does
#
# We set a channel to zero, or to its mean, and decode. Each bar shows how much the picture
# changes. The two differ most where the mean of the channel is far from zero, because the decoder
# has never seen zeros in such a channel. The number below is the correlation of the two.


# %%
def change(a, b):
    """Returns the root mean square of a difference, in pixel levels."""
    return float(jnp.sqrt(jnp.mean(jnp.square(a - b)))) * 127.5


zeroed = [vae.decode(latents.at[..., i].set(0)) for i in range(channels)]
averaged = [vae.decode(latents.at[..., i].set(mean[i])) for i in range(channels)]
losses = np.array(
    [[change(v, decoded) for v in versions] for versions in (zeroed, averaged)]
)

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7, 2.6))
ax.bar(np.arange(channels) - 0.2, losses[0], 0.4, label="set to zero")
ax.bar(np.arange(channels) + 0.2, losses[1], 0.4, label="set to its mean")
ax.set(xlabel="channel", ylabel="RMS change, of 255", xticks=range(channels))
ax.margins(y=0.2)
ax.legend(frameon=False, ncols=2)
plt.show()

# %%
farness = np.corrcoef(np.abs(mean), losses[0] - losses[1])[0, 1]
print(f"correlation of the mean's size and the extra loss: {farness:.2f}")

# %% tags=["check"]
assert losses.min() > 0.1
assert farness > 0.3

# %% [markdown]
# Here are the three channels that change the picture most, and the three that change it least,
# each set to its mean. The lower row shows the difference from the full decode, multiplied by
# three; gray means none. A channel does not stand for one thing such as colour, brightness or
# edges.

# %%
order = np.argsort(losses[1])[::-1]
chosen = [*order[:3], *order[-3:]]
above = [video.filmstrip(averaged[i][:, -1:], n=1) for i in chosen]
below = [
    video.filmstrip(jnp.clip(3 * (averaged[i] - decoded)[:, -1:], -1, 1), n=1)
    for i in chosen
]
picture = np.concatenate([np.concatenate(above, axis=1), np.concatenate(below, axis=1)])

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7.4, 2.0))
ax.imshow(picture)
ax.set_xticks((np.arange(6) + 0.5) * clip.shape[3], [f"without {i}" for i in chosen])
ax.set_yticks((np.arange(2) + 0.5) * clip.shape[2], ["decoded", "change"])
ax.tick_params(length=0)
ax.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# ## Between two clips
#
# Do shapes move on a straight line between the latents of two clips? The upper row is decoded
# from points on that line. The lower row mixes the pixels.

# %%
other = posteriors[1].mode()
fractions = np.linspace(0, 1, 5)
between = [vae.decode((1 - f) * latents + f * other) for f in fractions]
mixed = [(1 - f) * between[0] + f * between[-1] for f in fractions]
rows = [
    jnp.concatenate([v[:, 4:5] for v in versions], axis=1)
    for versions in (between, mixed)
]

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7.4, 2.2))
ax.imshow(video.filmstrip(*rows, n=5))
ax.set_xticks((np.arange(5) + 0.5) * clip.shape[3], [f"{f:.2f}" for f in fractions])
ax.set_yticks((np.arange(2) + 0.5) * clip.shape[2], ["latents", "pixels"])
ax.set(xlabel="fraction of the second clip")
ax.tick_params(length=0)
ax.spines[:].set_visible(False)
plt.show()

# %%
halfway = between[2]
to_mix, to_ends = video.psnr(halfway, mixed[2]), video.psnr(halfway, between[0])
print("halfway point:")
print(f"to the mix of pixels {to_mix:.1f} dB")
print(f"to the first clip    {to_ends:.1f} dB")

# %% tags=["check"]
assert jnp.array_equal(between[0], decoded)
assert to_mix > max(to_ends, video.psnr(halfway, between[-1]))

# %% [markdown]
# Shapes do not move. They fade, as pixels do. A cell of latents describes its own pixels, so
# mixing latents mixes what is at each place. Moving from one scene to another is the task of the
# diffusion model.
#
# ## How sure the encoder is
#
# The encoder gives a mean and a width for each number. The chart compares, on a logarithmic axis,
# the spread of the means over four clips with the width of the Gaussians.

# %%
means = jnp.concatenate([p.mean for p in posteriors])
widths = jnp.concatenate([p.std for p in posteriors])
spread = np.asarray(means.std((0, 1, 2, 3)))
width = np.asarray(jnp.sqrt(jnp.mean(widths**2, (0, 1, 2, 3))))

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7, 2.6))
ax.bar(np.arange(channels) - 0.2, spread, 0.4, label="spread of the means")
ax.bar(np.arange(channels) + 0.2, width, 0.4, label="width of the posterior")
ax.set(
    xlabel="channel", ylabel="std, VAE's units", yscale="log", xticks=range(channels)
)
ax.set_ylim(width.min() / 3, 8 * spread.max())
ax.legend(frameon=False, ncols=2)
plt.show()

# %%
narrower = np.median(spread / width)
print(f"the posterior is {narrower:.0f} times narrower than the spread")

# %% tags=["check"]
assert np.all(width < spread)

# %% [markdown]
# So the noise of a sample is small. Variances add: a sample has the spread
# $\sqrt{\mathrm{spread}^2 + \mathrm{width}^2}$, which is hardly more than the spread of the
# means. The picture of a sample is closer to that of the mode than the mode is to the clip.

# %%
key = jax.random.key(0)
samples = [posterior.sample(k) for k in jax.random.split(key, 3)]
noise = (samples[0] - posterior.mean) / posterior.std

drawn = [vae.decode(sample) for sample in samples]
for name, version in (
    ("mode", decoded),
    *((f"sample {i}", v) for i, v in enumerate(drawn)),
):
    to_mode = (
        "" if name == "mode" else f", {video.psnr(version, decoded):.1f} dB to the mode"
    )
    print(f"{name:9} {video.psnr(version, clip):.2f} dB to the clip{to_mode}")
    assert name == "mode" or video.psnr(version, decoded) > video.psnr(decoded, clip)

# %% tags=["check"]
assert abs(float(noise.mean())) < 0.05
assert abs(float(noise.std()) - 1) < 0.05

# %% [markdown]
# `.kl()` returns the distance of the posterior from a unit Gaussian. The training loss limits it.
# For one number with mean $\mu$ and deviation $\sigma$ it is
#
# $$\mathrm{KL} = \tfrac{1}{2} \left( \mu^2 + \sigma^2 - 1 - \log \sigma^2 \right)$$

# %%
written_out = 0.5 * jnp.sum(posterior.mean**2 + posterior.std**2 - 1 - posterior.logvar)
print(
    f"{posterior.kl()[0] / latents.size:.1f} nats for each of {latents.size:,} numbers"
)

# %% tags=["check"]
assert jnp.allclose(posterior.kl()[0], written_out, rtol=1e-4)
assert jnp.all(posterior.kl() > 0)
assert jnp.allclose(posterior.kl(posterior), 0, atol=1e-3)

# %% [markdown]
# ## Scaling factors
#
# The VAE has units of its own. A diffusion model mixes latents with Gaussian noise of unit
# variance, $x = \sqrt{\alpha} z + \sqrt{1 - \alpha} \epsilon$. How much of the picture remains at
# a given $\alpha$ depends on the variance of $z$:
#
# $$\mathrm{SNR} = \frac{\alpha}{1 - \alpha} \mathrm{Var}(z)$$
#
# Noise schedules assume a variance of about one. So each checkpoint has a factor, close to one
# over the standard deviation of its latents. These are the published factors and that of the tiny
# weights:

# %%
print(f"{'checkpoint':16} {'scaling_factor':14}   invert_scale_latents")
for name in ("CogVideoX-2b", "CogVideoX-5b", "CogVideoX1.5-5B", "tiny"):
    preset = cv.Config.preset(name)
    print(f"{name:16} {preset.scaling_factor:<14}   {preset.invert_scale_latents}")
    assert preset.latents_mean is None and preset.latents_std is None

# %% [markdown]
# The VAE never applies the factor by itself. `vae.scale_latents` converts to the units of the
# diffusion model, and `vae.unscale_latents` converts back. On our clips:

# %%
factor = vae.config.scaling_factor
scaled = vae.scale_latents(means)
print("clip  std in the VAE's units  scaled")
for i, p in enumerate(posteriors):
    print(f"{i:4}  {p.mean.std():22.2f}  {vae.scale_latents(p.mean).std():6.2f}")
print(f"all   {means.std():22.2f}  {scaled.std():6.2f}")

# %% tags=["check"]
assert jnp.allclose(vae.unscale_latents(scaled), means, rtol=1e-5, atol=1e-5)
assert 0.4 < scaled.std() < 2.5

# %% [markdown]
# CogVideoX1.5 has an exception. Its image-to-video model was trained on image latents that were
# divided by the factor. `image_condition=True` does that, and changes nothing for the other
# checkpoints. Scaling needs only the configuration, so a small model shows it.

# %%
small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
config = cv.Config(scaling_factor=0.7, invert_scale_latents=True, **small)
like15 = cv.VAE(config, key=key)
z = jnp.ones((1, 1, 1, 1, config.latent_channels))

# %% tags=["check"]
assert jnp.allclose(like15.scale_latents(z), 0.7 * z)
assert jnp.allclose(like15.scale_latents(z, image_condition=True), z / 0.7)
assert jnp.array_equal(vae.scale_latents(latents), factor * latents)

# %% [markdown]
# ## Two parts of the deviation
#
# The variance over all numbers has two parts: the distance between the means of the channels, and
# the variance of each channel around its own mean. Only the second part is picture; the first is
# constant. They add up exactly.

# %%
centres = means.mean((0, 1, 2, 3))
apart = centres.var()
within = means.var((0, 1, 2, 3)).mean()
print(
    f"variance {means.var():.2f} = {apart:.2f} between channels + {within:.2f} within"
)
print(f"scaled, what varies has a variance of {factor**2 * within:.3f}")

# %% tags=["check"]
assert MODEL != "tiny" or (apart > 3 * within and factor**2 * within < 0.5)
assert jnp.allclose(apart + within, means.var(), rtol=1e-3)

# %% [markdown]
# For the tiny weights the first part is larger. What varies is therefore far below unit variance,
# even after scaling. A configuration can give a mean and a deviation for each channel,
# `latents_mean` and `latents_std`, and `scale_latents` uses them. The published CogVideoX
# checkpoints do not. Again the configuration is all we need.

# %%
config = cv.Config(
    scaling_factor=1.0,
    latents_mean=tuple(centres.tolist()),
    latents_std=tuple(means.std((0, 1, 2, 3)).tolist()),
    latent_channels=channels,
    **small,
)
by_channel = cv.VAE(config, key=key)
white = by_channel.scale_latents(means)

# %% tags=["check"]
assert jnp.allclose(white.mean((0, 1, 2, 3)), 0, atol=1e-3)
assert jnp.allclose(white.std((0, 1, 2, 3)), 1, atol=1e-3)
assert jnp.allclose(by_channel.unscale_latents(white), means, rtol=1e-4, atol=1e-4)

# %% [markdown]
# The effect on noise: we add the same noise in equal amounts to latents in three units, and
# decode. If units did not matter, the rows would look alike.


# %%
def noised(z, alpha):
    noise = jax.random.normal(jax.random.key(1), z.shape)
    return alpha**0.5 * z + (1 - alpha) ** 0.5 * noise


alphas = (0.99, 0.9, 0.7, 0.4, 0.1)
units = {
    "factor": (vae.scale_latents, vae.unscale_latents, factor**2 * within),
    "channels": (by_channel.scale_latents, by_channel.unscale_latents, 1.0),
    "unscaled": (lambda z: z, lambda z: z, within),
}
rows, quality = [], {}
print("SNR of what varies, at alpha of", *alphas)
for name, (to, back, variance) in units.items():
    films = [vae.decode(back(noised(to(latents), alpha)))[:, -1:] for alpha in alphas]
    rows.append(jnp.clip(jnp.concatenate(films, axis=1), -1, 1))
    print(f"{name:10}", *(f"{alpha / (1 - alpha) * variance:8.2f}" for alpha in alphas))
    quality[name] = [video.psnr(film, decoded[:, -1:]) for film in films]
print("PSNR to the decode without noise, dB")
for name, each in quality.items():
    print(f"{name:10}", *(f"{value:8.1f}" for value in each))
by_variance = sorted(units, key=lambda name: float(units[name][2]))

# %% tags=["drawing"]
fig, ax = plt.subplots(figsize=(7.4, 3.1))
ax.imshow(video.filmstrip(*rows, n=5))
ax.set_xticks((np.arange(5) + 0.5) * clip.shape[3], [f"{alpha}" for alpha in alphas])
ax.set_yticks((np.arange(3) + 0.5) * clip.shape[2], list(units))
ax.set(xlabel="alpha: the share of the latents, by variance")
ax.tick_params(length=0)
ax.spines[:].set_visible(False)
plt.show()

# %% tags=["check"]
assert by_variance == sorted(
    units, key=lambda name: quality[name][1]
)  # at alpha of 0.9

# %% [markdown]
# The larger the variance of what varies, the longer the picture holds. A transformer that was
# trained in one unit fails in another, because the noise level that it is told is not the one
# that it sees. So use the factor of the checkpoint. If you train a diffusion model on latents of
# your own, measure each channel first.
#
# ## What to take away
#
# - Latents are a small video of sixteen channels, local in space and time. Each channel carries
#   detail.
# - Mixing latents fades, as mixing pixels does.
# - The posterior is far narrower than the spread of the latents. Mode or sample, the picture is
#   the same.
# - The VAE does not scale. Scale for the diffusion model and unscale for the decoder, with the
#   factor of the checkpoint.
#
# Next: [fine-tune the decoder](06_finetune.ipynb).
