"""Previews: the published tiny autoencoder of CogVideoX's latents.

It decodes with a fiftieth of the VAE's operations, and looks a little soft: right for watching a
generation while it runs. The weights are `taecvx.safetensors`, or `taecvx.pth`, of
https://github.com/madebyollin/taehv; none come with this package.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, named_scope
from jaxtyping import Array, Float

from ._checks import check_clip, check_range
from ._files import check_regular
from ._frames import LATENT_BATCH, SAMPLE_BATCH
from ._transforms.framewise import framewise
from ._types import AnyArray, Cache, Key

_LATENT_CHANNELS = 16
_WIDTH = 64
_DECODER_WIDTHS = (256, 128, 64, 64)
_MEM_BLOCKS = 3
# One latent frame stands for so many frames of video.
_FRAMES = 4
_SPATIAL = 8
_PUBLISHED = "taecvx.safetensors or taecvx.pth of https://github.com/madebyollin/taehv"


class Conv2d(eqx.Module):
    """A convolution of every frame, padded by zeros to keep its size, or to halve it."""

    weight: Float[Array, "kh kw i o"]
    bias: Float[Array, " o"] | None
    stride: int = eqx.field(static=True)

    def __init__(
        self,
        i: int,
        o: int,
        size: int = 3,
        *,
        stride: int = 1,
        bias: bool = True,
        key: Key,
        dtype=jnp.float32,
    ):
        bound = (i * size * size) ** -0.5
        wkey, bkey = jax.random.split(key)
        self.weight = jax.random.uniform(wkey, (size, size, i, o), dtype, -bound, bound)
        self.bias = jax.random.uniform(bkey, (o,), dtype, -bound, bound) if bias else None
        self.stride = stride

    def __call__(self, x: Float[Array, "b t h w i"], cache: None = None) -> tuple[Array, None]:
        frames = x.reshape(-1, *x.shape[2:])
        pad = self.weight.shape[0] // 2
        y = lax.conv_general_dilated(
            frames,
            self.weight,
            (self.stride, self.stride),
            [(pad, pad), (pad, pad)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.bias is not None:
            y = y + self.bias[None, None, None]
        return y.reshape(*x.shape[:2], *y.shape[1:]), cache


class Relu(eqx.Module):
    """The rectifier, as a layer."""

    def __call__(self, x: Float[Array, "b t h w c"], cache: None = None) -> tuple[Array, None]:
        return jax.nn.relu(x), cache


class Clamp(eqx.Module):
    """Bounds latents smoothly to (-3, 3)."""

    def __call__(self, x: Float[Array, "b t h w c"], cache: None = None) -> tuple[Array, None]:
        return jnp.tanh(x / 3) * 3, cache


class Double(eqx.Module):
    """Doubles height and width by repeating pixels."""

    def __call__(self, x: Float[Array, "b t h w c"], cache: None = None) -> tuple[Array, None]:
        return jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3), cache


class Pool(eqx.Module):
    """Makes one frame of `stride` frames, by a linear map of all their channels."""

    conv: Conv2d
    stride: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "b t h w c"], cache: None = None) -> tuple[Array, None]:
        b, t, h, w, c = x.shape
        groups = x.reshape(b, t // self.stride, self.stride, h, w, c)
        stacked = jnp.moveaxis(groups, 2, 4).reshape(b, -1, h, w, self.stride * c)
        return self.conv(stacked)[0], cache


class Grow(eqx.Module):
    """Makes `stride` frames of one, by a linear map to all their channels."""

    conv: Conv2d
    stride: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "b t h w c"], cache: None = None) -> tuple[Array, None]:
        y, _ = self.conv(x)
        b, t, h, w, _ = y.shape
        frames = jnp.moveaxis(y.reshape(b, t, h, w, self.stride, -1), 4, 2)
        return frames.reshape(b, t * self.stride, h, w, -1), cache


class MemBlock(eqx.Module):
    """A residual block that sees each frame beside the one before it; before the first is black.

    Its cache is the last frame that it saw.
    """

    conv: tuple[Conv2d, Relu, Conv2d, Relu, Conv2d]

    def __init__(self, width: int, *, key: Key, dtype=jnp.float32):
        first, second, third = jax.random.split(key, 3)
        self.conv = (
            Conv2d(2 * width, width, key=first, dtype=dtype),
            Relu(),
            Conv2d(width, width, key=second, dtype=dtype),
            Relu(),
            Conv2d(width, width, key=third, dtype=dtype),
        )

    def __call__(
        self, x: Float[Array, "b t h w c"], cache: Float[Array, "b 1 h w c"] | None = None
    ) -> tuple[Float[Array, "b t h w c"], Float[Array, "b 1 h w c"]]:
        past = jnp.zeros_like(x[:, :1]) if cache is None else cache
        y = jnp.concatenate([x, jnp.concatenate([past, x[:, :-1]], axis=1)], axis=-1)
        y, _ = _chain(self.conv, y, None)
        return jax.nn.relu(y + x), x[:, -1:]


class Ended(eqx.Module):
    """The cache behind a batch that was padded, which only a clip's last batch may be."""

    frames: int = eqx.field(static=True)


class Preview(eqx.Module):
    """The tiny autoencoder of CogVideoX's latents, by madebyollin.

    Video is `(b, t, h, w, 3)` in [-1, 1]; latents are `(b, t', h/8, w/8, 16)` in the VAE's own
    units, which are those that the weights expect: divide a pipeline's latents by its
    `scaling_factor` first, as `vae.unscale_latents` does. The decoder bounds them smoothly to
    (-3, 3), and bounds its frames to [-1, 1].

    The steps are called as the VAE's are, so that `framewise`, `streamed`, `sliced` and `sharded`
    apply. The counts of frames are the VAE's as well: latents of an odd count `t'` decode to
    `4 (t' - 1) + 1` frames, of an even one to `4 t'`.

    !!! Example

        ```python
        >>> import jax
        >>> from eqx_cogvae import preview
        >>> tiny = preview.Preview(key=jax.random.key(0))  # or preview.load("taecvx.safetensors")
        >>> tiny.decode(jax.numpy.zeros((1, 3, 2, 3, 16))).shape
        (1, 9, 16, 24, 3)

        ```

    **Arguments:**

    - `key`: a `jax.random.key` for random weights, of the published shapes.
    - `dtype`: of weights, activations and results.
    """

    encoder: tuple[Any, ...]
    decoder: tuple[Any, ...]

    def __init__(self, *, key: Key, dtype=jnp.float32):
        ekey, dkey = jax.random.split(key)
        self.encoder = _encoder(ekey, dtype)
        self.decoder = _decoder(dkey, dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights, activations and results; inputs are cast to it."""
        return self.decoder[-1].weight.dtype

    @eqx.filter_jit
    @named_scope("eqx_cogvae.Preview.encode_step")
    def encode_step(
        self, frames: Float[Array, "b t h w 3"], cache: Cache = None
    ) -> tuple[Float[Array, "b t2 h2 w2 16"], Cache]:
        """Encodes one frame batch of 4k frames, given the cache of the one before it.

        A clip's last batch may have another count: its last frame is repeated up to the next 4k.
        With `first=8`, `framewise(preview.encode_step, 8, first=8)` leaves the remainder there.

        **Arguments:**

        - `frames`: video `(b, t, h, w, 3)` in [-1, 1].
        - `cache`: the one before it returned it; None at a clip's start.

        **Returns:** latents `(b, ceil(t / 4), ...)`, and the next cache.

        **Raises:** `ValueError` for a wrong rank, channel count or dtype, and for a batch behind
        one that was padded.
        """
        check_clip(frames, "video", 3, smallest=_SPATIAL)
        if isinstance(cache, Ended):
            raise ValueError(
                f"a batch of {cache.frames} frames was padded to a multiple of {_FRAMES}, and "
                "another batch follows; only a clip's last batch may be padded: use "
                f"`framewise(preview.encode_step, {SAMPLE_BATCH}, first={SAMPLE_BATCH})`, which "
                "leaves the remainder to the last batch."
            )
        t = frames.shape[1]
        tail = jnp.repeat(frames[:, -1:], -t % _FRAMES, axis=1)
        x = (jnp.concatenate([frames, tail], axis=1).astype(self.dtype) + 1) / 2
        latents, cache = _chain(self.encoder, x, cache)
        return latents, Ended(t) if t % _FRAMES else cache

    @eqx.filter_jit
    @named_scope("eqx_cogvae.Preview.decode_step")
    def decode_step(
        self, latents: Float[Array, "b t h w 16"], cache: Cache = None
    ) -> tuple[Float[Array, "b t2 h2 w2 3"], Cache]:
        """Decodes one frame batch, given the cache of the one before it.

        A latent gives four frames. Where a clip's first batch has an odd count, its first latent
        gives one, as in the VAE: the three before it are left out.

        **Arguments:**

        - `latents`: `(b, t, h, w, 16)`, in the VAE's own units.
        - `cache`: the one before it returned it; None at a clip's start.

        **Returns:** frames in [-1, 1], and the next cache.

        **Raises:** `ValueError` for a wrong rank, channel count or dtype.
        """
        check_clip(latents, "latents", _LATENT_CHANNELS, smallest=1)
        skipped = _FRAMES - 1 if cache is None and latents.shape[1] % 2 else 0
        y, cache = _chain(self.decoder, latents.astype(self.dtype), cache)
        return jnp.clip(y[:, skipped:], 0, 1) * 2 - 1, cache

    def encode(self, video: Float[AnyArray, "b t h w 3"]) -> Float[Array, "b t2 h2 w2 16"]:
        """Encodes a clip, to latents in the VAE's own units.

        Four frames give a latent; the last frame is repeated up to the next 4k. The VAE's latents
        line up in another way, a clip's first frame alone and then four by four, so that what
        moves is up to three frames late in these.

        **Arguments:**

        - `video`: `(b, t, h, w, 3)` in [-1, 1], of any count of frames.

        **Returns:** `(b, ceil(t / 4), h/8, w/8, 16)`.

        **Raises:** `ValueError` for a wrong rank, channel count, dtype or range.
        """
        check_clip(video, "video", 3, smallest=_SPATIAL)
        check_range(video)
        step = framewise(self.encode_step, SAMPLE_BATCH, first=SAMPLE_BATCH)
        return step(jnp.asarray(video))

    def decode(self, latents: Float[AnyArray, "b t h w 16"]) -> Float[Array, "b t2 h2 w2 3"]:
        """Decodes a clip in frame batches of 2; the first takes the remainder.

        **Arguments:**

        - `latents`: `(b, t, h, w, 16)`, in the VAE's own units.

        **Returns:** frames in [-1, 1]: `4 (t - 1) + 1` for an odd `t`, else `4 t`.

        **Raises:** `ValueError` for a wrong rank, channel count or dtype.
        """
        check_clip(latents, "latents", _LATENT_CHANNELS, smallest=1)
        return framewise(self.decode_step, LATENT_BATCH)(jnp.asarray(latents))


def load(path: str | os.PathLike, *, dtype: Any = None) -> Preview:
    """Reads the published weights, `taecvx.safetensors` or `taecvx.pth`.

    Files of the same family for other models' latents, such as `taehv` and `taew2_1`, have the
    same tensors and cannot be told apart: they load, and their pictures are wrong.

    **Arguments:**

    - `path`: the file. A `.pth` is read by torch, which runs no code of the file.
    - `dtype`: of weights, activations and results; None keeps the file's.

    **Returns:** a `Preview`.

    **Raises:** `ValueError` for any other file; `FileNotFoundError`; `IsADirectoryError`;
    `ImportError` for a `.pth` without torch.
    """
    path = Path(path)
    check_regular(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, name {_PUBLISHED}.")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}: download {_PUBLISHED}.")
    tensors = _read(path)
    skeleton = eqx.filter_eval_shape(Preview, key=jax.random.key(0))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(skeleton)
    names = [jax.tree_util.keystr(where, simple=True, separator=".") for where, _ in leaves]
    _check_names(path, names, tensors)
    arrays = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        # Torch has its kernels as (out, in, height, width).
        array = tensors[name] if leaf.ndim == 1 else tensors[name].transpose(2, 3, 1, 0)
        if array.shape != leaf.shape or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{path} is no preview of CogVideoX: its {name} is {array.dtype} of "
                f"{tensors[name].shape}, and must be floating, for {leaf.shape[-1]} channels; "
                f"give {_PUBLISHED}."
            )
        arrays.append(jnp.asarray(array, dtype))
    return jax.tree.unflatten(treedef, arrays)


def _read(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file, by their names."""
    if path.suffix == ".safetensors":
        import safetensors.flax

        try:
            held = safetensors.flax.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(_unreadable(path, error)) from error
        return {name: np.asarray(array) for name, array in held.items()}
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is read by torch, which is missing: install it, or take the .safetensors "
            "file of the same name."
        ) from error
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Torch's unpickler raises errors of every kind for a file that it did not write.
        raise ValueError(_unreadable(path, error)) from error
    if not isinstance(held, dict) or not all(isinstance(x, torch.Tensor) for x in held.values()):
        raise ValueError(_unreadable(path, f"it holds a {type(held).__name__}, not tensors"))
    dtypes = {name: jnp.dtype(str(x.dtype).removeprefix("torch.")) for name, x in held.items()}
    return {name: x.float().numpy().astype(dtypes[name]) for name, x in held.items()}


def _unreadable(path: Path, reason: object) -> str:
    text = " ".join(str(reason).split())[:200]
    return f"{path} is not a file of weights ({text}): give {_PUBLISHED}."


def _check_names(path: Path, due: Iterable[str], held: Iterable[str]) -> None:
    missing, foreign = sorted(set(due) - set(held)), sorted(set(held) - set(due))
    if missing or foreign:
        said = [
            f"{what} {len(names)} tensors, such as {names[0][:80]}"
            for what, names in (("lacks", missing), ("has besides", foreign))
            if names
        ]
        raise ValueError(
            f"{path} is no preview of CogVideoX: it {' and '.join(said)}; give {_PUBLISHED}."
        )


def _encoder(key: Key, dtype: Any) -> tuple[Any, ...]:
    """The layers, in the order and number in which the published file counts them."""
    keys = iter(jax.random.split(key, 2 + 3 * (2 + _MEM_BLOCKS)))
    layers: list[Any] = [Conv2d(3, _WIDTH, key=next(keys), dtype=dtype), Relu()]
    for stride in (2, 2, 1):
        options = {"bias": False, "dtype": dtype}
        pool = Conv2d(stride * _WIDTH, _WIDTH, 1, key=next(keys), **options)
        halve = Conv2d(_WIDTH, _WIDTH, stride=2, key=next(keys), **options)
        blocks = [MemBlock(_WIDTH, key=next(keys), dtype=dtype) for _ in range(_MEM_BLOCKS)]
        layers += [Pool(pool, stride), halve, *blocks]
    return (*layers, Conv2d(_WIDTH, _LATENT_CHANNELS, key=next(keys), dtype=dtype))


def _decoder(key: Key, dtype: Any) -> tuple[Any, ...]:
    """The layers, in the order and number in which the published file counts them."""
    keys = iter(jax.random.split(key, 2 + 3 * (2 + _MEM_BLOCKS)))
    first = Conv2d(_LATENT_CHANNELS, _DECODER_WIDTHS[0], key=next(keys), dtype=dtype)
    layers: list[Any] = [Clamp(), first, Relu()]
    steps = zip(_DECODER_WIDTHS, _DECODER_WIDTHS[1:], (1, 2, 2), strict=False)
    for width, narrower, stride in steps:
        options = {"bias": False, "dtype": dtype}
        blocks = [MemBlock(width, key=next(keys), dtype=dtype) for _ in range(_MEM_BLOCKS)]
        grow = Conv2d(width, stride * width, 1, key=next(keys), **options)
        narrow = Conv2d(width, narrower, key=next(keys), **options)
        layers += [*blocks, Double(), Grow(grow, stride), narrow]
    last = Conv2d(_DECODER_WIDTHS[-1], 3, key=next(keys), dtype=dtype)
    return (*layers, Relu(), last)


def _chain(layers: tuple[Any, ...], x: Array, cache: Cache) -> tuple[Array, Cache]:
    """Calls layers one after another; the cache is one for each."""
    pasts = (None,) * len(layers) if cache is None else cache
    caches = []
    for layer, past in zip(layers, pasts, strict=True):
        x, past = layer(x, past)
        caches.append(past)
    return x, tuple(caches)


__all__ = ["Preview", "load"]
