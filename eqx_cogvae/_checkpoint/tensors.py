"""Tensors in files: known by their headers, read one at a time, never mapped into memory."""

import json
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Shaped

from .._files import check_regular

FLOATS = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(jnp.bfloat16),
}
_PICKLES = (b"PK\x03\x04", b"\x80")
# That of the published checkpoints is 50 kB; in Python a header takes many times its bytes.
_LONGEST_HEADER = 4 << 20
_LONGEST_REASON = 200
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NAMES: dict[str, str] = {code: name for name, code in _CODES.items()}


class Stored(NamedTuple):
    """A tensor in a file, not yet read. A `dtype` outside of `FLOATS` cannot be."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def read_safetensors(path: str | os.PathLike) -> dict[str, Stored]:
    """The tensors of a safetensors file of weights, in the file's order.

    **Raises:** `ValueError` for a file that is truncated or something else; `OSError`.
    """
    return read_header(
        path,
        "is a pickle, which may run code when opened, and safetensors are due: convert it with "
        "diffusers' `save_pretrained`, or, if its names are those of zai-org's 3d-vae.pt, load "
        "it with `from_original`, which runs nothing.",
    )[1]


def read_header(path: str | os.PathLike, pickled: str) -> tuple[dict[str, str], dict[str, Stored]]:
    """The metadata and the tensors of a safetensors file, in the file's order.

    **Raises:** `ValueError` for a file that is truncated or something else, with `pickled` after
    its name where it is a pickle; `OSError`.
    """
    path = Path(path)
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(8)
    length = int.from_bytes(start, "little")
    try:
        if length > _LONGEST_HEADER:
            raise ValueError(f"its header would be of {length} bytes")
        # Its own reader maps the file, whose pages would count as memory in use. It checks the
        # header, and the file's length against it; the tensors are then read plainly.
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            file.seek(len(start))
            header = json.loads(file.read(length), object_pairs_hook=unique)
    except (safetensors.SafetensorError, ValueError) as error:
        if start.startswith(_PICKLES):
            raise ValueError(f"{path} {pickled}") from error
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise ValueError(
            f"{path} is not a complete safetensors file ({reason}): copy or download it again."
        ) from error
    metadata = header.pop("__metadata__", None) or {}
    entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
    return metadata, {name: _stored(path, 8 + length, entry) for name, entry in entries}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`.

    **Raises:** `ValueError` for a key that is there twice, of which readers take one or other.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it gives {twice[:80]!r} twice")
    return content


def write_safetensors(
    path: str | os.PathLike,
    tensors: dict[str, Stored],
    metadata: dict[str, str],
) -> None:
    """Writes tensors as safetensors, reading each only when its turn comes.

    **Raises:** `OSError`.
    """
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, (shape, dtype, _) in tensors.items():
        begin, end = end, end + _size(shape) * FLOATS[dtype].itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)


def read_range(
    path: str | os.PathLike, offset: int, shape: Iterable[int], dtype: str
) -> Shaped[np.ndarray, "..."]:
    """An array of that shape and dtype from `offset` on.

    **Raises:** `ValueError` where the file ends too early; `OSError`.
    """
    array = empty(shape, dtype)
    with Path(path).open("rb") as file:
        file.seek(offset)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
            raise ValueError(f"{path} ended while it was read: copy or download it again.")
    return array


def empty(shape: Iterable[int], dtype: str) -> Shaped[np.ndarray, "..."]:
    """An array in pages of its own.

    They go back to the system with it, where `malloc` would keep them, and are aligned as XLA
    wants, which on a CPU takes such an array for its own without a copy.
    """
    shape = tuple(shape)
    size = _size(shape) * FLOATS[dtype].itemsize
    return (
        np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size)
        .view(FLOATS[dtype])
        .reshape(shape)
    )


def _stored(path: Path, start: int, entry: dict) -> Stored:
    shape, code = tuple(entry["shape"]), str(entry["dtype"])
    dtype = _NAMES.get(code, code)
    offset = start + entry["data_offsets"][0]
    return Stored(shape, dtype, lambda: read_range(path, offset, shape, dtype))


def _size(shape: Iterable[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


__all__ = [
    "FLOATS",
    "Stored",
    "empty",
    "read_header",
    "read_range",
    "read_safetensors",
    "unique",
    "write_safetensors",
]
