"""Masked examples, and what is refused from shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import batch_norm
from tests.support.algorithm_1 import TOLERANCE, draw, normalize, ours, paper


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("garbage", [0.0, 1e30, np.nan])
def test_masked_values_take_no_part(group_size, garbage):
    """What a padded example holds is irrelevant, NaN included (Flax's gradient is NaN then)."""
    x, dy = np.float32(draw(8, 3, 4)), np.float32(draw(8, 3, 4, seed=1))
    gamma, beta = np.float32(draw(4)), np.float32(draw(4, seed=2))
    mask = np.array([0, 1, 1, 1, 1, 0, 1, 0], bool)
    x[~mask] = garbage
    got, stats = ours(x, gamma, beta, dy, mask=mask, group_size=group_size)
    total = dgamma = dbeta = squares = weight = 0
    for rows in np.split(np.arange(8), 8 // (group_size or 8)):
        rows = rows[mask[rows]]
        flat = np.float64(x[rows]).reshape(-1, 4)
        y, dx, g, b = paper(flat, gamma, beta, np.float64(dy[rows]).reshape(-1, 4), 1e-3)
        for mine, wanted in ((got[0], y), (got[1], dx)):
            np.testing.assert_allclose(
                mine[rows], wanted.reshape(-1, 3, 4), rtol=2e-5, atol=4 * TOLERANCE
            )
        dgamma, dbeta = dgamma + g, dbeta + b
        total, weight = total + flat.sum(0), weight + len(flat)
        squares = squares + ((flat - flat.mean(0)) ** 2).sum(0)
    freedom = weight - 8 // (group_size or 8)
    np.testing.assert_allclose(got[2], dgamma, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[3], dbeta, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.mean, total / weight, rtol=1e-5)
    np.testing.assert_allclose(stats.var, squares / freedom, rtol=1e-5)
    assert not np.any(got[0][~mask])
    assert not np.any(got[1][~mask])


def test_groups_of_fewer_than_two_values_leave_the_estimate():
    """Valid examples 2, 1, 0: normalized with what they have; only the first is learnt from."""
    x = np.float32(draw(6, 3))
    mask = np.array([1, 1, 1, 0, 0, 0], bool)
    y, stats = normalize(
        x, None, None, batch_norm.init_stats((3,)), train=True, group_size=2, mask=mask
    )
    np.testing.assert_allclose(stats.mean, x[:2].mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.var, x[:2].var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(y[2:], 0)
    old = batch_norm.Stats(jnp.ones(3), jnp.ones(3) * 2, jnp.float32(5))
    _, new = normalize(x, None, None, old, train=True, mask=np.arange(6) == 3)
    assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("garbage", [1e30, np.nan])
def test_a_mask_zeroes_in_inference_too(garbage):
    x = np.float32(draw(6, 3))
    x[4:] = garbage
    mask = np.arange(6) < 4
    stats = batch_norm.Stats(jnp.ones(3), jnp.ones(3), jnp.float32(1))

    def run(x, mask):
        return normalize(x, None, jnp.ones(3), stats, train=False, mask=mask)[0]

    y, vjp = jax.vjp(lambda x: run(x, mask), x)
    np.testing.assert_allclose(y[:4], run(x, None)[:4])
    assert not np.any(y[4:])
    assert not np.any(vjp(jnp.ones_like(x))[0][4:])


@pytest.mark.parametrize("ratio", [1.0, 1e4])
def test_a_mask_that_varies_over_features(ratio):
    """Where no example has a value of every feature; means far off."""
    x = np.float32(np.random.default_rng(0).normal(ratio, 1, (64, 8)))
    mask = np.arange(64)[:, None] % 8 == np.arange(8)
    _, stats = normalize(x, None, None, batch_norm.init_stats((8,)), train=True, mask=mask)
    want = [np.float64(x[mask[:, c], c]).var(ddof=1) for c in range(8)]
    np.testing.assert_allclose(stats.var, want, rtol=1e-5)


def test_mask_may_broadcast_to_x_like_flax():
    x = np.float32(draw(2, 5, 3))
    mask = np.arange(5)[None, :, None] < np.array([3, 5])[:, None, None]  # sequence lengths
    y, stats = normalize(x, None, None, batch_norm.init_stats((3,)), train=True, mask=mask)
    values = x[np.broadcast_to(mask, x.shape)].reshape(-1, 3)
    np.testing.assert_allclose(stats.mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.var, values.var(0, ddof=1), rtol=1e-5)
    assert not np.any(y[0, 3:])


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((1, 3), {}, ValueError, "each statistic has 1 value.*at least 2"),  # Flax gives zeros
        ((4, 3), {"group_size": 1}, ValueError, "each statistic has 1 value.*at least 2"),
        ((10, 3), {"group_size": 4}, ValueError, "group_size is 4.*batch of 10"),
        ((10, 3), {"group_size": 0}, ValueError, "group_size is 0.*batch of 10"),
        ((4, 3), {"group_size": 8}, ValueError, "group_size is 8.*batch of 4"),
        ((0, 3), {}, ValueError, r"\(0, 3\) is empty"),
        ((0, 3), {"group_size": 32}, ValueError, r"\(0, 3\) is empty"),
        ((4, 3), {"dtype": jnp.int32}, TypeError, "int32.*floating point"),
        ((4, 3), {"dtype": jnp.complex64}, TypeError, "complex64.*floating point"),
        ((4, 2), {}, ValueError, r"scale has shape \(3,\).*\(2,\)"),
        ((4, 3), {"mask": jnp.ones(5, bool)}, ValueError, r"mask has shape \(5,\).*\(4,\)"),
        ((4, 3), {"axis": 2}, ValueError, "axes are 2.*up to 1"),
        ((4, 3), {"axis": (0, 1)}, ValueError, "leave one for the examples"),
        ((4, 3), {"epsilon": -1.0}, ValueError, "epsilon=-1.0 must be >= 0"),
        ((4, 3), {"momentum": 1.5}, ValueError, "momentum=1.5 within 0..1"),
    ],
)
def test_errors_name_value_and_limit(shape, options, error, message):
    options = dict(options)
    x = jnp.ones(shape, options.pop("dtype", jnp.float32))
    stats = batch_norm.init_stats((3,))
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda x: normalize(x, jnp.ones(3), None, stats, train=True, **options), x)
