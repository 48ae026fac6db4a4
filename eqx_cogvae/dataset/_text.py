"""Text from outside: lists, captions, metadata and file names."""

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

_MOST_NESTED = 100
# A label of 120 bytes leaves room, within the 255 of a file's name, for all that is added to it.
_LABEL_BYTES = 120


def decoded(content: bytes, name: str) -> str:
    """Returns the text of a UTF-8 file, without its byte-order mark.

    **Raises:** `ValueError` for any other encoding.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name} is not UTF-8 (byte 0x{content[error.start]:02x} in line {line}): "
            "save it as UTF-8."
        ) from error
    # ASCII characters in UTF-16 without a mark are valid UTF-8 with a NUL beside each.
    if "\0" in text:
        raise ValueError(f"{name} holds NUL characters, as UTF-16 does: save it as UTF-8.")
    return text


def parsed(text: str, name: str) -> Any:
    """Returns what a JSON text holds.

    **Raises:** `ValueError` for anything but JSON, or for JSON that is nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(_too_deep(name)) from error
    except ValueError as error:
        raise ValueError(f"{name} must hold JSON: {error}.") from error


def portable(value: Any, name: str, levels: int = _MOST_NESTED) -> Any:
    """Returns a value that every reader of JSON lines understands.

    NaN and infinity become null, and what JSON has no type for, such as a date, becomes text.

    **Raises:** `ValueError` for bytes, and for what is nested too deep.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray | memoryview):
        raise ValueError(f"{name} holds bytes, and the manifest is text: leave that column out.")
    if not isinstance(value, Mapping | list | tuple):
        return readable(str(value))
    if not levels:
        raise ValueError(_too_deep(name))
    if isinstance(value, Mapping):
        return {readable(str(k)): portable(v, name, levels - 1) for k, v in value.items()}
    return [portable(v, name, levels - 1) for v in value]


def _too_deep(name: str) -> str:
    return f"{name} is nested more than {_MOST_NESTED} deep: flatten it."


def readable(text: str) -> str:
    r"""Returns text that UTF-8 can write: a file name's foreign bytes appear as `\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode()


def label(name: str, length: int = 40) -> str:
    """Returns the letters, digits and marks of a file's name, of any script, without its suffix.

    Runs of other characters become `_`. Dots are among them, as WebDataset cuts names at dots.
    """
    text = unicodedata.normalize("NFC", PurePath(readable(name)).stem)
    kept = (c if c in "-_" or unicodedata.category(c)[0] in "LMN" else "\0" for c in text)
    text = re.sub("\0+", "_", "".join(kept))[:length]
    return text.encode()[:_LABEL_BYTES].decode(errors="ignore") or "_"


__all__ = ["decoded", "label", "parsed", "portable", "readable"]
