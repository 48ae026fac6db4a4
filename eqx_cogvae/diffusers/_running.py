"""The JAX model run on tensors: whole, by tiles, by slices, and on a mesh."""

# diffusers' own signatures take arguments by position that ours takes by name alone.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin, get_parameter_device
from diffusers.utils.accelerate_utils import apply_forward_hook
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Float

from .._autoencoder import VAE
from .._checks import warn_of_frames, warn_of_latent_frames, warn_of_size
from .._frames import LATENT_BATCH, SAMPLE_BATCH
from .._transforms.framewise import framewise
from .._transforms.sharded import sharded
from .._transforms.sliced import sliced
from .._transforms.tiled import tiled
from ._call import call
from ._surface import WithoutModules
from ._tensors import (
    VIDEO_RANK,
    check_process,
    jax_device,
    torch_device,
    torch_dtype as torch_dtype_of,
)

_MESH_AXES = ("batch", "height", "width")
# Accelerate and diffusers leave these on what they offload.
_HOOKS = ("_hf_hook", "_diffusers_hook")

# Frames in a batch, and in the first one, as `framewise` takes them.
_Batches = tuple[int, int | None]


class JaxAutoencoder(WithoutModules):
    """Encodes and decodes tensors with a JAX model, as diffusers' attributes say at each call."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Casts or moves the weights, as `torch.nn.Module.to` does."""
        # diffusers' own method warns of every cast, also where no module must stay in float32. It
        # is needed only once offloading has hung its hooks in.
        hooked = hasattr(self, "_diffusers_hook")
        return super().to(*args, **kwargs) if hooked else torch.nn.Module.to(self, *args, **kwargs)

    def __init__(self, vae: VAE, mesh: Mesh | None):
        check_process()
        # The constructor of diffusers' class would make its torch modules.
        ModelMixin.__init__(self)
        if mesh is not None:
            vae = jax.device_put(vae, NamedSharding(mesh, PartitionSpec()))
        self.vae, self.mesh = vae, mesh
        self.gradient_checkpointing = self.use_slicing = self.use_tiling = False
        self.num_sample_frames_batch_size = SAMPLE_BATCH
        self.num_latent_frames_batch_size = LATENT_BATCH
        # 1 decodes as CogVideoX-Fun does; None leaves the remainder to the first batch.
        self.first_latent_frames_batch_size: int | None = None
        size = (vae.config.sample_height // 2, vae.config.sample_width // 2)
        self._set_tiles(size, (1 / 6, 1 / 5))

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
        (posterior,) = self.encode(sample, return_dict=False)  # pyright: ignore
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)  # pyright: ignore

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
        _check_tensor(x, config.in_channels, config.spatial_compression)
        warn_of_frames(x.shape[2], config)
        warn_of_size(x.shape[3], x.shape[4], config.spatial_compression)
        tile = (self.tile_sample_min_height, self.tile_sample_min_width)
        return self._call(x, "encode_step", (self.num_sample_frames_batch_size, None), tile, tiles)

    def _decode(
        self, z: torch.Tensor, return_dict: bool = True, tiles: bool = False
    ) -> DecoderOutput | tuple[torch.Tensor]:
        _check_tensor(z, self.vae.config.latent_channels, 1)
        batches = self.num_latent_frames_batch_size, self.first_latent_frames_batch_size
        if batches[1] is None:
            warn_of_latent_frames(z.shape[2], self.vae.config)
        tile = (self.tile_latent_min_height, self.tile_latent_min_width)
        sample = self._call(z, "decode_step", batches, tile, tiles)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _call(
        self, x: torch.Tensor, step: str, batches: _Batches, tile: tuple[int, int], tiles: bool
    ) -> torch.Tensor:
        check_process()
        vae, where = self._placed(x.device)
        fn, again = self._functions(
            getattr(vae, step), batches, tile if tiles or self.use_tiling else None
        )
        return call(fn, again, where, x)

    def _placed(self, device: torch.device) -> tuple[VAE, Sharding]:
        """Returns the model for tensors on `device`, and where it is."""
        own = torch_device(self._where)
        if same_device(device, own):
            return self.vae, self._where
        if any(hasattr(module, hook) for module in self.modules() for hook in _HOOKS):
            where = SingleDeviceSharding(jax_device(device))
            return jax.device_put(self.vae, where), where
        raise ValueError(
            f"got a tensor on {device}, and the weights are on {own}: "
            f"move one of them with `.to({str(device)!r})` or `.to({str(own)!r})`."
        )

    def _functions(
        self, step: Callable, batches: _Batches, tile: tuple[int, int] | None
    ) -> tuple[Callable, Callable]:
        """Returns the function that a call runs, and the one that its backward pass runs."""
        again = eqx.filter_checkpoint(step) if self.gradient_checkpointing else step
        return self._composed(step, batches, tile), self._composed(again, batches, tile)

    def _composed(
        self, step: Callable, batches: _Batches, tile: tuple[int, int] | None
    ) -> Callable:
        size, first = batches
        fn = framewise(step, size, first=first)
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


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def same_device(one: torch.device, other: torch.device) -> bool:
    # The CPU is "cpu" and "cpu:0".
    return one == other or one.type == other.type == "cpu"


def _check_tensor(x: Any, channels: int, smallest: int) -> None:
    """Raises unless `x` is a tensor, BCTHW, without an empty axis, of `smallest` sides or more."""
    due = f"(batch, {channels} channels, frames, height, width)"
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"expected a torch tensor {due}, got {_kind(x)}.")
    shape = tuple(x.shape)
    if x.ndim != VIDEO_RANK or shape[1] != channels:
        last = x.ndim == VIDEO_RANK and shape[-1] == channels
        hint = ": channels are second in torch, use `x.movedim(-1, 1)`" if last else ""
        raise ValueError(f"expected a tensor {due}, got shape {shape}{hint}.")
    if 0 in shape or min(shape[3:]) < smallest:
        raise ValueError(
            f"expected a tensor {due} with one clip, one frame and {smallest}x{smallest} in height "
            f"and width at least, got shape {shape}."
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


__all__ = ["JaxAutoencoder", "same_device"]
