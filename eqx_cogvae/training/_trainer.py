"""Training steps."""

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree, Shaped

from .._autoencoder import VAE
from .._checkpoint.checkpoint import tensor_names
from .._quantised import is_quantised
from .._types import Key
from ._clip_loss import ClipLoss, Metrics
from ._remat import rematerialised


class TrainState(eqx.Module):
    """The state that a step changes: weights, their average, the optimiser's state, the count."""

    model: VAE
    """The weights, in the dtype that they were given in."""
    average: VAE
    """Their exponential moving average: what to save and use."""
    optimiser: PyTree
    """The state of the optax transformation, of the trained tensors alone."""
    step: Int[Array, ""]
    """How many steps have been taken."""


class Trainer(eqx.Module):
    """A step of gradient descent on clips, and how it is taken.

    **Arguments:**

    - `optimiser`: an optax gradient transformation.
    - `loss`: `(vae, clips, key) -> (loss, metrics)`, such as a `ClipLoss`.
    - `trainable`: which tensors are trained, by diffusers' names: `decoder_only`, or
        `lambda name: "norm" in name`. The others are held fixed, and cost no optimiser state.
    - `decay`: of the exponential moving average of the weights, per step. It rises to that from
        0.1, so that an average over few steps is not one of their beginning.
    - `accumulate`: into how many parts a batch is cut, whose gradients are averaged: the memory
        of a part, the step of the whole.
    - `dtype`: what is computed in, such as `jnp.bfloat16`; None is the weights' own. Weights,
        average and optimiser state stay as they are given: use float32.
    - `rematerialise`: whether each resnet block is computed again in the backward pass.
    - `mesh`: devices over which the batch is split; the state is on each of them.
    """

    optimiser: optax.GradientTransformation
    loss: Callable = ClipLoss()
    trainable: Callable[[str], bool] | None = None
    decay: float | int = 0.999
    accumulate: int = 1
    dtype: Any = eqx.field(default=None, static=True)
    rematerialise: bool = False
    mesh: Mesh | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        if not hasattr(self.optimiser, "update"):
            raise TypeError(
                "`optimiser` must be an optax transformation such as `optax.adam(1e-4)`, "
                f"got {self.optimiser!r}."
            )
        if not (self.trainable is None or callable(self.trainable)):
            raise TypeError(
                "`trainable` must be a function of a tensor's name such as `decoder_only`, "
                f"got {self.trainable!r}."
            )
        if self.accumulate < 1:
            raise ValueError(f"`accumulate` must be at least 1, got {self.accumulate}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1), got {self.decay}: the usual is 0.999.")

    def init(self, vae: VAE) -> TrainState:
        """Returns the state before the first step; `vae` stays the caller's own.

        Warns of weights in half precision, in which small steps are rounded away.

        **Raises:** `ValueError` if `trainable` chooses no tensor, or weights held in 8 bits.
        """
        trained, _ = self._split(vae)
        if is_quantised(vae if self.trainable is None else trained):
            raise ValueError(
                "weights held in 8 bits cannot be trained: train `cv.dequantised(vae)`, or choose "
                "others by `trainable`, such as those of layers of your own."
            )
        if not (leaves := jax.tree.leaves(trained)):
            raise ValueError(
                "`trainable` chooses no tensor, of names such as `decoder.conv_in.conv.weight`."
            )
        if any(jnp.finfo(leaf.dtype).bits < 32 for leaf in leaves):
            warnings.warn(
                f"the weights are {vae.dtype}, in which small steps are rounded away: load with "
                "`dtype=jnp.float32`, and compute in less with `Trainer(dtype=jnp.bfloat16)`.",
                stacklevel=2,
            )
        # A step gives its buffers away, so no two of them may be one, nor the caller's.
        copy = lambda tree: jax.tree.map(  # noqa: E731
            lambda x: jnp.array(x, copy=True) if eqx.is_array(x) else x, tree
        )
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            optimiser = copy(self.optimiser.init(trained))
        state = TrainState(copy(vae), copy(vae), optimiser, jnp.zeros((), jnp.int32))
        if self.mesh is None:
            return state
        return eqx.filter_shard(state, NamedSharding(self.mesh, PartitionSpec()))

    def step(
        self, state: TrainState, clips: Shaped[Array, "b t h w c"] | Any, key: Key
    ) -> tuple[TrainState, Metrics]:
        """One step on clips in [-1, 1] or uint8; the buffers of `state` are given away.

        The random numbers of a step are those of `key` and `state.step`: hand in the same key
        every time. The metrics are the losses, `loss` their weighted sum, and `gradient_norm`,
        all before the step.

        **Raises:** `ValueError` for a batch that does not divide by `accumulate` and the mesh.
        """
        parts = self.accumulate * (1 if self.mesh is None else self.mesh.size)
        if clips.shape[0] % parts:
            raise ValueError(
                f"a batch of {clips.shape[0]} clips does not divide into {parts} parts, "
                f"{self.accumulate} to accumulate on each of {parts // self.accumulate} devices."
            )
        return _update((self, jnp.asarray(clips), key), state)

    def _split(self, vae: VAE) -> tuple[Any, Any]:
        if self.trainable is None:
            return eqx.partition(vae, eqx.is_inexact_array)
        chosen = jax.tree.map(self.trainable, tensor_names(vae))
        return eqx.partition(vae, chosen)

    def _gradients(self, model: VAE, clips: Array, key: Key) -> tuple[Metrics, Any]:
        trained, frozen = self._split(model)

        def loss(trained, clips, key):
            vae = _cast(eqx.combine(trained, frozen), self.dtype)
            vae = rematerialised(vae) if self.rematerialise else vae
            return self.loss(vae, clips, key)

        def part(clips, key):
            gradient = eqx.filter_value_and_grad(loss, has_aux=True)
            (value, terms), grads = gradient(trained, clips, key)
            return {"loss": value, **terms}, grads

        if self.accumulate == 1:
            return part(clips, key)
        # Each part takes some of every device's clips, so that all devices work on it.
        clips = clips.reshape(-1, self.accumulate, *clips.shape[1:]).swapaxes(0, 1)
        keys = jax.random.split(key, self.accumulate)
        like = eqx.filter_eval_shape(part, clips[0], keys[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        body = lambda total, each: (jax.tree.map(jnp.add, total, part(*each)), None)  # noqa: E731
        total, _ = lax.scan(body, zeros, (clips, keys))
        return jax.tree.map(lambda x: x / self.accumulate, total)


@eqx.filter_jit(donate="all-except-first")
def _update(held: tuple[Trainer, Array, Key], state: TrainState) -> tuple[TrainState, Metrics]:
    trainer, clips, key = held
    if trainer.mesh is not None:
        batch = PartitionSpec(trainer.mesh.axis_names)
        clips = lax.with_sharding_constraint(clips, NamedSharding(trainer.mesh, batch))
    if clips.dtype == jnp.uint8:
        clips = clips.astype(jnp.float32) / 127.5 - 1
    metrics, grads = trainer._gradients(state.model, clips, jax.random.fold_in(key, state.step))
    trained, frozen = trainer._split(state.model)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        updates, optimiser = trainer.optimiser.update(grads, state.optimiser, trained)
    trained = eqx.apply_updates(trained, updates)
    decay = jnp.minimum((1 + state.step) / (10 + state.step), trainer.decay)
    # What is frozen goes back as the buffers it came in.
    average, still = trainer._split(state.average)
    average = jax.tree.map(lambda a, p: _mixed(a, p, decay), average, trained)
    metrics["gradient_norm"] = _norm(grads)
    model, average = eqx.combine(trained, frozen), eqx.combine(average, still)
    return TrainState(model, average, optimiser, state.step + 1), metrics


def decoder_only(name: str) -> bool:
    """Returns True for tensors that decode: a `trainable` that leaves the latents as they are."""
    return name.startswith(("decoder.", "post_quant_conv."))


def _cast(vae: VAE, dtype: Any) -> VAE:
    if dtype is None:
        return vae
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, vae)


def _norm(tree: PyTree) -> Float[Array, ""]:
    squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), squares[0].dtype)))


def _mixed(average: Array, new: Array, decay: Array) -> Array:
    decay = decay.astype(new.dtype)
    return decay * average + (1 - decay) * new


__all__ = ["TrainState", "Trainer", "decoder_only"]
