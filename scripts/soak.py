"""Long runs of a very small model: memory stays flat, and the last result equals the first.

python scripts/soak.py                      # four minutes of one core
python scripts/soak.py --frames 2000 --calls 100 --adapter-calls 50
"""

import argparse
import sys
import threading
import time
import warnings
from pathlib import Path

import jax
import numpy as np

import eqx_cogvae as cv

CONFIG = cv.Config(
    block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2, layers_per_block=1
)
# Both frame batches of each length, and a few sizes: programs for all of them, and no more.
SHAPES = [(b, t, h, 8) for b in (1, 2) for t in (1, 9, 17) for h in (8, 16, 24)]
THREADS = 4


def resident():
    """Megabytes of this process, where Linux tells."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 / 2**20 if statm.exists() else float("nan")


def clip(shape, seed=0):
    """Noise within [-1, 1]."""
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def streamed_frames(vae, count):
    """A feed that repeats one frame batch for ever; the cache settles, and so do the results."""
    batch = clip((1, 8, 16, 16))
    pieces = (batch for _ in range(count // 8))
    results = [None, None]
    for i, moments in enumerate(cv.streamed(vae.encode_step, 8)(pieces)):
        # From the second batch on each has the same past within reach.
        if i == 10:
            yield
            results[0] = np.asarray(moments)
    results[1] = np.asarray(moments)
    np.testing.assert_array_equal(*results)


def changing_shapes(vae, count):
    """Encoded and decoded, one shape after another."""
    first = {}
    for i in range(count):
        shape = SHAPES[i % len(SHAPES)]
        result = np.asarray(vae(clip(shape)))
        if shape in first:
            np.testing.assert_array_equal(result, first[shape])
        first[shape] = result
        if i == 2 * len(SHAPES):
            yield


def adapter_calls(vae, count):
    """The stand-in for diffusers' model, from several threads at once."""
    import torch

    from eqx_cogvae.diffusers import EqxAutoencoderKLCogVideoX

    adapter = EqxAutoencoderKLCogVideoX(vae)
    latents = torch.randn((1, 2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    due, faults = adapter.decode(latents).sample, []

    def work(calls):
        for _ in range(calls):
            if not torch.equal(adapter.decode(latents).sample, due):
                faults.append("a result differs")

    for calls in (count // 10, count - count // 10):
        threads = [threading.Thread(target=work, args=(calls // THREADS,)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if calls == count // 10:
            yield
    assert not faults, faults


def main():
    """Each run in turn; memory after its first part, and in the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--calls", type=int, default=1_000)
    parser.add_argument("--adapter-calls", type=int, default=500)
    parser.add_argument("--growth", type=float, default=32, help="megabytes that are allowed")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*nearest good counts")
    vae = cv.VAE(CONFIG, key=jax.random.key(0))
    grown = False
    for run, count in (
        (streamed_frames, options.frames),
        (changing_shapes, options.calls),
        (adapter_calls, options.adapter_calls),
    ):
        start = time.perf_counter()
        going = run(vae, count)
        next(going)
        before = resident()
        next(going, None)
        after = resident()
        print(
            f"{run.__name__}: {count}, {before:.0f} MB early, {after:.0f} MB in the end, "
            f"{compiled_programs()} programs of steps, {time.perf_counter() - start:.0f} s"
        )
        grown = grown or after - before > options.growth
    return grown


def compiled_programs():
    """How many programs the steps have been compiled to."""
    return cv._transforms.base._donating_program._cache_size()


if __name__ == "__main__":
    sys.exit(main())
