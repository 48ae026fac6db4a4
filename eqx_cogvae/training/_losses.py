"""Losses of a reconstruction: pure functions of clips in [-1, 1], means over their elements."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._posterior import DiagonalGaussian
from .._types import at_least_float32

Clip = Float[Array, "b t h w c"]
Scalar = Float[Array, ""]


def l1(decoded: Clip, video: Clip) -> Scalar:
    """Computes the mean absolute error.

    **Arguments:**

    - `decoded`, `video`: clips of one shape in [-1, 1].

    **Returns:** a scalar in units of the video's range, at least float32.

    **Raises:** `ValueError` for clips of different shapes.
    """
    return jnp.mean(jnp.abs(_difference(decoded, video)))


def l2(decoded: Clip, video: Clip) -> Scalar:
    """Computes the mean squared error; PSNR is `10 log10(4 / l2)`.

    **Arguments:**

    - `decoded`, `video`: clips of one shape in [-1, 1].

    **Returns:** a scalar in squared units of the video's range, at least float32.

    **Raises:** `ValueError` for clips of different shapes.
    """
    return jnp.mean(jnp.square(_difference(decoded, video)))


def kl(posterior: DiagonalGaussian, video: Clip) -> Scalar:
    """Computes the KL divergence to the unit Gaussian.

    A weight of 1e-6 beside a mean absolute error is that of latent diffusion's autoencoders
    (Rombach et al. 2022, https://arxiv.org/abs/2112.10752), which sum both over a clip.

    **Arguments:**

    - `posterior`: of the latents, from `VAE.encode`.
    - `video`: the clips that were encoded.

    **Returns:** a scalar in nats per element of the video.
    """
    return jnp.sum(posterior.kl()) / video.size


def gradient(decoded: Clip, video: Clip, *, scales: int = 3) -> Scalar:
    """Computes the mean absolute error of differences between neighbours in space.

    It rewards edges in their places, without a pretrained network. The differences are those of
    Mathieu et al. 2016 (https://arxiv.org/abs/1511.05440).

    **Arguments:**

    - `decoded`, `video`: clips of one shape in [-1, 1].
    - `scales`: number of sizes at most, each half of the one before, as far as sides halve.

    **Returns:** a scalar in units of the video's range, averaged over the sizes.

    **Raises:** `ValueError` for clips of different shapes.
    """
    error, total, count = _difference(decoded, video), jnp.zeros(()), 0
    for _ in range(scales):
        total += jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
        total += jnp.mean(jnp.abs(jnp.diff(error, axis=3)))
        count += 1
        if min(error.shape[2:4]) < 4:
            break
        error = _halved(error)
    return total / count


def temporal(decoded: Clip, video: Clip) -> Scalar:
    """Computes the mean absolute error of differences between frames, which is flicker.

    **Arguments:**

    - `decoded`, `video`: clips of one shape in [-1, 1].

    **Returns:** a scalar in units of the video's range; zero for clips of one frame.

    **Raises:** `ValueError` for clips of different shapes.
    """
    if video.shape[1] == 1:
        return jnp.zeros(())
    return jnp.mean(jnp.abs(jnp.diff(_difference(decoded, video), axis=1)))


def _difference(decoded: Array, video: Array) -> Array:
    if decoded.shape != video.shape:
        raise ValueError(
            f"losses compare clips of one shape, got {decoded.shape} and {video.shape}: "
            "train on 8k + 1 frames, and heights and widths that the model compresses evenly."
        )
    return at_least_float32(decoded) - at_least_float32(video)


def _halved(x: Array) -> Array:
    b, t, h, w, c = x.shape
    x = x[:, :, : h // 2 * 2, : w // 2 * 2]
    return jnp.mean(x.reshape(b, t, h // 2, 2, w // 2, 2, c), axis=(3, 5))


__all__ = ["gradient", "kl", "l1", "l2", "temporal"]
