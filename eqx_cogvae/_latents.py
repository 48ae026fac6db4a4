"""Latents files: one safetensors tensor, and in its metadata all that decoding needs."""

import dataclasses
import math
import numbers
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Shaped

from ._checkpoint.fingerprints import exact_fingerprint, fingerprint
from ._checkpoint.tensors import FLOATS, Stored, read_safetensors, write_safetensors
from ._files import atomic, check_name

FORMAT = "eqx_cogvae.latents.1"
_NAME = "latents"
_LOGVAR = "logvar"
_TENSORS = ("array", "logvar")
LAYOUTS = ("BTHWC", "BCTHW")
_PICKLED = (
    "is a pickle or an archive, which may run code when opened; latents come as safetensors: "
    "`safetensors.torch.save_file({'latents': z}, path)`."
)


# Compared by identity: arrays have no truth value.
@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """Latents, together with what their file says of them.

    A field is None if the file does not have it.

    **Arguments:**

    - `array`: the latents, BTHWC whatever the file's layout.
    - `scaled`: True if they are in the diffusion model's units, False if in the VAE's own.
    - `scaling_factor`: the factor between the two units.
    - `invert_scale_latents`: the config's field of that name.
    - `fps`: frames per second of the video.
    - `height`, `width`: size of the video in pixels.
    - `frames`: number of frames of the video, before padding.
    - `padded`: number of frames that were encoded.
    - `fingerprint`: `cv.fingerprint` of the model that encoded them.
    - `logvar`: log variances of the posterior; `array` is then its mean.
    - `source`, `source_sha256`: name and hash of the video file that a dataset's clip is from.
    - `start`: the clip's first frame in that video, at `fps`.
    - `seed`: of the noise, for `dataset.noise_key`, if the latents were drawn.
    """

    array: Float[np.ndarray, "b t h w c"]
    scaled: bool = False
    scaling_factor: float | None = None
    invert_scale_latents: bool | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    padded: int | None = None
    fingerprint: str | None = None
    logvar: Float[np.ndarray, "b t h w c"] | None = None
    source: str | None = None
    source_sha256: str | None = None
    start: int | None = None
    seed: int | None = None


def save_latents(path: str | os.PathLike, latents: Latents, *, layout: str = "BTHWC") -> None:
    """Writes latents as safetensors, atomically; equal latents give equal bytes.

    **Arguments:**

    - `path`: the file.
    - `latents`: the latents and their metadata.
    - `layout`: `"BTHWC"`, or `"BCTHW"`, which is diffusers' order of axes.

    **Raises:** `ValueError` for NaN or infinite values, a wrong rank, dtype or layout, a `logvar`
    of another shape, and a field that `load_latents` would refuse; `OSError`.
    """
    check_layout(layout)
    _check_arrays(latents.array, latents.logvar, "latents")
    tensors = {}
    for name, array in ((_NAME, latents.array), (_LOGVAR, latents.logvar)):
        if array is not None:
            array = np.asarray(array)
            array = np.moveaxis(array, -1, 1) if layout == "BCTHW" else array
            tensors[name] = _stored(array)
    fields = {k: v for k, v in vars(latents).items() if k not in _TENSORS and v is not None}
    metadata = {name: _text(value) for name, value in fields.items()}
    try:
        _fields(metadata)
    except ValueError as error:
        raise ValueError(
            f"latents with {error} cannot be written to {path}: correct that, or leave it out."
        ) from error
    metadata |= {"format": FORMAT, "layout": layout, "dtype": tensors[_NAME].dtype}
    with atomic(path) as partial:
        write_safetensors(partial, tensors, metadata)


def _stored(array: np.ndarray) -> Stored:
    return Stored(array.shape, array.dtype.name, lambda: array)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    return str(int(value)) if isinstance(value, numbers.Integral) else repr(float(value))


def load_latents(
    path: str | os.PathLike, *, channels: int | None = None, layout: str | None = None
) -> Latents:
    """Reads a latents file, or any safetensors file with one five-dimensional tensor.

    **Arguments:**

    - `path`: the file.
    - `channels`: the model's `latent_channels`, which the latents must have.
    - `layout`: `"BTHWC"` or `"BCTHW"`, for a file that does not say. None takes the one in
        which the axis of channels has `channels` entries, if only one does.

    **Returns:** the latents, BTHWC whatever the file's layout.

    **Raises:** `ValueError` for a file that is no safetensors or is truncated, for latents that
    are not finite, of a wrong rank, dtype or channel count, or of unknown layout, and for
    metadata that cannot be; `FileNotFoundError`; `IsADirectoryError`; `OSError`.
    """
    if layout is not None:
        check_layout(layout)
    (array, logvar), metadata = _read(Path(path))
    own = metadata.get("layout")
    if own is not None:
        check_layout(own, f" in the metadata of {path}")
    if own and layout and own != layout:
        raise ValueError(
            f"{path} has the layout {own} in its metadata, and `layout` is {layout}: leave the "
            "argument out."
        )
    layout = own or layout or _layout_of(path, array.shape, channels)
    if layout == "BCTHW":
        array = np.moveaxis(array, 1, -1)
        logvar = None if logvar is None else np.moveaxis(logvar, 1, -1)
    if channels is not None and array.shape[-1] != channels:
        raise ValueError(
            f"latents in {path} have {array.shape[-1]} channels, the model has {channels}: "
            "decode them with the model that encoded them."
        )
    _check_arrays(array, logvar, f"latents in {path}")
    made_by = metadata.get("format", FORMAT)
    if made_by != FORMAT and made_by.startswith(FORMAT.rstrip("0123456789")):
        raise ValueError(
            f"{path} is of format {reprlib.repr(made_by)}, this version reads {FORMAT}: "
            "update eqx_cogvae."
        )
    try:
        return Latents(array, logvar=logvar, **_fields(metadata))
    except ValueError as error:
        raise ValueError(
            f"{path} has a bad value in its metadata, {error}: encode it again, or save the tensor "
            "without metadata."
        ) from error


def _check_arrays(array: Any, logvar: Any, what: str) -> None:
    check_latents(array, what)
    if logvar is not None:
        check_latents(logvar, f"the logvar of {what}")
        if logvar.shape != array.shape:
            raise ValueError(
                f"the logvar of {what} must have the shape of their mean, {array.shape}, "
                f"got {logvar.shape}."
            )


def check_latents(
    latents: Shaped[np.ndarray, "..."] | Shaped[Array, "..."], what: str = "latents"
) -> None:
    """Raises `ValueError` unless latents are floating, of five axes, and finite."""
    if latents.ndim != 5 or latents.dtype.name not in FLOATS:
        raise ValueError(
            f"{what} must be floating, of shape (b, t, h, w, c), in one of {', '.join(FLOATS)}, "
            f"got {latents.dtype} of shape {latents.shape}."
        )
    wrong = ~np.isfinite(np.asarray(latents))
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{what} hold {int(wrong.sum())} NaN or infinite values of {wrong.size}, the first at "
            f"(b, t, h, w, c) = {first}: the latents are broken, not the VAE; "
            "check what made them, often float16 or a diffusion step that overflowed."
        )


def _read(path: Path) -> tuple[tuple[np.ndarray, np.ndarray | None], Mapping[str, str]]:
    check_name(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, name a latents file in it.")
    if not path.exists():
        raise FileNotFoundError(f"there is no latents file at {path}.")
    metadata, tensors = read_safetensors(path, _PICKLED)
    if _NAME not in tensors and len(tensors) != 1:
        raise ValueError(
            f"{path} must hold a tensor named {_NAME!r}, or one alone; "
            f"it holds {len(tensors)}: {', '.join(name[:80] for name in sorted(tensors)[:4])}."
        )
    stored = tensors.get(_NAME) or next(iter(tensors.values()))
    logvar = tensors.get(_LOGVAR) if _NAME in tensors else None
    return (_array(path, stored), None if logvar is None else _array(path, logvar)), metadata


def _array(path: Path, stored: Stored) -> np.ndarray:
    if stored.dtype not in FLOATS:
        raise ValueError(f"latents in {path} must be floating, got {stored.dtype}.")
    if len(stored.shape) != 5 or 0 in stored.shape:
        raise ValueError(
            f"latents in {path} must have five axes, none of them empty, got shape "
            f"{reprlib.repr(stored.shape)}."
        )
    return stored.read()


def check_layout(layout: str, where: str = "") -> None:
    if layout not in LAYOUTS:
        raise ValueError(
            f"a layout is one of {', '.join(LAYOUTS)}, got {reprlib.repr(layout)}{where}."
        )


def _layout_of(path: Any, shape: tuple[int, ...], channels: int | None) -> str:
    fits = {"BTHWC": shape[-1] == channels, "BCTHW": shape[1] == channels}
    found = [layout for layout, fit in fits.items() if fit]
    if channels is not None and not found:
        raise ValueError(
            f"latents in {path} have no axis for {channels} channels, neither as BTHWC nor as "
            f"BCTHW, got shape {shape}: decode them with the model that encoded them."
        )
    if len(found) != 1:
        raise ValueError(
            f"{path} does not say its layout, and shape {shape} does not tell it: "
            "give BTHWC or BCTHW as the layout."
        )
    return found[0]


def _fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    readers = {
        "scaled": _boolean,
        "scaling_factor": _positive,
        "invert_scale_latents": _boolean,
        "fps": _positive,
        "height": _count,
        "width": _count,
        "frames": _count,
        "padded": _count,
        "fingerprint": _digits,
        "source": _unicode,
        "source_sha256": _digits,
        "start": _whole,
        "seed": _whole,
    }
    fields = {}
    for name in readers.keys() & metadata.keys():
        try:
            fields[name] = readers[name](metadata[name])
        except ValueError as error:
            raise ValueError(f"{name}={reprlib.repr(metadata[name])}") from error
    return fields


def _unicode(text: str) -> str:
    text.encode()  # raises for what came from bytes that are not UTF-8
    return text


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ValueError(text)
    return float(text)


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise ValueError(text)
    return int(text)


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise ValueError(text)
    return int(text)


def _digits(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{1,64}", text):
        raise ValueError(text)
    return text


__all__ = [
    "FORMAT",
    "LAYOUTS",
    "Latents",
    "check_latents",
    "check_layout",
    "exact_fingerprint",
    "fingerprint",
    "load_latents",
    "save_latents",
]
