"""The loss of a clip that is encoded, sampled and decoded."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._autoencoder import VAE
from .._types import Key, at_least_float32
from ._losses import gradient, kl, l1, l2, temporal

Metrics = dict[str, Float[Array, ""]]


class ClipLoss(eqx.Module):
    """A weighted sum of losses over a clip that is encoded, sampled and decoded.

    Each number is the weight of the loss of its name. The defaults are the mean absolute error
    and latent diffusion's weight of the KL divergence.

    `perceptual` is any function `(decoded, clips) -> scalar` of two clips in float32, such as a
    published LPIPS. LPIPS takes pictures in [-1, 1], so frames are folded into the batch. Its
    weights are not trained; hand it in as an `eqx.Module` or a `jax.tree_util.Partial`, for them
    to be arguments of the compiled step, and no constants in it.

    !!! Example

        ```python
        def lpips(weights, decoded, clips):  # stands for the network that you have
            return jnp.mean(weights * (decoded - clips) ** 2, axis=(1, 2, 3))

        def perceptual(weights, decoded, clips):
            pictures = lambda x: x.reshape(-1, *x.shape[2:])  # (b t) h w c
            return jnp.mean(lpips(weights, pictures(decoded), pictures(clips)))

        perceptual = jax.tree_util.Partial(perceptual, jnp.ones(()))
        loss = training.ClipLoss(l1=1.0, perceptual=perceptual, perceptual_weight=0.1)
        value, metrics = loss(vae, clip, key)
        ```
    """

    l1: float | int = 1.0
    """Weight of the mean absolute error."""
    l2: float | int = 0.0
    """Weight of the mean squared error."""
    kl: float | int = 1e-6
    """Weight of the KL divergence to the unit Gaussian."""
    gradient: float | int = 0.0
    """Weight of the error of differences between neighbours in space."""
    temporal: float | int = 0.0
    """Weight of the error of differences between frames."""
    perceptual: Callable | None = None
    """A loss of one's own, `(decoded, clips) -> scalar`, both `(b, t, h, w, c)` in float32."""
    perceptual_weight: float | int = 1.0
    """Weight of `perceptual`."""

    def __check_init__(self):
        if not (self.perceptual is None or callable(self.perceptual)):
            raise TypeError(
                "`perceptual` must be a function of (decoded, clips), and its weight is "
                f"`perceptual_weight`, got {self.perceptual!r}."
            )

    def __call__(
        self, vae: VAE, clips: Float[Array, "b t h w c"], key: Key
    ) -> tuple[Float[Array, ""], Metrics]:
        """Computes the losses of clips.

        **Arguments:**

        - `vae`: the model.
        - `clips`: `(b, t, h, w, c)` in [-1, 1].
        - `key`: a `jax.random.key`, to draw latents with.

        **Returns:** the weighted sum, and every loss by its name, not weighted.

        **Raises:** `ValueError` if the clips are not decoded to their own shape.
        """
        total, terms, _ = self.with_decoded(vae, clips, key)
        return total, terms

    def with_decoded(
        self, vae: VAE, clips: Float[Array, "b t h w c"], key: Key
    ) -> tuple[Float[Array, ""], Metrics, Float[Array, "b t h w c"]]:
        """Computes the losses of clips, for one who needs the decoded clips as well.

        **Arguments:** as for a call.

        **Returns:** the weighted sum, every loss by its name, not weighted, and the decoded clips.
        """
        posterior = vae.encode(clips)
        decoded = vae.decode(posterior.sample(key))
        terms = {
            "l1": l1(decoded, clips),
            "l2": l2(decoded, clips),
            "kl": kl(posterior, clips),
            "gradient": gradient(decoded, clips),
            "temporal": temporal(decoded, clips),
        }
        total = sum((getattr(self, name) * term for name, term in terms.items()), jnp.zeros(()))
        if self.perceptual is not None:
            terms["perceptual"] = self._perceived(decoded, clips)
            total += self.perceptual_weight * terms["perceptual"]
        return total, terms, decoded

    def _perceived(self, decoded: Array, clips: Array) -> Float[Array, ""]:
        assert self.perceptual is not None
        term = self.perceptual(at_least_float32(decoded), at_least_float32(clips))
        if jnp.shape(term):
            raise ValueError(
                f"`perceptual` must return a scalar, got shape {jnp.shape(term)}: take its mean."
            )
        return term


__all__ = ["ClipLoss", "Metrics"]
