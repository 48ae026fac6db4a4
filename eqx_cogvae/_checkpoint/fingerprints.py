"""Fingerprints of models, and the ways in which a model differs from its config."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._autoencoder import VAE
from .._config import Config

_SAME_AS_FIRST = "constant"


def fingerprint(vae: eqx.Module) -> str:
    """Returns twelve hexadecimal digits that tell models apart.

    They depend on the configuration, the weights, and everything else that changes the function:
    padding modes, layers that were replaced. Weights count as rounded to bfloat16, so that a
    model and its bfloat16 copy agree.

    **Arguments:**

    - `vae`: the model, or one with a half removed.

    **Returns:** a string of 12 digits.
    """
    return _digest(vae, lambda leaf: leaf.astype(jnp.bfloat16).tobytes())[:12]


def exact_fingerprint(vae: eqx.Module) -> str:
    """Returns 64 digits as `fingerprint`, but by every bit of the weights and their dtype."""
    return _digest(vae, lambda leaf: leaf.dtype.name.encode() + leaf.tobytes())


def departures(vae: eqx.Module) -> dict[str, str]:
    """Returns what a model has that its config does not say, by its place in the tree.

    It compares all but the arrays with a VAE made from the config: types of layers, their static
    fields, numbers and functions among their leaves.
    """
    due, config = {}, getattr(vae, "config", None)
    if isinstance(config, Config):
        due = dict(_described(skeleton(config), ""))
    found = dict(_described(vae, ""))
    places = sorted(place for place in found if found[place] != due.get(place))
    return {place: found[place] for place in places}


@functools.lru_cache(maxsize=16)
def skeleton(config: Config) -> VAE:
    """Returns the VAE with shapes in the place of arrays: nothing is allocated."""
    return eqx.filter_eval_shape(lambda: VAE(config, key=jax.random.key(0)))


def is_array(x: Any) -> bool:
    """Returns True for arrays of JAX and NumPy, and for shapes in the place of arrays."""
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _described(node: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yields a place in the tree and a description of it, for all but the arrays."""
    if isinstance(node, Config) or is_array(node):
        return
    if isinstance(node, dict | list | tuple):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            yield from _described(value, f"{place}.{key}")
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        yield f"{place}.type", f"{type(node).__module__}.{type(node).__qualname__}"
        for field in dataclasses.fields(node):
            yield from _described(getattr(node, field.name, None), f"{place}.{field.name}")
    elif callable(node) and hasattr(node, "__qualname__"):
        yield place, f"{node.__module__}.{node.__qualname__}"
    else:
        # Addresses in memory differ from process to process.
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(node))
        same = place.endswith(".pad_mode") and node == _SAME_AS_FIRST
        yield place, repr("first") if same else text


def _digest(vae: eqx.Module, content: Callable[[np.ndarray], bytes]) -> str:
    digest = hashlib.sha256()
    config = getattr(vae, "config", None)
    if config is not None:
        digest.update(json.dumps(config.to_dict(), sort_keys=True).encode())
    # A model that is as its config says adds nothing here.
    digest.update("".join(f"{place}={what};" for place, what in departures(vae).items()).encode())
    leaves, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(vae, is_array))
    for name, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        digest.update(f"{name}{leaf.shape}".encode())
        array = np.asarray(leaf)
        digest.update(content(array.astype(array.dtype.newbyteorder("="), copy=False)))
    return digest.hexdigest()


__all__ = ["departures", "exact_fingerprint", "fingerprint", "is_array", "skeleton"]
