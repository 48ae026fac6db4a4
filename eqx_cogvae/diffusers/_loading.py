"""The arguments of diffusers' `from_pretrained`, in terms of ours."""

import os
from pathlib import Path
from typing import Any

import torch

from .._checkpoint.tensors import FLOATS
from .._checks import warn
from ._tensors import jax_dtype

WHERE = ("config", "subfolder", "revision", "token", "cache_dir", "local_files_only")
LOADING_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")

# They say how to read, which changes nothing about the result.
_HINTS = ("low_cpu_mem_usage", "disable_mmap", "offload_state_dict")
_REFUSED = {
    "quantization_config": "weights are floats, ask for `torch_dtype=torch.bfloat16`",
    "parallel_config": "several devices share the work of a `mesh=`",
    "max_memory": "weights go to one device, name it with `device_map=`, or give a `mesh=`",
    "offload_folder": "weights stay in memory, ask for `torch_dtype=torch.bfloat16`",
    "ignore_mismatched_sizes": "every weight is due, give the config that belongs to them",
    "force_download": "delete the files from the hub's cache, or name another `cache_dir`",
    "proxies": "set the environment variable HTTPS_PROXY",
    "use_flashpack": "give weights as safetensors",
    "flashpack_kwargs": "give weights as safetensors",
    "from_flax": "give weights as safetensors",
}
_DISPATCHED = ("auto", "balanced", "balanced_low_0", "sequential")


def check_options(options: dict[str, Any]) -> None:
    """Removes from `options` what changes nothing, and raises for what cannot be had.

    **Raises:** `ValueError`.
    """
    for name in _HINTS:
        options.pop(name, None)
    if options.pop("use_safetensors", None) is False:
        raise ValueError("weights are read from safetensors alone, leave `use_safetensors`.")
    for name, instead in _REFUSED.items():
        if value := options.pop(name, None):
            raise ValueError(f"`{name}={value!r}` cannot be had from JAX: {instead}.")


def variant_files(
    name_or_path: str | os.PathLike, variant: str, where: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Returns the one file of a variant's weights, and its config among the options for it.

    **Raises:** `FileNotFoundError` for a variant that a directory does not hold; `OSError` where
    the hub does not give it.
    """
    name = f"diffusion_pytorch_model.{variant}.safetensors"
    subfolder, config = where.pop("subfolder", None), where.pop("config", None)
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        # Slow to import, and local checkpoints do without.
        from huggingface_hub import hf_hub_download

        options: dict[str, Any] = where | {"subfolder": subfolder}
        weights = hf_hub_download(str(name_or_path), name, **options)
        return Path(weights), {
            "config": config or hf_hub_download(str(name_or_path), "config.json", **options)
        }
    folders = [path, path / "vae"] if subfolder is None else [path / subfolder]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name, {"config": config or folder / "config.json"}
    raise FileNotFoundError(
        f"there is no {name} in {' or '.join(map(str, folders))}, which `variant={variant!r}` "
        "asks for: leave `variant` to load the weights that are there."
    )


def asked_dtype(torch_dtype: Any, dtype: Any) -> torch.dtype:
    """Returns the dtype to load weights in: `dtype`, or `torch_dtype`, or float32 as in diffusers.

    Warns of what is no dtype, such as "auto", which diffusers takes for float32.
    """
    asked = torch_dtype if dtype is None else dtype
    if asked is None or isinstance(asked, torch.dtype):
        return asked or torch.float32
    warn(f"{asked!r} is no torch.dtype, so weights are torch.float32: give `torch.bfloat16` say.")
    return torch.float32


def weights_dtype(dtype: torch.dtype) -> Any:
    """Returns JAX's dtype for weights; `ValueError` for one that weights cannot have."""
    found = jax_dtype(dtype)
    if found.name not in FLOATS:
        raise ValueError(f"weights are of {', '.join(FLOATS)}, got {dtype}.")
    return found


def asked_device(device_map: Any) -> torch.device | None:
    """Returns the one device of a `device_map`, None where JAX chooses.

    **Raises:** `ValueError` for several devices, and for what is no device.
    """
    if isinstance(device_map, dict):
        if len(set(device_map.values())) != 1:
            raise ValueError(
                f"`device_map={device_map}` spreads one model over devices: name one device for "
                "all of it, or give a `mesh=`."
            )
        device_map = next(iter(device_map.values()))
    if device_map is None or device_map in _DISPATCHED:
        return None
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"`device_map` must be a device such as 'cuda:0', or one of {', '.join(_DISPATCHED)}, "
            f"got {device_map!r}."
        ) from error


__all__ = [
    "LOADING_INFO",
    "WHERE",
    "asked_device",
    "asked_dtype",
    "check_options",
    "variant_files",
    "weights_dtype",
]
