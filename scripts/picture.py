"""Draws the picture of README and site: python scripts/picture.py [--model MODEL].

It shows frames of the procedural clip, their reconstruction, and the difference multiplied by
three.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp

import eqx_cogvae as cv
from eqx_cogvae import video

TARGET = Path(__file__).resolve().parents[1] / "docs" / "assets" / "reconstruction.png"


def main() -> None:
    """Writes the picture, and prints the PSNR of the reconstruction."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    vae = cv.from_pretrained(parser.parse_args().model, dtype=jnp.float32)
    clip = jnp.asarray(video.procedural_clip(17, 96, 144))
    decoded = vae(clip)
    video.filmstrip(clip, decoded, 3 * (decoded - clip), n=5, path=TARGET)
    print(f"{TARGET.name}: PSNR {video.psnr(decoded, clip):.2f} dB")


if __name__ == "__main__":
    main()
