"""The VAE as diffusers' pipelines take it."""

# diffusers' own signatures take arguments by position that ours takes by name alone.
# pyright: reportIncompatibleMethodOverride=false

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from jax.sharding import Mesh

from .. import _checkpoint
from .._autoencoder import VAE
from .._config import Config
from ._loading import (
    LOADING_INFO,
    WHERE,
    asked_device,
    asked_dtype,
    check_options,
    variant_files,
    weights_dtype,
)
from ._running import JaxAutoencoder, same_device
from ._surface import Anchor
from ._tensors import as_tensor, jax_device, torch_device

_HUB_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")
_CPU = torch.device("cpu")
# Fields of the config that say how latents are used, and not what the network is.
_FREE_FIELDS = (
    *("sample_height", "sample_width", "scaling_factor", "shift_factor"),
    *("latents_mean", "latents_std", "force_upcast", "invert_scale_latents"),
)


class EqxAutoencoderKLCogVideoX(JaxAutoencoder):
    """Stands in for diffusers' `AutoencoderKLCogVideoX`, in pipelines and in scripts.

    !!! Example

        ```py
        vae = EqxAutoencoderKLCogVideoX.from_pretrained(
            "zai-org/CogVideoX-5b", torch_dtype=torch.bfloat16
        )
        pipe = CogVideoXPipeline.from_pretrained("zai-org/CogVideoX-5b", vae=vae)
        ```

    Methods and attributes are diffusers', and so are the numbers; frames, tiles and slices go
    through `framewise`, `tiled` and `sliced`, as the attributes say at each call. Two things
    differ: an overlap of 0.0 is honoured, and the result has the right size for any tile. Frame
    counts and sizes that do not come back as they were warn. Public names that are about torch's
    modules or weights (`encoder`, `load_state_dict`, `enable_layerwise_casting`) raise one line
    that says what to use instead.

    The one copy of the weights is JAX's, in `vae`. It is no torch parameter: gradients of any
    order flow through `encode` and `decode` to their input, and to no weight. The backward pass
    computes the forward pass anew, so that nothing but the input is kept for it. `state_dict` has
    views of the weights, not to be written to. `to` casts them, and moves them to any device that
    JAX reaches. Model, sequential and group offloading keep them on the CPU between calls, and
    put all of them on the device for a call. `torch.compile` leaves it as it is: XLA compiles it.

    JAX does not survive a fork: a `DataLoader` that encodes in its workers needs
    `multiprocessing_context="spawn"`.

    With a `mesh` each call runs `sharded` on its devices, its axes named after what they cut,
    "batch", "height" and "width", as `best_mesh` names them. Pipelines encode one clip at a
    time, which no batch axis divides. Weights stay on their mesh.

    To pipelines an instance is of diffusers' class, which they write into `model_index.json`:
    what they save loads without this package. `from_pipe` needs `vae=pipe.vae`.
    """

    def __init__(self, vae: VAE, *, mesh: Mesh | None = None):
        super().__init__(vae, mesh)
        name = AutoencoderKLCogVideoX.__name__
        self.register_to_config(_class_name=name, **vae.config.to_dict())
        # From this and `__class__` pipelines read what to write into their index.
        self.__module__ = AutoencoderKLCogVideoX.__module__
        self._anchor = Anchor(torch.empty(0, dtype=self.dtype, device=torch_device(self._where)))
        self.eval()

    @property
    def __class__(self):  # pyright: ignore
        return AutoencoderKLCogVideoX

    def _get_name(self) -> str:
        return type(self).__name__

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_parameters():,} parameters, {self.dtype}, "
            f"device={str(self.device)!r})"
        )

    def __reduce__(self):
        return _blank, (), self.__dict__

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        mesh: Mesh | None = None,
        device_map: Any = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """Loads a checkpoint in diffusers' layout, of the VAE or of a whole pipeline.

        Memory is always used sparingly, and weights are always safetensors.

        **Arguments:**

        - `pretrained_model_name_or_path`: a directory, a hub id, or `"tiny"`.
        - `torch_dtype`, `dtype`: the weights' dtype; the second goes first. None is float32, as
            in diffusers, and so is "auto", with a warning.
        - `mesh`: devices that share the work.
        - `device_map`: the device for the weights; None and "auto" leave that to JAX.
        - `output_loading_info`: return a pair, whose second part is diffusers' record of faults;
            it is empty, because faults raise.
        - `options`: `subfolder`, `revision`, `token`, `cache_dir` and `local_files_only` as
            `eqx_cogvae.from_pretrained` has them, fields of the config to replace, such as
            `scaling_factor`, and what else diffusers takes: it is obeyed or raises.

        **Returns:** the model; a pair with `output_loading_info`.

        **Raises:** as `eqx_cogvae.from_pretrained`; `ValueError` for an argument that cannot be
        had, with what to use instead; `TypeError` for one that diffusers does not have.
        """
        check_options(options)
        where = {name: options.pop(name) for name in WHERE if name in options}
        variant = options.pop("variant", None)
        fields = {field.name for field in dataclasses.fields(Config)}
        if unknown := options.keys() - fields:
            raise TypeError(
                f"`from_pretrained` takes no {min(unknown)!r}; it takes torch_dtype, dtype, mesh, "
                f"device_map, variant, {', '.join(WHERE)}, and fields of the config."
            )
        device, weights = asked_device(device_map), weights_dtype(asked_dtype(torch_dtype, dtype))
        source = pretrained_model_name_or_path
        if variant is not None:
            source, where = variant_files(source, variant, where)
        vae = _checkpoint.from_pretrained(source, dtype=weights, mesh=mesh, **where)
        model = cls(vae, mesh=mesh)
        model.register_to_config(_name_or_path=str(pretrained_model_name_or_path), **options)
        if device is not None:
            model.to(device)  # pyright: ignore
        return (model, {name: [] for name in LOADING_INFO}) if output_loading_info else model

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: Any,
        *,
        config: Any = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        mesh: Mesh | None = None,
        **options: Any,
    ) -> "EqxAutoencoderKLCogVideoX":
        """Loads one file of weights: safetensors with diffusers' names, or zai-org's `3d-vae.pt`.

        **Arguments:**

        - `pretrained_model_link_or_path_or_dict`: a path.
        - `config`: as `eqx_cogvae.from_pretrained` takes it with a file.
        - `torch_dtype`, `dtype`, `mesh`: as for `from_pretrained`.
        - `options`: no other; diffusers' own raise one line that says why.

        **Returns:** the model.

        **Raises:** as `eqx_cogvae.from_pretrained` and `eqx_cogvae.from_original`; `TypeError` for
        tensors instead of a path, and for another argument.
        """
        check_options(options)
        if options:
            raise TypeError(
                f"`from_single_file` takes no {min(options)!r}; it takes config, torch_dtype, "
                "dtype, mesh."
            )
        if isinstance(pretrained_model_link_or_path_or_dict, Mapping):
            raise TypeError(
                "`from_single_file` takes a path, got tensors: write them by "
                "`safetensors.torch.save_file`."
            )
        path = Path(pretrained_model_link_or_path_or_dict)
        weights = weights_dtype(asked_dtype(torch_dtype, dtype))
        if path.suffix == ".safetensors":
            where: dict[str, Any] = {} if config is None else {"config": config}
            return cls(_checkpoint.from_pretrained(path, dtype=weights, **where), mesh=mesh)
        return cls(_checkpoint.from_original(path, config, weights), mesh=mesh)

    @classmethod
    def from_config(
        cls, config: Mapping | str | os.PathLike, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Makes a model with random weights, drawn with a seed from torch's generator.

        **Arguments:**

        - `config`: fields, or the place of a `config.json`.
        - `return_unused_kwargs`: return a pair, whose second part are the fields not used.
        - `kwargs`: fields that replace those of `config`.

        **Returns:** the model; a pair with `return_unused_kwargs`.
        """
        held: Any = config if isinstance(config, Mapping) else cls.load_config(config)
        fields, unused, hidden = cls.extract_init_dict(dict(held), **kwargs)
        seed = int(torch.randint(2**31 - 1, ()))
        model = cls(VAE(Config.from_dict(fields), key=jax.random.key(seed)))
        return (model, {**unused, **hidden}) if return_unused_kwargs else model

    def register_to_config(self, **kwargs: Any) -> None:
        """Changes fields of the config, in `config` and in `vae.config`.

        **Arguments:**

        - `kwargs`: fields and their new values.

        **Raises:** `ValueError` for a field that shapes the network.
        """
        fields = self.vae.config.to_dict()
        changed = {k: v for k, v in kwargs.items() if k in fields and v != fields[k]}
        if fixed := changed.keys() - set(_FREE_FIELDS):
            raise ValueError(
                f"`{min(fixed)}` shapes the network, and cannot change from {fields[min(fixed)]} "
                f"to {changed[min(fixed)]}: make another model, by `from_config`."
            )
        if changed:
            config = dataclasses.replace(self.vae.config, **changed)
            self.vae = copy.copy(self.vae)
            object.__setattr__(self.vae, "config", config)
        super().register_to_config(**kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "10GB",
        **options: Any,
    ) -> None:
        """Writes a directory that diffusers' own class loads, unless another process does.

        The weights are one file, smaller than diffusers' shards are by default.

        **Arguments:**

        - `save_directory`: the directory; missing parents are created.
        - `is_main_process`: False writes nothing.
        - `safe_serialization`, `variant`, `max_shard_size`: as diffusers has them; the defaults
            alone can be had, but for `max_shard_size`, which changes nothing.
        - `push_to_hub`, `options`: push the directory to the hub, and how, as in diffusers.

        **Raises:** `ValueError` for `safe_serialization=False`, for a `variant` or another
        argument that cannot be had, and as `eqx_cogvae.save_pretrained`.
        """
        if not safe_serialization:
            raise ValueError("weights are written as safetensors alone, not as a pickle.")
        del max_shard_size
        if variant is not None:
            raise ValueError(
                f"`variant={variant!r}` cannot be had: the file has its plain name, rename it."
            )
        hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
        if given := [name for name, value in options.items() if value]:
            raise ValueError(f"`{min(given)}` cannot be had: weights are written as safetensors.")
        if is_main_process:
            _checkpoint.save_pretrained(self.vae, save_directory)
        if is_main_process and push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns the number of weights; none of them is torch's to train.

        **Arguments:**

        - `only_trainable`: True counts those that torch trains, which are none.
        - `exclude_embeddings`: without effect.

        **Returns:** the number.
        """
        del exclude_embeddings
        return 0 if only_trainable else sum(leaf.size for leaf in jax.tree.leaves(self.vae))

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Returns the size of the weights.

        **Arguments:**

        - `return_buffers`: without effect.

        **Returns:** bytes.
        """
        del return_buffers
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.vae))

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: torch.device = _CPU,
        offload_to_disk_path: str | None = None,
        **options: Any,
    ) -> None:
        """Keeps the weights on `offload_device`, and puts all on the tensor's device for a call.

        **Arguments:**

        - `offload_device`: the device of the weights between calls.
        - `offload_to_disk_path`: None alone can be had.
        - `onload_device`, `options`: handed on to diffusers' method.

        **Raises:** `ValueError` for a path: the weights stay in memory.
        """
        if offload_to_disk_path is not None:
            raise ValueError(
                "`offload_to_disk_path` cannot be had: the weights stay in memory, halve them by "
                "`.to(torch.bfloat16)`."
            )
        self.to(offload_device)  # pyright: ignore
        super().enable_group_offload(onload_device, offload_device, **options)

    def _apply(self, fn: Callable, recurse: bool = True) -> "EqxAutoencoderKLCogVideoX":
        # All of torch's conversions come by here: `to`, `half`, `cuda` and their like.
        own = torch_device(self._where)
        anchor = fn(torch.empty(0, dtype=self.dtype, device=own))
        vae, dtype = self.vae, weights_dtype(anchor.dtype)
        if not same_device(anchor.device, own):
            if self.mesh is not None:
                raise ValueError("the weights are on a mesh and stay there: give another `mesh=`.")
            vae = jax.device_put(vae, jax_device(anchor.device))
        # Weights held in 8 bits are no numbers to be cast.
        cast = lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf  # noqa: E731
        self.vae = jax.tree.map(cast, vae)
        self._anchor.weight = torch.nn.Parameter(anchor, requires_grad=False)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        del keep_vars
        for name, (leaf, axes) in _checkpoint.stored_leaves(self.vae).items():
            destination[prefix + name] = as_tensor(leaf).permute(axes)


def _blank() -> EqxAutoencoderKLCogVideoX:
    return EqxAutoencoderKLCogVideoX.__new__(EqxAutoencoderKLCogVideoX)


__all__ = ["EqxAutoencoderKLCogVideoX"]
