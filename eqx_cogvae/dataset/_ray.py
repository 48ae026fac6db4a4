"""Encoding by Ray Data: an actor for each accelerator, each with a model of its own."""

import logging
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._autoencoder import VAE
from .._latents import fingerprint
from ._encode import Encoder
from ._results import Result
from ._sources import Item
from ._store import Store

_ACCELERATORS = ("TPU", "GPU")
# A batch is large enough that videos decode ahead, and small enough that actors end together.
_BATCH_SIZE = 16


def encode_with_ray(
    vae: VAE, store: Store, items: Sequence[Item], *, threads: int, actors: int | None
) -> Iterator[Result]:
    """Yields the results of videos, as they come.

    Joins a cluster that `ray.init` or the environment names, or starts one on this machine.

    **Raises:** `ImportError` without Ray.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('`engine="ray"` needs Ray: pip install "eqx_cogvae[ray]".') from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    accelerator, count = _accelerators(ray.cluster_resources())
    count = max(1, actors or count)
    model = ray.put(jax.tree.map(lambda x: np.asarray(x) if eqx.is_array(x) else x, vae))
    rows = [{"item": pickle.dumps(item)} for item in items]
    size = max(1, min(_BATCH_SIZE, math.ceil(len(rows) / count)))
    data = ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / size))
    # Ray's own bars would cover the caller's progress.
    data.context.enable_progress_bars = False
    results = data.map_batches(
        _Actor,
        fn_constructor_args=(model, store, fingerprint(vae), threads),
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
        **accelerator,
    )
    for row in results.iter_rows():
        yield pickle.loads(row["result"])


class _Actor:
    """Keeps the model from batch to batch."""

    def __init__(self, model: Any, store: Store, fingerprint: str, threads: int):
        import ray  # pyright: ignore[reportMissingImports]

        arrays, rest = eqx.partition(ray.get(model), eqx.is_array)
        vae = eqx.combine(jax.device_put(arrays), rest)
        self._encode = Encoder(vae, store, fingerprint, threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        items = [pickle.loads(item) for item in batch["item"]]
        return {"result": [pickle.dumps(result) for result in self._encode(items)]}


def _accelerators(resources: Mapping[str, float]) -> tuple[dict[str, Any], int]:
    """Returns what an actor asks Ray for, and how many actors there may be."""
    for name in _ACCELERATORS:
        if resources.get(name, 0) >= 1:
            asked = {"num_gpus": 1} if name == "GPU" else {"resources": {name: 1}}
            return asked, int(resources[name])
    return {"num_cpus": 1}, 1


__all__ = ["encode_with_ray"]
