# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A diffusers pipeline
#
# This notebook is for those who have a CogVideoX pipeline in torch and want its VAE to run in
# JAX. After it you can swap the VAE in text-to-video, image-to-video and video-to-video
# pipelines, and you know what crosses between torch and JAX, what is copied, and where gradients
# flow. Each pipeline is compared with its own VAE. It runs offline.

# %% tags=["setup"]
import contextlib
import json
import os
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tokenizers
import torch
from PIL import Image

import eqx_cogvae as cv
from eqx_cogvae import video

with warnings.catch_warnings(
    action="ignore"
):  # progress bars miss the notebook's widgets
    import diffusers
    import transformers
    from diffusers import AutoencoderKLCogVideoX

    from eqx_cogvae.diffusers import (
        EqxAutoencoderKLCogVideoX,
        PreviewCallback,
        to_jax,
        to_torch,
    )

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()
plt.rcParams.update(
    {"figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9}
)

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)

# %% [markdown]
# ## Two VAEs with the same weights
#
# `EqxAutoencoderKLCogVideoX` replaces diffusers' class. It has the same methods, attributes and
# config. We also load diffusers' own class from the same files.

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


ours, theirs = EqxAutoencoderKLCogVideoX(vae), reference().float()
weights = theirs.state_dict()
print(f"{len(weights)} tensors, equal bit for bit")

# %% tags=["check"]
assert isinstance(ours, type(theirs))  # what pipelines ask
assert ours.state_dict().keys() == weights.keys()
assert all(
    torch.equal(tensor, weights[name]) for name, tensor in ours.state_dict().items()
)

# %% [markdown]
# A call goes there and back:
#
# ```
# torch tensor (b, c, t, h, w) -> JAX array (b, t, h, w, c) -> compiled program
#                                                                     |
# torch tensor (b, c, t, h, w) <- JAX array (b, t, h, w, c) <---------+
# ```
#
# The results have diffusers' own types, so `latent_dist.sample(generator)` draws the same random
# numbers as before. The two agree within 1e-5, as the norm of the difference over the norm of the
# result.


# %%
def distance(got, due):
    """Returns the relative difference, in L2."""
    return float((got.double() - due.double()).norm() / due.double().norm())


clip = video.procedural_clip(9, 96, 144, seed=100)  # (b, t, h, w, c)
x = to_torch(jnp.asarray(clip))  # (b, c, t, h, w)

with torch.no_grad():
    posteriors = [each.encode(x).latent_dist for each in (ours, theirs)]
    z = posteriors[1].mode()
    decoded = [each.decode(z).sample for each in (ours, theirs)]
draws = [each.sample(torch.Generator().manual_seed(1)) for each in posteriors]
for name, pair in {
    "encode, mean": [each.mean for each in posteriors],
    "encode, logvar": [each.logvar for each in posteriors],
    "sample": draws,
    "decode": decoded,
}.items():
    print(f"{name:15} {distance(*pair):.1e}")
    assert distance(*pair) < 1e-5

# %% tags=["check"]
assert type(posteriors[0]) is type(posteriors[1])
assert decoded[0].shape == x.shape

# %% [markdown]
# ## A pipeline without a download
#
# The VAE is real. Everything around it is small and random: a transformer of one block, a text
# encoder, and a tokenizer that knows seven words. Such a pipeline produces noise, but it shows
# whether both VAEs give the same frames. To have something to look at, a callback pulls its
# latents towards those of a known clip.

# %% tags=["setup"]
HEIGHT, WIDTH, FRAMES = 96, 144, 9
PROMPT = "a disc and slab drift over hills"
channels, cell = vae.config.latent_channels, vae.config.spatial_compression


def text_models():
    """Returns a T5 encoder of one layer and a tokenizer of the prompt's words."""
    words = {
        word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *PROMPT.split()])
    }
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(words), **sizes)
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.T5EncoderModel(config).eval(),
    }


def pipeline(kind, vae, in_channels=channels):
    """Returns a random pipeline around `vae`."""
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=channels,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=1,
        sample_width=WIDTH // cell,
        sample_height=HEIGHT // cell,
        sample_frames=FRAMES,
        max_text_seq_length=8,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler()
    pipe = kind(
        vae=vae, transformer=transformer.eval(), scheduler=scheduler, **text_models()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


known = theirs.config.scaling_factor * z.transpose(
    1, 2
)  # pipelines have (b, t, c, h, w)


def pulled(pipe, step, timestep, tensors):
    """Moves the latents three quarters of the way to `known`, after each step."""
    return {"latents": tensors["latents"].lerp(known, 0.75)}


def generate(pipe, **arguments):
    """Returns frames (b, t, h, w, c) in [-1, 1], the layout of `eqx_cogvae`."""
    arguments = {"num_inference_steps": 4, "max_sequence_length": 8} | arguments
    generator = torch.Generator().manual_seed(0)
    frames = pipe(
        prompt=PROMPT, generator=generator, output_type="pt", **arguments
    ).frames
    return frames.permute(0, 1, 3, 4, 2).numpy() * 2 - 1


def swapped(pipe, **arguments):
    """Returns the frames with the pipeline's own VAE, and with ours in its place."""
    before = generate(pipe, **arguments)
    pipe.vae = ours
    return before, generate(pipe, **arguments)


# %% tags=["drawing"]
def compare(title, before, after, *above):
    """Shows a film strip for each VAE, and their largest difference in a pixel."""
    worst = np.abs(before - after).max() * 127.5
    rows = [*above, before, after]
    _, axes = plt.subplots(figsize=(7, 0.95 * len(rows) + 0.3))
    axes.imshow(video.filmstrip(*rows, n=5))
    axes.set_yticks([(i + 0.5) * HEIGHT for i in range(len(rows))])
    axes.set_yticklabels([*["input"] * len(above), "diffusers' VAE", "ours"])
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(f"{title}: at most {worst:.1e} of 255 grey levels apart")
    plt.show()
    assert worst < 0.1


# %% [markdown]
# ## Text to video
#
# The pipeline starts from noise and uses the VAE once, at the end: `vae.decode`. The swap is one
# assignment, `pipe.vae = ours`. Both rows show the known clip under the noise of the random
# transformer.

# %%
pipe = pipeline(diffusers.CogVideoXPipeline, theirs)
text = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
before, after = swapped(pipe, **text, callback_on_step_end=pulled)
compare("Text to video", before, after)

# %% [markdown]
# The film shows diffusers' VAE on the left and ours on the right.

# %%
video.show(np.concatenate([before, after], axis=3), fps=8, width=580)

# %% [markdown]
# ## Previews while it generates
#
# `PreviewCallback` decodes the latents after chosen steps and writes a film strip or a video of
# each. It is made for the published tiny autoencoder of CogVideoX's latents, whose decoder needs 51
# times fewer operations than the VAE's: `PreviewCallback(preview.load("taecvx.safetensors"), ...)`.
# That file is a download, and it was not trained on the latents of the tiny weights. So the VAE
# itself decodes here, which is slower and shows the true picture.
#
# A pipeline takes one callback. Ours first pulls the latents, more gently than before, and then
# calls the preview. The rows run from the first steps to the last: at first there is noise alone,
# and halfway the scene comes through.

# %%
with tempfile.TemporaryDirectory() as folder:
    strips = PreviewCallback(vae, f"{folder}/step{{step}}.png", every=2, frames=5)

    def watched(pipe, step, timestep, tensors):
        latents = tensors["latents"].lerp(known, 0.5)
        return strips(pipe, step, timestep, {"latents": latents})

    generate(pipe, **text, num_inference_steps=8, callback_on_step_end=watched)
    files = sorted(Path(folder).iterdir())
    strips_shown = [np.asarray(Image.open(file)) for file in files]

# %% tags=["drawing"]
_, axis = plt.subplots(figsize=(7, 4.1))
axis.imshow(np.concatenate(strips_shown))
axis.set_yticks((np.arange(len(files)) + 0.5) * HEIGHT, [file.stem for file in files])
axis.set_xticks([])
axis.spines[:].set_visible(False)
axis.tick_params(length=0)
plt.show()

# %% tags=["check"]
assert [file.stem for file in files] == ["step1", "step3", "step5", "step7"]
assert {picture.shape for picture in strips_shown} == {(HEIGHT, 5 * WIDTH, 3)}

# %% [markdown]
# ## Image to video
#
# This pipeline uses the VAE twice. It encodes one frame, whose latents become extra channels
# beside the noise, and it decodes a clip.

# %%
pixels = ((clip[0] + 1) * 127.5).round().astype(np.uint8)
images = [Image.fromarray(each) for each in pixels]

pipe = pipeline(
    diffusers.CogVideoXImageToVideoPipeline, theirs, in_channels=2 * channels
)
before, after = swapped(pipe, image=images[0], **text, callback_on_step_end=pulled)
compare("Image to video", before, after)

# %% [markdown]
# ## Video to video
#
# This pipeline encodes a whole clip, adds noise to its latents, and decodes the result of the
# denoising. With little noise (`strength=0.02`) it needs no callback: the scene remains visible.

# %%
pipe = pipeline(diffusers.CogVideoXVideoToVideoPipeline, theirs)
scene = {"video": images, "height": HEIGHT, "width": WIDTH}
scene |= {"strength": 0.02, "num_inference_steps": 100}
before, after = swapped(pipe, **scene)
compare("Video to video", before, after, clip)

# %% [markdown]
# ## The switches
#
# `enable_tiling`, `enable_slicing` and the like work as in diffusers, with the same arguments.
# Inside, they choose the composition for the next call: `cv.framewise` within `cv.tiled` within
# `cv.sliced`. Here we decode a batch of two clips, one at a time, in tiles that are 72 pixels
# wide, overlap by a third, and are higher than the frame.

# %%
batch = torch.cat([z, z.flip(4)])[
    :, :, :1
]  # the scene and its mirror image, a frame of each
for each in (ours, theirs):
    each.enable_slicing()
whole = ours.decode(batch).sample

for each in (ours, theirs):
    each.enable_tiling(144, 72, 1 / 3, 1 / 3)
with torch.no_grad():
    tiles = [each.decode(batch).sample for each in (ours, theirs)]
print(f"tiled beside tiled in diffusers: {distance(*tiles):.1e}")
print(f"tiled beside whole:              {distance(tiles[0], whole):.1e}")

# %% tags=["check"]
assert distance(*tiles) < 1e-5
assert distance(tiles[0], whole) > 1e-3

# %% [markdown]
# The first number is rounding. The second is not: tiles do not see beyond their edges, in either
# library. In the right picture, the difference jumps from tile to tile and is largest in the
# last, the narrowest one. [Tiling and memory](03_tiling_and_memory.ipynb) explains it.

# %%
shown = [
    np.clip(each[0, :, 0].permute(1, 2, 0) / 2 + 0.5, 0, 1)
    for each in (whole, tiles[0])
]
apart = (tiles[0] - whole)[0].abs().mean(dim=(0, 1)) * 127.5

# %% tags=["drawing"]
figure, axes = plt.subplots(1, 3, figsize=(7.2, 1.9))
for axis, picture, title in zip(
    axes, [*shown, apart], ["whole", "in tiles", "apart"], strict=True
):
    image = axis.imshow(picture, cmap="magma")
    axis.set_title(title)
    axis.set_xticks(range(0, WIDTH, 48))
    axis.set_yticks(range(0, HEIGHT, 48))
    axis.set_xlabel("pixels")
figure.colorbar(image, ax=axes[2], label="grey levels of 255")
plt.show()

# %%
by_tile = [
    float(apart[:, columns].mean())
    for columns in (slice(48), slice(72, 96), slice(120, 144))
]
print("columns of one tile alone, apart by", *(f"{value:.2f}" for value in by_tile))

# %% tags=["check"]
assert by_tile[2] == max(by_tile)

# %% [markdown]
# Two things differ from diffusers: an overlap of 0.0 is used, and the result has the right size
# for any tile. For tiles 64 pixels wide with the usual overlaps, diffusers rounds stride and crop
# differently, so the size is wrong. If asked for no overlap, it keeps the overlap that it had:

# %%
sizes = {}
for each in (ours, theirs):
    each.disable_slicing()
    each.enable_tiling(144, 64, 1 / 6, 1 / 5)
    with torch.no_grad():
        sizes[each] = tuple(each.decode(z[:, :, :1]).sample.shape[3:])
    each.disable_tiling()
print(f"due {(HEIGHT, WIDTH)}, diffusers {sizes[theirs]}, ours {sizes[ours]}")

fresh = EqxAutoencoderKLCogVideoX(vae), reference()
for each in fresh:
    each.enable_tiling(32, 32, 0.0, 0.0)
overlaps = [each.tile_overlap_factor_height for each in fresh]
print(f"overlap after asking for 0.0: ours {overlaps[0]}, diffusers {overlaps[1]:.3f}")

# %% tags=["check"]
assert sizes[ours] == (HEIGHT, WIDTH)
assert sizes[theirs] != (HEIGHT, WIDTH)
assert overlaps == [0.0, 1 / 6]

# %% [markdown]
# ## What is copied
#
# Tensors and arrays share memory through DLPack if the bytes are in the right order. For video,
# torch's default order differs from JAX's: torch keeps the frames of one channel together, JAX
# the channels of one pixel. The two agree for `torch.channels_last_3d`.

# %%
contiguous = torch.rand(1, 3, 9, 16, 24)
layouts = {
    "vector, matrix, ...": torch.rand(6, 64),
    "video, torch's default": contiguous,
    "video, channels_last_3d": contiguous.contiguous(
        memory_format=torch.channels_last_3d
    ),
    "video, from to_torch": to_torch(jnp.asarray(clip)),
    "video, one of a batch": x.repeat(2, 1, 1, 1, 1).to(
        memory_format=torch.channels_last_3d
    )[1:],
    "video, every other frame": x[:, :, ::2],
}
shares = {}
for name, tensor in layouts.items():
    array = to_jax(tensor)
    back = to_torch(array)
    shares[name] = array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert back.data_ptr() == array.unsafe_buffer_pointer()  # no copy on the way back
    assert torch.equal(back, tensor)
    print(f"{name:25} {'shared' if shares[name] else 'copied once'}")

copied = [name for name, shared in shares.items() if not shared]

# %% tags=["check"]
assert copied == ["video, torch's default", "video, every other frame"]

# %% [markdown]
# So `vae.encode` copies an ordinary torch batch once, and everything that the VAE returns can go
# in again without a copy. Shared memory has a rule: do not write to such a tensor in place while
# the array is in use. Values cross unchanged, also those of bfloat16. int64 and float64 are
# refused unless `jax_enable_x64` is set, because JAX has no 64-bit types by default.
#
# The weights exist once. They belong to JAX, and `state_dict` returns views of them.

# %%
half = torch.randn(2, 5).to(torch.bfloat16)

for dtype in (torch.int64, torch.float64):
    try:
        to_jax(torch.ones(2, dtype=dtype))
    except ValueError as error:
        refused = str(error)
    print(refused)
    assert refused.startswith(f"got {dtype}")

held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(ours.vae)}
print(
    f"{sum(leaf.nbytes for leaf in jax.tree.leaves(vae)) / 1e6:.1f} MB of weights, once"
)

# %% tags=["check"]
assert to_jax(half).dtype == jnp.bfloat16 and torch.equal(to_torch(to_jax(half)), half)
assert {tensor.data_ptr() for tensor in ours.state_dict().values()} == held
assert all(a is b for a, b in zip(*map(jax.tree.leaves, (ours.vae, vae)), strict=True))

# %% [markdown]
# ## Gradients
#
# Gradients flow through `encode` and `decode` to the input through torch's autograd, so a guided
# pipeline keeps working. Here we ask which latents the middle of the last frame depends on.
# Bright cells matter most. The two maps should be equal.

# %%
MIDDLE = (..., -1, slice(40, 56), slice(60, 84))  # of the last frame


def sensitivity(model):
    """Returns the gradient of the middle's brightness by each latent."""
    leaf = z.clone().requires_grad_()
    loss = model.decode(leaf).sample[MIDDLE].square().mean()
    return torch.autograd.grad(loss, leaf)[0]


gradients = [sensitivity(each) for each in (ours, theirs)]
print(f"gradients apart by {distance(*gradients):.1e}")

# %% tags=["drawing"]
figure, axes = plt.subplots(1, 2, figsize=(7, 2.3), sharey=True)
for axis, gradient, title in zip(axes, gradients, ["ours", "diffusers'"], strict=True):
    size = gradient[0].square().sum(dim=(0, 1)).sqrt()
    image = axis.imshow(size / size.max(), cmap="magma", vmin=0, vmax=1)
    axis.set_title(f"{title}: gradient norm, relative")
    axis.set_xlabel("latent columns")
axes[0].set_ylabel("latent rows")
figure.colorbar(image, ax=axes)
plt.show()

# %% tags=["check"]
assert distance(*gradients) < 1e-4

# %% [markdown]
# The adapter has no torch parameters, so there are no torch gradients by the weights. Second
# derivatives by the input work. With `enable_gradient_checkpointing` the backward pass holds the
# activations of one frame batch at a time, and only caches between frame batches.
#
# To train the weights, use the Equinox module, `ours.vae`. `to_jax` brings a torch batch to it.
# [Fine-tuning](06_finetune.ipynb) shows training.

# %%
error = jnp.mean(jnp.square(ours.vae.decode(to_jax(z)) - to_jax(x)))
due = torch.nn.functional.mse_loss(decoded[1], x)
np.testing.assert_allclose(error, due, rtol=1e-5)
print(f"mean squared error {error:.4f} in JAX, {due:.4f} in torch")

# %% tags=["check"]
assert sum(parameter.numel() for parameter in ours.parameters()) == 0

# %% [markdown]
# ## Casts, and a pipeline on disk
#
# `pipe.to(torch.bfloat16)` also casts the adapter. The VAE that you gave to it is immutable, like
# all PyTrees: the adapter holds a cast copy, and yours does not change.
#
# A saved pipeline names diffusers' class and holds its files. It loads with or without this
# package, and gives the same frames.

# %%
cast = EqxAutoencoderKLCogVideoX(vae).to(torch.bfloat16)

with tempfile.TemporaryDirectory() as folder:
    pipe.save_pretrained(folder)
    index = json.loads(Path(folder, "model_index.json").read_text())
    print("model_index.json says", index["vae"])
    assert index["vae"] == ["diffusers", "AutoencoderKLCogVideoX"]
    load = diffusers.CogVideoXVideoToVideoPipeline.from_pretrained
    plain = load(folder)
    again = EqxAutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae")
    mixed = load(folder, vae=again)
for each in (plain, mixed):
    each.set_progress_bar_config(disable=True)
    frames = generate(each, **scene)
    assert np.abs(frames - after).max() * 127.5 < 0.1

# %% tags=["check"]
assert cast.dtype == torch.bfloat16 and vae.dtype == jnp.float32
assert cast.decode(z[:, :, :1, :4, :4]).sample.dtype == torch.bfloat16

assert type(plain.vae) is AutoencoderKLCogVideoX and mixed.vae is again

# %% [markdown]
# ## With the real model
#
# Only the names change. This needs the weights, and a machine for the transformer:
#
# ```python
# import torch
# from diffusers import CogVideoXPipeline
# from diffusers.utils import export_to_video
# from eqx_cogvae.diffusers import EqxAutoencoderKLCogVideoX
#
# name = "zai-org/CogVideoX-5b"
# dtype = torch.bfloat16
# vae = EqxAutoencoderKLCogVideoX.from_pretrained(name, torch_dtype=dtype)
# vae.enable_tiling()
# pipe = CogVideoXPipeline.from_pretrained(name, vae=vae, torch_dtype=dtype)
# frames = pipe("a kitten in the grass", num_frames=49).frames[0]
# export_to_video(frames, "kitten.mp4", fps=8)
# ```
#
# On a GPU, import `eqx_cogvae.diffusers` before JAX runs. Otherwise JAX reserves three quarters
# of the memory when it starts. Several devices share a frame with `mesh=cv.best_mesh(...)`, see
# [many devices](08_many_devices.ipynb).
#
# ## What to take away
#
# - `pipe.vae = EqxAutoencoderKLCogVideoX(vae)` is the whole swap. The frames equal those of
#   diffusers' VAE to far less than a grey level.
# - Methods, attributes and switches are those of diffusers. Sizes are right for any tile.
# - Video crosses without a copy in `channels_last_3d`, which is how it comes back. Torch's
#   default order is copied once on the way in.
# - Gradients reach the input. Weights are trained in JAX.
# - Saved pipelines are ordinary diffusers pipelines.
#
# Next: [latents](05_latents.ipynb) shows what lies between encoder and decoder, and [numerics and
# speed](09_numerics_and_speed.ipynb) compares the two libraries layer by layer.
