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
# A published VAE has seen many clips and none of yours. Here its decoder learns one clip more,
# with `eqx_cogvae.training`, while the encoder, and with it every latent, stays as it is. You will
# meet the trainer, its state, the moving average of the weights, and a run that is stopped and
# resumed. Runs offline, in about a minute.

# %%
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

plt.rcParams.update({"figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9})

# On a CPU half the time to compile, and about as fast after it: JAX reads it when it first computes.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
clip = jnp.asarray(video.procedural_clip(9, 32, 48, seed=100))


def strip(rows):
    """Five frames of each clip, a row for each with its name."""
    clips = list(rows.values())
    picture = video.filmstrip(*clips, n=5)
    height, width = clips[0].shape[2:4]
    figure, axes = plt.subplots(figsize=(7.2, 6.6 * picture.shape[0] / picture.shape[1] + 0.3))
    axes.imshow(picture, interpolation="nearest")
    times = np.linspace(0, clips[0].shape[1] - 1, 5).round().astype(int)
    axes.set_xticks((np.arange(5) + 0.5) * width, [f"frame {i}" for i in times])
    axes.set_yticks((np.arange(len(rows)) + 0.5) * height, list(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    plt.show()


# %% [markdown]
# The weights are read in float32, whatever they were saved in. Steps of training are small, and
# added to a bfloat16 weight most of them would be rounded away.
#
# ## Before
#
# The clip, and what the model makes of it. Look at the texture and the edges.

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
# of such a name, as any `lambda name: "norm" in name` is. What is not chosen is held fixed.

# %%
for name in ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight"):
    print(f"{name}: {'trained' if training.decoder_only(name) else 'fixed'}")

# %% [markdown]
# ## The trainer
#
# A `Trainer` holds what stays the same in a run: optimiser, loss, which tensors are trained. A
# `TrainState` holds what a step changes: weights, their moving average, the optimiser's state and
# the count of steps. A step is a function from one state to the next.
#
# `ClipLoss` is a weighted sum. The KL divergence is a matter of the encoder, so its weight is zero.

# %%
STEPS, SAVED = 200, 190
rate = optax.cosine_decay_schedule(2e-3, STEPS)
trainer = training.Trainer(
    optax.adam(rate),
    loss=training.ClipLoss(l1=1.0, l2=2.0, kl=0.0),
    trainable=training.decoder_only,
    decay=0.95,
)
state, key = trainer.init(vae), jax.random.key(0)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


print(f"weights: encoder {count(vae.encoder):,}, decoder {count(vae.decoder):,}")
print(f"numbers that Adam keeps: {count(state.optimiser):,}")
# Two moments of each decoder weight, none of the encoder's, and some counters.
trained = count(vae.decoder) + count(vae.post_quant_conv)
assert 2 * trained <= count(state.optimiser) < 2 * trained + 10

# %% [markdown]
# ## Two hundred steps
#
# The state that goes into a step is used up by it: its memory becomes that of the next state. The
# key is the same every time, since a step mixes the count of steps into it. Near the end the state
# is saved, for later.

# %%
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "state.eqx"
losses, measured = [], []
for step in range(STEPS):
    if step == SAVED:
        training.save_state(path, state)
    state, metrics = trainer.step(state, clip, key)
    losses.append(float(metrics["loss"]))
    if step % 20 == 19:
        each = [video.psnr(reconstruct(m, clip), clip) for m in (state.model, state.average)]
        measured.append((step + 1, *each))

# %% [markdown]
# On the left the loss. On the right the PSNR of the weights and of their moving average, which lags
# behind a little. With a learning rate that falls to zero the two meet at the end.

# %%
steps, of_model, of_average = zip(*measured, strict=True)
figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.8))
axes[0].semilogy(losses)
axes[0].set(xlabel="step", ylabel="loss (weighted L1 and L2)")
axes[1].axhline(start, color="gray", linestyle="--", label="before")
axes[1].plot(steps, of_model, ".-", label="weights")
axes[1].plot(steps, of_average, ".-", label="moving average")
axes[1].set(xlabel="step", ylabel="PSNR, dB")
axes[1].legend()
plt.show()
print(f"at the end {of_model[-1]:.2f} dB, the average {of_average[-1]:.2f} dB")
assert np.mean(losses[-20:]) < np.mean(losses[:20])
assert of_average[0] < of_model[0]
assert abs(of_average[-1] - of_model[-1]) < 0.1

# %% [markdown]
# ## After
#
# Edges and colours are near the clip's now; the finest texture is not all there.

# %%
tuned = state.average
after = reconstruct(tuned, clip)
print(f"PSNR before {start:.2f} dB, after {video.psnr(after, clip):.2f} dB")
assert video.psnr(after, clip) > start + 1
strip({"clip": clip, "before": before, "after": after})

# %% [markdown]
# And as a film: the clip, before, after.

# %%
video.show(jnp.concatenate([clip, before, after], axis=3), fps=8, width=700)

# %% [markdown]
# Frame by frame, to see that none was bought at the price of another.


# %%
def by_frame(decoded):
    return [video.psnr(decoded[:, i], clip[:, i]) for i in range(clip.shape[1])]


figure, axes = plt.subplots(figsize=(7, 2.4))
axes.plot(by_frame(before), ".-", label="before")
axes.plot(by_frame(after), ".-", label="after")
axes.set(xlabel="frame", ylabel="PSNR, dB", xticks=range(clip.shape[1]))
axes.legend()
plt.show()
assert all(a > b for a, b in zip(by_frame(after), by_frame(before), strict=True))

# %% [markdown]
# ## The encoder has not moved by a bit
#
# Latents that were encoded before still fit the new decoder, and a diffusion model that makes such
# latents need not be trained again.


# %%
def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return [bool(np.array_equal(x, y)) for x, y in pairs]


for model in (state.model, state.average):
    assert all(equal(vae.encoder, model.encoder))
    assert not any(equal(vae.decoder.conv_out, model.decoder.conv_out))

# %% [markdown]
# Another clip was not asked. It may gain from what was learned, where it is alike, or lose, where
# it is not. So measure on clips that you did not train on.

# %%
other = jnp.asarray(video.procedural_clip(9, 32, 48, seed=101))
for name, model in (("before", vae), ("after", tuned)):
    print(f"another clip, {name}: {video.psnr(reconstruct(model, other), other):.2f} dB")

# %% [markdown]
# ## Stopped and resumed
#
# The file from step 190, read into a fresh state, as a new process would do it. The last ten steps
# are taken once more. Random numbers come from the key and the count of steps, and the state holds
# all else, so losses and weights come out the same, bit for bit.

# %%
resumed = training.load_state(path, trainer.init(vae))
assert int(resumed.step) == SAVED
again = []
for _ in range(SAVED, STEPS):
    resumed, metrics = trainer.step(resumed, clip, key)
    again.append(float(metrics["loss"]))
print("first run:", *(f"{loss:.6f}" for loss in losses[-3:]))
print("resumed:  ", *(f"{loss:.6f}" for loss in again[-3:]))
assert again == losses[SAVED:]
assert all(equal(resumed, state))
folder.cleanup()

# %% [markdown]
# ## Your own clips
#
# Random crops of many files, read by threads, two parts of a batch after each other, each resnet
# block computed again in the backward pass, arithmetic in bfloat16. The batches are endless: the
# loop says when to stop. A rate of 2e-3 for 200 steps suits the tiny weights and one clip; begin far
# lower with the real ones, which this needs:
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
# The last line writes diffusers' layout: here and in diffusers it loads as any other checkpoint does.
#
# ## What to take away
#
# - A trainer is a value, a state is a PyTree, and a step is a function from one to the next.
# - What is trained is chosen by name; what is not costs no optimiser state.
# - Use `state.average`, and save `state`: a resumed run takes the same steps.
#
# Next: gradients by latents instead of weights, in
# [inversion and guidance](07_inversion_and_guidance.ipynb).
