"""The command `info`."""

from typing import Any

import click
import equinox as eqx
import jax
import jax.numpy as jnp

import eqx_cogvae as cv

from . import options

_DEFAULT_FRAMES = 49


@click.command(cls=options.Command, short_help="Print a model's configuration and costs.")
@click.argument("model", default="tiny", metavar="MODEL")
@click.option("--dtype", type=click.Choice(options.DTYPES), help="Default: as stored.")
@click.option(
    "--frames",
    type=options.COUNT,
    default=_DEFAULT_FRAMES,
    help="With --size; default: 49.",
)
@options.size()
@click.option(
    "--memory",
    type=options.Gibibytes(0, 1e7, min_open=True),
    metavar="GIB",
    help="Memory that the plan is to fit into.",
)
def info(model: str, dtype: str | None, frames: int, memory: float | None, **size: Any) -> None:
    """Print a model's configuration and size; with --size, plan its memory."""
    sizes = options.chosen_sizes(**size)
    vae = cv.from_pretrained(model, dtype=None if dtype is None else jnp.dtype(dtype))
    for name, value in vae.config.to_dict().items():
        print(f"{name:28} {value}")
    leaves = jax.tree.leaves(eqx.filter(vae, eqx.is_array))
    print(f"{'parameters':28} {sum(leaf.size for leaf in leaves):,}")
    print(f"{'tensors':28} {len(leaves)}")
    print(f"{'bytes':28} {sum(leaf.nbytes for leaf in leaves):,}")
    print(f"{'dtype':28} {', '.join(sorted({leaf.dtype.name for leaf in leaves}))}")
    print(f"{'fingerprint':28} {cv.fingerprint(vae)}")
    if sizes:
        print(cv.plan(vae, (1, frames, *sizes[0]), memory=memory and memory * 2**30))


__all__ = ["info"]
