"""Training states in files."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._checkpoint.tensors import Stored, read_safetensors, write_safetensors
from .._files import atomic
from .._quantised import QuantisedConv
from ._trainer import TrainState

_FORMAT = "eqx_cogvae.state.1"
_SHOWN = 3
_WRONG = "is not a state of this model and optimiser"


def save_state(path: str | os.PathLike, state: TrainState) -> None:
    """Writes a state as safetensors; a process killed meanwhile leaves the file that was there.

    **Arguments:**

    - `path`: the file.
    - `state`: weights, average, optimiser state, and a discriminator's, if there is one. Functions
        among the leaves are left out.

    **Raises:** `OSError` where the file cannot be written.
    """
    metadata = {"format": _FORMAT, "optimiser": _optimisers(state)}
    with atomic(path) as partial:
        write_safetensors(partial, _stored(state), metadata)


def load_state(path: str | os.PathLike, like: TrainState) -> TrainState:
    """Reads a state that was saved; steps from it give the same losses as without a break.

    **Arguments:**

    - `path`: the file.
    - `like`: a state of its kind, as `Trainer.init` gives it; the result goes where that is.

    **Returns:** the state.

    **Raises:** `FileNotFoundError`; `ValueError` for another model's or optimiser's state, told
    by the names, shapes and dtypes of its parts, and for a file that is no whole state.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no training state at {path}.")
    try:
        metadata, tensors = read_safetensors(path, "is a pickle or an archive.")
    except ValueError as error:
        raise ValueError(f"{path} {_WRONG} ({error})") from error
    held = _parts(tensors, metadata.get("optimiser"), metadata.get("format"))
    due = _parts(_stored(like), _optimisers(like), _FORMAT)
    if held != due:
        raise ValueError(
            f"{path} {_WRONG} (it holds {_listed(held - due)}; due is {_listed(due - held)}): "
            "build both as they were when it was saved."
        )

    def read(place: Any, leaf: Any) -> Any:
        tensor = tensors.get(jax.tree_util.keystr(place))
        return leaf if tensor is None else _placed_as(tensor.read(), leaf)

    return jax.tree_util.tree_map_with_path(read, like)


def _stored(state: TrainState) -> dict[str, Stored]:
    """Returns the arrays and numbers of a state by their place in the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    tensors = {}
    for place, leaf in leaves:
        if not callable(leaf):
            leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
            like = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
            read = lambda leaf=leaf: np.asarray(leaf)  # noqa: E731
            tensors[jax.tree_util.keystr(place)] = Stored(like.shape, like.dtype.name, read)
    return tensors


def _optimisers(state: TrainState) -> str:
    """Returns the types of the optimisers' states, and formats of 8 bits, in one line."""
    kinds = [*_kinds(state.optimiser), *_kinds(state.discriminator_optimiser)]
    return " ".join(kinds + _formats(state.model))


def _formats(model: Any) -> list[str]:
    """Returns the formats of weights in 8 bits, whose tensors look alike in all of them."""
    is_held = lambda node: isinstance(node, QuantisedConv)  # noqa: E731
    nodes = jax.tree.leaves(model, is_leaf=is_held)
    return sorted({node.format for node in nodes if is_held(node)})


def _kinds(optimiser: Any) -> Iterator[str]:
    """Yields the types of an optimiser's states: some differ in these and not in their names."""
    if hasattr(optimiser, "_fields") and optimiser:
        yield type(optimiser).__name__
    is_state = lambda node: node is not optimiser and hasattr(node, "_fields")  # noqa: E731
    for node in jax.tree.leaves(optimiser, is_leaf=is_state):
        if hasattr(node, "_fields"):
            yield from _kinds(node)


def _parts(tensors: dict[str, Stored], optimiser: str | None, made_by: str | None) -> set[str]:
    parts = {f"{name} of {t.dtype}{list(t.shape)}" for name, t in tensors.items()}
    return parts | {f"the format {made_by}", f"an optimiser of {optimiser}"}


def _listed(parts: set[str]) -> str:
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return (", ".join(sorted(parts)[:_SHOWN]) or "no more") + more


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _placed_as(array: np.ndarray, like: Any) -> Any:
    # An array that is committed to its device needs another program than one that is not.
    place = like.sharding if getattr(like, "committed", hasattr(like, "sharding")) else None
    if _is_key(like):
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
        return jax.device_put(key, place)
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return jax.device_put(array, place)
    return array if isinstance(like, np.ndarray) else type(like)(array.item())


__all__ = ["load_state", "save_state"]
