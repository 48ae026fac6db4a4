"""Arrays of JAX as tensors of torch, and back, in the same memory; their dtypes and devices."""

from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Sharding
from jaxtyping import Array, PyTree

VIDEO_RANK = 5


def to_jax(tree: PyTree) -> PyTree:
    """The tensors of a PyTree as JAX arrays, bit for bit; five axes turn from BCTHW to BTHWC.

    Memory is shared where torch's is laid out so: any contiguous tensor of other ranks, and
    video in `torch.channels_last_3d`, or as `to_torch` returns it. Else torch copies once: video
    with frames last, strided slices, and what does not begin at a multiple of 64 bytes. The
    arrays know nothing of autograd: tensors are detached. Other leaves pass as they are.

    A tensor that shares its memory must not be written to while the array is in use.

    **Raises:** `ValueError` for a dtype or a device that JAX lacks.
    """
    return jax.tree.map(lambda x: _to_jax(x) if isinstance(x, torch.Tensor) else x, tree)


def to_torch(tree: PyTree) -> PyTree:
    """The JAX arrays of a PyTree as tensors, bit for bit; five axes turn from BTHWC to BCTHW.

    Memory is shared, so that video is in `torch.channels_last_3d`: do not write to tensors whose
    arrays are still in use. Copied are arrays that lie on several devices (gathered on the
    first), and those on a device that torch lacks (brought to the host). Other leaves pass as
    they are.

    **Raises:** `ValueError` for a dtype that torch lacks.
    """
    return jax.tree.map(lambda x: _to_torch(x) if isinstance(x, jax.Array) else x, tree)


def _to_jax(x: torch.Tensor) -> Array:
    to_jax_dtype(x.dtype)
    to_jax_device(x.device)
    x = x.detach()
    if x.ndim == VIDEO_RANK:
        x = x.permute(0, 2, 3, 4, 1)
    return jax.dlpack.from_dlpack(x.contiguous())


def _to_torch(x: Array) -> torch.Tensor:
    tensor = to_tensor(x)
    return tensor.permute(0, 4, 1, 2, 3) if x.ndim == VIDEO_RANK else tensor


def to_tensor(x: Array) -> torch.Tensor:
    """In memory that torch reaches, axes as they are."""
    to_torch_dtype(x.dtype)
    reached = to_jax_device(to_torch_device(x.sharding))
    return torch.from_dlpack(x if x.devices() == {reached} else jax.device_put(x, reached))


def to_jax_dtype(dtype: torch.dtype) -> jnp.dtype:
    """Torch's dtype as JAX knows it.

    **Raises:** `ValueError` for one that JAX lacks, or has not turned on.
    """
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


def to_torch_dtype(dtype: jnp.dtype) -> torch.dtype:
    """JAX's dtype as torch knows it.

    **Raises:** `ValueError` for one that torch lacks.
    """
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch has no dtype {dtype.name}: cast the array, to float32 say.")
    return found


def to_jax_device(device: torch.device) -> Any:
    """Torch's device as JAX knows it.

    **Raises:** `ValueError` where JAX cannot reach it.
    """
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


def to_torch_device(sharding: Sharding) -> torch.device:
    """Where torch meets an array: on its first device, or on the host where torch lacks that."""
    first = min(sharding.addressable_devices, key=lambda device: device.id)
    if first.platform == "gpu" and torch.cuda.is_available():
        return torch.device("cuda", first.local_hardware_id)
    return torch.device("cpu")


def same_device(one: torch.device, other: torch.device) -> bool:
    """The CPU is "cpu" and "cpu:0"."""
    return one == other or one.type == other.type == "cpu"
