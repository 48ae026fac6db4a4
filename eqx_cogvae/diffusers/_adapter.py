"""The VAE as diffusers' pipelines take it."""

import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float
from torch.autograd.function import once_differentiable

from .. import _checkpoint
from .._autoencoder import VAE
from .._checkpoint.tensors import FLOATS
from .._frames import LATENT_BATCH, SAMPLE_BATCH
from .._transforms.framewise import framewise
from .._transforms.sharded import sharded
from .._transforms.sliced import sliced
from .._transforms.tiled import tiled
from ._tensors import (
    VIDEO_RANK,
    as_tensor,
    jax_device,
    jax_dtype,
    to_jax,
    to_torch,
    torch_device,
    torch_dtype,
)

_MESH_AXES = ("batch", "height", "width")


_WHERE = ("subfolder", "revision", "token", "cache_dir", "local_files_only")


def _same(one: torch.device, other: torch.device) -> bool:
    # The CPU is "cpu" and "cpu:0".
    return one == other or one.type == other.type == "cpu"


class _Call(torch.autograd.Function):
    """A function of one array, to torch; `again` is the same one as its backward runs it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fn: Callable, again: Callable, where: Sharding):  # pyright: ignore
        ctx.save_for_backward(x)
        ctx.again, ctx.where = again, where
        return to_torch(fn(jax.device_put(to_jax(x), where)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: torch.Tensor):  # pyright: ignore
        arrays = jax.device_put(to_jax((*ctx.saved_tensors, cotangent)), ctx.where)
        return to_torch(_pullback(ctx.again, *arrays)), None, None, None


@eqx.filter_jit
def _pullback(fn: Callable, x: Array, cotangent: Array) -> Array:
    return jax.vjp(fn, x)[1](cotangent)[0]


class EqxAutoencoderKLCogVideoX(torch.nn.Module):
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
    differ: an overlap of 0.0 is honoured, and the result has the right size for any tile.

    The one copy of the weights is JAX's, in `vae`. It is no torch parameter: gradients flow
    through `encode` and `decode` to their input, and to no weight. The backward pass computes
    the forward pass anew, so that nothing but the input is kept for it. `state_dict` has views
    of the weights, not to be written to. `to` casts them, and moves them to any device that JAX
    reaches.

    With a `mesh` each call runs `sharded` on its devices, its axes named after what they cut,
    "batch", "height" and "width", as `best_mesh` names them. Pipelines encode one clip at a
    time, which no batch axis divides. Weights stay on their mesh.

    To pipelines an instance is of diffusers' class, which they write into `model_index.json`:
    what they save loads without this package. `from_pipe` needs `vae=pipe.vae`.
    """

    def __init__(self, vae: VAE, *, mesh: Mesh | None = None):
        super().__init__()
        if mesh is not None:
            vae = jax.device_put(vae, NamedSharding(mesh, PartitionSpec()))
        self.vae, self.mesh = vae, mesh
        fields = vae.config.to_dict()
        self.config = FrozenDict(_class_name=AutoencoderKLCogVideoX.__name__, **fields)
        self.gradient_checkpointing = self.use_slicing = self.use_tiling = False
        self.num_sample_frames_batch_size = SAMPLE_BATCH
        self.num_latent_frames_batch_size = LATENT_BATCH
        size = (vae.config.sample_height // 2, vae.config.sample_width // 2)
        self._set_tiles(size, (1 / 6, 1 / 5))
        # From this and `__class__` pipelines read what to write into their index.
        self.__module__ = AutoencoderKLCogVideoX.__module__
        # Offloading asks the first parameter where the module is; `to` moves it along.
        anchor = torch.empty(0, dtype=self.dtype, device=self.device)
        self._anchor = torch.nn.Parameter(anchor, requires_grad=False)

    @property
    def __class__(self):  # pyright: ignore
        return AutoencoderKLCogVideoX

    def _get_name(self) -> str:
        return type(self).__name__

    def __reduce__(self):
        return _blank, (), self.__dict__

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        torch_dtype: torch.dtype | None = None,
        mesh: Mesh | None = None,
        low_cpu_mem_usage: bool = True,
        use_safetensors: bool = True,
        **where: Any,
    ) -> "EqxAutoencoderKLCogVideoX":
        """Loads a checkpoint in diffusers' layout, of the VAE or of a whole pipeline.

        `torch_dtype` None is float32, as in diffusers. `where` are the other arguments of
        `eqx_cogvae.from_pretrained`: `subfolder`, `revision`, `token`, `cache_dir`,
        `local_files_only`. Memory is always used sparingly, and weights are always safetensors.

        **Raises:** as `eqx_cogvae.from_pretrained`; `ValueError` for `use_safetensors=False`;
        `TypeError` for an argument that neither takes.
        """
        del low_cpu_mem_usage
        if use_safetensors is False:
            raise ValueError("weights are read from safetensors alone, leave `use_safetensors`.")
        if unknown := where.keys() - _WHERE:
            raise TypeError(
                f"`from_pretrained` takes no {min(unknown)!r}; it takes torch_dtype, mesh, "
                f"{', '.join(_WHERE)}."
            )
        dtype = _weights_dtype(torch.float32 if torch_dtype is None else torch_dtype)
        vae = _checkpoint.from_pretrained(name_or_path, dtype=dtype, mesh=mesh, **where)
        return cls(vae, mesh=mesh)

    def save_pretrained(self, path: str | os.PathLike, safe_serialization: bool = True) -> None:
        """Writes a directory that diffusers' own class loads.

        **Raises:** `ValueError` for `safe_serialization=False`, and as `save_pretrained`.
        """
        if not safe_serialization:
            raise ValueError("weights are written as safetensors alone, not as a pickle.")
        _checkpoint.save_pretrained(self.vae, path)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and results."""
        return torch_dtype(self.vae.dtype)

    @property
    def device(self) -> torch.device:
        """Where tensors are taken from and given back: the weights', or the CPU beside a TPU."""
        return torch_device(self._where)

    @property
    def _where(self) -> Sharding:
        return self.vae.decoder.conv_in.conv.weight.sharding

    @apply_forward_hook
    def encode(
        self, x: Float[torch.Tensor, "b c t h w"], return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The posterior of a batch of clips.

        **Raises:** `ValueError` for a wrong rank, channel count, dtype or device.
        """
        _check_rank(x, self.vae.config.in_channels)
        tile = (self.tile_sample_min_height, self.tile_sample_min_width)
        moments = self._call(x, self.vae.encode_step, self.num_sample_frames_batch_size, tile)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Float[torch.Tensor, "b c t h w"], return_dict: bool = True
    ) -> DecoderOutput | tuple[Float[torch.Tensor, "b c2 t2 h2 w2"]]:
        """The clips of a batch of latents; not clipped.

        **Raises:** `ValueError` for a wrong rank, channel count, dtype or device.
        """
        _check_rank(z, self.vae.config.latent_channels)
        tile = (self.tile_latent_min_height, self.tile_latent_min_width)
        sample = self._call(z, self.vae.decode_step, self.num_latent_frames_batch_size, tile)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Float[torch.Tensor, "b c t h w"],
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Float[torch.Tensor, "b c2 t2 h2 w2"]]:
        """Encodes and decodes: of the mode, or of a sample drawn with `generator`."""
        (posterior,) = self.encode(sample, return_dict=False)
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def _call(
        self, x: torch.Tensor, step: Callable, frames: int, tile: tuple[int, int]
    ) -> torch.Tensor:
        if not _same(x.device, self.device):
            raise ValueError(
                f"got a tensor on {x.device}, and the weights are on {self.device}: "
                f"move one of them with `.to({str(x.device)!r})` or `.to({str(self.device)!r})`."
            )
        return _Call.apply(x, *self._functions(step, frames, tile), self._where)  # pyright: ignore

    def _functions(self, step: Callable, frames: int, tile: tuple[int, int]) -> list[Callable]:
        """What a call runs, and what the backward pass runs of it."""
        again = eqx.filter_checkpoint(step) if self.gradient_checkpointing else step
        return [self._composed(each, frames, tile) for each in (step, again)]

    def _composed(self, step: Callable, frames: int, tile: tuple[int, int]) -> Callable:
        fn = framewise(step, frames)
        if self.mesh is not None:
            axes = {name: name for name in _MESH_AXES if name in self.mesh.axis_names}
            fn = sharded(fn, self.mesh, **axes)
        if self.use_tiling:
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
        """Encodes and decodes by tiles what is larger than one; None keeps what there is.

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

    def enable_gradient_checkpointing(self) -> None:
        """The backward pass keeps the caches of a frame batch, and computes the rest anew."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """The backward pass keeps all activations."""
        self.gradient_checkpointing = False

    def _apply(self, fn: Callable, recurse: bool = True) -> "EqxAutoencoderKLCogVideoX":
        # Here all of torch's conversions come by: `to`, `half`, `cuda` and their like.
        anchor = fn(self._anchor.detach())
        vae, dtype = self.vae, _weights_dtype(anchor.dtype)
        if not _same(anchor.device, self.device):
            if self.mesh is not None:
                raise ValueError("the weights are on a mesh and stay there: give another `mesh=`.")
            vae = jax.device_put(vae, jax_device(anchor.device))
        self.vae = jax.tree.map(lambda leaf: leaf.astype(dtype), vae)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for name, (leaf, axes) in _checkpoint.stored_leaves(self.vae).items():
            destination[prefix + name] = as_tensor(leaf).permute(axes)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """**Raises:** `NotImplementedError`: the weights are JAX's."""
        raise NotImplementedError(
            "the adapter's weights are not torch's: make another one, by `from_pretrained` or "
            "of an `eqx_cogvae.VAE`."
        )


def _blank() -> EqxAutoencoderKLCogVideoX:
    return EqxAutoencoderKLCogVideoX.__new__(EqxAutoencoderKLCogVideoX)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_rank(x: torch.Tensor, channels: int) -> None:
    if x.ndim != VIDEO_RANK or x.shape[1] != channels:
        raise ValueError(
            f"expected a tensor (batch, {channels} channels, frames, height, width), got shape "
            f"{tuple(x.shape)}."
        )


def _weights_dtype(dtype: torch.dtype) -> jnp.dtype:
    found = jax_dtype(dtype)
    if found.name not in FLOATS:
        raise ValueError(f"weights are of {', '.join(FLOATS)}, got {dtype}.")
    return found


def _check_tiles(
    size: tuple[int, int], overlap: tuple[int | float, int | float], cell: int
) -> None:
    """Has `tiled` cut frames of two tiles, row by row and column by column, for what it raises."""
    fn = tiled(lambda x: x[:, :, ::cell, ::cell], size, overlap)
    for height, width in ((2 * size[0], size[1]), (size[0], 2 * size[1])):
        eqx.filter_eval_shape(fn, jax.ShapeDtypeStruct((1, 1, height, width, 1), jnp.float32))


__all__ = ["EqxAutoencoderKLCogVideoX"]
