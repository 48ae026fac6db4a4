"""A reader of torch's zip files that runs nothing of what they hold.

A pickle is a program: it may import any callable and call it. This reader knows the few names
that tensors need, and refuses the file at the first other one. Torch is not imported.
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from ._tensor_files import FLOATS, Stored, read_range

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    # No weights, but they may stand beside them: counters, an optimiser's steps.
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_LOCAL_HEADER = 30


def read_torch(path: str | os.PathLike) -> Any:
    """What `torch.save` wrote, with `Stored` in the place of each tensor.

    **Raises:** `ValueError` for a pickle that needs more than tensors and plain containers, for
    the format of torch before 1.6, for a file that is truncated or something else; `OSError`.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(_no_zip(path)) from error
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{path} is a zip file but not one that `torch.save` writes.")
    root = pickles[0].removesuffix("data.pkl")
    _check_byte_order(path, members.get(f"{root}byteorder"))
    content = _Member(path, members[pickles[0]]).read()
    try:
        return _Unpickler(path, root, members, content).load()
    except _RefusedError as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        # A damaged pickle can raise anything.
        raise ValueError(
            f"the pickle in {path} is damaged ({error!r}): copy or download it again."
        ) from error


class _RefusedError(pickle.UnpicklingError):
    pass


class _Member(NamedTuple):
    """A file of the archive, read at its place: torch may leave checksums unset."""

    path: Path
    info: zipfile.ZipInfo

    @property
    def offset(self) -> int:
        if self.info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(
                f"{self.path} is compressed, which `torch.save` never does: "
                "save it again with torch."
            )
        with self.path.open("rb") as file:
            file.seek(self.info.header_offset)
            header = file.read(_LOCAL_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return self.info.header_offset + _LOCAL_HEADER + lengths

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.info.file_size)


# What a pickle can get hold of are tuples: it could change the attributes of anything else.


class _StorageType(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    dtype: str
    member: _Member


class _Tensor(NamedTuple):
    """`torch._utils._rebuild_tensor_v2`."""

    def __call__(self, storage, offset, size, stride, requires_grad=False, hooks=None, more=None):
        del requires_grad, hooks, more
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or len(size) != len(stride):
            raise pickle.UnpicklingError("a tensor without a storage, or strides")
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise pickle.UnpicklingError(f"a tensor of size {size} and strides {stride}")
        shape, stride = tuple(size), tuple(stride)
        return Stored(shape, storage.dtype, lambda: _strided(storage, offset, shape, stride))


class _Parameter(NamedTuple):
    """`torch._utils._rebuild_parameter`."""

    def __call__(self, data, requires_grad=False, hooks=None):
        del requires_grad, hooks
        return data


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, root: str, members: dict[str, zipfile.ZipInfo], content: bytes):
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._path = path
        self._root = root
        self._members = members

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise _RefusedError(
                f"{self._path} asks for {f'{module}.{name}'!r}, which weights do not need: "
                "refused, and nothing was run; get the weights from who made them, as safetensors."
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, *_ = pid
        if kind != "storage" or not isinstance(storage, _StorageType):
            raise pickle.UnpicklingError(f"{kind!r} where a storage is due")
        return _Storage(
            storage.dtype, _Member(self._path, self._members[f"{self._root}data/{key}"])
        )


def _strided(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Shaped[np.ndarray, "..."]:
    """The part of the storage that the tensor spans, seen through its strides."""
    member, itemsize = storage.member, FLOATS[storage.dtype].itemsize
    if 0 in shape:
        return np.empty(shape, FLOATS[storage.dtype])
    span = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    if (offset + span) * itemsize > member.info.file_size:
        raise ValueError(f"{member.path} holds a tensor that reaches beyond its storage.")
    start = member.offset + offset * itemsize
    flat = read_range(member.path, start, (span,), storage.dtype)
    return np.lib.stride_tricks.as_strided(
        flat, shape, tuple(step * itemsize for step in stride), writeable=False
    )


def _check_byte_order(path: Path, info: zipfile.ZipInfo | None) -> None:
    order = b"little" if info is None else _Member(path, info).read()
    if order != b"little":
        raise ValueError(
            f"{path} has its bytes in {order.decode(errors='replace')!r} order, 'little' is due: "
            "load and save it again with torch on a machine of that order."
        )


def _no_zip(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(b"PK"):
        return f"{path} is a truncated or damaged zip file: copy or download it again."
    if start.startswith(b"\x80"):
        return (
            f"{path} is a pickle outside of a zip file, as torch before 1.6 wrote; convert it: "
            "`torch.save(torch.load(path, weights_only=True), new_path)`."
        )
    return f"{path} is not a file that `torch.save` writes."


__all__ = ["read_torch"]
