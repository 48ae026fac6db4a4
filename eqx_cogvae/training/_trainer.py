"""Training steps."""

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
from .._checkpoint import tensor_names
from .._checks import warn
from .._meshes import Split, automatic, split
from .._pixels import from_pixels
from .._quantised import is_quantised
from .._types import Key, at_least_float32
from ._adversarial import Adversarial, check_optimiser, norm
from ._clip_loss import ClipLoss, Metrics
from ._remat import rematerialised


class TrainState(eqx.Module):
    """The state that a step changes: weights, their average, the optimiser's state, the count."""

    model: VAE
    """The weights, in the dtype that they were given in."""
    average: VAE
    """The exponential moving average of the weights: the one to save and use."""
    optimiser: PyTree
    """The state of the optax transformation, of the trained tensors alone."""
    step: Int[Array, ""]
    """Number of steps that have been taken."""
    discriminator: PyTree = None
    """The discriminator, or None without one."""
    discriminator_optimiser: PyTree = None
    """The state of the discriminator's optimiser, or None."""


def _automatic(mesh: Mesh | None) -> Mesh | None:
    """Returns the mesh with axes along which XLA splits the work, as the model's are inside."""
    return None if mesh is None else automatic(mesh)


class Trainer(eqx.Module):
    """Takes steps of gradient descent on clips.

    **Arguments:**

    - `optimiser`: an optax gradient transformation.
    - `loss`: `(vae, clips, key) -> (loss, metrics)`, such as a `ClipLoss`. With `adversarial` it
        needs a method `with_decoded` that returns the decoded clips too, as `ClipLoss` has.
    - `trainable`: says by a tensor's name in diffusers if it is trained: `decoder_only`,
        `lora_only`, or `lambda name: "norm" in name`. The others are held fixed, and cost no
        optimiser state.
    - `decay`: decay per step of the exponential moving average of the weights. It rises to that
        from 0.1, so that an average over few steps is not one of their beginning.
    - `accumulate`: number of parts that a batch is cut into, whose gradients are averaged. A step
        then needs the memory of a part.
    - `dtype`: dtype to compute in, such as `jnp.bfloat16`; None is the weights' own. Weights,
        average and optimiser state stay as they are given: use float32.
    - `rematerialise`: if True, each resnet block is computed again in the backward pass.
    - `mesh`: devices over which the batch is split; the state is on each of them.
    - `adversarial`: trains against a discriminator as well, see `Adversarial`.
    """

    optimiser: optax.GradientTransformation
    loss: Callable = ClipLoss()
    trainable: Callable[[str], bool] | None = None
    decay: float | int = 0.999
    accumulate: int = 1
    dtype: Any = eqx.field(default=None, static=True)
    rematerialise: bool = False
    mesh: Mesh | None = eqx.field(default=None, static=True, converter=_automatic)
    adversarial: Adversarial | None = None

    def __check_init__(self):
        check_optimiser(self.optimiser)
        if not (self.trainable is None or callable(self.trainable)):
            raise TypeError(
                "`trainable` must be a function of a tensor's name such as `decoder_only`, "
                f"got {self.trainable!r}."
            )
        if self.accumulate < 1:
            raise ValueError(f"`accumulate` must be at least 1, got {self.accumulate}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1), got {self.decay}: the usual is 0.999.")
        if not (self.adversarial is None or isinstance(self.adversarial, Adversarial)):
            raise TypeError(
                "`adversarial` must be a `training.Adversarial(optimiser)`, "
                f"got {self.adversarial!r}."
            )
        if self.adversarial is not None and not hasattr(self.loss, "with_decoded"):
            raise TypeError(
                "`adversarial` needs a `loss` with a method `with_decoded(vae, clips, key) -> "
                f"(loss, metrics, decoded)`, such as `ClipLoss`, got {self.loss!r}."
            )

    def init(self, vae: VAE, discriminator: PyTree = None) -> TrainState:
        """Returns the state before the first step; the arguments stay the caller's own.

        Warns of weights in half precision, in which small steps are rounded away.

        **Arguments:**

        - `vae`: the model.
        - `discriminator`: an `eqx.Module` from clips to logits such as a `Discriminator`, for a
            trainer that has `adversarial`.

        **Returns:** the state.

        **Raises:** `ValueError` if `trainable` chooses no tensor, or weights held in 8 bits, for a
        discriminator that is missing, and for one without `adversarial`.
        """
        trained, _ = self._split(vae)
        if is_quantised(trained):
            raise ValueError(
                "weights held in 8 bits cannot be trained: train `cv.dequantised(vae)`, or choose "
                "others by `trainable`, such as those of layers of your own."
            )
        if not jax.tree.leaves(trained):
            raise ValueError(
                "`trainable` chooses no tensor, of names such as `decoder.conv_in.conv.weight`."
            )
        if (discriminator is None) != (self.adversarial is None):
            raise ValueError(
                "a discriminator and `Trainer(adversarial=...)` need each other: give both, as in "
                "`trainer.init(vae, training.Discriminator(key=key))`, or none."
            )
        judged = eqx.filter(discriminator, eqx.is_inexact_array)
        _warn_of_half_precision((trained, judged))
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            optimiser = self.optimiser.init(trained)
            other = None if self.adversarial is None else self.adversarial.optimiser.init(judged)
        step = jnp.zeros((), jnp.int32)
        state = TrainState(vae, vae, optimiser, step, discriminator, other)
        # A step gives its buffers away, so no two of them may be one, nor the caller's.
        state = jax.tree.map(lambda x: jnp.array(x, copy=True) if eqx.is_array(x) else x, state)
        if self.mesh is None:
            return state
        return eqx.filter_shard(state, NamedSharding(self.mesh, PartitionSpec()))

    def step(
        self, state: TrainState, clips: Shaped[Array, "b t h w c"] | Any, key: Key
    ) -> tuple[TrainState, Metrics]:
        """Takes one step; the buffers of `state` are given away.

        The random numbers of a step are those of `key` and `state.step`: hand in the same key
        every time.

        **Arguments:**

        - `state`: the state before the step.
        - `clips`: in [-1, 1], or uint8.
        - `key`: for the noise of the latents.

        **Returns:** the next state, and the metrics, all from before the step: the losses of
        `loss`, `loss` as their weighted sum, and `gradient_norm`, that of the VAE's gradient. With
        `adversarial` there are also `adversarial` and `adversarial_weight`, the term and its weight
        in that sum; `discriminator`, the discriminator's own loss; and `logits_real` and
        `logits_fake`, the means of its logits.

        **Raises:** `ValueError` for a batch that does not divide by `accumulate` and the mesh.
        """
        parts = self.accumulate * (1 if self.mesh is None else self.mesh.size)
        if clips.shape[0] % parts:
            raise ValueError(
                f"a batch of {clips.shape[0]} clips does not divide into {parts} parts, "
                f"{self.accumulate} to accumulate on each of {parts // self.accumulate} devices."
            )
        clips = jnp.asarray(clips) if self.mesh is None else jax.device_put(clips, self._by_clip)
        return _update((self, clips, key), state)

    @property
    def _by_clip(self) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))

    def _split(self, vae: VAE) -> tuple[Any, Any]:
        if self.trainable is None:
            return eqx.partition(vae, eqx.is_inexact_array)
        trainable = self.trainable
        # Layers of one's own may hold functions and whole numbers too.
        chosen = lambda name, leaf: eqx.is_inexact_array(leaf) and bool(trainable(name))  # noqa: E731
        return eqx.partition(vae, jax.tree.map(chosen, tensor_names(vae), vae))

    def _objective(
        self, vae: VAE, discriminator: PyTree, clips: Array, key: Key, step: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """Returns the number that is differentiated, and the metrics."""
        vae, discriminator = _cast(vae, self.dtype), _cast(discriminator, self.dtype)
        vae = rematerialised(vae) if self.rematerialise else vae
        if self.adversarial is None:
            value, terms = self.loss(vae, clips, key)
            return value, jax.tree.map(jnp.asarray, {"loss": value, **terms})
        return self.adversarial.objective(self.loss, vae, discriminator, clips, key, step)

    def _gradients(self, state: TrainState, clips: Array, key: Key) -> tuple[Metrics, Any]:
        """Returns the metrics, and the gradients of the VAE and of the discriminator."""
        trained, frozen = self._split(state.model)
        judged, rest = eqx.partition(state.discriminator, eqx.is_inexact_array)

        @eqx.filter_grad(has_aux=True)
        def gradients(given: tuple[Any, Any], clips: Array, key: Key) -> Any:
            vae, discriminator = eqx.combine(given, (frozen, rest))
            return self._objective(vae, discriminator, clips, key, state.step)

        def part(clips: Array, key: Key) -> tuple[Metrics, Any]:
            return gradients((trained, judged), clips, key)[::-1]

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
        clips = lax.with_sharding_constraint(clips, trainer._by_clip)
    if clips.dtype == jnp.uint8:
        clips = from_pixels(clips)
    key = jax.random.fold_in(key, state.step)
    share = Split(batch=1 if trainer.mesh is None else trainer.mesh.size)
    with split(split.value.further(share)):
        metrics, (grads, other_grads) = trainer._gradients(state, clips, key)
    trained, frozen = trainer._split(state.model)
    other = state.discriminator, state.discriminator_optimiser
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        updates, optimiser = trainer.optimiser.update(grads, state.optimiser, trained)
        if trainer.adversarial is not None:
            other = trainer.adversarial.update(*other, other_grads, state.step)
    trained = eqx.apply_updates(trained, updates)
    decay = jnp.minimum((1 + state.step) / (10 + state.step), trainer.decay)
    # What is frozen goes back as the buffers it came in.
    average, still = trainer._split(state.average)
    average = jax.tree.map(lambda a, p: _mixed(a, p, decay), average, trained)
    metrics["gradient_norm"] = norm(grads)
    model, average = eqx.combine(trained, frozen), eqx.combine(average, still)
    return TrainState(model, average, optimiser, state.step + 1, *other), metrics


def decoder_only(name: str) -> bool:
    """Returns True for tensors that decode: a `trainable` that leaves the latents as they are.

    **Arguments:**

    - `name`: of the tensor, as diffusers has it.

    **Returns:** True for those of the decoder and of the convolution before it.
    """
    return name.startswith(("decoder.", "post_quant_conv."))


def _warn_of_half_precision(trained: PyTree) -> None:
    for leaf in jax.tree.leaves(trained):
        if jnp.finfo(leaf.dtype).bits < 32:
            return warn(
                f"the weights are {leaf.dtype}, in which small steps are rounded away: load with "
                "`dtype=jnp.float32`, and compute in less with `Trainer(dtype=jnp.bfloat16)`."
            )


def _cast(model: PyTree, dtype: Any) -> PyTree:
    if dtype is None:
        return model
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, model)


def _mixed(average: Array, new: Array, decay: Array) -> Array:
    # In half precision 0.999 is 1, with which the average would never move.
    wide, decay = at_least_float32(average), decay.astype(at_least_float32(new).dtype)
    return (decay * wide + (1 - decay) * at_least_float32(new)).astype(new.dtype)


__all__ = ["TrainState", "Trainer", "decoder_only"]
