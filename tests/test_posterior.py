"""The diagonal Gaussian against torch's distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import normal, to_torch

import eqx_cogvae as cv

SHAPE = (2, 3, 4, 5, 6)


def gaussian(seed):
    return cv.DiagonalGaussian(normal(SHAPE, seed), 0.5 * normal(SHAPE, seed + 1))


def theirs(ours):
    mean, std = to_torch(ours.mean), to_torch(ours.std)
    return torch.distributions.Normal(mean, std)


def summed(x):
    return x.sum(dim=(1, 2, 3, 4)).numpy()


def test_divergence_from_the_unit_gaussian():
    unit = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(1.0))
    due = torch.distributions.kl_divergence(theirs(gaussian(0)), unit)
    np.testing.assert_allclose(gaussian(0).kl(), summed(due), rtol=1e-5)


def test_divergence_from_another():
    due = torch.distributions.kl_divergence(theirs(gaussian(0)), theirs(gaussian(5)))
    np.testing.assert_allclose(gaussian(0).kl(gaussian(5)), summed(due), rtol=1e-5)


def test_likelihood():
    x = normal(SHAPE, 9)
    due = -theirs(gaussian(0)).log_prob(to_torch(x))
    np.testing.assert_allclose(gaussian(0).nll(x), summed(due), rtol=1e-5)


def test_samples_have_the_moments():
    posterior = cv.DiagonalGaussian(
        jnp.full((1, 4, 64, 64, 4), 2.0), jnp.full((1, 4, 64, 64, 4), -2.0)
    )
    draws = posterior.sample(jax.random.key(0))
    # 65536 draws: five standard errors.
    assert abs(float(draws.mean()) - 2) < 5 * np.exp(-1) / 256
    assert abs(float(draws.std()) - np.exp(-1)) < 5 * np.exp(-1) / 256 / np.sqrt(2)
    np.testing.assert_array_equal(draws, posterior.sample(jax.random.key(0)))
    np.testing.assert_array_equal(posterior.mode(), posterior.mean)


def test_log_variances_are_clamped():
    moments = jnp.concatenate(
        [jnp.zeros((1, 1, 1, 2, 1)), jnp.array([-99.0, 99.0]).reshape(1, 1, 1, 2, 1)], -1
    )
    posterior = cv.DiagonalGaussian.from_moments(moments)
    np.testing.assert_array_equal(posterior.logvar.ravel(), [-30, 20])
    assert np.isfinite(posterior.std).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    posterior = cv.DiagonalGaussian(normal(SHAPE, 0, dtype), normal(SHAPE, 1, dtype))
    assert posterior.sample(jax.random.key(0)).dtype == dtype
    wide = cv.DiagonalGaussian(
        posterior.mean.astype(jnp.float32), posterior.logvar.astype(jnp.float32)
    )
    np.testing.assert_array_equal(posterior.kl(), wide.kl())
