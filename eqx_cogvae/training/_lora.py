"""Low-rank adaptation (LoRA): small changes to kernels, trained and saved apart."""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._autoencoder import VAE
from .._checkpoint.names import from_stored, named, to_stored
from .._checkpoint.tensors import FLOATS, Stored, read_safetensors, write_safetensors
from .._files import atomic
from .._layers import Conv
from .._lowering import Taps, pointwise_conv
from .._quantised import is_quantised
from .._types import Key, at_least_float32

_KERNEL, _DOWN, _UP = ".weight", ".lora_A", ".lora_B"
_SHOWN = 3


class LowRank(eqx.Module):
    """A convolution's kernel and bias, and a change of low rank to the kernel.

    It stands in for a `Conv`, and keeps the names of its tensors. The change is
    `lora_A @ lora_B`. It is added to the kernel, which is small beside a clip, so that there is one
    convolution to run as before, and there are no further activations to keep.
    """

    weight: Float[Array, "*sizes i o"]
    bias: Float[Array, " o"]
    lora_A: Float[Array, "*sizes i r"]
    lora_B: Float[Array, "*ones r o"]

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h w o"]:
        """Multiplies the channels of each pixel by a kernel of size 1x1x1."""
        return pointwise_conv(x, *self.taps())

    def taps(self) -> Taps:
        """Returns the changed kernel, in the dtype of the unchanged one, and the bias."""
        change = jnp.matmul(self.lora_A, self.lora_B, precision="highest")
        kernel = at_least_float32(self.weight)
        kernel = kernel + change.astype(kernel.dtype)
        return Taps(kernel.astype(self.weight.dtype), self.bias)


def lora(vae: VAE, rank: int, *, key: Key, where: Callable[[str], bool] | None = None) -> VAE:
    """Adds a trainable change of low rank to kernels; the model computes the same at first.

    The change is `lora_A @ lora_B` (Hu et al. 2021, https://arxiv.org/abs/2106.09685), with
    random `lora_A` and `lora_B` of zeros, both at least float32 whatever the model is. They are
    tensors beside the kernel's: `decoder.conv_in.conv.lora_A`, `decoder.conv_in.conv.lora_B`.

    **Arguments:**

    - `vae`: the model.
    - `rank`: rank of every change. It takes `rank / o + rank / (taps * i)` of the memory of a
        kernel from `i` to `o` channels.
    - `key`: for `lora_A`.
    - `where`: says by the name of its kernel, such as `decoder.conv_in.conv.weight`, if a
        convolution is changed: `decoder_only`, or `lambda name: "resnets" in name`. None changes
        all convolutions.

    **Returns:** the model with changed convolutions, for `Trainer(..., trainable=lora_only)`.

    **Raises:** `ValueError` for a rank below 1, for a `where` that chooses no convolution, and for
    a model that has LoRA already, or weights in 8 bits.

    !!! Example

        ```python
        trainer = training.Trainer(optax.adam(1e-3), trainable=training.lora_only)
        state = trainer.init(training.lora(vae, 4, key=key, where=training.decoder_only))
        for clips in crops.batches(int(state.step)):
            state, metrics = trainer.step(state, clips, key)
        training.save_lora("lora.safetensors", state.average)
        plain = training.merge(training.load_lora("lora.safetensors", vae))
        cv.save_pretrained(plain, "fine-tuned")
        ```
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank` must be a whole number of at least 1, got {rank!r}.")
    convs = _convs(vae)
    chosen = [name for name in convs if where is None or where(name + _KERNEL)]
    if not chosen:
        raise ValueError(
            f"`where` chooses none of the {len(convs)} convolutions, by names of kernels such as "
            f"{next(iter(convs), 'decoder.conv_in.conv')}{_KERNEL}."
        )

    def change(conv: Conv, key: Key) -> LowRank:
        *sizes, i, o = conv.weight.shape
        dtype = _at_least_float32(conv)
        down = Conv(tuple(sizes), i, rank, key=key, dtype=dtype).weight
        return _low_rank(conv, down, jnp.zeros((*(1 for _ in sizes), rank, o), dtype))

    keys = jax.random.split(key, len(chosen))
    pairs = zip(chosen, keys, strict=True)
    return _with_changes(vae, {name: change(convs[name], k) for name, k in pairs})


def lora_only(name: str) -> bool:
    """Returns True for the tensors that `lora` adds: a `trainable` that holds the model fixed.

    **Arguments:**

    - `name`: of the tensor, such as `decoder.conv_in.conv.lora_A`.

    **Returns:** True for `lora_A` and `lora_B`.
    """
    return name.endswith((_DOWN, _UP))


def merge(vae: VAE) -> VAE:
    """Adds the changes of `lora` to the kernels.

    **Arguments:**

    - `vae`: a model with LoRA; one without is returned as it is.

    **Returns:** the same function as a plain model, which `save_pretrained` takes. Kernels have
    the dtype that they had.
    """

    def plain(node: Any) -> Any:
        if not isinstance(node, LowRank):
            return node
        kernel, bias = node.taps()
        *sizes, i, o = kernel.shape
        blank = eqx.filter_eval_shape(Conv, tuple(sizes), i, o, key=jax.random.key(0))
        return eqx.tree_at(lambda conv: (conv.weight, conv.bias), blank, (kernel, bias))

    return jax.tree.map(plain, vae, is_leaf=lambda node: isinstance(node, LowRank))


def save_lora(path: str | os.PathLike, vae: VAE) -> None:
    """Writes the tensors that `lora` added, and no others, as safetensors.

    They have the names that they have in the model, and torch's order of axes: `lora_A` is
    `(rank, i, *sizes)`, `lora_B` `(o, rank, 1, ...)`, the weights of two convolutions in a row. The
    file appears whole or not at all.

    **Arguments:**

    - `path`: the file.
    - `vae`: a model with LoRA, such as `state.average`.

    **Raises:** `ValueError` for a model without LoRA; `OSError` where the file cannot be written.
    """
    leaves = {name: leaf for name, leaf in named(vae).items() if lora_only(name)}
    if not leaves:
        raise ValueError("the model has no LoRA to save: wrap it by `lora`, or `save_pretrained`.")
    with atomic(path) as partial:
        write_safetensors(partial, {n: _stored(x) for n, x in leaves.items()}, {"format": "pt"})


def load_lora(path: str | os.PathLike, vae: VAE) -> VAE:
    """Reads what `save_lora` wrote, and changes a model by it.

    **Arguments:**

    - `path`: the file.
    - `vae`: the plain model that was changed, or one of the same shapes.

    **Returns:** the model with LoRA, at least float32, on the convolutions that the file names.

    **Raises:** `FileNotFoundError`; `ValueError` that names the tensors that are missing,
    unexpected, misshapen or not finite, for a file that is not whole safetensors, and for a model
    that has LoRA already.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no LoRA at {path}: give a file that `save_lora` wrote.")
    convs = _convs(vae)
    _, tensors = read_safetensors(path, "is a pickle: give a file that `save_lora` wrote.")
    _check(_faults(tensors, convs), path, convs)

    def read(name: str, suffix: str) -> np.ndarray:
        array = tensors[name + suffix].read()
        return array.transpose(from_stored(array.ndim)).astype(_at_least_float32(convs[name]))

    arrays = {
        name: (read(name, _DOWN), read(name, _UP)) for name in convs if name + _DOWN in tensors
    }
    faults = defaultdict(list)
    for name, pair in arrays.items():
        for suffix, array in zip((_DOWN, _UP), pair, strict=True):
            if not np.isfinite(array).all():
                faults["not finite"].append(name + suffix)
    _check(faults, path, convs)
    changes = {name: _low_rank(convs[name], *pair) for name, pair in arrays.items()}
    return _with_changes(vae, changes)


def _convs(vae: VAE) -> dict[str, Conv]:
    """Returns the convolutions by their names in diffusers."""
    if is_quantised(vae):
        raise ValueError(
            "weights held in 8 bits take no LoRA: change the plain model, or `cv.dequantised(vae)`."
        )
    # A subclass of a user may compute something else.
    is_conv = lambda node: type(node) is Conv or isinstance(node, LowRank)  # noqa: E731
    nodes, _ = jax.tree_util.tree_flatten_with_path(vae, is_leaf=is_conv)
    convs = {_name(path): node for path, node in nodes if is_conv(node)}
    for name, node in convs.items():
        if isinstance(node, LowRank):
            raise ValueError(
                f"the model has LoRA already, such as {name}{_DOWN}: `merge` it first, or start "
                "from the plain model."
            )
    return convs


def _with_changes(vae: VAE, changes: Mapping[str, LowRank]) -> VAE:
    change = lambda path, node: changes.get(_name(path), node)  # noqa: E731
    is_conv = lambda node: type(node) is Conv  # noqa: E731
    return jax.tree_util.tree_map_with_path(change, vae, is_leaf=is_conv)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _low_rank(conv: Conv, down: Any, up: Any) -> LowRank:
    return LowRank(conv.weight, conv.bias, jnp.asarray(down), jnp.asarray(up))


def _at_least_float32(conv: Conv) -> Any:
    return jnp.float64 if conv.weight.dtype == jnp.float64 else jnp.float32


def _stored(leaf: Any) -> Stored:
    axes = to_stored(leaf.ndim)
    read = lambda: np.asarray(leaf).transpose(axes)  # noqa: E731
    return Stored(tuple(leaf.shape[axis] for axis in axes), leaf.dtype.name, read)


def _faults(tensors: Mapping[str, Stored], convs: Mapping[str, Conv]) -> dict[str, list[str]]:
    """Returns what is wrong with a file's tensors, as far as their headers tell."""
    faults = defaultdict(list)
    for name, tensor in tensors.items():
        conv = convs.get(name.removesuffix(_DOWN).removesuffix(_UP))
        if conv is None or not lora_only(name):
            faults["unexpected"].append(name)
            continue
        stem, _, kind = name.rpartition(".")
        partner = stem + (_UP if f".{kind}" == _DOWN else _DOWN)
        *sizes, i, o = conv.weight.shape
        if partner not in tensors:
            faults["missing"].append(partner)
            continue
        rank = next(iter(tensors[stem + _DOWN].shape), 0)
        down, up = (rank, i, *sizes), (o, rank, *(1 for _ in sizes))
        due = down if f".{kind}" == _DOWN else up
        if tensor.shape != due or not rank:
            faults["misshapen"].append(f"{name} {list(tensor.shape)} for {list(due)}")
        elif tensor.dtype not in FLOATS:
            faults["not floating"].append(f"{name} of {tensor.dtype}")
    if not tensors:
        faults["missing"] = [name + suffix for name in convs for suffix in (_DOWN, _UP)]
    return faults


def _check(faults: Mapping[str, list[str]], path: Any, convs: Mapping[str, Conv]) -> None:
    if not faults:
        return
    parts = []
    for fault, names in faults.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        parts.append(f"{len(names)} {fault}: {', '.join(names[:_SHOWN])}{more}")
    raise ValueError(
        f"{path} is no LoRA of this model; {'; '.join(parts)}; due are pairs such as "
        f"{next(iter(convs), 'decoder.conv_in.conv')}{_DOWN} and {_UP}: give a file that "
        "`save_lora` wrote, and the model that it was trained on."
    )


__all__ = ["LowRank", "load_lora", "lora", "lora_only", "merge", "save_lora"]
