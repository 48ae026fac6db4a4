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
# A published VAE has seen millions of clips and none of yours. Here its decoder learns one clip
# more, with `eqx_cogvae.training`, while the encoder, and with it every latent, stays as it is.
# Runs offline, in about a minute.

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
from PIL import Image

import eqx_cogvae as cv
from eqx_cogvae import training, video

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
clip = jnp.asarray(video.procedural_clip(9, 32, 48, seed=100))

# %% [markdown]
# ## Before
#
# The model reconstructs the clip as well as it can. That is the number to beat.

# %%
reconstruct = eqx.filter_jit(lambda vae, clip: vae(clip))
before = reconstruct(vae, clip)
start = video.psnr(before, clip)
print(f"PSNR before: {start:.2f} dB")

# %% [markdown]
# ## The trainer
#
# A `Trainer` holds what stays the same: optimiser, loss, which tensors are trained. A `TrainState`
# holds what a step changes, and is given away to each step. `decoder_only` looks at diffusers'
# names of tensors; any function of a name does.

# %%
STEPS = 200
rate = optax.cosine_decay_schedule(2e-3, STEPS)
trainer = training.Trainer(
    optax.adam(rate),
    loss=training.ClipLoss(l1=1.0, l2=2.0, kl=0.0),
    trainable=training.decoder_only,
    decay=0.95,
)
state, key = trainer.init(vae), jax.random.key(0)

# %%
losses = []
for _ in range(STEPS):
    state, metrics = trainer.step(state, clip, key)
    losses.append(float(metrics["loss"]))

# %% [markdown]
# The loss over the steps. Each draws fresh noise for its latents, so that the curve trembles.

# %%
figure, axes = plt.subplots(figsize=(7, 3), dpi=100)
axes.semilogy(losses)
axes.set(xlabel="step", ylabel="loss (weighted L1 and L2)", title="The decoder learns one clip")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## After
#
# `state.average` is the moving average of the weights, steadier than the last of them.

# %%
tuned = state.average
after = reconstruct(tuned, clip)
print(f"PSNR before {start:.2f} dB, after {video.psnr(after, clip):.2f} dB")
assert video.psnr(after, clip) > start + 1

# %% [markdown]
# From above: the clip, before, after.

# %%
Image.fromarray(video.filmstrip(clip, before, after, n=5))

# %% [markdown]
# The encoder has not moved by a bit, so latents that were encoded before still fit.

# %%
same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), vae.encoder, tuned.encoder)
moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), vae.decoder, tuned.decoder)
assert all(jax.tree.leaves(same))
assert any(jax.tree.leaves(moved))

# %% [markdown]
# What was won here is lost elsewhere: a decoder that is trained on one clip forgets others. The
# clip below is another one.

# %%
other = jnp.asarray(video.procedural_clip(9, 32, 48, seed=101))
for name, model in (("before", vae), ("after", tuned)):
    print(f"another clip, {name}: {video.psnr(reconstruct(model, other), other):.2f} dB")

# %% [markdown]
# ## Killed and resumed
#
# A state is saved whole or not at all, and a run that goes on from it takes the same steps: random
# numbers come from the key and the count of steps, and the state holds all else.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "state.eqx"
    training.save_state(path, state)
    resumed = training.load_state(path, trainer.init(vae))
_, unbroken = trainer.step(state, clip, key)
_, again = trainer.step(resumed, clip, key)
assert np.array_equal(unbroken["loss"], again["loss"])

# %% [markdown]
# ## Keep it
#
# `cv.save_pretrained(tuned, "my-vae")` writes diffusers' layout: here and in diffusers it loads as
# any other checkpoint does.
#
# ## What to take away
#
# - A trainer is a value, a state is a PyTree, and a step is a function from one to the next.
# - What is trained is chosen by name; what is not costs no optimiser state.
# - For a clip that does not fit, `rematerialise=True` and `accumulate=` trade time for memory.
#
# Next: gradients by latents instead of weights, in
# [inversion and guidance](07_inversion_and_guidance.ipynb).
