"""The VAE as diffusers' pipelines take it."""

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin, get_parameter_device
from diffusers.utils.accelerate_utils import apply_forward_hook
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Float

from .. import _checkpoint
from .._autoencoder import VAE
from .._checks import warn_of_frames, warn_of_latent_frames, warn_of_size
from .._config import Config
from .._frames import LATENT_BATCH, SAMPLE_BATCH
from .._transforms.framewise import framewise
from .._transforms.sharded import sharded
from .._transforms.sliced import sliced
from .._transforms.tiled import tiled
from ._call import call
from ._loading import (
    LOADING_INFO,
    WHERE,
    asked_device,
    asked_dtype,
    check_options,
    variant_files,
    weights_dtype,
)
from ._surface import Anchor, WithoutModules
from ._tensors import (
    VIDEO_RANK,
    as_tensor,
    check_process,
    jax_device,
    torch_device,
    torch_dtype as torch_dtype_of,
)

_MESH_AXES = ("batch", "height", "width")
# Accelerate and diffusers leave these on what they offload.
_HOOKS = ("_hf_hook", "_diffusers_hook")
_HUB_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")
_CPU = torch.device("cpu")
# Fields of the config that say how latents are used, and not what the network is.
_FREE_FIELDS = (
    *("sample_height", "sample_width", "scaling_factor", "shift_factor"),
    *("latents_mean", "latents_std", "force_upcast", "invert_scale_latents"),
)


class EqxAutoencoderKLCogVideoX(WithoutModules):
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
        check_process()
        # The constructor of diffusers' class would make its torch modules.
        ModelMixin.__init__(self)
        if mesh is not None:
            vae = jax.device_put(vae, NamedSharding(mesh, PartitionSpec()))
        self.vae, self.mesh = vae, mesh
        name = AutoencoderKLCogVideoX.__name__
        self.register_to_config(_class_name=name, **vae.config.to_dict())
        self.gradient_checkpointing = self.use_slicing = self.use_tiling = False
        self.num_sample_frames_batch_size = SAMPLE_BATCH
        self.num_latent_frames_batch_size = LATENT_BATCH
        size = (vae.config.sample_height // 2, vae.config.sample_width // 2)
        self._set_tiles(size, (1 / 6, 1 / 5))
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
            model.to(device)
        return (model, {name: [] for name in LOADING_INFO}) if output_loading_info else model

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike,
        *,
        config: Any = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        mesh: Mesh | None = None,
    ) -> "EqxAutoencoderKLCogVideoX":
        """Loads one file of weights: safetensors with diffusers' names, or zai-org's `3d-vae.pt`.

        **Arguments:**

        - `pretrained_model_link_or_path_or_dict`: a path.
        - `config`: as `eqx_cogvae.from_pretrained` takes it with a file.
        - `torch_dtype`, `dtype`, `mesh`: as for `from_pretrained`.

        **Raises:** as `eqx_cogvae.from_pretrained` and `eqx_cogvae.from_original`.
        """
        path = Path(pretrained_model_link_or_path_or_dict)
        weights = weights_dtype(asked_dtype(torch_dtype, dtype))
        if path.suffix == ".safetensors":
            return cls(_checkpoint.from_pretrained(path, config=config, dtype=weights), mesh=mesh)
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
        """
        if not isinstance(config, Mapping):
            config = cls.load_config(config)
        fields, unused, hidden = cls.extract_init_dict(dict(config), **kwargs)
        seed = int(torch.randint(2**31 - 1, ()))
        model = cls(VAE(Config.from_dict(fields), key=jax.random.key(seed)))
        return (model, {**unused, **hidden}) if return_unused_kwargs else model

    def register_to_config(self, **kwargs: Any) -> None:
        """Changes fields of the config, in `config` and in `vae.config`.

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

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and results."""
        return torch_dtype_of(self.vae.dtype)

    @property
    def device(self) -> torch.device:
        """Device where tensors are taken from and given back: the weights', or the CPU for a TPU.

        While a group hook offloads the weights, it is the one that they are called on.
        """
        if any(hasattr(module, "_diffusers_hook") for module in self.modules()):
            return get_parameter_device(self)
        return torch_device(self._where)

    @property
    def _where(self) -> Sharding:
        return jax.tree.leaves(self.vae)[0].sharding

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns the number of weights; none of them is torch's to train."""
        del exclude_embeddings
        return 0 if only_trainable else sum(leaf.size for leaf in jax.tree.leaves(self.vae))

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Returns the size of the weights in bytes."""
        del return_buffers
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.vae))

    @torch.compiler.disable
    @apply_forward_hook
    def encode(
        self, x: Float[torch.Tensor, "b c t h w"], return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Returns the posterior of a batch of clips.

        Warns of a frame count that does not round-trip, and of a size that is cropped.

        **Raises:** `ValueError` for a wrong rank, channel count, dtype or device; `TypeError` for
        what is no tensor; `RuntimeError` in a forked process.
        """
        posterior = DiagonalGaussianDistribution(self._encode(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @torch.compiler.disable
    @apply_forward_hook
    def decode(
        self, z: Float[torch.Tensor, "b c t h w"], return_dict: bool = True
    ) -> DecoderOutput | tuple[Float[torch.Tensor, "b c2 t2 h2 w2"]]:
        """Returns the clips of a batch of latents; not clipped.

        Warns of a count of latent frames that belongs to no frame count that round-trips.

        **Raises:** as `encode`.
        """
        return self._decode(z, return_dict)

    @torch.compiler.disable
    def forward(
        self,
        sample: Float[torch.Tensor, "b c t h w"],
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Float[torch.Tensor, "b c2 t2 h2 w2"]]:
        """Encodes and decodes: the mode, or a sample drawn with `generator`."""
        (posterior,) = self.encode(sample, return_dict=False)
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    @torch.compiler.disable
    def tiled_encode(
        self, x: Float[torch.Tensor, "b c t h w"]
    ) -> Float[torch.Tensor, "b c2 t2 h2 w2"]:
        """Returns the moments of a batch of clips, encoded by tiles whatever `use_tiling` says."""
        return self._encode(x, tiles=True)

    @torch.compiler.disable
    def tiled_decode(
        self, z: Float[torch.Tensor, "b c t h w"], return_dict: bool = True
    ) -> DecoderOutput | tuple[Float[torch.Tensor, "b c2 t2 h2 w2"]]:
        """Returns the clips of latents, decoded by tiles whatever `use_tiling` says."""
        return self._decode(z, return_dict, tiles=True)

    def _encode(self, x: torch.Tensor, tiles: bool = False) -> torch.Tensor:
        config = self.vae.config
        _check_tensor(x, config.in_channels)
        warn_of_frames(x.shape[2], config)
        warn_of_size(x.shape[3], x.shape[4], config.spatial_compression)
        tile = (self.tile_sample_min_height, self.tile_sample_min_width)
        return self._call(x, "encode_step", self.num_sample_frames_batch_size, tile, tiles)

    def _decode(
        self, z: torch.Tensor, return_dict: bool = True, tiles: bool = False
    ) -> DecoderOutput | tuple[torch.Tensor]:
        _check_tensor(z, self.vae.config.latent_channels)
        warn_of_latent_frames(z.shape[2], self.vae.config)
        tile = (self.tile_latent_min_height, self.tile_latent_min_width)
        sample = self._call(z, "decode_step", self.num_latent_frames_batch_size, tile, tiles)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _call(
        self, x: torch.Tensor, step: str, frames: int, tile: tuple[int, int], tiles: bool
    ) -> torch.Tensor:
        check_process()
        vae, where = self._placed(x.device)
        fn, again = self._functions(
            getattr(vae, step), frames, tile if tiles or self.use_tiling else None
        )
        return call(fn, again, where, x)

    def _placed(self, device: torch.device) -> tuple[VAE, Sharding]:
        """Returns the model for tensors on `device`, and where it is."""
        own = torch_device(self._where)
        if _same(device, own):
            return self.vae, self._where
        if any(hasattr(module, hook) for module in self.modules() for hook in _HOOKS):
            where = SingleDeviceSharding(jax_device(device))
            return jax.device_put(self.vae, where), where
        raise ValueError(
            f"got a tensor on {device}, and the weights are on {own}: "
            f"move one of them with `.to({str(device)!r})` or `.to({str(own)!r})`."
        )

    def _functions(
        self, step: Callable, frames: int, tile: tuple[int, int] | None
    ) -> tuple[Callable, Callable]:
        """Returns the function that a call runs, and the one that its backward pass runs."""
        again = eqx.filter_checkpoint(step) if self.gradient_checkpointing else step
        return self._composed(step, frames, tile), self._composed(again, frames, tile)

    def _composed(self, step: Callable, frames: int, tile: tuple[int, int] | None) -> Callable:
        fn = framewise(step, frames)
        if self.mesh is not None:
            axes = {name: name for name in _MESH_AXES if name in self.mesh.axis_names}
            fn = sharded(fn, self.mesh, **axes)
        if tile is not None:
            overlap = (self.tile_overlap_factor_height, self.tile_overlap_factor_width)
            # Devices divide whole tiles only, so that on a mesh the last ones are moved inward.
            fn = tiled(fn, tile, overlap, edges="clip" if self.mesh is None else "shift")
        return sliced(fn) if self.use_slicing else fn

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_overlap_factor_height: float | None = None,
        tile_overlap_factor_width: float | None = None,
    ) -> None:
        """Encodes and decodes by tiles what is larger than one; None keeps the value there is.

        On a mesh each tile is cut among the devices, and the last ones are moved inward rather
        than cut short.

        **Raises:** `ValueError` for a tile that is no multiple of a latent cell, or that a mesh
        does not divide, and an overlap that is not in [0, 1) or leaves no step to the next tile.
        """
        size = (
            _or(tile_sample_min_height, self.tile_sample_min_height),
            _or(tile_sample_min_width, self.tile_sample_min_width),
        )
        overlap = (
            _or(tile_overlap_factor_height, self.tile_overlap_factor_height),
            _or(tile_overlap_factor_width, self.tile_overlap_factor_width),
        )
        _check_tiles(size, overlap, self.vae.config.spatial_compression)
        self._check_tiles_on_mesh(size)
        self._set_tiles(size, overlap)
        self.use_tiling = True

    def _check_tiles_on_mesh(self, size: tuple[int, int]) -> None:
        cell = self.vae.config.spatial_compression
        for name, side in zip(("height", "width"), size, strict=True):
            among = 1 if self.mesh is None else self.mesh.shape.get(name, 1)
            if among > 1 and (side // cell % among or side // cell < 2 * among):
                due = max(round(side / cell / among), 2) * among * cell
                raise ValueError(
                    f"a tile {name} of {side} does not divide among the mesh's {among} devices "
                    f"into parts of two latent cells or more: give {due}."
                )

    def _set_tiles(self, size: tuple[int, int], overlap: tuple[float, float]) -> None:
        cell = self.vae.config.spatial_compression
        self.tile_sample_min_height, self.tile_sample_min_width = size
        self.tile_latent_min_height, self.tile_latent_min_width = (side // cell for side in size)
        self.tile_overlap_factor_height, self.tile_overlap_factor_width = overlap

    def disable_tiling(self) -> None:
        """Encodes and decodes whole frames."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Encodes and decodes one clip of the batch at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encodes and decodes all clips of the batch at once."""
        self.use_slicing = False

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
        """Keeps the caches of a frame batch for the backward pass, and computes the rest anew.

        **Raises:** `ValueError` for a function of torch's that checkpoints torch's modules.
        """
        if gradient_checkpointing_func is not None:
            raise ValueError(
                "`gradient_checkpointing_func` cannot be had: JAX checkpoints each frame batch, "
                "leave it out."
            )
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keeps all activations for the backward pass."""
        self.gradient_checkpointing = False

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: torch.device = _CPU,
        offload_to_disk_path: str | None = None,
        **options: Any,
    ) -> None:
        """Keeps the weights on `offload_device`, and puts all on the tensor's device for a call.

        **Raises:** `ValueError` for a path: the weights stay in memory.
        """
        if offload_to_disk_path is not None:
            raise ValueError(
                "`offload_to_disk_path` cannot be had: the weights stay in memory, halve them by "
                "`.to(torch.bfloat16)`."
            )
        self.to(offload_device)
        super().enable_group_offload(onload_device, offload_device, **options)

    def _apply(self, fn: Callable, recurse: bool = True) -> "EqxAutoencoderKLCogVideoX":
        # All of torch's conversions come by here: `to`, `half`, `cuda` and their like.
        own = torch_device(self._where)
        anchor = fn(torch.empty(0, dtype=self.dtype, device=own))
        vae, dtype = self.vae, weights_dtype(anchor.dtype)
        if not _same(anchor.device, own):
            if self.mesh is not None:
                raise ValueError("the weights are on a mesh and stay there: give another `mesh=`.")
            vae = jax.device_put(vae, jax_device(anchor.device))
        self.vae = jax.tree.map(lambda leaf: leaf.astype(dtype), vae)
        self._anchor.weight = torch.nn.Parameter(anchor, requires_grad=False)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        del keep_vars
        for name, (leaf, axes) in _checkpoint.stored_leaves(self.vae).items():
            destination[prefix + name] = as_tensor(leaf).permute(axes)


def _blank() -> EqxAutoencoderKLCogVideoX:
    return EqxAutoencoderKLCogVideoX.__new__(EqxAutoencoderKLCogVideoX)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _same(one: torch.device, other: torch.device) -> bool:
    # The CPU is "cpu" and "cpu:0".
    return one == other or one.type == other.type == "cpu"


def _check_tensor(x: Any, channels: int) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"expected a torch tensor (batch, {channels} channels, frames, height, width), got "
            f"{_kind(x)}."
        )
    if x.ndim != VIDEO_RANK or x.shape[1] != channels:
        raise ValueError(
            f"expected a tensor (batch, {channels} channels, frames, height, width), got shape "
            f"{tuple(x.shape)}."
        )


def _kind(x: Any) -> str:
    name = f"{type(x).__module__.partition('.')[0]}'s {type(x).__name__}"
    if isinstance(x, jax.Array):
        return "a JAX array: `eqx_cogvae.diffusers.to_torch` turns BTHWC into a tensor"
    if isinstance(x, np.ndarray):
        return "a NumPy array: `torch.from_numpy` makes a tensor of it"
    if isinstance(x, AutoencoderKLOutput | DiagonalGaussianDistribution):
        return f"{name}: take a sample, as `encode(x).latent_dist.sample()` is"
    if isinstance(x, DecoderOutput):
        return f"{name}: take its `.sample`"
    return name


def _check_tiles(
    size: tuple[int, int], overlap: tuple[int | float, int | float], cell: int
) -> None:
    """Raises as `tiled` does, by cutting frames of two tiles, row by row and column by column."""
    fn = tiled(lambda x: x[:, :, ::cell, ::cell], size, overlap)
    for height, width in ((2 * size[0], size[1]), (size[0], 2 * size[1])):
        eqx.filter_eval_shape(fn, jax.ShapeDtypeStruct((1, 1, height, width, 1), jnp.float32))


__all__ = ["EqxAutoencoderKLCogVideoX"]
