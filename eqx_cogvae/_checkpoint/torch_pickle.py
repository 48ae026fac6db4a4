"""A reader of torch's zip files that runs nothing of what they hold.

A pickle is a program: it may import any callable and call it. This reader knows the few names
that tensors need, and refuses the file at the first other one. Torch is not imported.
"""

import os
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from .._config import shown
from .tensors import FLOATS, Stored, read_range

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
# That of the published checkpoint is 40 kB; in Python a pickle takes many times its bytes.
_LONGEST_PICKLE = 4 << 20


def read_torch(path: str | os.PathLike) -> Any:
    """What `torch.save` wrote, with `Stored` in the place of each tensor.

    **Raises:** `ValueError` for a pickle that needs more than tensors and plain containers, for
    the format of torch before 1.6, for a file that is truncated or something else; `OSError`.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = {info.filename: info for info in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            # A damaged directory may lead to before the file's beginning, which is an `OSError`.
            raise ValueError(_no_zip(path)) from error
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{path} is a zip file but not one that `torch.save` writes.")
    root = pickles[0].removesuffix("data.pkl")
    _check_byte_order(path, members.get(f"{root}byteorder"))
    member = _Member(path, members[pickles[0]])
    if member.info.file_size > _LONGEST_PICKLE:
        raise ValueError(
            f"the pickle in {path} is of {member.info.file_size} bytes, and {_LONGEST_PICKLE} "
            "are enough for the names of a model: save the state dict alone."
        )
    content = member.read()
    try:
        return _Machine(path, root, members).run(content)
    except _RefusedError as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        # A damaged pickle can raise anything.
        raise ValueError(
            f"the pickle in {path} is damaged ({shown(repr(error))}): copy or download it again."
        ) from error


class _RefusedError(ValueError):
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
            file.seek(max(self.info.header_offset, 0))
            header = file.read(_LOCAL_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        offset = self.info.header_offset + _LOCAL_HEADER + lengths
        fits = 0 <= offset <= self.path.stat().st_size - self.info.file_size
        if not fits or not header.startswith(b"PK\x03\x04"):
            raise ValueError(_damaged(self.path))
        return offset

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
            raise TypeError("a tensor without a storage, or strides")
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("a tensor of a negative size, or offset, or stride")
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


class _Machine:
    """Runs the few instructions of pickles that `torch.save` writes, and no other.

    Python's own unpickler can be made to fill the memory by one instruction, or to hash a tuple
    of tuples until the end of days. Here nothing grows faster than the pickle is long.
    """

    def __init__(self, path: Path, root: str, members: dict[str, zipfile.ZipInfo]):
        self._path = path
        self._root = root
        self._members = members
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        """What the pickle describes."""
        for instruction, argument, _ in pickletools.genops(content):
            name = instruction.name
            if name == "STOP":
                break
            if name in _LITERALS:
                self._stack.append(_LITERALS[name]() if argument is None else argument)
            elif name in _INSTRUCTIONS:
                getattr(self, _INSTRUCTIONS[name])(name, argument)
            elif name not in _IGNORED:
                raise _RefusedError(f"{self._path} uses the instruction {name!r}, {_REFUSED}")
        return self._stack.pop()

    def _mark(self, *_) -> None:
        self._marks.append(len(self._stack))

    def _pop_marked(self) -> list[Any]:
        mark = self._marks.pop()
        items, self._stack[mark:] = self._stack[mark:], []
        return items

    def _put(self, name: str, argument: int | None) -> None:
        del name  # one of them counts by itself
        self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]

    def _get(self, _: str, argument: int) -> None:
        self._stack.append(self._memo[argument])

    def _tuple(self, name: str, _: Any) -> None:
        if name == "TUPLE":
            items = self._pop_marked()
        else:
            items = [self._stack.pop() for _ in range(int(name[-1]))][::-1]
        self._stack.append(tuple(items))

    def _add(self, name: str, _: Any) -> None:
        items = self._pop_marked() if name.endswith("S") else [self._stack.pop()]
        self._stack[-1].extend(items)

    def _set(self, name: str, _: Any) -> None:
        items = (
            self._pop_marked() if name.endswith("S") else [self._stack.pop(-2), self._stack.pop()]
        )
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, _KEYS):
                raise TypeError(f"a {type(key).__name__} for a key")
            self._stack[-1][key] = value

    def _build(self, *_) -> None:
        """The attributes of an ordered dictionary, which nobody asks for."""
        self._stack.pop()
        if not isinstance(self._stack[-1], OrderedDict):
            raise TypeError(f"attributes for a {type(self._stack[-1]).__name__}")

    def _global(self, name: str, argument: str | None) -> None:
        names = (
            [self._stack.pop() for _ in range(2)][::-1] if argument is None else argument.split(" ")
        )
        module, name = map(str, names)
        if (module, name) not in _GLOBALS:
            raise _RefusedError(f"{self._path} asks for {f'{module}.{name}'[:80]!r}, {_REFUSED}")
        self._stack.append(_GLOBALS[module, name])

    def _reduce(self, *_) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if function is OrderedDict and arguments == ():
            self._stack.append(OrderedDict())
        elif isinstance(function, _Tensor | _Parameter):
            self._stack.append(function(*arguments))
        else:
            raise TypeError(f"a call of a {type(function).__name__}")

    def _storage(self, *_) -> None:
        kind, storage, key, *_ = self._stack.pop()
        if kind != "storage" or not isinstance(storage, _StorageType) or not isinstance(key, str):
            raise TypeError(f"a {type(kind).__name__} where a storage is due")
        info = self._members[f"{self._root}data/{key}"]
        self._stack.append(_Storage(storage.dtype, _Member(self._path, info)))


_REFUSED = (
    "which weights do not need: refused, and nothing was run; get the weights from who made "
    "them, as safetensors."
)
_KEYS = str | bytes | int | float | None
_IGNORED = ("PROTO", "FRAME")
_LITERALS: dict[str, Any] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
} | dict.fromkeys(
    (
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    )
)
_INSTRUCTIONS = {
    "MARK": "_mark",
    "BINPUT": "_put",
    "LONG_BINPUT": "_put",
    "MEMOIZE": "_put",
    "BINGET": "_get",
    "LONG_BINGET": "_get",
    "TUPLE": "_tuple",
    "TUPLE1": "_tuple",
    "TUPLE2": "_tuple",
    "TUPLE3": "_tuple",
    "APPEND": "_add",
    "APPENDS": "_add",
    "SETITEM": "_set",
    "SETITEMS": "_set",
    "BUILD": "_build",
    "GLOBAL": "_global",
    "STACK_GLOBAL": "_global",
    "REDUCE": "_reduce",
    "BINPERSID": "_storage",
}


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


def _damaged(path: Path) -> str:
    return f"{path} is a truncated or damaged zip file: copy or download it again."


def _no_zip(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(b"PK"):
        return _damaged(path)
    if start.startswith(b"\x80"):
        return (
            f"{path} is a pickle outside of a zip file, as torch before 1.6 wrote; convert it: "
            "`torch.save(torch.load(path, weights_only=True), new_path)`."
        )
    return f"{path} is not a file that `torch.save` writes."


__all__ = ["read_torch"]
