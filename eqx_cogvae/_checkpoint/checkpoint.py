"""Checkpoints: loading and saving, one tensor at a time."""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from .._autoencoder import VAE
from .._checks import warn
from .._config import Config, read_fields
from .._files import check_name, check_regular, staged
from .._quantised import is_quantised
from .files import CONFIG, INDEX, PICKLES, SHARD, WEIGHTS, find, read_json
from .fingerprints import departures, is_array, skeleton
from .names import file_names, from_stored, named, own_tensors, tensor_names, to_stored
from .tensors import (
    FLOATS,
    FLOATS_OF_8_BITS,
    Stored,
    empty,
    read_safetensors,
    read_torch,
    write_safetensors,
)

# The version whose files these are; diffusers writes it down and does not ask for it.
_DIFFUSERS_VERSION = "0.42.1"
_SHOWN = 8
_LONGEST = 200
_FEW = 100
_CHUNK = 1 << 20
_HINT = "give the config that belongs to these weights."
_PICKLED = (
    "is a pickle, which may run code when opened, and not safetensors: load it with "
    "`from_original`, which executes nothing, or convert it with diffusers' `save_pretrained`."
)


def from_pretrained(
    name_or_path: str | os.PathLike,
    *,
    config: Config | str | os.PathLike | None = None,
    subfolder: str | None = None,
    dtype: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    mesh: Mesh | None = None,
) -> VAE:
    """Loads a checkpoint: a directory, a hub id, `"tiny"`, or one safetensors file.

    Weights may be sharded, and are found under a variant's name (`.fp16.`) when that is the only
    one; on the hub `fp16` goes before `bf16`. Tensors have the names of diffusers or of
    zai-org's original, alone or under the prefix `vae.` or `first_stage_model.` of a whole
    model's file. Those of a loss (`loss.`) are left out.

    **Arguments:**

    - `name_or_path`: a directory with `config.json` and `diffusion_pytorch_model.safetensors`,
        or with both under `vae/`; a hub id, where `vae/` is looked into first; `"tiny"`, which
        is embedded; or a `.safetensors` file, together with `config`.
    - `config`: a `Config`, the name of a `Config.preset`, or the path of a `config.json` or its
        directory. It is needed for a file; elsewhere it takes the place of `config.json`.
    - `subfolder`: the folder of the files in the directory or on the hub, if it is another.
    - `dtype`: of the weights; None keeps that of the checkpoint (float32 if it mixes several).
        Weights of 8 bits need a `dtype` to be cast to, and torch to be read.
    - `revision`, `token`, `cache_dir`, `local_files_only`: as in `huggingface_hub`.
    - `mesh`: devices, each of which gets a copy of the weights.

    **Returns:** the model. Keys of `config.json` that change nothing, such as `sample_size`, are
    ignored with a warning.

    **Raises:** `ValueError` that names all missing, unexpected, misshapen and not finite
    tensors; for a config of another model, a truncated file, a pickle, a file without `config`;
    `FileNotFoundError`; `OSError` if the hub does not give the files.
    """
    files = find(
        name_or_path,
        subfolder,
        configured=config is not None,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    found, ignored = _read_config(files.config) if files.config else _given_config(config)
    if ignored:
        warn(ignored)
    tensors: dict[str, Stored] = {}
    for path in files.weights:
        _, shard = read_safetensors(path, _PICKLED)
        if twice := tensors.keys() & shard.keys():
            raise ValueError(f"{path} holds {min(twice)!r} again: copy or download all shards.")
        tensors |= shard
    where = files.weights[0] if len(files.weights) == 1 else files.weights[0].parent
    return _filled(found, own_tensors(tensors), dtype, mesh, str(where))


def from_original(
    path: str | os.PathLike,
    config: Config | str | os.PathLike | None = None,
    dtype: Any = None,
) -> VAE:
    """Loads zai-org's `3d-vae.pt`, or another state dict in a file of torch or safetensors.

    A file of torch is read by `torch.load(weights_only=True)`, which executes nothing in it, and
    needs `eqx_cogvae[diffusers]`. Names are those of the original or of diffusers.

    **Arguments:**

    - `path`: the file.
    - `config`: as in `from_pretrained`; None is that of CogVideoX-2b. 5b and 1.5 differ in the
        latents' scale alone, see `Config.preset`.
    - `dtype`: of the weights; None keeps that of the file.

    **Returns:** the model.

    **Raises:** `ValueError` as `from_pretrained`, and for a pickle that asks for more than
    tensors; `ImportError` where torch is needed and missing; `FileNotFoundError`;
    `IsADirectoryError`.
    """
    path = Path(path)
    check_regular(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a directory: name the file in it, such as 3d-vae.pt, or use "
            "`from_pretrained`."
        )
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}: give a 3d-vae.pt.")
    found, ignored = (Config(), "") if config is None else _given_config(config)
    if ignored:
        warn(ignored)
    tensors = own_tensors(_original_tensors(path))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Stored):
            raise ValueError(
                f"{name!r} in {path} is of type {type(tensor).__name__}, not a tensor: "
                "save the state dict alone."
            )
    return _filled(found, tensors, dtype, None, str(path))


def save_pretrained(vae: VAE, path: str | os.PathLike) -> None:
    """Writes a directory that diffusers' and our `from_pretrained` load, each weight bit by bit.

    It appears whole or not at all, and a checkpoint that is there stays until the new one is
    complete. Other files in the directory stay, except the shards of the old checkpoint. If a
    process is killed at the very end of saving over a checkpoint with another config, it may leave
    no checkpoint; it never leaves a mixture.

    **Arguments:**

    - `vae`: the whole model, each parameter a floating array.
    - `path`: the directory; missing parents are created.

    **Raises:** `ValueError` for a model that is not whole, or that computes something else than
    its config says, such as one that pads by replication, and for one from `quantised`; `OSError`
    if the files cannot be written.
    """
    tensors = stored_tensors(vae)
    fields = {"_class_name": "AutoencoderKLCogVideoX", "_diffusers_version": _DIFFUSERS_VERSION}
    text = json.dumps(fields | vae.config.to_dict(), indent=2) + "\n"
    path = Path(os.path.abspath(path))
    with staged(path) as folder:
        (folder / CONFIG).write_text(text, encoding="utf-8")
        write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
        if not path.exists():
            try:
                os.replace(folder, path)
                return
            except OSError:
                if not path.is_dir():
                    raise
                # Another process has just saved to the same place.
        _replace(path, folder / CONFIG, folder / WEIGHTS)


def _filled(
    config: Config, tensors: Mapping[str, Stored], dtype: Any, mesh: Mesh | None, where: str
) -> VAE:
    """Returns the VAE with the tensors of a file, read one after another."""
    _check_depth(config, len(tensors), where)
    vae = skeleton(config)
    names = file_names(named(vae), tensors, len(config.block_out_channels))
    shapes, structure = jax.tree.flatten(vae)
    due = dict(zip(names, shapes, strict=True))
    dtype = _dtype(dtype, tensors, where)
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    faults = defaultdict(list)
    faults["missing"] = [name for name in due if name not in tensors]
    leaves = {}
    for name, tensor in tensors.items():
        if name not in due:
            faults["unexpected"].append(name)
        elif tensor.dtype not in FLOATS.keys() | FLOATS_OF_8_BITS:
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
        raise ValueError(_complaint(where, faults, dtype))
    return jax.tree.unflatten(structure, [leaves[name] for name in names])


def _complaint(where: str, faults: Mapping[str, list[str]], dtype: np.dtype) -> str:
    parts, hint = [], _HINT
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            first = ", ".join(" ".join(name.split())[:_LONGEST] for name in names[:_SHOWN])
            parts.append(f"{len(names)} {fault}: {first}{more}")
    if [fault for fault, names in faults.items() if names] == ["not finite"]:
        hint = f"get another copy, or a wider dtype if {dtype.name} was asked for."
    return f"the tensors in {where} do not fit the model; {'; '.join(parts)}; {hint}"


def _check_depth(config: Config, held: int, where: str) -> None:
    """Raises `ValueError` for a config whose skeleton alone would be too large for the file."""
    resnets = len(config.block_out_channels) * (2 * config.layers_per_block + 1)
    # Two convolutions and more in each, and a file may lack some.
    if resnets > max(2 * held, _FEW):
        raise ValueError(
            f"the {held} tensors in {where} do not fit the model, whose "
            f"`layers_per_block`={config.layers_per_block} makes {resnets} resnet blocks; {_HINT}"
        )


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in to_stored(len(shape)))


def _laid_out(tensor: Stored, dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """Reads a tensor, and transposes and casts it in one copy."""
    array = tensor.read()
    array = array.transpose(from_stored(array.ndim))
    result = empty(array.shape, dtype.name)
    # What overflows is reported by name.
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(result, array, casting="unsafe")
    return result


def _is_finite(array: Shaped[np.ndarray, "..."]) -> bool:
    # The mask of a whole array would be a quarter of its size or more.
    flat = array.reshape(-1)
    return all(np.isfinite(flat[i : i + _CHUNK]).all() for i in range(0, flat.size, _CHUNK))


def _dtype(asked: Any, tensors: Mapping[str, Stored], where: str) -> np.dtype:
    doubles = jnp.result_type(float) == jnp.float64
    held = {tensor.dtype for tensor in tensors.values()}
    if asked is None:
        if small := held & FLOATS_OF_8_BITS:
            raise ValueError(
                f"{where} holds {min(small)} weights, a dtype that only stores numbers: give a "
                "`dtype=` to compute in, such as `jnp.bfloat16`."
            )
        known = held & FLOATS.keys()
        name = known.pop() if len(known) == 1 else "float32"
        return FLOATS[name if doubles or name != "float64" else "float32"]
    try:
        name = jnp.dtype(asked).name
    except TypeError:
        name = str(asked)
    if name not in FLOATS:
        raise ValueError(f"`dtype` must be one of {', '.join(FLOATS)}, got {name}.")
    if name == "float64" and not doubles:
        raise ValueError(
            "`dtype` float64 needs JAX's 64-bit mode, which is off: call "
            "`jax.config.update('jax_enable_x64', True)` first, or ask for float32."
        )
    return FLOATS[name]


def _given_config(config: Config | str | os.PathLike | None) -> tuple[Config, str]:
    """Returns the config that a user names, and a warning of what was ignored in its file."""
    if isinstance(config, Config):
        return config, ""
    if not isinstance(config, str | os.PathLike):
        raise TypeError(
            "`config` must be a Config, the name of a preset, or a path, "
            f"got a {type(config).__name__}."
        )
    path = Path(config).expanduser()
    check_name(path)
    # A preset's name is the preset even beside a folder of this name, as "tiny" is the weights.
    if isinstance(config, str) and (path.name == config or not path.exists()):
        try:
            return Config.preset(config), ""
        except ValueError as error:
            if not path.exists():
                raise ValueError(f"`config` {config!r} is no file, and {error}") from error
    return _read_config(path / CONFIG if path.is_dir() else path)


def _read_config(path: Path) -> tuple[Config, str]:
    """Returns the config in a file, and a warning of the keys that were ignored."""
    fields = read_json(path)
    try:
        config, ignored = read_fields(fields)
    except TypeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} holds a value of a wrong type ({reason}): copy or download it again."
        ) from error
    except ValueError as error:
        raise ValueError(f"in {path}: {error}") from error
    return config, f"in {path}: {ignored}" if ignored else ""


def stored_tensors(vae: VAE) -> dict[str, Stored]:
    """Returns the leaves by diffusers' names, as torch lays them out.

    **Raises:** `ValueError` for a model that is not whole, or not as its config says.
    """
    if is_quantised(vae):
        raise ValueError(
            "cannot save a model whose weights are held in 8 bits, as diffusers' files have no "
            "scales: save `cv.dequantised(vae)`, or use `eqx.tree_serialise_leaves`."
        )
    due = named(skeleton(vae.config))
    leaves = {
        name: leaf
        for name, leaf in named(vae).items()
        if is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)
    }
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
            f"cannot save a model that differs from its config in {len(wrong)} places, such as "
            f"{min(wrong)}: give every parameter as a floating array."
        )
    for place, what in departures(vae).items():
        raise ValueError(
            f"cannot save a model with {place.strip('.')}={what}: diffusers' config has no field "
            "for it, so another model would be loaded; use `eqx.tree_serialise_leaves`."
        )
    return {name: _stored_leaf(leaf) for name, leaf in leaves.items()}


def stored_leaves(vae: VAE) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Returns the leaves by diffusers' names, each with its axes in torch's order."""
    return {name: (leaf, to_stored(leaf.ndim)) for name, leaf in named(vae).items()}


def _stored_leaf(leaf: Any) -> Stored:
    axes = to_stored(leaf.ndim)
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


def _original_tensors(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if path.suffix in PICKLES or zipped:
        return read_torch(path)
    return read_safetensors(path, "is a pickle of torch before 1.6: save it again with torch.")[1]


__all__ = [
    "from_original",
    "from_pretrained",
    "save_pretrained",
    "stored_leaves",
    "stored_tensors",
    "tensor_names",
]
