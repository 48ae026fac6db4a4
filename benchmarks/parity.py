"""The default configuration through the command line, against diffusers on the same frames.

    python benchmarks/parity.py CLIP [--frames N] [--size HxW]

diffusers writes a checkpoint of random weights; the command line encodes and decodes the clip
with it. Prints tensors, parameters, relative errors (L2) and seconds.
"""

import argparse
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch

from eqx_cogvae import _latents, video
from eqx_cogvae._cli import main as cli


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--size", default="96x144")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLCogVideoX().eval()
    state = model.state_dict()
    print(f"{len(state)} tensors, {sum(t.numel() for t in state.values()):,} parameters")
    size = tuple(map(int, options.size.split("x")))
    clip = np.asarray(video.read(options.clip, frames=options.frames, size=size))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        latents, frames = Path(folder, "z.safetensors"), Path(folder, "out.npy")
        common = ["--model", folder, "--dtype", "float32"]
        cut = ["--frames", str(options.frames), "--size", options.size]
        begun = time.perf_counter()
        _run("encode", options.clip, latents, *common, *cut)
        _run("decode", latents, frames, *common)
        print(f"ours {time.perf_counter() - begun:.0f} s, loading and compiling included")
        ours, decoded = _latents.load_latents(latents).array, np.load(frames)
    begun = time.perf_counter()
    with torch.no_grad():
        mean = model.encode(torch.from_numpy(np.moveaxis(clip, -1, 1).copy())).latent_dist.mean
        sample = model.decode(torch.from_numpy(np.moveaxis(ours, -1, 1).copy())).sample
    print(f"diffusers {time.perf_counter() - begun:.0f} s")
    print(f"encode {_distance(ours, mean):.2e}, decode {_distance(decoded, sample):.2e}")


def _run(*arguments: object) -> None:
    if cli.main([str(argument) for argument in arguments]):
        raise SystemExit("the command line failed")


def _distance(ours: np.ndarray, theirs: torch.Tensor) -> float:
    due = np.moveaxis(theirs.numpy(), 1, -1).astype(np.float64)
    return float(np.linalg.norm(ours - due) / np.linalg.norm(due))


if __name__ == "__main__":
    main()
