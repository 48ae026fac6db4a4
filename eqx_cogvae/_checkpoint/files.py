"""Finds a checkpoint's files: in a directory, on the hub, or among the embedded ones."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .._files import check_name, check_regular

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD = re.compile(r"diffusion_pytorch_model-\d{5}-of-\d{5}\.safetensors")

_EMBEDDED = Path(__file__).parents[1]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_VARIANTS = (
    re.compile(r"diffusion_pytorch_model\.((?!.*-\d{5}-of-\d{5}\.)[^.]+)\.safetensors"),
    re.compile(r"diffusion_pytorch_model\.safetensors\.index\.([^.]+)\.json"),
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Found(NamedTuple):
    """A checkpoint's files, by their paths on this machine."""

    config: Path | None
    weights: tuple[Path, ...]


def find(
    name_or_path: str | os.PathLike, subfolder: str | None, *, configured: bool, **hub: Any
) -> Found:
    """Returns the files of a directory, a file, `"tiny"` or a hub id.

    **Arguments:**

    - `configured`: True if the caller has a config; then none is looked for.
    - `hub`: for `hf_hub_download`.

    **Raises:** `FileNotFoundError`; `ValueError` for a pickle, for several variants, for a
    damaged index, for a file without a config; `OSError` where the hub gives nothing.
    """
    source = _source(name_or_path, hub)
    if isinstance(source, Path):
        if configured and subfolder is None:
            return Found(None, (source,))
        raise ValueError(
            f"{source} is a file: pass its `config=`, such as 'CogVideoX-2b' or 'CogVideoX-5b', "
            f"and no `subfolder`; or give a directory with {CONFIG} and {WEIGHTS}."
        )
    folders = source.folders if subfolder is None else (subfolder,)
    for folder in folders:
        config = None if configured else source.get(folder, CONFIG)
        if config is None and not configured:
            continue
        if weights := _weights(source, folder):
            return Found(config, weights)
        if config is not None:
            raise source.without_weights(folder)
    raise source.without_weights(folders[0]) if configured else source.without_config(folders)


class _Directory:
    """A directory on this machine."""

    folders = ("", "vae")

    def __init__(self, path: Path):
        self.path = path

    def get(self, folder: str, name: str) -> Path | None:
        path = self.path / folder / name
        return path if path.is_file() else None

    def variants(self, folder: str) -> list[str]:
        place = self.path / folder
        names = [path.name for path in place.iterdir()] if place.is_dir() else []
        matches = [pattern.fullmatch(name) for pattern in _VARIANTS for name in names]
        return sorted({match[1] for match in matches if match})

    def without_config(self, folders: tuple[str, ...]) -> Exception:
        places = " or ".join(str(self.path / folder) for folder in folders)
        pickles = [path.name for path in _pickles(self.path)]
        hint = f"; `from_original` reads {pickles[0]}" if pickles else ""
        return FileNotFoundError(
            f"there is no {CONFIG} in {places}: give a directory that diffusers' "
            f"`save_pretrained` wrote{hint}."
        )

    def without_weights(self, folder: str) -> Exception:
        place = self.path / folder
        for pickle in _pickles(place):
            return ValueError(
                f"{pickle} is a pickle, which may run code when opened: convert it to {WEIGHTS} "
                "with diffusers' `save_pretrained(..., safe_serialization=True)`."
            )
        return FileNotFoundError(
            f"there is no {WEIGHTS} in {place}, nor an {INDEX}, beside its {CONFIG}: "
            "copy or download it too."
        )


class _Hub:
    """A repository on the hub. Asks for files by name, and never for a list of them."""

    folders = ("vae", "")

    def __init__(self, name: str, options: dict[str, Any]):
        self.name = name
        self.options: dict[str, Any] = options
        self.reason = ""

    def get(self, folder: str, name: str) -> Path | None:
        # Slow to import, and local checkpoints do without.
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            path = huggingface_hub.hf_hub_download(
                self.name, name, subfolder=folder or None, **self.options
            )
        except (EntryNotFoundError, FileNotFoundError) as error:
            self.reason = _first_line(error)
            if isinstance(error, LocalEntryNotFoundError):
                # The hub is out of reach, and each further try would wait as long as this one.
                self.options = self.options | {"local_files_only": True}
            return None
        except Exception as error:
            # The errors of the hub, of its cache and of the transport have no base in common.
            self.reason = _first_line(error)
            raise self._error("it") from error
        return Path(path)

    def variants(self, folder: str) -> list[str]:
        del folder
        return ["fp16", "bf16"]

    def without_config(self, folders: tuple[str, ...]) -> Exception:
        return self._error(" or ".join(f"{folder}/{CONFIG}".strip("/") for folder in folders))

    def without_weights(self, folder: str) -> Exception:
        return self._error(f"{folder}/{WEIGHTS} or {folder}/{INDEX}".replace(" /", " ").strip("/"))

    def _error(self, what: str) -> OSError:
        return OSError(
            f"there is no directory {self.name!r}, and the hub did not give {what} "
            f"({self.reason}): check the name, `revision`, `token` and the network, "
            "or give a directory."
        )


def _source(name_or_path: str | os.PathLike, hub: dict[str, Any]) -> Path | _Directory | _Hub:
    if name_or_path == "tiny":
        path = _EMBEDDED / "tiny"
        if not path.is_dir():
            raise FileNotFoundError(
                f"the embedded weights 'tiny' are missing from {path}: install eqx_cogvae again, "
                "or give a directory or a hub id."
            )
        return _Directory(path)
    path = Path(name_or_path).expanduser()
    check_name(path)
    if path.is_dir():
        return _Directory(path)
    if path.is_file() and path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, and not safetensors: load it with `from_original`, which "
            "executes nothing, or convert it with diffusers' `save_pretrained`."
        )
    if path.exists():
        return path
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(name_or_path):
        return _Hub(name_or_path, hub)
    raise FileNotFoundError(
        f"there is no directory {path}: give one that diffusers' `save_pretrained` wrote, "
        "'tiny', or a hub id such as 'zai-org/CogVideoX-2b'."
    )


def _weights(source: _Directory | _Hub, folder: str) -> tuple[Path, ...]:
    """Returns the weights' files, or none; an index goes first, and variants last."""
    if plain := _files(source, folder, None):
        return plain
    variants = source.variants(folder)
    if isinstance(source, _Directory) and len(variants) > 1:
        raise ValueError(
            f"{source.path / folder} holds the variants {', '.join(variants)}, and no {WEIGHTS}: "
            "leave one there, or rename one to that."
        )
    for variant in variants:
        if files := _files(source, folder, variant):
            return files
    return ()


def _files(source: _Directory | _Hub, folder: str, variant: str | None) -> tuple[Path, ...]:
    names = [INDEX, WEIGHTS]
    if variant is not None:
        names = [
            f"{stem}.{variant}.{suffix}" for stem, _, suffix in (n.rpartition(".") for n in names)
        ]
    index = source.get(folder, names[0])
    if index is None:
        single = source.get(folder, names[1])
        return () if single is None else (single,)
    shards = []
    for name in _shards(index):
        shard = source.get(folder, name)
        if shard is None:
            raise FileNotFoundError(
                f"{index} names {name}, which is not there: copy or download it too."
            )
        shards.append(shard)
    return tuple(shards)


def _shards(index: Path) -> list[str]:
    content = read_json(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(map(_plain, names.values())):
        raise ValueError(
            f"{index} must map tensors to files beside it under 'weight_map': "
            "copy or download it again."
        )
    return sorted(set(names.values()))


def _plain(name: Any) -> bool:
    """Returns True for the name of a file in the same directory, and in no other place."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-][\w.-]{,199}\.safetensors", name))


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file of JSON.

    **Raises:** `ValueError` for anything else, and for a key given twice, of which readers take
    one or the other; `OSError`.
    """
    check_regular(path)
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it gives {twice[:80]!r} twice")
    return content


def _pickles(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.suffix in PICKLES)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


__all__ = ["CONFIG", "INDEX", "PICKLES", "SHARD", "WEIGHTS", "Found", "find", "read_json"]
