"""GPU memory for torch and JAX in one process."""

import os

import jax

from .._checks import warn

_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def leave_memory_to_torch() -> None:
    """Sets JAX's allocator to take GPU memory as it needs it, or warns that it is too late."""
    if _PREALLOCATE in os.environ or os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform":
        return
    if not _has_started():
        os.environ[_PREALLOCATE] = "false"
    elif jax.default_backend() == "gpu":
        warn(
            "JAX has started, and keeps three quarters of the GPU's memory from torch: set "
            f"{_PREALLOCATE}=false, or import eqx_cogvae.diffusers before JAX is first used."
        )


def _has_started() -> bool:
    """True once JAX has devices; asking does not start it."""
    # JAX has no public function for this. It refuses to change the number of its CPU devices
    # once it has started, so the answer is whether such a change is refused.
    count = jax.config.jax_num_cpu_devices  # pyright: ignore
    try:
        jax.config.update("jax_num_cpu_devices", 2 if count == 1 else 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", count)
    return False


__all__ = ["leave_memory_to_torch"]
