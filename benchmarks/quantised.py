"""Memory and error of weights in 8 bits, beside bfloat16.

    python benchmarks/quantised.py
    python benchmarks/quantised.py --clips ship.mp4 car.mp4 --latents latents.safetensors

Prints a table of bytes of weights, and one of errors of the tiny weights: relative (L2) to
float32, encoding clips and decoding their latents, and latents from a file, whose statistics are
a diffusion model's. The last column is the error in units of bfloat16's own.
"""

import argparse
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import eqx_cogvae as cv
from eqx_cogvae import video
from eqx_cogvae._quantised import FORMATS

MODELS = ("tiny", "CogVideoX-5b")


def main() -> None:
    """Prints both tables."""
    options = _options()
    print(f"jax {jax.__version__}, {platform.machine()}\n")
    print(f"| weights | {' | '.join(MODELS)} |")
    print("|---|" + "---|" * len(MODELS))
    columns = [_megabytes(model) for model in MODELS]
    for name in columns[0]:
        print(f"| {name} | {' | '.join(f'{column[name]:.1f} MB' for column in columns)} |")
    print("\n| task | source | weights | computed in | error | times bfloat16's |")
    print("|---|---|---|---|---|---|", flush=True)
    for task, source, call in _tasks(options):
        _rows(task, source, call)


def _megabytes(model: str) -> dict[str, float]:
    """Megabytes of a model's arrays, by what holds the kernels, from shapes alone."""
    shapes = {
        dtype: eqx.filter_eval_shape(
            lambda d=dtype: cv.VAE(cv.Config.preset(model), key=jax.random.key(0), dtype=d)
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    }
    held = {"float32": shapes[jnp.float32], "bfloat16": shapes[jnp.bfloat16]}
    for form in FORMATS:
        held[f"{form}, others bfloat16"] = eqx.filter_eval_shape(
            cv.quantised, shapes[jnp.bfloat16], form
        )
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    return {name: size(tree) / 1e6 for name, tree in held.items()}


def _tasks(options: argparse.Namespace) -> Iterator[tuple[str, str, Callable]]:
    """Yields a task, the name of its source, and the call that a model is given to."""
    height, width = map(int, options.size.split("x"))
    exact, size = cv.from_pretrained("tiny", dtype=jnp.float32), (height, width)
    clips = {"procedural": video.procedural_clip(options.frames, height, width)}
    if options.clips:
        clips = {
            path.stem: np.asarray(video.read(path, frames=options.frames, size=size))
            for path in options.clips
        }
    for name, clip in clips.items():
        x = jnp.asarray(clip)
        z = exact.encode(x).mean
        yield "encode", name, lambda vae, x=x: vae.encode(x).mean
        yield "decode", name, lambda vae, z=z: vae.decode(z)
    if options.latents:
        (array,) = load_file(options.latents).values()
        z = jnp.asarray(np.moveaxis(array.astype(np.float32), 1, -1))
        cell = exact.config.spatial_compression
        frames = exact.config.latent_frames(options.frames)
        z = z[:, :frames, : height // cell, : width // cell]
        yield "decode", options.latents.stem, lambda vae: vae.decode(z)


def _rows(task: str, source: str, call: Callable) -> None:
    exact = cv.from_pretrained("tiny", dtype=jnp.float32)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    due, own = np.asarray(call(exact)), None
    models = {("bfloat16", "bfloat16"): half}
    for form in FORMATS:
        models[form, "bfloat16"] = cv.quantised(half, form)
    for form in FORMATS:
        models[form, "float32"] = cv.quantised(exact, form)
    for (weights, dtype), vae in models.items():
        error = np.linalg.norm(np.asarray(call(vae), np.float32) - due) / np.linalg.norm(due)
        own = own or error
        ratio = f"{error / own:.1f}"
        print(f"| {task} | {source} | {weights} | {dtype} | {error:.2e} | {ratio} |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=Path, nargs="+", help="videos; without, a procedural one")
    parser.add_argument("--latents", type=Path, help="a safetensors file of one array, BCTHW")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", default="128x192")
    return parser.parse_args()


if __name__ == "__main__":
    main()
