"""Defines the diagonal Gaussian that an encoder returns."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._types import Key, at_least_float32

_LOGVAR_RANGE = (-30.0, 20.0)


class DiagonalGaussian(eqx.Module):
    """A normal distribution over latents, independent in every element.

    Latents are in the VAE's own units: see `VAE.scale_latents`.
    """

    mean: Float[Array, "b t h w c"]
    """The mean of each element."""
    logvar: Float[Array, "b t h w c"]
    """The logarithm of each element's variance, in [-30, 20] when it comes from the encoder."""

    @classmethod
    @eqx.filter_jit
    def from_moments(cls, moments: Float[Array, "b t h w m"]) -> "DiagonalGaussian":
        """Returns the distribution that a step of the encoder describes.

        **Arguments:**

        - `moments`: `(b, t, h, w, m)`: means in the first half of the channels, log variances in
            the second.

        **Returns:** the distribution, its log variances clamped to [-30, 20].
        """
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return cls(mean, jnp.clip(logvar, *_LOGVAR_RANGE))

    @property
    def std(self) -> Float[Array, "b t h w c"]:
        """The standard deviation of each element: `exp(logvar / 2)`."""
        return _std(self.logvar)

    def mode(self) -> Float[Array, "b t h w c"]:
        """Returns the most likely latents, `(b, t, h, w, c)`: the mean.

        **Returns:** latents in the VAE's own units.
        """
        return self.mean

    @eqx.filter_jit
    def sample(self, key: Key) -> Float[Array, "b t h w c"]:
        """Draws latents at random, differentiably in `mean` and `logvar`.

        **Arguments:**

        - `key`: a `jax.random.key`.

        **Returns:** latents, `(b, t, h, w, c)`, in the VAE's own units.
        """
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    @eqx.filter_jit
    def kl(self, other: "DiagonalGaussian | None" = None) -> Float[Array, " b"]:
        """Computes the KL divergence to another distribution.

        **Arguments:**

        - `other`: of the same shape; None is the unit Gaussian.

        **Returns:** nats, `(b,)`, summed over all axes but the batch, in at least float32.
        """
        mean, logvar = _upcast(self.mean, self.logvar)
        if other is None:
            terms = jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar
        else:
            to_mean, to_logvar = _upcast(other.mean, other.logvar)
            away = jnp.square(mean - to_mean) * jnp.exp(-to_logvar)
            terms = away + jnp.exp(logvar - to_logvar) - 1.0 - logvar + to_logvar
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3, 4))

    @eqx.filter_jit
    def nll(self, x: Float[Array, "b t h w c"]) -> Float[Array, " b"]:
        """Computes the negative log likelihood of latents.

        **Arguments:**

        - `x`: latents, `(b, t, h, w, c)`, in the VAE's own units.

        **Returns:** nats, `(b,)`, summed over all axes but the batch, in at least float32.
        """
        mean, logvar, x = _upcast(self.mean, self.logvar, x)
        terms = math.log(2 * math.pi) + logvar + jnp.square(x - mean) * jnp.exp(-logvar)
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3, 4))


@eqx.filter_jit
def _std(logvar: Array) -> Array:
    return jnp.exp(0.5 * logvar)


def _upcast(*arrays: Array) -> tuple[Array, ...]:
    return tuple(map(at_least_float32, arrays))


__all__ = ["DiagonalGaussian"]
