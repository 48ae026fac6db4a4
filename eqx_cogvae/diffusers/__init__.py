"""The VAE as diffusers' pipelines take it: torch outside, JAX inside. `eqx_cogvae[diffusers]`.

Importing this module before JAX has started sets `XLA_PYTHON_CLIENT_PREALLOCATE=false`, unless
it is set: by default JAX takes three quarters of a GPU's memory when it starts, and torch would
be left with the rest.
"""

from ._memory import leave_memory_to_torch as _leave_memory_to_torch

_leave_memory_to_torch()

try:
    from ._adapter import EqxAutoencoderKLCogVideoX as EqxAutoencoderKLCogVideoX
    from ._preview import PreviewCallback as PreviewCallback
    from ._tensors import to_jax as to_jax, to_torch as to_torch
except ImportError as error:
    raise ImportError(
        f"the adapter needs torch and diffusers ({error}): pip install 'eqx_cogvae[diffusers]'."
    ) from error

__all__ = [
    "EqxAutoencoderKLCogVideoX",
    "PreviewCallback",
    "to_jax",
    "to_torch",
]
