# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune the decoder on one clip
#
# A published VAE has not seen your clips. Here its decoder learns one more clip, while the
# encoder, and so every latent, stays the same. After this notebook you can set up a `Trainer`,
# read its state, use the moving average of the weights, and stop and resume a run. It runs
# offline.

# %% tags=["setup"]
import os
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import eqx_cogvae as cv
from eqx_cogvae import training, video

plt.rcParams.update(
    {"figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9}
)

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
clip = jnp.asarray(video.procedural_clip(9, 32, 48, seed=100))


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
# The weights are loaded in float32, whatever type the file has. Training steps are small, and
# bfloat16 would round most of them away.
#
# ## Before
#
# The clip and its reconstruction. The texture and the edges differ.

# %%
reconstruct = eqx.filter_jit(lambda vae, clip: vae(clip))
before = reconstruct(vae, clip)
start = video.psnr(before, clip)
print(f"PSNR before: {start:.2f} dB")
strip({"clip": clip, "before": before})

# %% [markdown]
# ## What is trained
#
# Tensors are chosen by the names that diffusers gives them. `training.decoder_only` is a function
# of a name, and so is `lambda name: "norm" in name`. All other tensors stay fixed.

# %%
for name in ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight"):
    print(f"{name}: {'trained' if training.decoder_only(name) else 'fixed'}")

# %% [markdown]
# ## The trainer
#
# A `Trainer` holds what stays the same in a run: the optimiser, the loss, and which tensors are
# trained. A `TrainState` holds what a step changes: the weights, their moving average, the state
# of the optimiser, and the number of steps. A step is a function from one state to the next.
#
# `ClipLoss` is a weighted sum of terms. The KL divergence depends on the encoder alone, so its
# weight is zero here.

# %%
STEPS, SAVED = 100, 95
rate = optax.cosine_decay_schedule(2e-3, STEPS)
trainer = training.Trainer(
    optax.adam(rate),
    loss=training.ClipLoss(l1=1.0, l2=2.0, kl=0.0),
    trainable=training.decoder_only,
    decay=0.9,
)
state, key = trainer.init(vae), jax.random.key(0)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


print(f"weights: encoder {count(vae.encoder):,}, decoder {count(vae.decoder):,}")
print(f"numbers that Adam keeps: {count(state.optimiser):,}")
# Adam keeps two moments of each decoder weight, none of the encoder's, and counters.
trained = count(vae.decoder) + count(vae.post_quant_conv)

# %% tags=["check"]
assert 2 * trained <= count(state.optimiser) < 2 * trained + 10

# %% [markdown]
# ## A hundred steps
#
# A step reuses the memory of the state that it receives, so that state cannot be used again. The
# key is the same for each step, because a step mixes its number into the key. Near the end we
# save the state.

# %%
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "state.eqx"
losses, measured = [], []
for step in range(STEPS):
    if step == SAVED:
        training.save_state(path, state)
    state, metrics = trainer.step(state, clip, key)
    losses.append(float(metrics["loss"]))
    if step % 10 == 9:
        each = [
            video.psnr(reconstruct(m, clip), clip) for m in (state.model, state.average)
        ]
        measured.append((step + 1, *each))

# %% [markdown]
# The left chart shows the loss. The right one shows the PSNR of the weights and of their moving
# average, which lags slightly. The learning rate falls to zero, so the two meet at the end.

# %%
steps, of_model, of_average = zip(*measured, strict=True)

# %% tags=["drawing"]
figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.8))
axes[0].semilogy(losses)
axes[0].set(xlabel="step", ylabel="loss (weighted L1 and L2)")
axes[1].axhline(start, color="gray", linestyle="--", label="before")
axes[1].plot(steps, of_model, ".-", label="weights")
axes[1].plot(steps, of_average, ".-", label="moving average")
axes[1].set(xlabel="step", ylabel="PSNR, dB")
axes[1].legend()
plt.show()

# %%
print(f"at the end {of_model[-1]:.2f} dB, the average {of_average[-1]:.2f} dB")

# %% tags=["check"]
assert np.mean(losses[-20:]) < np.mean(losses[:20])
middle = len(steps) // 2
assert of_average[middle] < of_model[middle]
assert abs(of_average[-1] - of_model[-1]) < 0.1

# %% [markdown]
# ## After
#
# Edges and colours are now close to those of the clip. The finest texture is still missing.

# %% tags=["cover"]
tuned = state.average
after = reconstruct(tuned, clip)
print(f"PSNR before {start:.2f} dB, after {video.psnr(after, clip):.2f} dB")
strip({"clip": clip, "before": before, "after": after})

# %% tags=["check"]
assert video.psnr(after, clip) > start + 1

# %% [markdown]
# The film shows the clip, the reconstruction before, and the reconstruction after.

# %%
video.show(jnp.concatenate([clip, before, after], axis=3), fps=8, width=700)

# %% [markdown]
# Every frame has improved, not only the mean.


# %%
def by_frame(decoded):
    return [video.psnr(decoded[:, i], clip[:, i]) for i in range(clip.shape[1])]


# %% tags=["drawing"]
figure, axes = plt.subplots(figsize=(7, 2.4))
axes.plot(by_frame(before), ".-", label="before")
axes.plot(by_frame(after), ".-", label="after")
axes.set(xlabel="frame", ylabel="PSNR, dB", xticks=range(clip.shape[1]))
axes.legend()
plt.show()

# %% tags=["check"]
assert all(a > b for a, b in zip(by_frame(after), by_frame(before), strict=True))

# %% [markdown]
# ## The encoder has not changed
#
# Latents from before still fit the new decoder, and a diffusion model that produces such latents
# need not be trained again. The check compares the encoder's weights bit for bit.


# %%
def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return [bool(np.array_equal(x, y)) for x, y in pairs]


# %% tags=["check"]
for model in (state.model, state.average):
    assert all(equal(vae.encoder, model.encoder))
    assert not any(equal(vae.decoder.conv_out, model.decoder.conv_out))

# %% [markdown]
# The decoder was trained on one clip. Another clip may gain if it is similar, or lose if it is
# not. So measure on clips that were not used in training.

# %%
other = jnp.asarray(video.procedural_clip(9, 32, 48, seed=101))
for name, model in (("before", vae), ("after", tuned)):
    print(
        f"another clip, {name}: {video.psnr(reconstruct(model, other), other):.2f} dB"
    )

# %% [markdown]
# ## Stop and resume
#
# We load the file from step 95 into a fresh state, as a new process would, and take the last five
# steps again. Random numbers depend on the key and the number of the step, and the state holds
# everything else. So losses and weights are the same, bit for bit.

# %%
resumed = training.load_state(path, trainer.init(vae))
assert int(resumed.step) == SAVED
again = []
for _ in range(SAVED, STEPS):
    resumed, metrics = trainer.step(resumed, clip, key)
    again.append(float(metrics["loss"]))
print("first run:", *(f"{loss:.6f}" for loss in losses[-3:]))
print("resumed:  ", *(f"{loss:.6f}" for loss in again[-3:]))
folder.cleanup()

# %% tags=["check"]
assert again == losses[SAVED:]
assert all(equal(resumed, state))

# %% [markdown]
# ## Your own clips
#
# The code below reads random crops from many files in threads, splits each batch in two,
# recomputes each resnet block in the backward pass, and computes in bfloat16. The batches never
# end, so the loop decides when to stop. The rate of 2e-3 above suits the tiny weights and one
# clip. Begin with a much lower rate for the published weights:
#
# ```python
# vae = cv.from_pretrained("zai-org/CogVideoX-2b", dtype=jnp.float32)
# sources = [training.Source(path, height=256) for path in paths]
# crops = training.Crops(sources, batch=2, frames=17, size=(128, 128))
# trainer = training.Trainer(
#     optax.adamw(1e-5),
#     loss=training.ClipLoss(l1=1.0, gradient=0.2),
#     trainable=training.decoder_only,
#     accumulate=2,
#     dtype=jnp.bfloat16,
#     rematerialise=True,
# )
# state, key = trainer.init(vae), jax.random.key(0)
# for clips in crops.batches(int(state.step)):
#     state, metrics = trainer.step(state, clips, key)
#     if state.step == 10_000:
#         break
# cv.save_pretrained(state.average, "my-vae")
# ```
#
# The last line writes the layout of diffusers, so the result loads in diffusers and here like any
# other checkpoint.
#
# ## What to take away
#
# - A trainer is a value, a state is a PyTree, and a step is a function from one state to the
#   next.
# - Tensors to train are chosen by name. Fixed tensors take no memory in the optimiser.
# - Use `state.average`, and save `state`: a resumed run takes the same steps.
#
# Next: gradients by latents instead of weights, in [inversion and
# guidance](07_inversion_and_guidance.ipynb).
