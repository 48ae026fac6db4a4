"""Tensors to arrays and back, without a copy where memory can be shared."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Sharding
from jaxtyping import Array, PyTree

VIDEO_RANK = 5

# The process in which JAX was first used through this package, once it was.
_process: int | None = None


def check_process() -> None:
    """Raises in a process that was forked from one that uses JAX, where JAX would hang.

    **Raises:** `RuntimeError`.
    """
    global _process
    if _process is None:
        _process = os.getpid()
    if _process != os.getpid():
        raise RuntimeError(
            f"JAX runs in process {_process} and cannot run in its forked copy {os.getpid()}: "
            "start workers by spawn, as with `DataLoader(..., multiprocessing_context='spawn')` "
            "or `multiprocessing.set_start_method('spawn')`."
        )


def to_jax(tree: PyTree) -> PyTree:
    """Returns a PyTree's tensors as JAX arrays, bit for bit; five axes turn from BCTHW to BTHWC.

    Memory is shared where torch's is laid out so: any contiguous tensor of other ranks, and
    video in `torch.channels_last_3d`, or as `to_torch` returns it. Else torch copies once: video
    with frames last, strided slices, lazy conjugates and negatives, and what does not begin at a
    multiple of 64 bytes. The arrays know nothing of autograd: tensors are detached. Other leaves
    pass as they are.

    A tensor that shares its memory must not be written to while the array is in use.

    **Arguments:**

    - `tree`: a PyTree with torch tensors.

    **Returns:** the PyTree with JAX arrays, on the tensors' devices.

    **Raises:** `ValueError` for a dtype, a layout or a device that JAX lacks; `RuntimeError` in a
    process that was forked.
    """
    check_process()
    return jax.tree.map(lambda x: _to_jax(x) if isinstance(x, torch.Tensor) else x, tree)


def to_torch(tree: PyTree) -> PyTree:
    """Returns a PyTree's JAX arrays as tensors, bit for bit; five axes turn from BTHWC to BCTHW.

    Memory is shared, so that video is in `torch.channels_last_3d`: do not write to tensors whose
    arrays are still in use. Copied are arrays that lie on several devices (gathered on the
    first), and those on a device that torch lacks (brought to the host). Other leaves pass as
    they are.

    **Arguments:**

    - `tree`: a PyTree with JAX arrays.

    **Returns:** the PyTree with torch tensors, on the arrays' devices.

    **Raises:** `ValueError` for a dtype that torch lacks; `RuntimeError` in a forked process.
    """
    check_process()
    return jax.tree.map(lambda x: _to_torch(x) if isinstance(x, jax.Array) else x, tree)


def _to_jax(x: torch.Tensor) -> Array:
    jax_dtype(x.dtype)
    jax_device(x.device)
    if x.layout != torch.strided or x.is_nested:
        raise ValueError(f"JAX has no {x.layout} tensors: give a dense one, as `.to_dense()` does.")
    # What a lazy conjugate or negative still has to do is lost on the way, unless it is done.
    x = x.detach().resolve_conj().resolve_neg()
    if x.ndim == VIDEO_RANK:
        x = x.permute(0, 2, 3, 4, 1)
    return jax.dlpack.from_dlpack(x.contiguous())


def _to_torch(x: Array) -> torch.Tensor:
    tensor = as_tensor(x)
    return tensor.permute(0, 4, 1, 2, 3) if x.ndim == VIDEO_RANK else tensor


def as_tensor(x: Array) -> torch.Tensor:
    """Returns an array as a tensor in memory that torch reaches, axes as they are."""
    torch_dtype(x.dtype)
    reached = jax_device(torch_device(x.sharding))
    return torch.from_dlpack(x if x.devices() == {reached} else jax.device_put(x, reached))


def jax_dtype(dtype: torch.dtype) -> jnp.dtype:
    """Returns JAX's dtype of the same name."""
    try:
        found = jnp.dtype(str(dtype).removeprefix("torch."))
    except TypeError as error:
        raise ValueError(f"JAX has no {dtype}: cast the tensor, to torch.float32 say.") from error
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise ValueError(
            f"got {dtype}, and JAX has 64 bits off: cast it to 32, or call "
            "`jax.config.update('jax_enable_x64', True)` first."
        )
    return found


def torch_dtype(dtype: jnp.dtype) -> torch.dtype:
    """Returns torch's dtype of the same name."""
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch has no dtype {dtype.name}: cast the array, to float32 say.")
    return found


def jax_device(device: torch.device) -> Any:
    """Returns torch's device as JAX knows it."""
    platform = {"cpu": "cpu", "cuda": "gpu"}.get(device.type)
    try:
        devices = jax.local_devices(backend=platform) if platform else []
    except RuntimeError:
        devices = []
    index = 0 if device.type == "cpu" else device.index
    for found in devices:
        if found.local_hardware_id == index:
            return found
    raise ValueError(
        f"JAX cannot reach torch's device {device}, it has {', '.join(map(str, jax.devices()))}: "
        "stay on one of those, or install JAX for this device."
    )


def torch_device(sharding: Sharding) -> torch.device:
    """Returns the first device of an array, or the CPU where torch lacks that device."""
    first = min(sharding.addressable_devices, key=lambda device: device.id)
    if first.platform == "gpu" and torch.cuda.is_available():
        return torch.device("cuda", first.local_hardware_id)
    return torch.device("cpu")


__all__ = [
    "VIDEO_RANK",
    "as_tensor",
    "check_process",
    "jax_device",
    "jax_dtype",
    "to_jax",
    "to_torch",
    "torch_device",
    "torch_dtype",
]
