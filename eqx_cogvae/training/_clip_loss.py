"""The loss of a clip that is encoded, sampled and decoded."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._autoencoder import VAE
from .._types import Key
from ._losses import gradient, kl, l1, l2, temporal

Metrics = dict[str, Float[Array, ""]]


class ClipLoss(eqx.Module):
    """A weighted sum of losses over a clip that is encoded, sampled and decoded.

    Each field is the weight of the loss of its name. The defaults are the mean absolute error
    and latent diffusion's weight of the KL divergence.
    """

    l1: float | int = 1.0
    """Of the mean absolute error."""
    l2: float | int = 0.0
    """Of the mean squared error."""
    kl: float | int = 1e-6
    """Of the KL divergence to the unit Gaussian."""
    gradient: float | int = 0.0
    """Of the error of differences between neighbours in space."""
    temporal: float | int = 0.0
    """Of the error of differences between frames."""

    def __call__(
        self, vae: VAE, clips: Float[Array, "b t h w c"], key: Key
    ) -> tuple[Float[Array, ""], Metrics]:
        """The sum, and every loss before it is weighted."""
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
        return total, terms


__all__ = ["ClipLoss", "Metrics"]
