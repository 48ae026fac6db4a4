"""Names and layouts of tensors in files: the bijection with the leaves of the tree.

The path of a leaf in the tree, its parts joined by dots, is the tensor's name in diffusers.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax

from .._autoencoder import VAE

T = TypeVar("T")
# Torch's OIDHW and OIHW to our DHWIO and HWIO; all else is laid out alike.
_LAYOUTS = {5: (2, 3, 4, 1, 0), 4: (2, 3, 1, 0)}
# From names in diffusers to those in the original; the order of up blocks is also reversed.
_ORIGINAL = (
    (r"^encoder\.down_blocks\.", "encoder.down."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.resnets\.", ".block."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
)
_IS_ORIGINAL = re.compile(r"(en|de)coder\.(down|mid|up)\.")
# A VAE within a whole diffusion model's file.
_PREFIXES = ("first_stage_model.", "vae.")
_LOSS = "loss."


def tensor_names(vae: VAE) -> VAE:
    """Returns the names of a model's tensors in diffusers.

    **Arguments:**

    - `vae`: the model.

    **Returns:** the same tree, with names in the place of tensors.
    """
    name = lambda path, leaf: jax.tree_util.keystr(path, simple=True, separator=".")  # noqa: E731
    return jax.tree_util.tree_map_with_path(name, vae)


def named(vae: VAE) -> dict[str, Any]:
    """Returns the leaves by their names in diffusers, in the tree's order."""
    return dict(zip(jax.tree.leaves(tensor_names(vae)), jax.tree.leaves(vae), strict=True))


def own_tensors(tensors: Mapping[str, T]) -> dict[str, T]:
    """Returns the VAE's tensors by their names in it, without a discriminator or other models."""
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            inner = [name for name in tensors if name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): tensors[name] for name in inner}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_LOSS)}


def file_names(names: Iterable[str], held: Iterable[str], blocks: int) -> list[str]:
    """Returns `names`, of diffusers, as a file spells them that holds the tensors `held`.

    That is as they are, or as zai-org's checkpoints have them; `blocks` counts the up blocks.
    """
    if not any(map(_IS_ORIGINAL.match, held)):
        return list(names)
    return [_original_name(name, blocks) for name in names]


def _original_name(name: str, blocks: int) -> str:
    for pattern, replacement in _ORIGINAL:
        name = re.sub(pattern, replacement, name)
    level = re.match(r"decoder\.up_blocks\.(\d+)\.", name)
    return f"decoder.up.{blocks - 1 - int(level[1])}.{name[level.end() :]}" if level else name


def from_stored(rank: int) -> tuple[int, ...]:
    """Returns the axes in a file of each axis of a leaf of this rank."""
    return _LAYOUTS.get(rank, tuple(range(rank)))


def to_stored(rank: int) -> tuple[int, ...]:
    """Returns the axes of a leaf in the order that its file has them."""
    axes = from_stored(rank)
    return tuple(axes.index(axis) for axis in range(rank))


__all__ = ["file_names", "from_stored", "named", "own_tensors", "tensor_names", "to_stored"]
