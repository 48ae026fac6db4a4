"""How much of what a caller does with decoded frames a stream hides behind the next batch.

    python benchmarks/streams.py [--model CogVideoX-5b] [--clip 49x480x720] [--work 0.05]

Decodes a clip, takes each piece to the host as bytes, and sleeps over it for `--work` seconds, as
a caller would write a file. First in turn, then with the stream running ahead: the seconds that
are saved are those of the work that the device did not wait for. Medians of `--repeats`.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import eqx_cogvae as cv


def main() -> None:
    """Prints the seconds of a decode alone, of one in turn with the work, and of both at once."""
    options = _options()
    config = cv.Config.preset(options.model)
    vae = cv.VAE(config, key=jax.random.key(0), dtype=jnp.dtype(options.dtype))
    frames, height, width = map(int, options.clip.split("x"))
    cell = config.spatial_compression
    cells = (1, config.latent_frames(frames), height // cell, width // cell)
    z = jax.random.normal(jax.random.key(1), (*cells, config.latent_channels), vae.dtype)
    step = cv.as_uint8(vae.decode_step)

    def run(work: float, ahead: bool) -> tuple[float, int]:
        begun, pieces = time.perf_counter(), 0
        for piece in cv.streamed(step, 2, ahead=ahead)(z):
            np.asarray(piece)
            time.sleep(work)
            pieces += 1
        return time.perf_counter() - begun, pieces

    rows = {
        "decoding alone": (0.0, False),
        "in turn with the work": (options.work, False),
        "running ahead": (options.work, True),
    }
    print(f"{options.model}, {options.clip}, {vae.dtype}, {jax.devices()[0].device_kind}\n")
    print("| | seconds | of them the work |\n|---|---|---|")
    for name, arguments in rows.items():
        _, pieces = run(*arguments)  # compiles
        seconds = statistics.median(run(*arguments)[0] for _ in range(options.repeats))
        print(f"| {name} | {seconds:.3f} s | {pieces * arguments[0]:.3f} s |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="CogVideoX-5b", help="a preset of `Config`")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--clip", default="49x480x720")
    parser.add_argument("--work", type=float, default=0.05, help="seconds for each piece")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
