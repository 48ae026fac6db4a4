"""The clips of an encoded dataset, for a training loop."""

import copy
import dataclasses
import json
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import jax
import numpy as np
from jaxtyping import Float

from .._latents import Latents, check_layout, load_latents
from .._types import Key
from ._sources import LATENTS, Item, find

_CAPTIONS = ("caption", "text", "prompt")
# Columns of a manifest and of a tar that say where things lie, or are no metadata.
_PLACES = ("file", "rows")


class Example(NamedTuple):
    """A clip as `LatentsSource` gives it."""

    latents: Float[np.ndarray, "t h w c"]
    """In the units of its file, `(t, h, w, c)`, or `(c, t, h, w)` with `layout="BCTHW"`."""
    caption: str
    """Empty where there is none."""
    metadata: dict[str, Any]
    """The columns of the manifest, and what the latents file says of itself."""


class LatentsSource:
    """Reads the clips of an encoded dataset by their numbers: `len(source)`, `source[i]`.

    It is a `RandomAccessDataSource` for Grain and a map-style `Dataset` for torch as it is, and
    can be pickled, for workers in processes of their own. Workers need no accelerator: files are
    read by NumPy. Latents are in the units of their files; `vae.scale_latents` makes them the
    diffusion model's.

    !!! Example

        ```py
        source = dataset.LatentsSource("latents", key=jax.random.key(0))
        loader = grain.MapDataset.source(source).shuffle(seed=0).batch(4).to_iter_dataset()
        for latents, captions, metadata in loader: ...
        ```

    **Arguments:**

    - `source`: the folder that `dataset.encode` wrote, whose manifests are read; one such
        `manifest.jsonl`; or, without a manifest, a folder of latents files and WebDataset tars, or
        one of them. Each line of a manifest is an example, whether its clip is a file or in a tar.
    - `key`: a `jax.random.key`. If a clip's file holds the posterior, as `latents="posterior"`
        encodes it, latents are drawn from it: the same ones for a key and a number at each
        access. None gives the mean. `with_key` makes a source of other draws, for another epoch.
    - `dtype`: of the latents; None keeps the file's, such as bfloat16, which torch cannot collate.
    - `layout`: `"BTHWC"`, or `"BCTHW"` as torch has it. Latents have no batch axis in either.

    **Raises:** `FileNotFoundError`; `ValueError` for a list or a tar that cannot be read, or if
    there are no latents.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        *,
        key: Key | None = None,
        dtype: Any = np.float32,
        layout: str = "BTHWC",
    ):
        check_layout(layout)
        self._source = Path(source)
        self._examples = list(_examples(self._source))
        self._dtype = None if dtype is None else np.dtype(dtype)
        self._layout = layout
        self._seeds = _seeds(key)

    def with_key(self, key: Key | None) -> "LatentsSource":
        """Returns a source of the same clips that draws latents by another key.

        **Arguments:**

        - `key`: a `jax.random.key`, or None for the mean.

        **Returns:** the source; the files are not listed again.
        """
        other = copy.copy(self)
        other._seeds = _seeds(key)
        return other

    def __len__(self) -> int:
        return len(self._examples)

    def __repr__(self) -> str:
        # Grain's checkpoints compare it between runs.
        return f"LatentsSource({str(self._source)!r}, {len(self)} clips)"

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Reads a clip.

        **Arguments:**

        - `index`: its number, from 0 on; negative numbers count from the end.

        **Returns:** an `Example`.

        **Raises:** `IndexError` for a number outside; as `load_latents` for a file that cannot be
        read.
        """
        given = operator.index(index)
        number = given + len(self) if given < 0 else given
        if not 0 <= number < len(self):
            raise IndexError(f"clips are numbered from 0 to {len(self) - 1}, got {given}.")
        item, columns = self._examples[number]
        record = _read(item)
        metadata = _metadata(record) | {k: v for k, v in columns.items() if v is not None}
        caption = next((metadata.pop(name) for name in _CAPTIONS if name in metadata), "")
        return Example(self._array(record, number), str(caption), metadata)

    def _array(self, record: Latents, number: int) -> np.ndarray:
        array = record.array[0]
        if self._seeds is not None and record.logvar is not None:
            noise = np.random.default_rng((*self._seeds, number)).standard_normal(array.shape)
            std = np.exp(0.5 * record.logvar[0].astype(np.float64))
            array = (array.astype(np.float64) + std * noise).astype(array.dtype)
        if self._layout == "BCTHW":
            array = np.ascontiguousarray(np.moveaxis(array, -1, 0))
        return array if self._dtype is None else array.astype(self._dtype)


def _seeds(key: Key | None) -> tuple[int, ...] | None:
    """Returns the numbers of a key, which any process can read without a device."""
    return None if key is None else tuple(np.ravel(jax.random.key_data(key)).tolist())


def _examples(source: Path) -> Iterator[tuple[Item, dict[str, Any]]]:
    manifests = sorted(source.glob("manifest*.jsonl")) if source.is_dir() else []
    if source.name.endswith(".jsonl") and source.is_file():
        manifests = [source]
    # Runs with another number of shards leave lines that say the same.
    seen: set[str] = set()
    for manifest in manifests:
        yield from _listed(manifest, seen)
    if manifests:
        return
    for item in find(source, LATENTS):
        if item.problem:
            raise ValueError(item.problem)
        for row in item.rows:
            yield item, {k: v for k, v in row.items() if k not in _PLACES}


def _listed(manifest: Path, seen: set[str]) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Yields the examples of a manifest whose lines are new, each with where its clip is."""
    tars: dict[Path, dict[str, Item]] = {}
    lines = manifest.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip() or line in seen:
            continue
        where = f"line {number} of {manifest}"
        try:
            row = json.loads(line)
            path = manifest.parent / row["file"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{where} must be a JSON object with a latents file under 'file', as "
                f"`dataset.encode` writes it, got {line[:80]!r}."
            ) from error
        columns = {name: value for name, value in row.items() if name not in _PLACES}
        if path.suffix != ".tar":
            yield Item(row["file"], path), columns
            continue
        if path not in tars:
            tars[path] = {item.name.rpartition("/")[2]: item for item in find(path, LATENTS)}
        member = f"{row.get('id')}.safetensors"
        if member not in tars[path]:
            raise ValueError(f"{where} names {member} in {path}, which is not there.")
        yield tars[path][member], columns
    seen.update(lines)


def _read(item: Item) -> Latents:
    if item.size is None:
        record = load_latents(item.path)
    else:
        with item.local() as (path, _):
            record = load_latents(path)
    if len(record.array) != 1:
        raise ValueError(f"{item.name} holds {len(record.array)} clips, expected one.")
    return record


def _metadata(record: Latents) -> dict[str, Any]:
    """Returns what a latents file says of itself, without its arrays."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    arrays = ("array", "logvar")
    return {k: v for k, v in fields.items() if v is not None and k not in arrays}


__all__ = ["Example", "LatentsSource"]
