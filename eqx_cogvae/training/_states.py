"""Training states in files."""

import os
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from .._files import Written, atomic, check_regular
from ._crops import Crops as Crops, Source as Source
from ._losses import gradient as gradient, kl as kl, l1 as l1, l2 as l2, temporal as temporal
from ._trainer import TrainState


def save_state(path: str | os.PathLike, state: TrainState) -> None:
    """Writes a state; a process killed meanwhile leaves the file that was there.

    **Raises:** `OSError` where the file cannot be written.
    """
    with atomic(path) as partial, Written(partial) as file:
        eqx.tree_serialise_leaves(file, state)  # pyright: ignore


def load_state(path: str | os.PathLike, like: TrainState) -> TrainState:
    """Reads a state that was saved, to go on to the same losses.

    `like` is one of its kind, as `Trainer.init` gives it; the state goes where that is.

    **Raises:** `FileNotFoundError`; `ValueError` for another model's or optimiser's state.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no training state at {path}.")
    check_regular(path)
    try:
        with Path(path).open("rb") as file:
            state = eqx.tree_deserialise_leaves(file, like)
        return jax.tree.map(_placed_as, state, like)
    except (RuntimeError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is not a state of this model and optimiser ({reason}): build both as they "
            "were when it was saved."
        ) from error


def _placed_as(x: Any, like: Any) -> Any:
    return jax.device_put(x, like.sharding) if isinstance(like, jax.Array) else x


__all__ = ["load_state", "save_state"]
