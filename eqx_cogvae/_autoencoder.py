"""Defines the model: encoder, decoder, and the VAE that holds both."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import named_scope
from jaxtyping import Array, Float

from ._blocks import BlockCache, DownBlock, MidBlock, UpBlock, down_block, mid_block, up_block
from ._checks import check_clip, check_range, memory_advice, warn_of_frames, warn_of_size
from ._config import Config
from ._frames import LATENT_BATCH, SAMPLE_BATCH
from ._layers import CausalConv3d, Conv, GroupNorm, SpatialNorm
from ._meshes import on_automatic_axes
from ._posterior import DiagonalGaussian
from ._resnet import normed_conv
from ._transforms.framewise import framewise
from ._types import AnyArray, Key, bound, hashed

_OUT_EPS = 1e-6


class EncoderCache(NamedTuple):
    """Holds the last frames that the encoder's causal convolutions saw."""

    conv_in: Float[Array, "b k h w c"] | None
    down_blocks: tuple[BlockCache, ...]
    mid_block: BlockCache
    conv_out: Float[Array, "b k h w c"] | None


class DecoderCache(NamedTuple):
    """Holds the last frames that the decoder's causal convolutions saw."""

    conv_in: Float[Array, "b k h w c"] | None
    mid_block: BlockCache
    up_blocks: tuple[BlockCache, ...]
    conv_out: Float[Array, "b k h w c"] | None

    def continued(self) -> "ContinuedCache":
        """Returns the cache, marked to say that the next batch does not start a clip."""
        return ContinuedCache(*self)


class ContinuedCache(DecoderCache):
    """Marks the decoder's cache to say that the next batch does not start a clip.

    Without the mark an odd batch is treated as the start of a clip, as diffusers does. The decoder
    returns a cache with the mark if it is given one.
    """


class Encoder(eqx.Module):
    """Maps a frame batch of video to the moments of its latents.

    **Arguments:**

    - `config`: the hyperparameters.
    - `key`: a `jax.random.key` for random weights.
    - `dtype`: of the weights.
    - `pad_mode`: the padding of causal convolutions. `"first"`, that of all published checkpoints,
        pads time by the cache, or by copies of a clip's first frame, and space by zeros;
        `"constant"` is another name for it. `"replicate"` pads both by replication, and keeps no
        cache.

    **Raises:** `ValueError` for another `pad_mode`.
    """

    conv_in: CausalConv3d
    down_blocks: tuple[DownBlock, ...]
    mid_block: MidBlock
    norm_out: GroupNorm
    conv_out: CausalConv3d

    def __init__(self, config: Config, *, key: Key, dtype=jnp.float32, pad_mode: str = "first"):
        keys = jax.random.split(key, len(config.block_out_channels) + 3)
        widths = config.block_out_channels
        options = {"pad_mode": pad_mode, "dtype": dtype}
        self.conv_in = CausalConv3d(config.in_channels, widths[0], key=keys[0], **options)
        self.down_blocks = tuple(
            down_block(config, level, key=keys[3 + level], **options)
            for level in range(len(widths))
        )
        self.mid_block = mid_block(config, widths[-1], None, key=keys[1], **options)
        self.norm_out = GroupNorm(widths[-1], config.norm_num_groups, _OUT_EPS, dtype=dtype)
        moments = 2 * config.latent_channels
        self.conv_out = CausalConv3d(widths[-1], moments, key=keys[2], **options)

    @named_scope("eqx_cogvae.Encoder")
    def __call__(
        self, x: Float[Array, "b t h w c"], cache: EncoderCache | None = None
    ) -> tuple[Float[Array, "b t2 h2 w2 m"], EncoderCache]:
        """Encodes one frame batch, without the checks of `VAE.encode_step`.

        **Arguments:**

        - `x`: video in [-1, 1], in the dtype of the weights.
        - `cache`: from the batch before it; None at a clip's start.

        **Returns:** moments, with `2 * latent_channels` channels, and the cache for the next batch.
        """
        downs = (None,) * len(self.down_blocks)
        conv_in, down_blocks, mid_block, conv_out = cache or (None, downs, None, None)
        x, conv_in = self.conv_in(x, conv_in)
        caches = []
        for block, past in zip(self.down_blocks, down_blocks, strict=True):
            x, past = block(x, past)
            caches.append(past)
        x, mid_block = self.mid_block(x, mid_block)
        x, conv_out = normed_conv(self.norm_out, jax.nn.silu, self.conv_out, x, conv_out)
        return x, EncoderCache(conv_in, tuple(caches), mid_block, conv_out)


class Decoder(eqx.Module):
    """Maps a frame batch of latents to video.

    **Arguments:** as for `Encoder`.

    **Raises:** `ValueError` for another `pad_mode`.
    """

    conv_in: CausalConv3d
    mid_block: MidBlock
    up_blocks: tuple[UpBlock, ...]
    norm_out: SpatialNorm
    conv_out: CausalConv3d

    def __init__(self, config: Config, *, key: Key, dtype=jnp.float32, pad_mode: str = "first"):
        keys = jax.random.split(key, len(config.block_out_channels) + 4)
        widths, latents = config.block_out_channels[::-1], config.latent_channels
        options = {"pad_mode": pad_mode, "dtype": dtype}
        self.conv_in = CausalConv3d(latents, widths[0], key=keys[0], **options)
        self.mid_block = mid_block(config, widths[0], latents, key=keys[1], **options)
        self.up_blocks = tuple(
            up_block(config, level, key=keys[4 + level], **options) for level in range(len(widths))
        )
        groups = config.norm_num_groups
        self.norm_out = SpatialNorm(widths[-1], latents, groups, key=keys[2], dtype=dtype)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, key=keys[3], **options)

    @named_scope("eqx_cogvae.Decoder")
    def __call__(
        self, latents: Float[Array, "b t h w z"], cache: DecoderCache | None = None
    ) -> tuple[Float[Array, "b t2 h2 w2 c"], DecoderCache]:
        """Decodes one frame batch, without the checks of `VAE.decode_step`.

        **Arguments:**

        - `latents`: in the VAE's own units and the dtype of the weights.
        - `cache`: from the batch before it; None at a clip's start.

        **Returns:** frames, about in [-1, 1], and the cache for the next batch.
        """
        ups = (None,) * len(self.up_blocks)
        continued = isinstance(cache, ContinuedCache)
        conv_in, mid_block, up_blocks, conv_out = cache or (None, None, ups, None)
        x, conv_in = self.conv_in(latents, conv_in)
        x, mid_block = self.mid_block(x, mid_block, latents=latents)
        caches = []
        for block, past in zip(self.up_blocks, up_blocks, strict=True):
            x, past = block(x, past, latents=latents, continued=continued)
            caches.append(past)
        x, conv_out = normed_conv(self.norm_out, jax.nn.silu, self.conv_out, x, conv_out, latents)
        cache = DecoderCache(conv_in, mid_block, tuple(caches), conv_out)
        return x, cache.continued() if continued else cache


class VAE(eqx.Module):
    """The CogVideoX video autoencoder.

    Video is `(b, t, h, w, 3)` in [-1, 1]; latents are `(b, t', h/8, w/8, 16)` by default, in
    the VAE's own units. Numbers agree with diffusers' `AutoencoderKLCogVideoX`. The model is
    differentiable in forward and in reverse mode, to any order.

    !!! Example

        ```python
        >>> import jax
        >>> import eqx_cogvae as cv
        >>> config = cv.Config(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1)
        >>> vae = cv.VAE(config, key=jax.random.key(0))
        >>> vae.encode(jax.numpy.zeros((1, 9, 16, 24, 3))).mean.shape
        (1, 5, 8, 12, 16)

        ```

    **Arguments:**

    - `config`: the hyperparameters, static in the PyTree.
    - `key`: a `jax.random.key` for random weights; `from_pretrained` loads trained ones.
    - `dtype`: of the weights, and so of what is computed.
    - `pad_mode`: the padding of causal convolutions. `"first"`, that of all published checkpoints,
        pads time by the cache, or by copies of a clip's first frame, and space by zeros;
        `"constant"` is another name for it. `"replicate"` pads both by replication, and keeps no
        cache.

    **Raises:** `ValueError` for another `pad_mode`.
    """

    config: Config = eqx.field(static=True)
    encoder: Encoder | None
    decoder: Decoder | None
    quant_conv: Conv | None
    post_quant_conv: Conv | None

    def __init__(self, config: Config, *, key: Key, dtype=jnp.float32, pad_mode: str = "first"):
        ekey, dkey, qkey, pkey = jax.random.split(key, 4)
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, key=ekey, dtype=dtype, pad_mode=pad_mode)
        self.decoder = Decoder(config, key=dkey, dtype=dtype, pad_mode=pad_mode)
        self.quant_conv = (
            Conv((1, 1, 1), 2 * z, 2 * z, key=qkey, dtype=dtype) if config.use_quant_conv else None
        )
        self.post_quant_conv = (
            Conv((1, 1, 1), z, z, key=pkey, dtype=dtype) if config.use_post_quant_conv else None
        )

    def __hash__(self) -> int:
        return hashed(self)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the decoder's parameters and results, or the encoder's without a decoder.

        Each half casts its input to the dtype of its own parameters.
        """
        return _dtype(self.encoder if self.decoder is None else self.decoder)

    def _half(self, name: str) -> Any:
        """Returns the encoder or the decoder, which a user may have removed to save memory."""
        if (half := getattr(self, name)) is None:
            raise ValueError(f"the model has no {name} (it is None): load the model again.")
        return half

    @bound
    @eqx.filter_jit
    @on_automatic_axes
    def encode_step(
        self, frames: Float[Array, "b t h w c"], cache: EncoderCache | None = None
    ) -> tuple[Float[Array, "b t2 h2 w2 m"], EncoderCache]:
        """Encodes one frame batch, given the cache of the batch before it.

        **Arguments:**

        - `frames`: video in [-1, 1]: 8 frames, or 9 in a clip's first batch, as the model was
            trained; any count works.
        - `cache`: from the step before; None at a clip's start.

        **Returns:** moments with `2 * latent_channels` channels, for
        `DiagonalGaussian.from_moments`, and the cache for the next batch.

        **Raises:** `ValueError` for a wrong rank, channel count or dtype; `TypeError` for what is
        no array of JAX or NumPy.
        """
        cell = self.config.spatial_compression
        check_clip(frames, "video", self.config.in_channels, smallest=cell)
        encoder = self._half("encoder")
        x, after = encoder(frames.astype(_dtype(encoder)), cache)
        return (x if self.quant_conv is None else self.quant_conv(x)), after

    @bound
    @eqx.filter_jit
    @on_automatic_axes
    def decode_step(
        self, latents: Float[Array, "b t h w z"], cache: DecoderCache | None = None
    ) -> tuple[Float[Array, "b t2 h2 w2 c"], DecoderCache]:
        """Decodes one frame batch, given the cache of the batch before it.

        **Arguments:**

        - `latents`: in the VAE's own units: 2 latent frames, or 3 in a clip's first batch, as the
            model was trained; any count works.
        - `cache`: from the step before; None at a clip's start.

        **Returns:** frames, about in [-1, 1] and not clipped, and the cache for the next batch.

        **Raises:** `ValueError` for a wrong rank, channel count or dtype; `TypeError` for what is
        no array of JAX or NumPy.
        """
        check_clip(latents, "latents", self.config.latent_channels, smallest=1)
        decoder = self._half("decoder")
        z = latents.astype(_dtype(decoder))
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return decoder(z, cache)

    @bound
    def encode(self, video: Float[AnyArray, "b t h w c"]) -> DiagonalGaussian:
        """Encodes a clip in frame batches of 8; the first batch takes the remainder.

        Counts of 8k + 1 frames round-trip; others warn: see `pad_frames`. Sides that are no
        multiples of 8 are cropped, with a warning.

        **Arguments:**

        - `video`: `(b, t, h, w, 3)`, floating, in [-1, 1].

        **Returns:** the distribution of latents, `(b, t', h/8, w/8, 16)` by default, in the VAE's
        own units.

        **Raises:** `ValueError` for a wrong rank, channel count, dtype or range, and for NaN;
        `TypeError` for what is no array of JAX or NumPy.
        """
        check_clip(
            video, "video", self.config.in_channels, smallest=self.config.spatial_compression
        )
        check_range(video)
        warn_of_frames(video.shape[1], self.config)
        warn_of_size(video.shape[2], video.shape[3], self.config.spatial_compression)
        with memory_advice(video.shape):
            moments = framewise(self.encode_step, SAMPLE_BATCH)(jnp.asarray(video))
        return DiagonalGaussian.from_moments(moments)

    @bound
    def decode(self, latents: Float[AnyArray, "b t h w z"]) -> Float[Array, "b t2 h2 w2 c"]:
        """Decodes a clip in frame batches of 2; the first batch takes the remainder.

        **Arguments:**

        - `latents`: `(b, t', h', w', 16)` by default, in the VAE's own units:
            `unscale_latents` makes them of the diffusion model's.

        **Returns:** video, `(b, t, 8h', 8w', 3)`, about in [-1, 1] and not clipped. An odd count
        `t'` gives `4 (t' - 1) + 1` frames, an even one `4 t'`.

        **Raises:** `ValueError` for a wrong rank, channel count or dtype; `TypeError` for what is
        no array of JAX or NumPy.
        """
        check_clip(latents, "latents", self.config.latent_channels, smallest=1)
        with memory_advice(latents.shape):
            return framewise(self.decode_step, LATENT_BATCH)(jnp.asarray(latents))

    def __call__(
        self, video: Float[AnyArray, "b t h w c"], *, key: Key | None = None
    ) -> Float[Array, "b t2 h2 w2 c"]:
        """Encodes and decodes a clip.

        **Arguments:**

        - `video`: `(b, t, h, w, 3)` in [-1, 1].
        - `key`: a `jax.random.key` to draw latents with; None takes their mode.

        **Returns:** the reconstruction, of the shape of `video` if it has 8k + 1 frames and sides
        that are multiples of 8.

        **Raises:** as `encode`.
        """
        posterior = self.encode(video)
        return self.decode(posterior.mode() if key is None else posterior.sample(key))

    @eqx.filter_jit
    def scale_latents(
        self, latents: Float[Array, "b t h w z"], *, image_condition: bool = False
    ) -> Float[Array, "b t h w z"]:
        """Returns latents in the diffusion model's units.

        That is `(z - shift - mean) / std * scaling_factor`, by the fields of the config.

        **Arguments:**

        - `latents`: in the VAE's own units.
        - `image_condition`: True for the latents of the picture that an image-to-video model
            starts from. They are divided by the factor if the config sets
            `invert_scale_latents`.

        **Returns:** latents of the same shape and dtype.

        **Raises:** `ValueError` for a wrong rank, channel count or dtype.
        """
        check_clip(latents, "latents", self.config.latent_channels, smallest=1)
        shift, std = self._latent_statistics()
        scaled = (latents - shift.astype(latents.dtype)) / std.astype(latents.dtype)
        return scaled * self._factor(image_condition)

    @eqx.filter_jit
    def unscale_latents(
        self, latents: Float[Array, "b t h w z"], *, image_condition: bool = False
    ) -> Float[Array, "b t h w z"]:
        """Returns latents in the VAE's own units: the inverse of `scale_latents`.

        **Arguments:**

        - `latents`: in the diffusion model's units.
        - `image_condition`: as for `scale_latents`.

        **Returns:** latents of the same shape and dtype, for `decode`.

        **Raises:** `ValueError` for a wrong rank, channel count or dtype.
        """
        check_clip(latents, "latents", self.config.latent_channels, smallest=1)
        shift, std = self._latent_statistics()
        scaled = latents / self._factor(image_condition)
        return scaled * std.astype(latents.dtype) + shift.astype(latents.dtype)

    def _factor(self, image_condition: bool) -> float:
        factor = self.config.scaling_factor
        return 1 / factor if image_condition and self.config.invert_scale_latents else factor

    def _latent_statistics(self) -> tuple[Array, Array]:
        config, shape = self.config, (1, 1, 1, 1, self.config.latent_channels)
        mean = jnp.zeros(shape) if config.latents_mean is None else jnp.array(config.latents_mean)
        std = jnp.ones(shape) if config.latents_std is None else jnp.array(config.latents_std)
        return mean.reshape(shape) + (config.shift_factor or 0.0), std.reshape(shape)


def _dtype(half: Any) -> jnp.dtype:
    """Returns the dtype of the first floating parameter."""
    for leaf in jax.tree.leaves(half):
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf.dtype
    raise ValueError("the model holds no floating parameter: load it again.")


__all__ = ["VAE", "Decoder", "Encoder"]
