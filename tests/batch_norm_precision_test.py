"""Means far off, outliers, constant channels, bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import batch_norm
from tests.support.algorithm_1 import draw, normalize, ours


@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_variance_of_a_far_off_mean(ratio):
    """Relative error <= 1e-3 in float32, which Flax's and Haiku's E[x^2] - E[x]^2 is far from."""
    x = np.float32(np.random.default_rng(0).normal(ratio, 1, (32, 8, 8, 16)))
    _, stats = jax.jit(
        lambda x: normalize(x, None, None, batch_norm.init_stats((16,)), train=True)
    )(x)
    want = np.float64(x).var((0, 1, 2), ddof=1)  # of the rounded values: their rounding is not ours
    assert np.max(np.abs(stats.var / want - 1)) < 1e-3


def test_variance_when_the_first_value_is_the_outlier():
    x = np.float32(draw(64, 6, 2))
    x[0] = 1e6
    _, stats = normalize(x, None, None, batch_norm.init_stats((2,)), train=True)
    # The shift lies sqrt(64) deviations off the mean: 64 times the rounding of a sum of 128, 2e-6.
    np.testing.assert_allclose(stats.var, np.float64(x).var((0, 1), ddof=1), rtol=1.3e-4)


@pytest.mark.parametrize("value", [3.1, 1e4 + 0.1, -7e6])
@pytest.mark.parametrize("mask", [None, np.arange(48) > 2])
def test_constant_channel_gives_beta_and_no_noise(value, mask):
    """Exactly, whatever the rounding of sums: PyTorch gives 1 deviation at 1e4."""
    x = np.full((48, 7, 7, 2), value, np.float32)
    beta = np.float32([0.5, -2])
    for compiled in (lambda f: f, jax.jit):
        y, stats = compiled(
            lambda x: normalize(
                x, np.float32([1, 3]), beta, batch_norm.init_stats((2,)), train=True, mask=mask
            )
        )(x)
        assert np.array_equal(np.unique(y[5:]), np.unique(beta))
        assert np.all(stats.mean == np.float32(value))


def test_bfloat16_inputs_have_float32_statistics():
    x = jnp.asarray(draw(64, 4, 4, 8) + 100, jnp.bfloat16)
    (y, dx, dgamma, _), stats = ours(x, np.float32(draw(8)), np.float32(draw(8)), x)
    assert (y.dtype, dx.dtype, dgamma.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    fresh = batch_norm.init_stats((8,))
    _, stats = normalize(x, None, None, fresh, train=True)
    assert stats.mean.dtype == stats.var.dtype == jnp.float32
    np.testing.assert_allclose(stats.var, np.float64(x).var((0, 1, 2), ddof=1), rtol=1e-5)
