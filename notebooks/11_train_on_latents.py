# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a video model on latents
#
# A latent video model is trained on what a VAE makes of videos. This notebook goes the whole way,
# in JAX and on a CPU. When you have read it, you can
#
# - encode a folder of videos into latents, once, and read them with Grain,
# - measure latents, and scale them where it belongs,
# - write a small diffusion transformer in Equinox, train it by flow matching, and sample from it,
# - decode samples, and measure in pixels whether the model does what it is asked,
# - save everything with Orbax, and resume so that not a bit differs.
#
# It runs offline in about a minute, of which training takes half. Its videos are drawn by a few
# lines of NumPy, and the VAE is the tiny one of this package. With your videos and the published
# weights the code stays the same, but for the sizes.

# %% tags=["setup"]
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Int

import eqx_cogvae as cv
from eqx_cogvae import dataset, preview, video

plt.rcParams.update({"figure.dpi": 100, "font.size": 9})
plt.rcParams["figure.constrained_layout.use"] = True

MODEL = os.environ.get("EQX_COGVAE_MODEL", "tiny")


def strip(clips, names, frames=9, width=7.2, title=None):
    """Draws a film strip with a named row for each clip."""
    picture = video.filmstrip(*clips, n=frames)
    height = (width - 1.1) * picture.shape[0] / picture.shape[1]
    figure, axes = plt.subplots(figsize=(width, height + 0.3))
    axes.imshow(picture)
    rows, columns = picture.shape[0] / len(names), picture.shape[1] / frames
    for i in range(1, frames):
        axes.axvline(i * columns - 0.5, color="white", linewidth=1)
    axes.set_yticks((np.arange(len(names)) + 0.5) * rows, names)
    axes.set(xticks=[], title=title)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    plt.show()


# %% [markdown]
# ## Videos
#
# The dataset is one whose conditioning can be checked: a disc of one of three colours crosses a
# gray frame in one of four directions. How far from the middle it crosses is random, and so is the
# gray.

# %%
COLOURS = {
    "red": (0.9, 0.2, 0.15),
    "green": (0.15, 0.7, 0.25),
    "blue": (0.2, 0.3, 0.95),
}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
FRAMES, SIZE, RADIUS, EACH = 9, 48, 0.2, 12
PAIRS = [(colour, direction) for colour in COLOURS for direction in DIRECTIONS]


def draw(colour, direction, rng):
    """A clip (t, h, w, 3) in [-1, 1]."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    ground = rng.uniform(0.25, 0.5)
    along = np.array(DIRECTIONS[direction])
    middle = 0.5 + rng.uniform(-0.25, 0.25) * along[::-1]
    clip = np.empty((FRAMES, SIZE, SIZE, 3), np.float32)
    for t in range(FRAMES):
        cx, cy = middle + 0.07 * (t - FRAMES // 2) * along
        distance = np.hypot(x - cx, y - cy) - RADIUS
        cover = np.clip(0.5 - SIZE * distance, 0, 1)[..., None]
        clip[t] = (1 - cover) * ground + cover * np.array(COLOURS[colour])
    return 2 * clip - 1


# %% [markdown]
# Each clip becomes a video file. Beside it lie its caption, in a `.txt`, and its labels, in a
# `.json`: that is how `dataset.encode` finds them.

# %%
folder = tempfile.TemporaryDirectory()
root = Path(folder.name)
(root / "videos").mkdir()
rng = np.random.default_rng(0)
for colour, direction in PAIRS:
    for number in range(EACH):
        path = root / "videos" / f"{colour}-{direction}-{number:02}.mp4"
        video.write(path, draw(colour, direction, rng), fps=8)
        path.with_suffix(".txt").write_text(f"a {colour} disc moves {direction}")
        labels = {"colour": colour, "direction": direction}
        path.with_suffix(".json").write_text(json.dumps(labels))

samples = [draw(*pair, np.random.default_rng(i)) for i, pair in enumerate(PAIRS[::5])]
strip(samples, [" ".join(pair) for pair in PAIRS[::5]])

# %% [markdown]
# ## Latents
#
# `dataset.encode` encodes the folder once and for all: 9 frames of 48x48 pixels become 3 latent
# frames of 6x6 cells with 16 channels. It stores the mean and the width of the posterior, so
# that `LatentsSource` can draw from it with a key. Captions and labels come along.

# %%
vae = cv.from_pretrained(MODEL, dtype=jnp.float32)
settings = dataset.Settings(frames=FRAMES, latents="posterior")
print(dataset.encode(vae, root / "videos", root / "latents", settings))

source = dataset.LatentsSource(root / "latents", key=jax.random.key(0))
example = source[0]
print(len(source), "examples; the first:", example.latents.shape, example.caption)
kept = ("colour", "direction", "fps", "frames")
print({name: example.metadata[name] for name in kept})

# %% [markdown]
# The VAE bounds the quality of everything that follows. Look at what it keeps of three clips.

# %%
shown = [source[i] for i in (0, 60, 120)]
strip(
    [vae.decode(jnp.asarray(each.latents)[None]) for each in shown],
    [f"{each.metadata['colour']} {each.metadata['direction']}" for each in shown],
)

# %% [markdown]
# ## Statistics, and where to scale
#
# Flow matching mixes latents with noise of unit variance. A channel that varies much less than
# the noise drowns in it, and a constant offset is something that the model has to learn for
# nothing. So each channel should have mean 0 and standard deviation 1.
#
# A checkpoint's `scaling_factor` is one number for all channels, and cannot do that. Blue below
# is what it leaves: the means are far apart, and what varies is small.

# %%
latents = np.stack([each.latents for each in source])
factored = np.asarray(vae.scale_latents(latents))
axes = (0, 1, 2, 3)
means, stds = factored.mean(axes), factored.std(axes)
constant = means.var() / factored.var()
print(f"after the factor: a standard deviation of {factored.std():.2f},")
print(f"and {constant:.0%} of the variance is between the channels' means")

# %% [markdown]
# `latents_mean` and `latents_std` in the config are the numbers of each channel, measured on our
# training set. They replace the factor. Nothing else in the model changes, and neither do the
# files: these stay in the VAE's own units, so that they outlive such a choice.
#
# **Scaling belongs in two places.** `vae.scale_latents` comes right before the diffusion model
# sees latents, in training; `vae.unscale_latents` right before `vae.decode`, in sampling. With
# `cv.save_pretrained` the config, and the statistics in it, are saved with the VAE. Statistics of
# your own are for a model of your own: a published transformer was trained with its checkpoint's
# factor, and to tune it you keep that.

# %%
config = dataclasses.replace(
    vae.config,
    scaling_factor=1.0,
    latents_mean=tuple(latents.mean(axes).tolist()),
    latents_std=tuple(latents.std(axes).tolist()),
)
vae = cv.from_pretrained(MODEL, config=config, dtype=jnp.float32)
scaled = np.asarray(vae.scale_latents(latents))

_, panels = plt.subplots(1, 2, figsize=(7.2, 2.4), sharex=True)
channels = np.arange(latents.shape[-1])
for values, name, shift in (
    (factored, "one factor", -0.2),
    (scaled, "by channel", 0.2),
):
    panels[0].bar(channels + shift, values.mean(axes), 0.4, label=name)
    panels[1].bar(channels + shift, values.std(axes), 0.4, label=name)
panels[0].set(xlabel="channel", ylabel="mean", xticks=channels[::3])
panels[1].set(xlabel="channel", ylabel="standard deviation")
panels[0].legend(frameon=False)
plt.show()

# %% tags=["check"]
assert constant > 0.3 or MODEL != "tiny"
assert np.allclose(scaled.mean(axes), 0, atol=1e-2)
assert np.allclose(scaled.std(axes), 1, atol=1e-2)
assert np.allclose(vae.unscale_latents(scaled), latents, atol=1e-3)

# %% [markdown]
# ## Batches
#
# A `LatentsSource` is a source for Grain as it is. Grain shuffles anew in every epoch, repeats
# without end, and turns the words of the metadata into numbers. Its iterator knows where it is,
# which will matter for checkpoints.

# %%
BATCH = 32


def numbers(example):
    """The arrays that training needs of an example."""
    colour, direction = example.metadata["colour"], example.metadata["direction"]
    labels = list(COLOURS).index(colour), list(DIRECTIONS).index(direction)
    return example.latents, np.array(labels, np.int32)


def batches():
    data = grain.MapDataset.source(source).seed(0).shuffle().map(numbers)
    return iter(data.repeat().batch(BATCH).to_iter_dataset())


for each in next(batches()):
    print(each.shape, each.dtype)

# %% [markdown]
# ## A video model
#
# The model is a small diffusion transformer. It cuts latents into tokens of 3x3 cells, adds a
# learned position to each, and lets all tokens of all frames attend to each other. Time and labels
# are embedded into one vector, which shifts, scales and gates every block.
#
# An Equinox model is written for one example, `jax.vmap` makes batches, and the shapes are in the
# annotations: `t h w c` is a latent clip, `n d` are its tokens.

# %%
WIDTH, HEADS, DEPTH, PATCH = 96, 4, 3, 3


def zero(linear):
    """The layer with all its numbers zero: a block begins as the identity."""
    return jax.tree.map(jnp.zeros_like, linear)


def tokens(z: Float[Array, "t h w c"]) -> Float[Array, "n v"]:
    """Squares of cells, each as one vector of its values."""
    t, h, w, c = z.shape
    cut = z.reshape(t, h // PATCH, PATCH, w // PATCH, PATCH, c)
    return cut.swapaxes(2, 3).reshape(-1, PATCH**2 * c)


def latents_of(x: Float[Array, "n v"], shape) -> Float[Array, "t h w c"]:
    """Undoes `tokens`."""
    t, h, w, c = shape
    cut = x.reshape(t, h // PATCH, w // PATCH, PATCH, PATCH, c)
    return cut.swapaxes(2, 3).reshape(shape)


def normalise(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    modulation: eqx.nn.Linear

    def __init__(self, *, key):
        keys = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=keys[1])
        self.modulation = zero(eqx.nn.Linear(WIDTH, 6 * WIDTH, key=keys[2]))

    def __call__(
        self, x: Float[Array, "n d"], condition: Float[Array, " d"]
    ) -> Float[Array, "n d"]:
        shifts, scales, gates = self.modulation(condition).reshape(3, 2, WIDTH)
        y = normalise(x) * (1 + scales[0]) + shifts[0]
        x = x + gates[0] * self.attention(y, y, y)
        y = normalise(x) * (1 + scales[1]) + shifts[1]
        return x + gates[1] * jax.vmap(self.mlp)(y)


class Flow(eqx.Module):
    """Guesses the latents that noisy ones come from."""

    embed: eqx.nn.Linear
    position: Float[Array, "n d"]
    time: eqx.nn.MLP
    colours: Float[Array, "colours d"]
    directions: Float[Array, "directions d"]
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, shape, *, key):
        t, h, w, c = shape
        count, values = t * (h // PATCH) * (w // PATCH), PATCH**2 * c
        keys = jax.random.split(key, 5 + DEPTH)
        self.embed = eqx.nn.Linear(values, WIDTH, key=keys[0])
        self.position = 0.5 * jax.random.normal(keys[1], (count, WIDTH))
        self.time = eqx.nn.MLP(64, WIDTH, WIDTH, 1, jax.nn.silu, key=keys[2])
        self.colours = jax.random.normal(keys[3], (len(COLOURS), WIDTH))
        self.directions = jax.random.normal(keys[4], (len(DIRECTIONS), WIDTH))
        self.blocks = [Block(key=key) for key in keys[5:]]
        self.head = zero(eqx.nn.Linear(WIDTH, values, key=keys[0]))

    def __call__(
        self,
        z: Float[Array, "t h w c"],
        time: Float[Array, ""],
        labels: Int[Array, "2"],
    ) -> Float[Array, "t h w c"]:
        x = jax.vmap(self.embed)(tokens(z)) + self.position
        waves = 2 * jnp.pi * time * 2 ** jnp.linspace(-2, 4, 32)
        condition = self.time(jnp.concatenate([jnp.sin(waves), jnp.cos(waves)]))
        condition += self.colours[labels[0]] + self.directions[labels[1]]
        for block in self.blocks:
            x = block(x, jax.nn.silu(condition))
        return latents_of(jax.vmap(self.head)(normalise(x)), z.shape)


model = Flow(latents.shape[1:], key=jax.random.key(1))
arrays = jax.tree.leaves(eqx.filter(model, eqx.is_array))
print(f"{sum(each.size for each in arrays):,} parameters, {len(model.position)} tokens")

# %% [markdown]
# ## Flow matching
#
# For latents $z$, noise $\epsilon$ and a time $t$ between 0 and 1, the point
# $x_t = (1 - t) \epsilon + t z$ lies on the straight line from one to the other, and moves along
# it with the velocity $z - \epsilon$. The model is shown $x_t$, $t$ and the labels, and guesses the
# end of the line, $\hat z$. The velocity that this implies is to be right:
#
# $$v = \frac{\hat z - x_t}{1 - t}, \qquad
# \mathrm{loss} = \mathbb{E}\, \lVert v - (z - \epsilon) \rVert^2$$
#
# Why not let the model answer with the velocity itself? That holds the noise, which fills all 144
# values of a token, and a small model spends its width on carrying it through. Clips of discs are
# far simpler. Where $1 - t$ goes to zero, 0.1 takes its place. Most times are drawn near the noise,
# where it is decided what goes where.
#
# The state holds all that changes: model, moving average, optimiser and step. Random numbers come
# from the key and the step, so that a resumed run draws the same.

# %%
STEPS, SAVED = 500, 480
rate = optax.warmup_cosine_decay_schedule(0, 3e-3, 40, STEPS, 1e-5)
adamw = optax.adamw(rate, weight_decay=0.01)
optimiser = optax.chain(optax.clip_by_global_norm(1.0), adamw)
key = jax.random.key(2)


class State(eqx.Module):
    model: Flow
    average: Flow
    optimiser: optax.OptState
    step: Int[Array, ""]


def start():
    """The state of a run that begins."""
    model = Flow(latents.shape[1:], key=jax.random.key(1))
    held = optimiser.init(eqx.filter(model, eqx.is_array))
    state = State(model, model, held, jnp.zeros((), jnp.int32))
    # Put where Orbax puts what it restores, so that the step compiles only once.
    arrays, rest = eqx.partition(state, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, jax.devices()[0]), rest)


def velocity(model, x: Float[Array, "b t h w c"], time, labels: Int[Array, "b 2"]):
    """The way from `x` to the end that the model guesses, in the time that is left."""
    left = jnp.maximum(1 - time, 0.1)[:, None, None, None, None]
    return (jax.vmap(model)(x, time, labels) - x) / left


def loss(model, z: Float[Array, "b t h w c"], labels: Int[Array, "b 2"], key):
    time_key, noise_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, z.shape)
    time = jax.nn.sigmoid(jax.random.normal(time_key, (len(z),)) - 0.8)
    t = time[:, None, None, None, None]
    guess = velocity(model, (1 - t) * noise + t * z, time, labels)
    return jnp.mean(jnp.square(guess - (z - noise)))


@eqx.filter_jit
def train(state, z, labels, key):
    """One step: the next state, and the loss."""
    value, gradient = eqx.filter_value_and_grad(loss)(
        state.model, z, labels, jax.random.fold_in(key, state.step)
    )
    arrays = eqx.filter(state.model, eqx.is_array)
    updates, held = optimiser.update(gradient, state.optimiser, arrays)
    model = eqx.apply_updates(state.model, updates)
    # Young averages forget faster: they begin as the random weights.
    decay = jnp.minimum(0.98, (1 + state.step) / (10 + state.step))
    average = jax.tree.map(
        lambda a, b: decay * a + (1 - decay) * b if eqx.is_array(a) else a,
        state.average,
        model,
    )
    return State(model, average, held, state.step + 1), value


# %% [markdown]
# ## Training
#
# The loop is short. Near the end Orbax saves two things together: the state, and the place of
# Grain's iterator. Orbax knows arrays, and an Equinox model also holds functions, so
# `eqx.partition` parts the two.


# %%
def save(manager, state, data):
    arrays, _ = eqx.partition(state, eqx.is_array)
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(arrays), data=grain.checkpoint.CheckpointSave(data)
    )
    manager.save(int(state.step), args=args)
    manager.wait_until_finished()


def restore(manager, state, data):
    """The last state saved, in the form of `state`; moves `data` to its place."""
    arrays, rest = eqx.partition(state, eqx.is_array)
    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(arrays),
        data=grain.checkpoint.CheckpointRestore(data),
    )
    found = manager.restore(manager.latest_step(), args=args)
    return eqx.combine(found["state"], rest)


def run(state, data, until, losses):
    for _ in range(int(state.step), until):
        z, labels = next(data)
        state, value = train(state, vae.scale_latents(z), labels, key)
        losses.append(value)
    return state


manager = ocp.CheckpointManager(root / "checkpoints")
state, data, losses = start(), batches(), []
began = time.perf_counter()
state = run(state, data, SAVED, losses)
save(manager, state, data)
state = run(state, data, STEPS, losses)
losses = [float(each) for each in losses]
print(f"{STEPS} steps in {time.perf_counter() - began:.0f} s")
print(f"loss at first {losses[0]:.2f}, mean of the last 50 {np.mean(losses[-50:]):.3f}")

# %%
smooth = np.convolve(losses, np.ones(20) / 20, "valid")
figure, panel = plt.subplots(figsize=(7.2, 2.4))
panel.semilogy(losses, color="tab:blue", alpha=0.3, label="each step")
ends = np.arange(len(smooth)) + 19
panel.semilogy(ends, smooth, color="tab:blue", label="mean of 20")
panel.axhline(losses[0], color="gray", ls="--", lw=1, label="guesses the mean")
panel.axvline(SAVED, color="tab:orange", lw=1, label="saved")
panel.set(xlabel="step", ylabel="loss")
panel.legend(frameon=False, ncols=4)
plt.show()

# %% tags=["check"]
assert np.mean(losses[-50:]) < losses[0] / 5

# %% [markdown]
# ## Sampling
#
# A sample starts as noise, at time 0, and takes Euler steps along the model's velocity.
# `jax.lax.scan` runs them in one program. Beside the next point it returns the guess
# $x_t + (1 - t) v$, where the line of this step would end: that is what to look at while a sample
# is made.

# %%
EULER = 24


@eqx.filter_jit
def sample(model, labels: Int[Array, "b 2"], key):
    """Latents in the model's units, and the guess of each step."""

    def step(x, t):
        v = velocity(model, x, jnp.full(len(x), t), labels)
        return x + v / EULER, x + (1 - t) * v

    noise = jax.random.normal(key, (len(labels), *latents.shape[1:]))
    return jax.lax.scan(step, noise, jnp.arange(EULER) / EULER)


def ask(pairs):
    words = list(COLOURS), list(DIRECTIONS)
    return jnp.array([[words[0].index(c), words[1].index(d)] for c, d in pairs])


EVERY = 4
asked = [pair for pair in PAIRS for _ in range(EVERY)]
z, guesses = sample(state.average, ask(asked), jax.random.key(3))
print(z.shape, guesses.shape)

# %% [markdown]
# ## Previews
#
# The guesses of one sample, decoded. Colour and direction are there after the first step, as a blur
# over the places that the disc may have; look at how it gathers in one of them.
#
# This uses the VAE, which is tiny here. With CogVideoX's own latents
# `preview.load("taecvx.safetensors").decode` does it 51 times cheaper. That file is a download and
# does not know the tiny model's latents, so here we only check, without weights or arithmetic,
# that it takes the same latents and gives the same frames.

# %%
decode = cv.framewise(vae.decode_step, 2)
chosen = (0, 2, 5, 11, EULER - 1)
steps = vae.unscale_latents(guesses[jnp.array(chosen), 0])
names = [f"step {i + 1}" for i in chosen]
strip([decode(each[None]) for each in steps], names, title=" ".join(asked[0]))

# %% tags=["check"]
weightless = eqx.filter_eval_shape(preview.Preview, key=key)
like = eqx.filter_eval_shape(lambda p, z: p.decode(z), weightless, steps)
assert like.shape == (len(chosen), FRAMES, SIZE, SIZE, 3) or MODEL != "tiny"

# %% [markdown]
# ## Samples
#
# One sample for each pair of labels. Nothing was picked out: these are the first ones of the key.

# %%
clips = np.asarray(decode(vae.unscale_latents(z)))
firsts = clips[::EVERY]
strip(firsts[:, None], [" ".join(pair) for pair in PAIRS], width=5.6)

# %% [markdown]
# All of them as one film, a row for each colour. A long video would be written as it is decoded:
# `video.write(path, cv.streamed(vae.decode_step, 2)(latents))` holds one frame batch at a time.

# %%
grid = firsts.reshape(len(COLOURS), len(DIRECTIONS), *firsts.shape[1:])
film = grid.transpose(2, 0, 3, 1, 4, 5).reshape(FRAMES, len(COLOURS) * SIZE, -1, 3)
video.show(film, fps=8, width=512)

# %% tags=["check"]
pieces = cv.streamed(vae.decode_step, 2, ahead=False)(vae.unscale_latents(z[:1]))
assert np.allclose(np.concatenate(list(pieces), axis=1), clips[:1], atol=1e-4)

# %% [markdown]
# ## Does it do what it is asked?
#
# Pixels can tell. The disc is where colour is; its colour is the mean there, and its direction the
# way that its centre goes from the first frame to the last. First we measure the clips that the
# VAE decodes from the dataset, to see that the measure is right; then all samples.


# %%
def measure(clip):
    """Colour and direction of a clip (t, h, w, 3), by its pixels."""
    pixels = np.clip((np.asarray(clip) + 1) / 2, 0, 1)
    vivid = np.clip(pixels.max(-1) - pixels.min(-1) - 0.25, 0, None)
    weight = vivid / (vivid.sum((1, 2), keepdims=True) + 1e-6)
    mean = (pixels * weight[..., None]).sum((0, 1, 2))
    y, x = np.mgrid[:SIZE, :SIZE]
    centres = np.stack([(weight * x).sum((1, 2)), (weight * y).sum((1, 2))], axis=-1)
    moved = centres[-1] - centres[0]
    alike = {name: np.corrcoef(mean, value)[0, 1] for name, value in COLOURS.items()}
    along = {name: moved @ np.array(way) for name, way in DIRECTIONS.items()}
    return max(alike, key=alike.get), max(along, key=along.get)


def hits(clips, pairs):
    """Shares of clips with the right colour, direction, and both."""
    right = np.array([measure(clip) for clip in clips]) == np.array(pairs)
    return right[:, 0].mean(), right[:, 1].mean(), right.all(1).mean()


known = [source[i] for i in range(0, len(source), 3)]
decoded = decode(jnp.stack([each.latents for each in known]))
labels = [(each.metadata["colour"], each.metadata["direction"]) for each in known]
results = {
    "the dataset, decoded": hits(decoded, labels),
    "samples": hits(clips, asked),
    "chance": (1 / 3, 1 / 4, 1 / 12),
}
print(f"{'':22} colour  direction  both")
for name, shares in results.items():
    print(f"{name:22} {shares[0]:6.0%}  {shares[1]:9.0%}  {shares[2]:4.0%}")

# %% tags=["check"]
assert results["the dataset, decoded"][2] > 0.95
assert results["samples"][2] > 0.8

# %% [markdown]
# ## Stopped and resumed
#
# Now we pretend that the run was killed after the save. A fresh state and fresh batches are what a
# new process would have; `restore` fills the one and moves the other to its place. The remaining
# steps are taken again, and compared: losses, weights, their average and Adam's moments.

# %%
again, more = batches(), []
resumed = restore(manager, start(), again)
assert resumed.step == SAVED
resumed = run(resumed, again, STEPS, more)
more = [float(each) for each in more]
print("without a break:", *(f"{each:.6f}" for each in losses[-4:]))
print("resumed:        ", *(f"{each:.6f}" for each in more[-4:]))

# %% tags=["check"]
assert more == losses[SAVED:]
pairs = zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True)
assert all(np.array_equal(a, b) for a, b in pairs)
manager.close()
folder.cleanup()

# %% [markdown]
# ## With your videos
#
# The steps stay the same, and most of the lines:
#
# - Encode with the published weights, on many machines if need be:
#   `python -m eqx_cogvae encode-dataset videos/ latents/ --model zai-org/CogVideoX-2b --frames 49
#   --size 480x720 --fps 8 --latents posterior`. See [datasets](../docs/datasets.md).
# - Measure the statistics of each channel on some thousands of your clips, before you train.
# - A text encoder's output takes the place of two label embeddings.
# - `source.with_key(key)` draws other latents from the posteriors, for the next epoch.
#
# ## What to take away
#
# - Latents are encoded once and stored in the VAE's units; `LatentsSource` feeds them to Grain.
# - `vae.scale_latents` comes right before the diffusion model, `vae.unscale_latents` right before
#   the decoder, and the statistics belong in the config.
# - A diffusion transformer in Equinox is a page of code, and training it a loop.
# - Measure samples in pixels: a falling loss does not say that conditioning works.
# - A checkpoint is the state and the place in the data; then a resumed run is the same run.
#
# Next: [latents](05_latents.ipynb) looks into the sixteen channels,
# [fine-tuning](06_finetune.ipynb) trains the VAE itself, and
# [many devices](08_many_devices.ipynb) decodes long videos on more than one.
