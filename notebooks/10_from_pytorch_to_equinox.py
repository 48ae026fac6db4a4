# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From PyTorch to Equinox
#
# This notebook is for those who know diffusers' `AutoencoderKLCogVideoX`, or its earlier port to
# Flax. After it you can translate each old call to the new one. Both are run and compared. First
# comes Equinox in five minutes, with the VAE as the example. It runs offline.

# %% tags=["setup"]
import contextlib
import copy
import dataclasses
import os
import tempfile
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch

import eqx_cogvae as cv
from eqx_cogvae import training, video

with warnings.catch_warnings(
    action="ignore"
):  # progress bars miss the notebook's widgets
    import diffusers
    from diffusers import AutoencoderKLCogVideoX

diffusers.utils.logging.set_verbosity_error()  # a cast warns of missing modules
plt.rcParams.update(
    {"figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9}
)

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)

# %% [markdown]
# ## Equinox in five minutes
#
# **A module is a PyTree.** In torch, a module is an object that owns its parameters. In Equinox,
# it is a frozen dataclass whose fields are arrays and other modules. It is a tree: JAX can list
# its leaves, map over them, and build another tree. Nothing is registered and nothing is hidden.

# %%
leaves = jax.tree.leaves(vae)
print(f"{len(leaves)} arrays, {sum(leaf.size for leaf in leaves):,} parameters")
print("fields:", [field.name for field in dataclasses.fields(vae)])
print(
    "one leaf:",
    vae.decoder.conv_in.conv.weight.shape,
    vae.decoder.conv_in.conv.weight.dtype,
)

doubled = jax.tree.map(lambda leaf: 2 * leaf, vae)  # what torch needs a loop for

try:
    vae.decoder = None
except dataclasses.FrozenInstanceError as error:
    print("assigning to a field:", error)

# %% tags=["check"]
assert isinstance(doubled, cv.VAE) and doubled.config is vae.config
assert jnp.array_equal(
    doubled.decoder.conv_out.conv.bias, 2 * vae.decoder.conv_out.conv.bias
)

# %% [markdown]
# **Methods are functions of their module.** `vae.decode(latents)` is a pure function of two trees
# of arrays: it keeps nothing from call to call. It compiles the step that it repeats, once for
# each shape, with the weights as an argument of the program. Another VAE of the same structure
# uses the same program.

# %%
clip = jnp.asarray(video.procedural_clip(9, 64, 96, seed=100))  # (b, t, h, w, c)
latents = vae.encode(clip).mode()
decoded = vae.decode(latents)
print(f"{clip.shape} -> {latents.shape} -> {decoded.shape}")
print(f"PSNR {video.psnr(decoded, clip):.1f} dB")

# %% tags=["check"]
assert decoded.shape == clip.shape

# %% [markdown]
# **Surgery makes a new tree.** `eqx.tree_at` names a place and what goes there. All other leaves
# are shared, not copied. Here we reverse the output channels of the last convolution, so red and
# blue trade places. The second row shows the clip in wrong colours. The first row has not
# changed, because `vae` has not.


# %%
def last(vae):
    """Returns the leaves that write the colours."""
    return vae.decoder.conv_out.conv.weight, vae.decoder.conv_out.conv.bias


compiled = []


def note(event, _, fun_name="", **__):
    """Records each program that is compiled, or read from a cache on disk."""
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(fun_name)


turned = eqx.tree_at(last, vae, replace_fn=lambda leaf: leaf[..., ::-1])
jax.monitoring.register_event_duration_secs_listener(note)
wrong = turned.decode(latents)
jax.monitoring.unregister_event_duration_listener(note)

# %% tags=["drawing"]
figure, axis = plt.subplots(figsize=(7, 2.0))
axis.imshow(video.filmstrip(decoded, wrong, n=5))
axis.set_yticks([32, 96], ["vae", "turned"])
axis.set_xticks([])
axis.tick_params(length=0)
axis.spines[:].set_visible(False)
plt.show()

# %% tags=["check"]
assert compiled == []  # the other VAE ran in the same program
assert jnp.allclose(wrong, decoded[..., ::-1], atol=1e-5)
assert jnp.array_equal(vae.decode(latents), decoded)  # and left nothing behind
assert turned.encoder.conv_in.conv.weight is vae.encoder.conv_in.conv.weight

# %% [markdown]
# **Freezing is splitting.** There is no `requires_grad`. `eqx.partition` splits a tree in two, by
# a tree of booleans or by a function of leaves. Each half has `None` where the other has an
# array. You differentiate by one half and join both with `eqx.combine`. `eqx.filter_jit` and
# `eqx.filter_value_and_grad` are JAX's functions for trees that also hold leaves other than
# arrays. Here the decoder is trained on the first frame, and the encoder is not.

# %%
names = jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path, simple=True, separator="."), vae
)
chosen = jax.tree.map(lambda name: name.startswith("decoder."), names)
trained, frozen = eqx.partition(vae, chosen)
counts = [len(jax.tree.leaves(half)) for half in (trained, frozen)]
print("trained: {} arrays, frozen: {}".format(*counts))


@eqx.filter_jit
@eqx.filter_value_and_grad
def loss_and_gradient(trained, frozen, latents, clip):
    """Returns the squared error of decoding; its gradient is by the first argument."""
    vae = eqx.combine(trained, frozen)
    return jnp.mean(jnp.square(vae.decode(latents) - clip))


still = latents[:, :1], clip[:, :1]
loss, gradient = loss_and_gradient(trained, frozen, *still)

updates = jax.tree.map(lambda leaf: -0.01 * leaf, gradient)
after, _ = loss_and_gradient(eqx.apply_updates(trained, updates), frozen, *still)
print(f"loss {loss:.5f}, after one step {after:.5f}")

# %% tags=["check"]
assert jax.tree.structure(gradient) == jax.tree.structure(trained)
assert after < loss

# %% [markdown]
# This is all of Equinox: trees, functions of trees, and functions of functions.
#
# ## Old call, new call
#
# Here is the whole table. Each line is run below on both sides. `model` is diffusers' VAE, `x`
# and `z` are tensors, and `clip` and `latents` are arrays.
#
# | task | diffusers | here |
# |---|---|---|
# | load | `Class.from_pretrained(p, torch_dtype=dtype)` | `cv.from_pretrained(p, dtype=dtype)` |
# | weights | `model.state_dict()[name]` | the leaf whose path is `name` |
# | layout | (b, c, t, h, w), kernels OIDHW | (b, t, h, w, c), kernels DHWIO |
# | encode | `model.encode(x).latent_dist` | `vae.encode(clip)` |
# | mode | `.mode()` | `.mode()` |
# | sample | `.sample(generator)` | `.sample(key)` |
# | decode | `model.decode(z).sample` | `vae.decode(latents)` |
# | both ways | `model(x).sample` | `vae(clip)` |
# | scale | `z * model.config.scaling_factor` | `vae.scale_latents(latents)` |
# | slices | `model.enable_slicing()` | `cv.sliced(vae.decode)` |
# | tiles | `model.enable_tiling(...)` | `cv.tiled(fn, size, overlap)`, for each `fn` as below |
# | frame batch | `model.num_latent_frames_batch_size = n` | `cv.framewise(vae.decode_step, n)` |
# | dtype | `model.to(torch.bfloat16)` | `jax.tree.map(lambda a: a.astype(jnp.bfloat16), vae)` |
# | device | `model.to("cpu")` | `jax.device_put(vae, jax.devices("cpu")[0])` |
# | freeze | `model.requires_grad_(False)` | `eqx.partition(vae, ...)` |
# | gradient | `loss.backward()`, `p.grad` | `eqx.filter_value_and_grad(loss)(vae)` |
# | less memory | `model.enable_gradient_checkpointing()` | `training.rematerialised(vae)` |
# | training mode | `model.train()`, `model.eval()` | none: nothing depends on it |
# | save | `model.save_pretrained(p)` | `cv.save_pretrained(vae, p)` |

# %%
errors = {}


def check(what, got, due, bar=1e-5):
    """Records the relative difference of two results, in L2."""
    if isinstance(due, torch.Tensor):
        due = np.moveaxis(due.detach().float().numpy(), 1, -1)
    got, due = np.asarray(got, np.float64), np.asarray(due, np.float64)
    assert got.shape == due.shape, (got.shape, due.shape)
    errors[what] = np.linalg.norm(got - due) / np.linalg.norm(due)
    assert errors[what] < bar, (what, errors[what])


# %% [markdown]
# ### Load, and the names of the weights
#
# The path of a leaf in the tree, joined by dots, is the name of the tensor in diffusers. Only
# kernels have another layout: input and output channels come last.

# %%
# A folder or a hub id, searched in the order of `cv.from_pretrained`.
where = Path(cv.__file__).parent / "tiny" if MODEL == "tiny" else MODEL
places = (None, "vae") if Path(where).exists() else ("vae", None)


def reference(**options):
    """Loads diffusers' own VAE from the same files."""
    for inside in places:
        with contextlib.suppress(OSError):
            load = AutoencoderKLCogVideoX.from_pretrained
            return load(where, subfolder=inside, **options).eval()
    raise OSError(f"diffusers finds no VAE at {where}")


model = reference().float()

KERNELS = {5: (4, 3, 0, 1, 2), 4: (3, 2, 0, 1)}  # to torch's OIDHW and OIHW


def in_torch_layout(leaf):
    """Returns a weight in torch's layout."""
    return np.transpose(leaf, KERNELS.get(leaf.ndim, range(leaf.ndim)))


def by_name(tree):
    """Returns the leaves of a VAE, or of its gradient, by the names of torch."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in flat
    }


def equal(one, other):
    """Returns True if all leaves of two trees are equal, bit for bit."""
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


state = model.state_dict()
ours = by_name(vae)
for name, leaf in ours.items():
    assert np.array_equal(in_torch_layout(leaf), state[name].numpy())

name = "decoder.up_blocks.1.resnets.0.conv1.conv.weight"
print(name)
print("torch:", tuple(state[name].shape), " here:", ours[name].shape)

# %% tags=["check"]
assert ours.keys() == state.keys()
assert ours[name] is vae.decoder.up_blocks[1].resnets[0].conv1.conv.weight

# %% [markdown]
# ### Layout, encode, decode
#
# Channels are last. Use `np.moveaxis` in NumPy, or `to_jax` and `to_torch` of
# `eqx_cogvae.diffusers`, which avoid a copy where they can ([a diffusers
# pipeline](04_diffusers_pipeline.ipynb)).

# %%
x = torch.from_numpy(np.moveaxis(np.asarray(clip), -1, 1).copy())
with torch.no_grad():
    posterior = model.encode(x).latent_dist
    z = posterior.mode()
    check("encode, mode", vae.encode(clip).mode(), z)
    check("encode, logvar", vae.encode(clip).logvar, posterior.logvar)
    check("decode", vae.decode(latents), model.decode(z).sample)
    check("both", vae(clip), model(x).sample)
    check("scale", vae.scale_latents(latents), z * model.config.scaling_factor)

# %% [markdown]
# ### Random numbers by key
#
# A `torch.Generator` is an object that each draw changes. A JAX key is a value that does not
# change: the same key draws the same numbers. Split a key to draw others. The numbers of the two
# libraries differ, but their distributions are equal: with torch's noise, ours gives torch's
# sample.

# %%
ours_posterior = vae.encode(clip)
key = jax.random.key(0)
one, two = jax.random.split(key)

noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
noise = np.moveaxis(noise.numpy(), 1, -1)
drawn = posterior.sample(torch.Generator().manual_seed(0))
check("sample", ours_posterior.mean + ours_posterior.std * noise, drawn)

draws = jax.vmap(ours_posterior.sample)(jax.random.split(key, 1000))
spread = jnp.std(draws, axis=0) / ours_posterior.std
print(f"spread of 1000 samples over the posterior's own: {jnp.mean(spread):.3f}")

# %% tags=["check"]
assert jnp.array_equal(ours_posterior.sample(key), ours_posterior.sample(key))
assert not jnp.array_equal(ours_posterior.sample(one), ours_posterior.sample(two))
assert abs(jnp.mean(spread) - 1) < 0.01

# %% [markdown]
# ### Switches become transforms
#
# In diffusers, tiling and slicing are modes of the object. They apply to both directions until
# someone turns them off. Here they are functions of functions: you can hold both versions at
# once, and they nest. Tile sizes are in cells of the input: pixels to encode, latents to decode.

# %%
batch = jnp.concatenate([latents, latents[:, ::-1]])
batch_z = torch.from_numpy(np.moveaxis(np.asarray(batch), -1, 1).copy())
with torch.no_grad():
    model.enable_slicing()
    check("slices", cv.sliced(vae.decode)(batch), model.decode(batch_z).sample)
    model.disable_slicing()

    model.enable_tiling(96, 48, 1 / 3, 1 / 3)  # in pixels
    tiled = cv.tiled(
        cv.framewise(vae.decode_step, 2), (12, 6), (1 / 3, 1 / 3)
    )  # in latent cells
    check("tiles", tiled(latents[:, :1]), model.decode(z[:, :, :1]).sample)
    moments = cv.tiled(cv.framewise(vae.encode_step, 8), (96, 48), (1 / 3, 1 / 3))(
        clip[:, :1]
    )
    tiled_posterior = cv.DiagonalGaussian.from_moments(moments)
    check(
        "tiles, encode",
        tiled_posterior.mean,
        model.encode(x[:, :, :1]).latent_dist.mean,
    )
    model.disable_tiling()

    model.num_latent_frames_batch_size = 1
    check(
        "frame batch of 1",
        cv.framewise(vae.decode_step, 1)(latents),
        model.decode(z).sample,
    )
    model.num_latent_frames_batch_size = 2

# %% [markdown]
# ### Dtype and device
#
# In torch, `to` changes a module in place. Here, a cast or a move is a map over the tree and
# returns another tree. Weights cast to bfloat16 are equal in both libraries, and so are weights
# loaded in bfloat16. Results agree to about eight binary digits. Another device is another name:
# `"cuda:1"` in torch, `jax.devices("gpu")[1]` here.

# %%
cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), vae)
loaded = cv.from_pretrained(MODEL, dtype=jnp.bfloat16)
model16, loaded16 = (
    copy.deepcopy(model).to(torch.bfloat16),
    reference(torch_dtype=torch.bfloat16),
)
for name, leaf in by_name(loaded).items():
    weight = in_torch_layout(leaf).astype(np.float32)
    for their in (model16, loaded16):
        assert np.array_equal(weight, their.state_dict()[name].float().numpy())
with torch.no_grad():
    their = model16.decode(z[:, :, :1].bfloat16()).sample
check("decode, bfloat16", cast.decode(latents[:, :1]), their, bar=2e-2)

moved, there = (
    jax.device_put(vae, jax.devices("cpu")[0]),
    copy.deepcopy(model).to("cpu"),
)
with torch.no_grad():
    check("moved", moved.decode(latents[:, :1]), there.decode(z[:, :, :1]).sample)

# %% tags=["check"]
assert cast.dtype == loaded.dtype == jnp.bfloat16 and vae.dtype == jnp.float32
assert equal(cast, loaded)
assert moved.decoder.conv_in.conv.weight.devices() == {jax.devices("cpu")[0]}

# %% [markdown]
# ### Gradients
#
# Torch records the forward pass and leaves gradients in the parameters. JAX transforms the
# function into one that returns the gradients, as a tree of the same structure. The section on
# freezing has computed them. There is nothing to zero before and nothing to detach. Here every
# gradient of the decoder is compared with torch's.


# %%
def check_gradient(what, gradient):
    """Compares with torch's gradient, and returns the largest error of a tensor."""
    got = {name: in_torch_layout(leaf) for name, leaf in by_name(gradient).items()}
    assert got.keys() == due.keys()
    flat = [
        np.concatenate([np.ravel(each[name]) for name in due]) for each in (got, due)
    ]
    check(what, *flat, bar=1e-4)
    return max(
        np.linalg.norm(got[name] - due[name]) / np.linalg.norm(due[name])
        for name in due
    )


def torch_gradient():
    """Returns torch's gradient of the decoder, by name."""
    model.zero_grad()
    torch.nn.functional.mse_loss(
        model.decode(z[:, :, :1]).sample, x[:, :, :1]
    ).backward()
    return {
        name: p.grad.numpy()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


model.requires_grad_(False)
model.decoder.requires_grad_(True)
due = torch_gradient()

worst = check_gradient("gradient", gradient)
print(f"{len(due)} gradients, the worst of them {worst:.1e} apart")

# %% tags=["check"]
assert worst < 1e-3


# %% [markdown]
# To keep less for the backward pass and compute it again, torch has a switch. This library has
# two transforms. `training.rematerialised` keeps only the inputs of each resnet block.
# `eqx.filter_checkpoint` keeps only the inputs of a frame batch. They nest. The gradient is the
# same in both libraries.


# %%
@eqx.filter_jit
@eqx.filter_grad
def frugal(trained, frozen, latents, clip):
    """Returns the gradient above, for less memory."""
    vae = training.rematerialised(eqx.combine(trained, frozen))
    decode = cv.framewise(eqx.filter_checkpoint(vae.decode_step), 2)
    return jnp.mean(jnp.square(decode(latents) - clip))


model.enable_gradient_checkpointing()
recomputed = torch_gradient()
model.disable_gradient_checkpointing()

by_block = frugal(trained, frozen, *still)
worst = check_gradient("gradient, frugal", by_block)
print(f"the worst of them {worst:.1e} apart")

# %% tags=["check"]
assert recomputed.keys() == due.keys()
assert all(
    np.allclose(recomputed[name], due[name], rtol=1e-4, atol=1e-6) for name in due
)
assert worst < 1e-3

# %% [markdown]
# ### Training mode
#
# `train` and `eval` change nothing in this network, because it has no dropout and no running
# statistics. So there is no counterpart.

# %%
with torch.no_grad():
    training_mode = model.train().decode(z).sample
    assert torch.equal(model.eval().decode(z).sample, training_mode)

# %% [markdown]
# ### Save, and back to diffusers
#
# The folder has the layout of diffusers. What you train here runs there, and what was saved there
# loads here.

# %%
with tempfile.TemporaryDirectory() as folder:
    cv.save_pretrained(turned, folder)
    print(sorted(path.name for path in Path(folder).iterdir()))
    back = AutoencoderKLCogVideoX.from_pretrained(folder).eval()
    assert equal(cv.from_pretrained(folder), turned)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    assert equal(cv.from_pretrained(folder), vae)

with torch.no_grad():
    check("saved, loaded there", wrong, back.decode(z).sample)

# %% [markdown]
# ## All comparisons
#
# Each dot is one comparison from above, and should lie left of its bar. The bars are 1e-5, 1e-4
# for gradients and 2e-2 in bfloat16.

# %% tags=["drawing"]
figure, axis = plt.subplots(figsize=(7, 3.6))
rows = range(len(errors))
axis.semilogx(list(errors.values()), rows, "o")
kinds = {"gradient": 1e-4, "bfloat16": 2e-2}
bars = [
    next((bar for kind, bar in kinds.items() if kind in what), 1e-5) for what in errors
]
axis.plot(bars, rows, "k|", markersize=12)
axis.set_yticks(rows, list(errors))
axis.invert_yaxis()
axis.set_xlim(1e-8, 6e-2)
axis.grid(axis="x", alpha=0.3)
axis.set_xlabel("relative error (L2)")
plt.show()

# %% [markdown]
# ## Deliberate differences
#
# In three places this library does not follow diffusers. In diffusers, some tile sizes give video
# of the wrong size, an overlap of 0.0 is ignored, and `kl()` sums over three axes instead of
# four. The first two are shown in [a diffusers pipeline](04_diffusers_pipeline.ipynb), the last
# one here:

# %%
ours_kl, their_kl = ours_posterior.kl(), posterior.kl()
print("here", ours_kl.shape, " diffusers", tuple(their_kl.shape))
check("kl", ours_kl, their_kl.numpy().sum(axis=-1))

# %% tags=["check"]
assert ours_kl.shape == (1,)

# %% [markdown]
# ## From the Flax port
#
# [diffusers-tpu](https://github.com/yangwhale/diffusers-tpu) has an earlier port of this VAE as a
# Flax NNX module, `FlaxAutoencoderKLCogVideoX`. It needs Flax and its own fork of diffusers and
# is not run here: the left column was read from its source (`autoencoder_kl_cogvideox_flax.py`,
# December 2025). The right column is run.
#
# | task | Flax port, as read | here |
# |---|---|---|
# | load | `Class.from_pretrained(id, dtype=...)`, hub | `cv.from_pretrained(p, dtype=...)` |
# | layout | (b, t, h, w, c), kernels DHWIO | the same |
# | weights | kernels are named `kernel`, norms' weights `scale` | diffusers' names |
# | encode | `mean, logvar = vae.encode(x)` | `vae.encode(x)`, with `.mean`, `.logvar` |
# | sample | `vae(x, sample_posterior=True, rng=key)` | the same by `vae(x, key=key)` |
# | decode | `vae.decode(z)`, clipped to [-1, 1] unless by tiles | `vae.decode(z)`, never clipped |
# | tiles | `vae.enable_tiling(...)`, `vae.disable_tiling()` | `cv.tiled(...)` |
# | frame batch | `vae.num_latent_frames_batch_size = n` | `cv.framewise(vae.decode_step, n)` |
# | cache | a list, by position, inside of `decode` | returned by `decode_step`, a PyTree |
#
# If you come from that port, mind five things. Encode your clips again: its encoder pools frames
# in another order than diffusers, so its latents differ. Clip what you decode, where you need it.
# One latent frame decodes to one frame. Tiles are blended as in diffusers. Call
# `vae.unscale_latents` before `vae.decode`, which does not divide by the scaling factor.

# %%
moments = ours_posterior.mean, ours_posterior.logvar

frame, cache = vae.decode_step(latents[:, :1])
print(f"decoded values from {decoded.min():.2f} to {decoded.max():.2f}")
print("the cache:", type(cache).__name__, cache._fields)

# %% tags=["check"]
assert moments[0].shape == moments[1].shape == latents.shape
assert jnp.array_equal(vae(clip, key=key), vae.decode(ours_posterior.sample(key)))
assert frame.shape == clip[:, :1].shape

# %% [markdown]
# ## What to take away
#
# - A VAE is a tree of arrays. To cast, move, freeze or edit it, map over the tree and get another
#   tree.
# - Names and numbers are those of diffusers. The order of axes is not: channels come last.
# - Modes became transforms, and random generators became keys.
# - Weights go back and forth between the libraries, bit for bit.
#
# Next: [fine-tuning](06_finetune.ipynb) trains the decoder, and [causality and the conv
# cache](02_causality_and_the_conv_cache.ipynb) explains `decode_step`.
