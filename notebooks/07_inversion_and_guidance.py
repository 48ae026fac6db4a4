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
# The decoder is differentiable, so pixels can ask latents to change. Here a clip has a hole; we
# look for latents whose video agrees with what is left of it. Then a colour is asked for by a
# gradient. Runs offline, in about a minute.

# %%
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from PIL import Image

import eqx_cogvae as cv
from eqx_cogvae import video

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
clip = jnp.asarray(video.procedural_clip(9, 48, 64, seed=0))
encode = eqx.filter_jit(lambda vae, x: vae.encode(x).mode())

# %% [markdown]
# ## A hole
#
# `seen` is one where the video is known. The hole is filled with grey before encoding, so that the
# latents we begin with believe in a grey box.

# %%
seen = jnp.ones((1, 1, *clip.shape[2:4], 1)).at[:, :, 16:32, 24:40].set(0.0)
begin = encode(vae, clip * seen)
target = encode(vae, clip)

# %% [markdown]
# ## The gradient
#
# A clip goes through the framewise transform. The step is checkpointed: the backward pass computes
# each frame batch again instead of keeping all of them, which matters for long clips.


# %%
def objective(latents, vae, clip, seen, begin, checkpoint=True):
    step = eqx.filter_checkpoint(vae.decode_step) if checkpoint else vae.decode_step
    decoded = cv.framewise(step, 2)(latents)
    visible = jnp.sum(seen * (decoded - clip) ** 2) / (jnp.sum(seen) * clip.shape[1] * 3)
    # Latents of one frame differ little from those around them: the hole is filled from its rim.
    rough = sum(jnp.mean(jnp.diff(latents, axis=axis) ** 2) for axis in (2, 3))
    return visible + 1e-4 * rough


value_and_grad = eqx.filter_jit(jax.value_and_grad(objective))
_, with_checkpoint = value_and_grad(begin, vae, clip, seen, begin)
plain = eqx.filter_jit(jax.grad(lambda *args: objective(*args, checkpoint=False)))
without = plain(begin, vae, clip, seen, begin)
error = jnp.linalg.norm(with_checkpoint - without) / jnp.linalg.norm(without)
print(f"checkpointed and plain gradients differ by {float(error):.1e}")
assert error < 1e-5

# %% [markdown]
# ## Memory of the gradient
#
# What the compiler reserves for temporaries, for clips of more and more frame batches. Without
# checkpoints memory grows with the clip; with them hardly.

# %%
frames = [3, 9]


def temporaries(count, checkpoint):
    z = jax.ShapeDtypeStruct((1, count, 4, 6, begin.shape[-1]), begin.dtype)
    x = jax.ShapeDtypeStruct((1, vae.config.sample_frames(count), 32, 48, 3), begin.dtype)
    hole = jax.ShapeDtypeStruct((1, 1, 32, 48, 1), begin.dtype)
    weights, rest = eqx.partition(vae, eqx.is_array)

    def loss(latents, weights, clip, hole):
        model = eqx.combine(weights, rest)
        return objective(latents, model, clip, hole, latents, checkpoint)

    compiled = jax.jit(jax.grad(loss)).lower(z, weights, x, hole).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


kept = [temporaries(count, False) for count in frames]
again = [temporaries(count, True) for count in frames]
figure, axes = plt.subplots(figsize=(7, 2.6), dpi=100)
axes.plot(frames, kept, marker="o", label="as it is")
axes.plot(frames, again, marker="o", label="checkpointed")
axes.set(xlabel="latent frames", ylabel="temporaries, MiB", ylim=(0, None))
axes.legend()
figure.tight_layout()
plt.show()
assert again[-1] < kept[-1]

# %% [markdown]
# ## Inpainting
#
# Adam on the latents. Nothing is asked of the hole itself.

# %%
optimiser = optax.adam(5e-2)
latents, state = begin, optimiser.init(begin)
losses = []
for _ in range(40):
    loss, gradient = value_and_grad(latents, vae, clip, seen, begin)
    updates, state = optimiser.update(gradient, state)
    latents = latents + updates
    losses.append(float(loss))
figure, axes = plt.subplots(figsize=(7, 2.4), dpi=100)
axes.semilogy(losses)
axes.set(xlabel="step", ylabel="error of what is seen")
figure.tight_layout()
plt.show()

# %%
decode = eqx.filter_jit(lambda vae, z: vae.decode(z))
before, after = decode(vae, begin), decode(vae, latents)


def visible_psnr(decoded):
    return video.psnr(decoded * seen, clip * seen)


print(f"what is seen: {visible_psnr(before):.2f} dB before, {visible_psnr(after):.2f} dB after")
print(f"reconstruction of the clip without a hole: {visible_psnr(decode(vae, target)):.2f} dB")
assert losses[-1] < losses[0]
assert visible_psnr(after) > visible_psnr(before)

# %% [markdown]
# From above: the clip with its hole, what it decoded to at first, and after the search. An
# autoencoder knows how a picture looks nearby, not what a scene holds: it fits what is seen, and
# only the rim of the hole changes. A diffusion model's prior belongs here; this gradient is
# the part that the VAE gives to it.

# %%
Image.fromarray(video.filmstrip(clip * seen, before, after, n=5))

# %% [markdown]
# ## Guidance
#
# The same gradient for any wish that can be written in pixels. Here: more red, and near to where it
# began. A sampler does one such step between two of its own.


# %%
@eqx.filter_jit
def wish(z, vae, start):
    decoded = cv.framewise(eqx.filter_checkpoint(vae.decode_step), 2)(z)
    redness = jnp.mean(decoded[..., 0]) - jnp.mean(decoded[..., 1:])
    return -redness + 1e-3 * jnp.mean((z - start) ** 2)


gradient_of = eqx.filter_jit(jax.grad(wish))
guided = target
for _ in range(6):
    slope = gradient_of(guided, vae, target)
    guided = guided - 0.1 * slope / jnp.sqrt(jnp.mean(slope**2))


def redness(decoded):
    return float(jnp.mean(decoded[..., 0]) - jnp.mean(decoded[..., 1:]))


plain_video, red_video = decode(vae, target), decode(vae, guided)
print(f"redness {redness(plain_video):.3f} before, {redness(red_video):.3f} after")
assert redness(red_video) > redness(plain_video)
Image.fromarray(video.filmstrip(plain_video, red_video, n=5))

# %% [markdown]
# ## What to take away
#
# - `jax.grad` goes through `cv.framewise`, and `eqx.filter_checkpoint` around the step bounds its
#   memory.
# - A gradient by latents is a tool: for inversion, for guidance, for measuring what a frame sees.
#
# Next: [many devices](08_many_devices.ipynb).
