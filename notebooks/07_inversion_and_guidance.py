# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inversion and guidance
#
# The decoder is differentiable, so an error in pixels can change latents. After this notebook you
# can take a gradient through a long clip in bounded memory, fill a hole in a clip by a search
# over latents, and guide latents by a wish about pixels. It runs offline.

# %% tags=["setup"]
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import eqx_cogvae as cv
from eqx_cogvae import video

plt.rcParams.update(
    {"figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9}
)

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
cell = vae.config.spatial_compression


def strip(rows):
    """Shows five frames of each clip, one named row for each."""
    clips = list(rows.values())
    picture = video.filmstrip(*clips, n=5)
    height, width = clips[0].shape[2:4]
    figure, axes = plt.subplots(
        figsize=(7.2, 6.6 * picture.shape[0] / picture.shape[1] + 0.3)
    )
    axes.imshow(picture, interpolation="nearest")
    times = np.linspace(0, clips[0].shape[1] - 1, 5).round().astype(int)
    axes.set_xticks((np.arange(5) + 0.5) * width, [f"frame {i}" for i in times])
    axes.set_yticks((np.arange(len(rows)) + 0.5) * height, list(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    plt.show()


# %% [markdown]
# ## A gradient through time
#
# `cv.framewise` turns a function of one frame batch into a function of a clip. Under `jax.grad`
# it is a scan. The backward pass then needs what the forward pass computed for all frame batches,
# unless the step is checkpointed. A checkpointed step keeps only caches and frames, and computes
# the rest again.


# %%
def error(latents, vae, target, checkpoint):
    step = eqx.filter_checkpoint(vae.decode_step) if checkpoint else vae.decode_step
    return jnp.mean((cv.framewise(step, 2)(latents) - target) ** 2)


# %% [markdown]
# `jax.vjp` returns the backward pass as a function that holds what it needs. `jax.eval_shape`
# gives its size without computing it. The peak of memory is this size plus what one frame batch
# computes. For 65 frames, which are eight frame batches:

# %%
long = jnp.asarray(video.procedural_clip(65, 24, 32, seed=0))
shape = vae.config.latent_frames(65), 24 // cell, 32 // cell, vae.config.latent_channels
latents = jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def backward(latents, checkpoint):
    return jax.vjp(lambda z: error(z, vae, long, checkpoint), latents)[1]


def kept(checkpoint):
    held = jax.eval_shape(lambda z: backward(z, checkpoint), latents)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held)) / 2**20


memory = {"as it is": kept(False), "checkpointed": kept(True)}

# %% tags=["drawing"]
figure, axes = plt.subplots(figsize=(7, 1.8))
bars = axes.barh(list(memory), memory.values(), color=["C0", "C1"])
axes.bar_label(bars, fmt="%.0f", padding=3)
axes.set(xlabel="kept for the backward pass, MiB", xlim=(0, 1.1 * max(memory.values())))
axes.invert_yaxis()
plt.show()

# %% tags=["check"]
assert memory["checkpointed"] < memory["as it is"] / 3

# %% [markdown]
# `pull` converts a gradient by pixels to a gradient by latents, and compiles once. We test it
# with finite differences: a small step along the gradient must change the error, here the mean
# square over 17 frames, by the amount that the gradient predicts.


# %%
@eqx.filter_jit
def pull(by_pixel, latents, vae):
    step = eqx.filter_checkpoint(vae.decode_step)
    (by_latent,) = jax.vjp(cv.framewise(step, 2), latents)[1](by_pixel)
    return by_latent


moving = jnp.asarray(video.procedural_clip(17, 40, 56, seed=0))
whole_latents = vae.encode(moving).mode()


def squares(decoded):
    return jnp.mean((decoded - moving) ** 2)


along = pull(jax.grad(squares)(vae.decode(whole_latents)), whole_latents, vae)
small = 0.1 * along / jnp.linalg.norm(along)
change = squares(vae.decode(whole_latents + small)) - squares(
    vae.decode(whole_latents - small)
)
said = 2 * jnp.sum(along * small)
print(f"the error changes by {change:.2e}, the gradient says {said:.2e}")

# %% tags=["check"]
assert abs(change - said) < 0.02 * abs(said)

# %% [markdown]
# ## A hole
#
# `seen` is one where the video is known and zero in the hole. We encode the clip with its hole
# and decode it. The gray box is now part of the picture.

# %%
clip = moving[:, :9]
seen = jnp.ones(clip.shape).at[:, :, 16:32, 24:40].set(0.0)
begin = vae.encode(clip * seen).mode()
before = vae.decode(begin)


def rms(decoded, where):
    squares = np.asarray(where * (jnp.clip(decoded, -1, 1) - clip) ** 2)
    return float(np.sqrt(squares.sum() / where.sum()))


print(f"RMS error in the hole {rms(before, 1 - seen):.3f}")
print(f"RMS error elsewhere   {rms(before, seen):.3f}")
strip({"clip": clip, "with a hole": clip * seen, "decoded": before})

# %% [markdown]
# ## The objective
#
# We minimise the following over latents $z$, with Adam. All norms are means over elements.
#
# $$\lVert m \cdot (D(z) - x) \rVert^2 + \lambda \lVert u \rVert^2 + \lambda \lVert \nabla u \rVert^2, \qquad u = (z - \mu) / \sigma$$
#
# The first term compares the decoded clip with $x$ where the mask $m$ is one. It does not
# constrain the hole. The other terms are a prior. Latents stay about as large as those we begin
# with, given by the mean $\mu$ and deviation $\sigma$ of each channel, and neighbours in time and
# space stay similar.


# %%
mean, std = (
    jnp.mean(begin, (1, 2, 3), keepdims=True),
    jnp.std(begin, (1, 2, 3), keepdims=True),
)


def disagreement(decoded):
    return jnp.sum(seen * (decoded - clip) ** 2) / jnp.sum(seen)


@eqx.filter_jit
@eqx.filter_value_and_grad(has_aux=True)
def objective(latents, vae, prior):
    decoded = vae.decode(latents)  # one batch: a checkpoint saves nothing
    visible = disagreement(decoded)
    unit = (latents - mean) / std
    rough = sum(jnp.mean(jnp.diff(unit, axis=axis) ** 2) for axis in (1, 2, 3))
    hole = jnp.sum((1 - seen) * (decoded - clip) ** 2) / jnp.sum(1 - seen)
    return visible + prior * (jnp.mean(unit**2) + rough), (visible, hole)


def search(prior, steps=25):
    optimiser = optax.adam(0.1)
    latents, state, trace = begin, optimiser.init(begin), []
    for _ in range(steps):
        (_, errors), slope = objective(latents, vae, jnp.asarray(prior))
        updates, state = optimiser.update(slope, state)
        latents = optax.apply_updates(latents, updates)
        trace.append([float(each) for each in errors])
    return latents, np.sqrt(trace)


# %% [markdown]
# Without the prior, the gradient is that of the first term alone. `pull` computes the same
# gradient with a checkpointed step. The two agree.

# %%
_, plain = objective(begin, vae, jnp.asarray(0.0))
checkpointed = pull(jax.grad(disagreement)(before), begin, vae)
difference = float(jnp.linalg.norm(checkpointed - plain) / jnp.linalg.norm(plain))
print(f"relative difference of the gradients: {difference:.1e}")

# %% tags=["check"]
assert difference < 1e-5

# %% [markdown]
# ## With and without a prior
#
# The error of the visible part falls in both cases. In the hole, which the search does not see,
# the result without a prior is arbitrary.

# %%
found = {"no prior": search(0.0), "prior": search(1e-3)}

# %% tags=["drawing"]
figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.8), sharey=True)
for name, (_, trace) in found.items():
    axes[0].semilogy(trace[:, 0], label=name)
    axes[1].semilogy(trace[:, 1], label=name)
axes[0].set(xlabel="step", ylabel="RMS error", title="what is seen")
axes[1].set(xlabel="step", title="in the hole")
axes[1].legend()
plt.show()

# %%
free, after = (vae.decode(found[name][0]) for name in ("no prior", "prior"))
whole = vae.decode(vae.encode(clip).mode())
rows = {
    "at first": before,
    "no prior": free,
    "prior": after,
    "clip without a hole": whole,
}
for name, decoded in rows.items():
    errors = rms(decoded, 1 - seen), rms(decoded, seen)
    print("{:20} hole {:.3f}  elsewhere {:.3f}".format(name, *errors))

# %% tags=["check"]
for decoded in (free, after):
    assert rms(decoded, seen) < rms(before, seen)
assert rms(after, 1 - seen) < 0.7 * rms(before, 1 - seen)
assert rms(after, 1 - seen) < rms(free, 1 - seen)

# %% [markdown]
# The search fills the hole from its surroundings. It knows how pictures look nearby, but not what
# was there. For that, a diffusion model is the better prior, and this gradient is what the VAE
# contributes.

# %% tags=["cover"]
strip(
    {"with a hole": clip * seen, "at first": before, "no prior": free, "prior": after}
)

# %% [markdown]
# The film shows the clip, the clip with its hole, and the result with the prior.

# %%
video.show(jnp.concatenate([clip, clip * seen, after], axis=3), fps=8, width=700)

# %% [markdown]
# The visible part is now closer to the clip than its plain reconstruction: the search finds
# better latents than the encoder. This is called *inversion*. With a mask of ones it works for
# any clip.

# %% tags=["check"]
assert rms(after, seen) < rms(whole, seen)

# %% [markdown]
# ## Guidance
#
# Any wish that can be written in pixels has a gradient by latents. The sampler of a diffusion
# model can take a small step along it between two of its own steps. Here the wish is more red in
# the left half of all 17 frames.


# %%
left = jnp.zeros(clip.shape[3]).at[: clip.shape[3] // 2].set(1.0)


def redness(decoded, where):
    red = decoded[..., 0] - jnp.mean(decoded[..., 1:], axis=-1)
    return jnp.sum(red * where) / jnp.sum(jnp.broadcast_to(where, red.shape))


guided, slopes = whole_latents, []
for _ in range(4):
    by_pixel = jax.grad(redness)(vae.decode(guided), left)
    slopes.append(pull(by_pixel, guided, vae))
    guided = guided + 0.08 * slopes[-1] / jnp.sqrt(jnp.mean(slopes[-1] ** 2))

# %% [markdown]
# The left map shows the size of the gradient in each cell of the latents. The right map shows how
# much the pixels have changed. Both reach slightly beyond the middle, because each cell affects
# the pixels around it and the norms see the whole frame.

# %%
plain, red = vae.decode(whole_latents), vae.decode(guided)
felt = np.linalg.norm(slopes[0][0], axis=(0, 3))
changed = np.sqrt(np.mean((np.asarray(red) - plain)[0] ** 2, axis=(0, 3)))

# %% tags=["drawing"]
figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.7))
for ax, values, label in zip(
    axes, (felt, changed), ("gradient", "RMS change"), strict=True
):
    figure.colorbar(
        ax.imshow(values, cmap="magma", vmin=0), ax=ax, label=label, shrink=0.8
    )
axes[0].set(xlabel="column of latents", ylabel="row of latents")
axes[1].set(xlabel="x, pixels", ylabel="y, pixels")
plt.show()

# %%
middle = changed.shape[1] // 2

# %% tags=["check"]
assert changed[:, :middle].mean() > 2 * changed[:, middle:].mean()

# %% [markdown]
# The 17 frames, decoded as they were and with the wish:

# %%
print(f"redness on the left {redness(plain, left):.3f}, then {redness(red, left):.3f}")
strip({"decoded": plain, "more red": red})

# %% tags=["check"]
assert redness(red, left) > redness(plain, left) + 0.05

# %% [markdown]
# In a sampler, the latents are in the units of the diffusion model, and the wish applies to its
# estimate of the clean latents:
#
# ```python
# def wished(noisy, time):
#     clean = guess(noisy, time)  # your model's estimate
#     step = eqx.filter_checkpoint(vae.decode_step)
#     return redness(cv.framewise(step, 2)(vae.unscale_latents(clean)), left)
#
#
# noisy = noisy + strength * jax.grad(wished)(noisy, time)
# ```
#
# ## What to take away
#
# - `jax.grad` works through `cv.framewise`. `eqx.filter_checkpoint` around the step bounds its
#   memory and does not change the gradient.
# - A prior must determine what the pixels do not.
# - A wish in pixels is a step in latents.
#
# Next: [many devices](08_many_devices.ipynb).
