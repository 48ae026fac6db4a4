"""The methods by which diffusers' class acts on torch modules, for a model without."""

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

_MODULES = ("encoder", "decoder", "quant_conv", "post_quant_conv")


class WithoutModules(AutoencoderKLCogVideoX):
    """Raises for each public name of diffusers' class that is about torch modules or weights."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            return super().__getattr__(name)
        if getattr(self.vae, name) is None:
            return None
        raise AttributeError(_no_module(name))

    def get_submodule(self, target: str) -> torch.nn.Module:
        """Returns a module that the user registered; `AttributeError` for diffusers' own."""
        name = target.partition(".")[0]
        if name in _MODULES:
            raise AttributeError(_no_module(name))
        return super().get_submodule(target)

    def get_parameter(self, target: str) -> torch.nn.Parameter:
        """Returns a weight by its name in `state_dict`, as a parameter that takes no gradient."""
        weights = self.state_dict()
        if target not in weights:
            return super().get_parameter(target)
        return torch.nn.Parameter(weights[target], requires_grad=False)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """**Raises:** `NotImplementedError`: the weights are JAX's."""
        del args, kwargs
        raise NotImplementedError(
            "the adapter's weights are not torch's: make another one, by `from_pretrained` or "
            "of an `eqx_cogvae.VAE`."
        )

    def share_memory(self) -> NoReturn:
        """**Raises:** `NotImplementedError`: the weights are JAX's."""
        raise NotImplementedError(
            "JAX's weights cannot lie in memory that processes share: load them in each one."
        )

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> NoReturn:
        """**Raises:** `NotImplementedError`: there are no layers to cast."""
        del args, kwargs
        raise NotImplementedError(
            "layers are not cast one by one in JAX: cast all weights by `.to(torch.bfloat16)`."
        )

    def enable_parallelism(self, **kwargs: Any) -> NoReturn:
        """**Raises:** `NotImplementedError`: devices share the work of a JAX mesh."""
        del kwargs
        raise NotImplementedError(
            "devices share the work by a JAX mesh: give `mesh=` to the adapter, such as "
            "`eqx_cogvae.best_mesh(shape)`."
        )

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> NoReturn:
        """**Raises:** `NotImplementedError`: there are no blocks left to compile."""
        del args, kwargs
        raise NotImplementedError(
            "XLA compiles all of it at the first call: call `encode` and `decode` as they are."
        )

    def dequantize(self) -> NoReturn:
        """**Raises:** `NotImplementedError`: the model is dequantised before it is wrapped."""
        raise NotImplementedError(
            "weights in 8 bits stay so within the adapter: build it from "
            "`eqx_cogvae.dequantised(vae)`. `.to(torch.float32)` widens any others."
        )

    @classmethod
    def extract_init_dict(cls, config_dict: Any, **kwargs: Any) -> tuple[dict, dict, dict]:
        """Returns the fields of diffusers' constructor, the unused ones and the hidden ones."""
        return AutoencoderKLCogVideoX.extract_init_dict(config_dict, **kwargs)


class Anchor(torch.nn.Module):
    """Holds the one parameter, which is empty: torch asks it for the model's device and dtype.

    Offloading hooks look up the weights of a module by their names in its state dict. This
    module shows them none, so that they leave it alone.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator:
        """Yields nothing; the module around it yields the parameter."""
        del args, kwargs
        return iter(())

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        del destination, prefix, keep_vars


def _no_module(name: str) -> str:
    return (
        f"`{name}` is no torch module here, the network is JAX's: call `encode` and `decode`, or "
        f"take the Equinox module `.vae.{name}`; its weights as tensors are in `state_dict()`."
    )


__all__ = ["Anchor", "WithoutModules"]
