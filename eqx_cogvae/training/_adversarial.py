"""Training against a discriminator."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .._autoencoder import VAE
from .._checkpoint import tensor_names
from .._types import Key, at_least_float32
from ._clip_loss import Metrics

_LAST_LAYER = "decoder.conv_out."
_SMALLEST_NORM = 1e-4
_LARGEST_WEIGHT = 1e4

Scalar = Float[Array, ""]


def hinge(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Scalar:
    """Returns the hinge loss of a discriminator.

    It is `(mean(relu(1 - real)) + mean(relu(1 + fake))) / 2`: 1 for a discriminator that says 0
    everywhere, and 0 for one that is right by a margin of 1.

    **Arguments:**

    - `real`: logits of clips from the data.
    - `fake`: logits of decoded clips.

    **Returns:** the loss, a scalar in at least float32.
    """
    margins = jax.nn.relu(1 - at_least_float32(real)), jax.nn.relu(1 + at_least_float32(fake))
    return (jnp.mean(margins[0]) + jnp.mean(margins[1])) / 2


class Adversarial(eqx.Module):
    """Trains a VAE against a discriminator, which is trained beside it by its own optimiser.

    The VAE's loss gets one more term, the mean of the logits of its decoded clips, negated. Its
    weight adapts as in VQGAN (Esser et al. 2021, https://arxiv.org/abs/2012.09841) and latent
    diffusion: it is `weight` times the norm of the loss's gradient over the norm of the term's
    gradient, both at the kernel of `decoder.conv_out`, and that ratio is at most 1e4. The kernel
    may be one that is not trained. Each part of a batch that is cut by `Trainer(accumulate=...)`
    has a weight of its own. The discriminator descends the `hinge` loss on the same clips, in the
    same step.

    **Arguments:**

    - `optimiser`: the optax transformation of the discriminator's weights. The usual one is Adam
        with `b1=0.5, b2=0.9`.
    - `weight`: factor of the term beside the adaptive one.
    - `start`: number of steps without the term. Until then the discriminator and its optimiser
        stay as they are: a VAE that is trained from random weights has to decode something first.

    !!! Example

        ```python
        adversarial = training.Adversarial(optax.adam(1e-4, b1=0.5, b2=0.9), weight=0.5, start=1)
        trainer = training.Trainer(optax.adam(1e-4), adversarial=adversarial)
        state = trainer.init(vae, training.Discriminator(width=8, key=key))
        for clips in crops.batches(int(state.step)):
            state, metrics = trainer.step(state, clips, key)
        ```
    """

    optimiser: optax.GradientTransformation
    weight: float | int = 0.5
    start: int = 0

    def __check_init__(self):
        check_optimiser(self.optimiser)
        if self.weight < 0:
            raise ValueError(f"`weight` must be at least 0, got {self.weight}: the usual is 0.5.")
        if self.start < 0:
            raise ValueError(f"`start` must be at least 0 steps, got {self.start}.")

    def objective(
        self,
        loss: Any,
        vae: VAE,
        discriminator: Callable,
        clips: Float[Array, "b t h w c"],
        key: Key,
        step: Int[Array, ""],
    ) -> tuple[Scalar, Metrics]:
        """Returns a sum to differentiate by the VAE and by the discriminator, and the metrics.

        One addend, `loss` among the metrics, is differentiated by the VAE's weights alone, the
        other by the discriminator's.

        **Arguments:**

        - `loss`: has a method `with_decoded`, as `ClipLoss` has.
        - `vae`, `discriminator`: the models.
        - `clips`: `(b, t, h, w, c)` in [-1, 1].
        - `key`: a `jax.random.key`, to draw latents with.
        - `step`: number of steps taken so far.

        **Returns:** the sum, a scalar, and the metrics by their names.
        """
        last, rest = eqx.partition(vae, _last_layer(vae))

        def forward(last: VAE) -> tuple[tuple[Scalar, Array], Metrics]:
            value, terms, decoded = loss.with_decoded(eqx.combine(last, rest), clips, key)
            return (value, decoded), terms

        (value, decoded), pull, terms = jax.vjp(forward, last, has_aux=True)
        fixed = _stopped(discriminator)
        term, back = jax.vjp(lambda decoded: -_mean(fixed(decoded)), decoded)
        # What the weight is made of counts as constant, so nothing is differentiated twice.
        pull, (ascent,) = _stopped(pull), _stopped(back(jnp.ones_like(term)))
        by_loss = norm(pull((jnp.ones_like(value), jnp.zeros_like(decoded))))
        by_term = norm(pull((jnp.zeros_like(value), ascent)))
        ratio = jnp.clip(by_loss / (by_term + _SMALLEST_NORM), 0, _LARGEST_WEIGHT)
        weight = jnp.where(step < self.start, 0, self.weight * ratio)
        real, fake = discriminator(clips), discriminator(_stopped(decoded))
        own, value = hinge(real, fake), value + weight * term
        added = {"adversarial": term, "adversarial_weight": weight, "discriminator": own}
        logits = {"logits_real": _mean(real), "logits_fake": _mean(fake)}
        metrics = {"loss": value, **terms, **added, **logits}
        return value + own, jax.tree.map(jnp.asarray, metrics)

    def update(
        self, discriminator: PyTree, optimiser: PyTree, grads: PyTree, step: Int[Array, ""]
    ) -> tuple[PyTree, PyTree]:
        """Takes a step of the discriminator, or none before `start`.

        **Arguments:**

        - `discriminator`, `optimiser`: the model and the state of its optimiser.
        - `grads`: gradients by the discriminator's weights.
        - `step`: number of steps taken so far.

        **Returns:** both after the step.
        """
        weights = eqx.filter(discriminator, eqx.is_inexact_array)
        updates, after = self.optimiser.update(grads, optimiser, weights)
        moved = eqx.apply_updates(discriminator, updates), after

        def kept(new: Any, old: Any) -> Any:
            # What is no array is the same before and after.
            return jnp.where(step < self.start, old, new) if eqx.is_array(new) else new

        return jax.tree.map(kept, moved, (discriminator, optimiser))


def check_optimiser(optimiser: Any) -> None:
    """Raises `TypeError` unless it is an optax transformation."""
    if not hasattr(optimiser, "update"):
        raise TypeError(
            "`optimiser` must be an optax transformation such as `optax.adam(1e-4)`, "
            f"got {optimiser!r}."
        )


def norm(tree: PyTree) -> Scalar:
    """Returns the L2 norm of all arrays of a tree together, in at least float32."""
    squares = [jnp.sum(jnp.square(at_least_float32(x))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def _last_layer(vae: VAE) -> VAE:
    """Returns True for the kernel of the decoder's last layer, or for all it has, if no kernel."""

    def is_last(name: str, leaf: Any) -> bool:
        return name.startswith(_LAST_LAYER) and eqx.is_inexact_array(leaf)

    names = tensor_names(vae)
    last = jax.tree.map(is_last, names, vae)
    kernel = jax.tree.map(lambda name, own: own and name.endswith(".weight"), names, last)
    return kernel if any(jax.tree.leaves(kernel)) else last


def _mean(logits: Array) -> Scalar:
    return jnp.mean(at_least_float32(logits))


def _stopped(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: lax.stop_gradient(x) if eqx.is_array(x) else x, tree)


__all__ = ["Adversarial", "check_optimiser", "hinge", "norm"]
