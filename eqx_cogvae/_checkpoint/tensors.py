"""Tensors in files: known by their headers, and read one at a time."""

import contextlib
import functools
import json
import math
import mmap
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Shaped

from .._files import check_regular

FLOATS = {name: np.dtype(jnp.dtype(name)) for name in ("float64", "float32", "float16", "bfloat16")}
# NumPy lacks these: they are read by torch, and cast.
FLOATS_OF_8_BITS = {"float8_e4m3fn", "float8_e5m2"}
_CODES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
_NAMES: dict[str, str] = {code: name for name, code in _CODES.items()}
_PICKLES = (b"PK\x03\x04", b"\x80")
_LONGEST_REASON = 200
# Keys under which training code saves its state dict.
_NESTS = ("model", "module", "state_dict")


class Stored(NamedTuple):
    """A tensor that is not yet read. `dtype` is NumPy's name, or else the file's own code."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def read_safetensors(
    path: str | os.PathLike, pickled: str
) -> tuple[dict[str, str], dict[str, Stored]]:
    """Returns the metadata and the tensors of a safetensors file.

    **Raises:** `ValueError` for a file that is truncated or something else, with `pickled` after
    its name where it is a pickle; `OSError`.
    """
    path = Path(path)
    check_regular(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: name the file in it.")
    with _opened(path, "numpy", pickled) as file:
        names = file.keys()  # the file is no dictionary, and cannot be iterated over
        tensors = {name: _stored(path, name, file.get_slice(name)) for name in names}
        return file.metadata() or {}, tensors


def read_torch(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the state dict that `torch.save` wrote, with a `Stored` in the place of each tensor.

    It may be nested under the usual names. torch maps the file and executes nothing in it.

    **Raises:** `ImportError` without torch; `ValueError` for a file that torch refuses to load as
    weights alone, or that holds no state dict.
    """
    torch = _torch(f"{path} is a file of torch's, and reading it needs torch")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is not a whole file of `torch.save`, which writes zip files since torch 1.6: "
            "copy or download it again, or load and save it again with torch."
        )
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"torch refuses to read {path} as weights alone ({_torch_reason(error)}), and nothing "
            "was executed: copy or download it again, or ask its author for safetensors."
        ) from error
    for _ in _NESTS:
        nests = _NESTS if isinstance(tree, dict) else ()
        tree = next((tree[key] for key in nests if isinstance(tree.get(key), dict)), tree)
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path} holds a value of type {type(tree).__name__}, not named tensors: "
            "give zai-org's 3d-vae.pt, or a state dict."
        )
    is_tensor = lambda value: isinstance(value, torch.Tensor)  # noqa: E731
    return {str(k): _stored_torch(v) if is_tensor(v) else v for k, v in tree.items()}


def write_safetensors(
    path: str | os.PathLike, tensors: dict[str, Stored], metadata: dict[str, str]
) -> None:
    """Writes tensors as safetensors, reading each only when its turn comes.

    The library's own writer takes all of them at once.

    **Raises:** `OSError`.
    """
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, (shape, dtype, _) in tensors.items():
        begin, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dtype, read in tensors.values():
            # The bytes of an array may be in another order than the machine's.
            array = np.ascontiguousarray(read().astype(jnp.dtype(dtype), copy=False))
            file.write(array.reshape(-1).view(np.uint8).data)


def empty(shape: Iterable[int], dtype: str) -> Shaped[np.ndarray, "..."]:
    """Returns an array in memory pages of its own.

    The pages go back to the system with the array, where `malloc` would keep them. They are
    aligned as XLA wants, so that on a CPU it takes the array without a copy.
    """
    shape = tuple(shape)
    size = math.prod(shape) * FLOATS[dtype].itemsize
    pages = np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size)
    return pages.view(FLOATS[dtype]).reshape(shape)


def _stored(path: Path, name: str, header: Any) -> Stored:
    code = str(header.get_dtype())
    dtype = _NAMES.get(code, code)
    return Stored(tuple(header.get_shape()), dtype, functools.partial(_read, path, name, dtype))


def _read(path: Path, name: str, dtype: str) -> np.ndarray:
    # The library maps the file. It is closed after each tensor, to let go of the pages in memory.
    if dtype not in FLOATS_OF_8_BITS:
        with _opened(path, "numpy") as file:
            return file.get_tensor(name)
    _torch(f"{path} holds {dtype} weights, and casting them needs torch")
    with _opened(path, "pt") as file:
        return _as_numpy(file.get_tensor(name))


@contextlib.contextmanager
def _opened(path: Path, framework: str, pickled: str | None = None) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework=framework) as file:
            yield file
    except (safetensors.SafetensorError, ValueError) as error:
        with path.open("rb") as file:
            start = file.read(8)
        # The length of a safetensors header may begin with the same byte; it ends in zeros.
        is_length = len(start) == 8 and start.endswith(b"\0\0\0\0")
        if pickled is not None and start.startswith(_PICKLES) and not is_length:
            raise ValueError(f"{path} {pickled}") from error
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise ValueError(
            f"{path} is not a complete safetensors file ({reason}): copy or download it again."
        ) from error


def _torch(need: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f'{need}: pip install "eqx_cogvae[diffusers]".') from error
    return torch


def _torch_reason(error: Exception) -> str:
    # torch's own advice is to execute the file: only the line that names the fault is kept.
    lines = str(error).splitlines() or [type(error).__name__]
    faults = [line for line in lines if "GLOBAL" in line or "WeightsUnpickler" in line]
    return (faults or lines)[0].partition(" Please")[0].strip(" \t.")[:_LONGEST_REASON]


def _stored_torch(tensor: Any) -> Stored:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not str(tensor.layout).endswith("strided"):
        dtype = f"{tensor.layout} {dtype}"
    return Stored(tuple(tensor.shape), dtype, functools.partial(_as_numpy, tensor))


def _as_numpy(tensor: Any) -> np.ndarray:
    """Returns the elements of a torch tensor on the CPU, without a copy."""
    import torch

    tensor, dtype = tensor.detach(), str(tensor.dtype).removeprefix("torch.")
    if dtype in ("bfloat16", *FLOATS_OF_8_BITS):  # torch gives NumPy only dtypes of NumPy's own
        bits = torch.int16 if dtype == "bfloat16" else torch.uint8
        return tensor.view(bits).numpy().view(jnp.dtype(dtype))
    return tensor.numpy()


__all__ = [
    "FLOATS",
    "FLOATS_OF_8_BITS",
    "Stored",
    "empty",
    "read_safetensors",
    "read_torch",
    "write_safetensors",
]
