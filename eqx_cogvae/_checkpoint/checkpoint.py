"""Checkpoints: loading, saving, and the one place where layouts change.

The path of a leaf in the tree, its parts joined by dots, is the tensor's name in diffusers.
"""

import functools
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from .._autoencoder import VAE
from .._config import Config
from .._files import atomic, beside, check_regular
from .files import CONFIG, INDEX, SHARD, WEIGHTS, find, read_json
from .tensors import FLOATS, Stored, empty, read_safetensors, write_safetensors
from .torch_pickle import read_torch

# The version whose files these are; diffusers writes it down and does not ask for it.
_DIFFUSERS_VERSION = "0.42.1"
# Torch's OIDHW and OIHW to our DHWIO and HWIO; all else is laid out alike.
_LAYOUTS = {5: (2, 3, 4, 1, 0), 4: (2, 3, 1, 0)}
_SHOWN = 8
_LONGEST = 200
_FEW = 100
_CHUNK = 1 << 20

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
_ORIGINAL_NESTS = ("model", "module", "state_dict")
_ORIGINAL_PREFIX = "first_stage_model."


def from_pretrained(
    name_or_path: str | os.PathLike,
    *,
    subfolder: str | None = None,
    dtype: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    mesh: Mesh | None = None,
) -> VAE:
    """Loads a checkpoint in diffusers' layout.

    `name_or_path` is a directory with `config.json` and `diffusion_pytorch_model.safetensors`,
    or with both under `vae/`; a hub id, where `vae/` is looked into first; or `"tiny"`, which
    is embedded. `subfolder` names another place. Weights may be sharded, and are found under a
    variant's name (`.fp16.`) when that is the only one; on the hub `fp16` goes before `bf16`.

    `dtype` None keeps that of the checkpoint (float32, when it mixes several). `mesh` puts a
    copy of the weights on each of its devices. `revision`, `token`, `cache_dir` and
    `local_files_only` are for the hub.

    **Raises:** `ValueError` that names all missing, unexpected, misshapen and not finite
    tensors; for a config of another model, a truncated file, a pickle; `FileNotFoundError`;
    `OSError` where the hub does not give the files.
    """
    files = find(
        name_or_path,
        subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    config = _read_config(files.config)
    tensors: dict[str, Stored] = {}
    for path in files.weights:
        shard = read_safetensors(path)
        if twice := tensors.keys() & shard.keys():
            raise ValueError(f"{path} holds {min(twice)!r} again: copy or download all shards.")
        tensors |= shard
    hint = f"use the {CONFIG} that belongs to these weights."
    if any(re.match(r"(first_stage_model\.)?encoder\.down\.\d", name) for name in tensors):
        hint = "these are the names of zai-org's 3d-vae.pt, load it with `from_original`."
    where = str(files.weights[0] if len(files.weights) == 1 else files.config.parent)
    _check_depth(config, len(tensors), where, hint)
    skeleton = _skeleton(config)
    names = list(_named(skeleton))
    return _filled(skeleton, names, tensors, _dtype(dtype, tensors), mesh, where, hint)


def from_original(path: str | os.PathLike, config: Config | None = None, dtype: Any = None) -> VAE:
    """Loads a checkpoint of zai-org/CogVideo: `3d-vae.pt`, or the same names in safetensors.

    Nothing in a pickle is executed: it is refused if it asks for more than tensors. `config`
    None is that of CogVideoX-2b; 5b and 1.5 differ in `scaling_factor` alone, see
    `Config.preset`. `dtype` None keeps that of the file.

    **Raises:** `ValueError` as `from_pretrained`, for a pickle that asks for more than tensors,
    and for the format of torch before 1.6; `FileNotFoundError`; `IsADirectoryError`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a directory: name the file in it, such as 3d-vae.pt, or use "
            "`from_pretrained` for diffusers' layout."
        )
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}: give a 3d-vae.pt.")
    check_regular(path)
    config = Config() if config is None else config
    tensors = _original_tensors(path)
    hint = "pass the `config=` that belongs to these weights."
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        hint = "these are diffusers' names, load them with `from_pretrained`."
    skeleton, blocks = _skeleton(config), len(config.block_out_channels)
    names = [_original_name(name, blocks) for name in _named(skeleton)]
    return _filled(skeleton, names, tensors, _dtype(dtype, tensors), None, str(path), hint)


def save_pretrained(vae: VAE, path: str | os.PathLike) -> None:
    """Writes a directory that diffusers' and our `from_pretrained` load, each weight bit by bit.

    It appears whole or not at all, and a checkpoint already there stays as it is until the new
    one is complete. Other files in the directory stay, but for the shards of an old checkpoint.
    A process killed at the very end of saving over a checkpoint of another config leaves none, if
    it does not leave the old or the new one: never a mixture.

    **Raises:** `ValueError` for a model that is not whole, or that pads by replication, which
    diffusers' config cannot say; `OSError` where the files cannot be written.
    """
    if vae.encoder.conv_in.pad_mode == "replicate":
        raise ValueError(
            "a model with pad_mode='replicate' cannot be saved: diffusers' config has no word "
            "for it, and would load another model; use `eqx.tree_serialise_leaves`."
        )
    tensors = stored_tensors(vae)
    fields = {"_class_name": "AutoencoderKLCogVideoX", "_diffusers_version": _DIFFUSERS_VERSION}
    text = json.dumps(fields | vae.config.to_dict(), indent=2) + "\n"

    def write(config: Path, weights: Path) -> None:
        config.write_text(text, encoding="utf-8")
        write_safetensors(weights, tensors, {"format": "pt"})

    path = Path(os.path.abspath(path))
    if path.is_dir():
        with beside(path / CONFIG) as config, beside(path / WEIGHTS) as weights:
            write(config, weights)
            _replace(path, config, weights)
        return
    if path.exists():
        raise NotADirectoryError(f"cannot write {path}: it is a file, name a directory.")
    top = path
    while not top.parent.exists():
        top = top.parent
    with atomic(top) as partial:
        folder = partial / path.relative_to(top)
        try:
            folder.mkdir(parents=True)
            write(folder / CONFIG, folder / WEIGHTS)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _filled(
    skeleton: VAE,
    names: list[str],
    tensors: Mapping[str, Stored],
    dtype: np.dtype,
    mesh: Mesh | None,
    where: str,
    hint: str,
) -> VAE:
    """The VAE, one tensor after another; `names` are those of its leaves in the file."""
    shapes, structure = jax.tree.flatten(skeleton)
    due = dict(zip(names, shapes, strict=True))
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    faults = defaultdict(list)
    faults["missing"] = [name for name in due if name not in tensors]
    leaves = {}
    for name, tensor in tensors.items():
        if name not in due:
            faults["unexpected"].append(name)
        elif tensor.dtype not in FLOATS:
            faults["not floating"].append(f"{name} of {tensor.dtype}")
        elif tensor.shape != (shape := _stored_shape(due[name].shape)):
            faults["misshapen"].append(f"{name} {list(tensor.shape)} for {list(shape)}")
        else:
            array = _laid_out(tensor, dtype)
            if not _is_finite(array):
                faults["not finite"].append(name)
            elif not any(faults.values()):
                # Waiting lets go of the host's copy before the next tensor is read.
                leaves[name] = jax.block_until_ready(jax.device_put(array, place))
    if any(faults.values()):
        raise ValueError(_complaint(where, faults, dtype, hint))
    return jax.tree.unflatten(structure, [leaves[name] for name in names])


def _complaint(where: str, faults: Mapping[str, list[str]], dtype: np.dtype, hint: str) -> str:
    parts = []
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            first = ", ".join(" ".join(name.split())[:_LONGEST] for name in names[:_SHOWN])
            parts.append(f"{len(names)} {fault}: {first}{more}")
    if [fault for fault, names in faults.items() if names] == ["not finite"]:
        hint = f"get another copy, or a wider dtype if {dtype.name} was asked for."
    return f"the tensors in {where} do not fit the model; {'; '.join(parts)}; {hint}"


def _check_depth(config: Config, held: int, where: str, hint: str) -> None:
    """Raises for a config whose very skeleton would take longer than the file is large."""
    resnets = len(config.block_out_channels) * (2 * config.layers_per_block + 1)
    # Two convolutions and more in each, and a file may lack some.
    if resnets > max(2 * held, _FEW):
        raise ValueError(
            f"the {held} tensors in {where} do not fit the model, which has {resnets} resnet "
            f"blocks, by `layers_per_block`={config.layers_per_block}; {hint}"
        )


@functools.lru_cache(maxsize=1)
def _skeleton(config: Config) -> VAE:
    """The VAE with shapes in the place of arrays: nothing is allocated."""
    return eqx.filter_eval_shape(lambda: VAE(config, key=jax.random.key(0)))


def tensor_names(vae: VAE) -> VAE:
    """The same tree with the tensors' names in diffusers for leaves."""
    name = lambda path, leaf: jax.tree_util.keystr(path, simple=True, separator=".")  # noqa: E731
    return jax.tree_util.tree_map_with_path(name, vae)


def _named(vae: VAE) -> dict[str, Any]:
    """The leaves by their names in diffusers, in the tree's order."""
    return dict(zip(jax.tree.leaves(tensor_names(vae)), jax.tree.leaves(vae), strict=True))


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _to_stored(len(shape)))


def _to_stored(rank: int) -> tuple[int, ...]:
    axes = _LAYOUTS.get(rank, tuple(range(rank)))
    return tuple(axes.index(axis) for axis in range(rank))


def _laid_out(tensor: Stored, dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """Read, transposed and cast in one copy."""
    array = tensor.read()
    array = array.transpose(_LAYOUTS.get(array.ndim, tuple(range(array.ndim))))
    result = empty(array.shape, dtype.name)
    # What overflows is reported by name.
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(result, array, casting="unsafe")
    return result


def _is_finite(array: Shaped[np.ndarray, "..."]) -> bool:
    """Piece by piece: the mask of a whole array is a quarter of its size or more."""
    flat = array.reshape(-1)
    return all(np.isfinite(flat[i : i + _CHUNK]).all() for i in range(0, flat.size, _CHUNK))


def _dtype(asked: Any, tensors: Mapping[str, Stored]) -> np.dtype:
    doubles = jnp.result_type(float) == jnp.float64
    if asked is None:
        held = {tensor.dtype for tensor in tensors.values()} & FLOATS.keys()
        name = held.pop() if len(held) == 1 else "float32"
        return FLOATS[name if doubles or name != "float64" else "float32"]
    try:
        name = jnp.dtype(asked).name
    except TypeError:
        name = str(asked)
    if name not in FLOATS:
        raise ValueError(f"`dtype` must be one of {', '.join(FLOATS)}, got {name}.")
    if name == "float64" and not doubles:
        raise ValueError(
            "`dtype` float64 was asked for, and JAX has 64 bits off: call "
            "`jax.config.update('jax_enable_x64', True)` first, or ask for float32."
        )
    return FLOATS[name]


def _read_config(path: Path) -> Config:
    fields = read_json(path)
    try:
        return Config.from_dict(fields)
    except TypeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} holds a value of a wrong type ({reason}): copy or download it again."
        ) from error
    except ValueError as error:
        raise ValueError(f"in {path}: {error}") from error


def stored_tensors(vae: VAE) -> dict[str, Stored]:
    """The leaves by diffusers' names, as torch lays them out.

    **Raises:** `ValueError` for a model that is not whole.
    """
    due = _named(_skeleton(vae.config))
    leaves = {name: leaf for name, leaf in _named(vae).items() if eqx.is_array(leaf)}
    wrong = [
        name
        for name in due.keys() | leaves.keys()
        if name not in due
        or name not in leaves
        or leaves[name].shape != due[name].shape
        or leaves[name].dtype.name not in FLOATS
    ]
    if wrong:
        raise ValueError(
            f"cannot save a model that is not as its config says, in {len(wrong)} places, "
            f"such as {min(wrong)}: give every parameter as a floating array."
        )
    return {name: _stored_leaf(leaf) for name, leaf in leaves.items()}


def stored_leaves(vae: VAE) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The leaves by diffusers' names, each with the axes of it that torch has, in torch's order."""
    return {name: (leaf, _to_stored(leaf.ndim)) for name, leaf in _named(vae).items()}


def _stored_leaf(leaf: Any) -> Stored:
    axes = _to_stored(leaf.ndim)
    read = lambda: np.asarray(leaf).transpose(axes)  # noqa: E731
    return Stored(_stored_shape(leaf.shape), leaf.dtype.name, read)


def _replace(folder: Path, config: Path, weights: Path) -> None:
    """Puts the new files in the place of the old ones.

    Only a rename is atomic, and these are two. Where the config changes there is none between
    them, so that what a killed process leaves is refused. An index goes before the single file,
    and hides it until it is removed.
    """
    place, old = folder / CONFIG, config.with_suffix(".old")
    changed = not place.exists() or place.read_bytes() != config.read_bytes()
    if changed and place.exists():
        os.replace(place, old)
    try:
        os.replace(weights, folder / WEIGHTS)
    except BaseException:
        if old.exists():
            os.replace(old, place)
        raise
    (folder / INDEX).unlink(missing_ok=True)
    if changed:
        os.replace(config, place)
        old.unlink(missing_ok=True)
    for path in folder.iterdir():
        if SHARD.fullmatch(path.name):
            path.unlink()


def _original_name(name: str, blocks: int) -> str:
    for pattern, replacement in _ORIGINAL:
        name = re.sub(pattern, replacement, name)
    level = re.match(r"decoder\.up_blocks\.(\d+)\.", name)
    return f"decoder.up.{blocks - 1 - int(level[1])}.{name[level.end() :]}" if level else name


def _original_tensors(path: Path) -> dict[str, Stored]:
    """By their names in the VAE, without what belongs to training or to other models."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if path.suffix == ".safetensors" and not zipped:
        tree: Any = read_safetensors(path)
    else:
        tree = read_torch(path)
    for _ in _ORIGINAL_NESTS:
        nests = _ORIGINAL_NESTS if isinstance(tree, dict) else ()
        tree = next((tree[key] for key in nests if isinstance(tree.get(key), dict)), tree)
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path} holds a value of type {type(tree).__name__}, and named tensors are due: "
            "give zai-org's 3d-vae.pt, or a state dict of the same names."
        )
    if any(str(name).startswith(_ORIGINAL_PREFIX) for name in tree):
        tree = {
            str(name).removeprefix(_ORIGINAL_PREFIX): tensor
            for name, tensor in tree.items()
            if str(name).startswith(_ORIGINAL_PREFIX)
        }
    tensors = {str(k): v for k, v in tree.items() if not str(k).startswith("loss.")}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Stored):
            raise ValueError(
                f"{name!r} in {path} is of type {type(tensor).__name__}, and a tensor is due: "
                "save the state dict alone."
            )
    return tensors


__all__ = ["from_original", "from_pretrained", "save_pretrained", "stored_tensors", "tensor_names"]
