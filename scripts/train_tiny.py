"""Trains the tiny VAE: python scripts/train_tiny.py --data DIR --out DIR [--resume].

The mp4 clips of `--data`, at several sizes and strides in time, are mixed with procedural ones.
Three stages of larger and larger crops, each of two frame batches, so that steady batches with
their cache are trained as well as first ones. On a GPU take many crops a step and compute in
bfloat16: `--batch 16 --dtype bfloat16`. The state is saved every few minutes: a killed run goes
on with `--resume`, to the same losses. `--out` then holds `tiny/`,
the averaged weights in bfloat16 in diffusers' layout, and `figures.json`, what was measured.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eqx_cogvae as cv
from eqx_cogvae import training, video
from eqx_cogvae._pixels import from_pixels

HELD_OUT_FRAMES, HELD_OUT_SIZE = 17, (128, 192)
_LOGVAR = -6.0


class Stage(NamedTuple):
    """Part of the run: a share of the steps, and its crops."""

    share: float
    frames: int
    size: tuple[int, int]
    heights: tuple[int, ...]


STAGES = (
    Stage(0.80, 17, (64, 64), (128, 192, 256)),
    Stage(0.16, 17, (96, 128), (128, 160, 192, 224, 256)),
    Stage(0.04, 17, (128, 192), (128, 160, 224)),
)


def main() -> None:
    """Trains, or goes on with it."""
    options = _options()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    loss = training.ClipLoss(l1=options.l1, l2=4.0, gradient=0.1)
    dtype = jnp.dtype(options.dtype)
    trainer = training.Trainer(_optimiser(options), loss=loss, decay=0.99, dtype=dtype)
    state, saved = trainer.init(_start(options)), out / "state.eqx"
    if options.resume and saved.exists():
        state = training.load_state(saved, state)
    key, begun = jax.random.key(options.seed), time.time()
    last, recent = begun, []
    while (step := int(state.step)) < options.steps:
        stage, stop = _stage(step, options)
        print(f"from step {step} on: {stage}", flush=True)
        for clips in _crops(stage, options).batches(step):
            state, metrics = trainer.step(state, _varied(clips, options.seed, step), key)
            recent.append(metrics)
            step += 1
            if step % 50 == 0:
                _report(step, jax.device_get(recent), time.time() - begun)
                recent = []
            if step == stop or time.time() - last > options.save_every:
                last = time.time()
                training.save_state(saved, state)
            if step == stop:
                break
    _export(state.average, out, options, int(state.step))


def _start(options: argparse.Namespace) -> cv.VAE:
    """Given weights to go on from, or random ones that begin to learn sooner.

    Spatial norms begin without the product of features and latents, latents without noise to
    drown in, and channels differ by a constant: norms would else hide how bright a clip is.
    """
    if options.start:
        return cv.from_pretrained(options.start, dtype=jnp.float32)
    config = cv.Config.preset("tiny")
    z = config.latent_channels

    def begun(name: str, x: Any) -> Any:
        if name.endswith(".conv_y.conv.weight"):
            return jnp.zeros_like(x)
        if name.endswith(".conv_y.conv.bias"):
            return jnp.ones_like(x)
        if name == "encoder.conv_in.conv.bias":
            return x * 9
        if name.startswith("encoder.conv_out.conv."):
            return x.at[..., z:].set(_LOGVAR if x.ndim == 1 else 0.0)
        return x

    vae = cv.VAE(config, key=jax.random.key(options.seed))
    return jax.tree.map(begun, training.tensor_names(vae), vae)


def _optimiser(options: argparse.Namespace) -> optax.GradientTransformation:
    """Muon for the convolutions, a kernel's taps and inputs as rows; Adam for what is left."""
    rate = optax.warmup_cosine_decay_schedule(0.0, options.rate, 50, options.steps)
    matrix = lambda rank: optax.contrib.MuonDimensionNumbers(  # noqa: E731
        tuple(range(rank - 1)), rank - 1
    )
    kernels = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: matrix(x.ndim) if x.ndim > 1 else None, tree
    )
    return optax.contrib.muon(
        rate,
        adam_learning_rate=lambda step: 0.4 * rate(step),
        adam_b2=0.99,
        muon_weight_dimension_numbers=kernels,
        consistent_rms=0.2,
    )


def _stage(step: int, options: argparse.Namespace) -> tuple[Stage, int]:
    """The stage that a step belongs to, and the step it ends at."""
    stages, share = [STAGES[i] for i in options.stages], 0.0
    for stage in stages:
        share += stage.share / sum(each.share for each in stages)
        stop = round(options.steps * share)
        if step < stop:
            break
    return stage, stop


def _crops(stage: Stage, options: argparse.Namespace) -> training.Crops:
    files = [path for path in _files(options) if path.stem != options.held_out]
    sources = [training.Source(path, height) for path in files for height in stage.heights]
    for seed in range(4):
        clip = np.asarray(video.procedural_clip(49, 128, 192, seed=seed))[0]
        sources.append(training.Source(clip, weight=0.1 * len(sources)))
    return training.Crops(
        sources,
        batch=options.batch,
        frames=stage.frames,
        size=stage.size,
        strides=(1, 2, 3),
        seed=options.seed,
        workers=os.cpu_count() or 2,
    )


def _varied(clips: np.ndarray, seed: int, step: int) -> jax.Array:
    """Half of the clips recoloured, half run backwards, a third upside down: five videos are few.

    Recoloured are those with their channels in another order, duller and brighter or darker. A
    step's are the same however often the run was resumed.
    """
    rng, count = np.random.default_rng((seed, step)), len(clips)
    recoloured = rng.random((count, 1)) < 0.5
    order = np.where(recoloured, rng.permuted(np.tile(np.arange(3), (count, 1)), axis=1), range(3))
    gain = np.where(recoloured, rng.uniform(0.5, 1.0, (count, 3)), 1.0)
    shift = rng.uniform(-1.0, 1.0, (count, 3)) * (1 - gain)
    clips = np.stack([clip[:: rng.choice((1, -1)), :: rng.choice((1, 1, -1))] for clip in clips])
    return _recoloured(clips, order, gain.astype(np.float32), shift.astype(np.float32))


@jax.jit
def _recoloured(clips: jax.Array, order: jax.Array, gain: jax.Array, shift: jax.Array) -> jax.Array:
    order, gain, shift = (x[:, None, None, None] for x in (order, gain, shift))
    x = jnp.take_along_axis(from_pixels(clips), order, axis=-1)
    return x * gain + shift


def _report(step: int, metrics: list[dict[str, Any]], seconds: float) -> None:
    mean = {name: float(np.mean([each[name] for each in metrics])) for name in metrics[0]}
    text = " ".join(f"{name} {value:.4f}" for name, value in mean.items())
    print(
        f"step {step} psnr {10 * np.log10(4 / mean['l2']):.2f} {text} {seconds:.0f} s", flush=True
    )


def _export(vae: cv.VAE, out: Path, options: argparse.Namespace, step: int) -> None:
    """The weights, with the factor that brings the latents' deviation to one, and figures."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vae)
    vae = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    latents, psnr = [], {}
    for path in _files(options):
        clip = jnp.asarray(video.read(path, frames=HELD_OUT_FRAMES, size=HELD_OUT_SIZE))
        latents.append(np.asarray(vae.encode(clip).mean).ravel())
        if path.stem == options.held_out:
            psnr[path.stem] = video.psnr(vae(clip), clip)
            latents.pop()
    clip = jnp.asarray(video.procedural_clip(HELD_OUT_FRAMES, *HELD_OUT_SIZE, seed=100))
    psnr["procedural, seed 100"] = video.psnr(vae(clip), clip)
    every = np.concatenate(latents)
    fields = vae.config.to_dict() | {"scaling_factor": round(1 / float(np.std(every)), 4)}
    blank = eqx.filter_eval_shape(cv.VAE, cv.Config.from_dict(fields), key=jax.random.key(0))
    scaled = jax.tree.unflatten(jax.tree.structure(blank), jax.tree.leaves(half))
    cv.save_pretrained(scaled, out / "tiny")
    figures = {
        "step": step,
        "held_out_psnr_db": psnr,
        "latent_mean": float(np.mean(every)),
        "latent_std": float(np.std(every)),
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"step {step} held out {psnr}", flush=True)


def _files(options: argparse.Namespace) -> list[Path]:
    return sorted(Path(options.data).glob("*.mp4"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--start", help="a checkpoint to begin from")
    parser.add_argument("--held-out", default="kitten", help="a clip to measure on")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--stages", type=int, nargs="+", default=range(len(STAGES)))
    parser.add_argument("--batch", type=int, default=1, help="crops of a step")
    parser.add_argument("--dtype", default="float32", help="what is computed in")
    parser.add_argument("--l1", type=float, default=1.0, help="weight of the absolute error")
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--save-every", type=float, default=300, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
