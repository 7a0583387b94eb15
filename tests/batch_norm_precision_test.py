"""Means far off, outliers, constant channels, bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_jax import batch_norm
from tests.support.algorithm_1 import draw, normalize, ours


def adversaries(values):
    """Data of [examples, ...] that mislead one way or another of taking a variance in float32."""
    n = len(values)
    for place, name in ((0, "first"), (n // 2, "middle"), (n - 1, "last")):
        for size in (1e2, 1e4, 1e6, -1e18):
            x = values.copy()
            x[place] = size
            yield f"example of {size:.0e} {name}", x
            x = values.copy()
            x[(place,) + (0,) * (values.ndim - 1)] = size
            yield f"value of {size:.0e} {name}", x
    for ratio in (1e2, 1e3, 1e4):
        yield f"mean/std {ratio:.0e}", values + ratio
        yield f"mean/std -{ratio:.0e}, scaled", 1e-6 * (values - ratio)
    signs = np.where(np.arange(n) % 2, 1e4, -1e4).reshape(-1, *[1] * (values.ndim - 1))
    yield "alternating 1e4", values + signs
    yield "two halves", values + np.where(np.arange(n) < n // 2, 0, 1e4).reshape(signs.shape)
    yield "ascending", values + 100.0 * np.arange(n).reshape(signs.shape)
    yield "tiny", values * 1e-15


# A dense batch, a convolution's, one of the paper's groups, a long one, odd sizes.
SHAPES = [
    ((16384, 2), None),
    ((64, 6, 6, 3), None),
    ((64, 12, 4, 3), 32),
    ((60, 5), 60),
    ((77, 3), 7),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "group_size"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_variance_of_adversarial_data(shape, group_size, dtype, masked):
    """Relative error <= 1e-5, against float64 of the rounded values; measured up to 4e-6."""
    values = np.random.default_rng(0).normal(0, 1, shape)
    mask = np.arange(shape[0]) % 5 != 1 if masked else np.ones(shape[0], bool)
    size = group_size or shape[0]

    @jax.jit
    def run(x):
        fresh = batch_norm.init_stats(shape[-1:])
        return normalize(
            x, None, None, fresh, train=True, group_size=group_size, mask=mask if masked else None
        )[1]

    for name, x in adversaries(values):
        x = jnp.asarray(np.float32(x), dtype)
        exact = np.float64(x)
        if not np.all(np.isfinite(exact)):
            continue  # beyond float16
        total = means = freedom = weight = 0
        for rows in np.split(np.arange(shape[0]), shape[0] // size):
            rows = exact[rows[mask[rows]]].reshape(-1, shape[-1])
            total, freedom = total + ((rows - rows.mean(0)) ** 2).sum(0), freedom + len(rows) - 1
            means, weight = means + rows.sum(0), weight + len(rows)
        stats = run(x)
        np.testing.assert_allclose(stats.var, total / freedom, rtol=1e-5, err_msg=name)
        scale = np.sqrt(total / freedom) + np.abs(means / weight)
        assert np.all(np.abs(stats.mean - means / weight) <= 1e-6 * scale), name


@given(
    data=st.lists(
        st.floats(-(2.0**50), 2.0**50, width=32, allow_subnormal=False), min_size=2, max_size=48
    ),
    repeat=st.sampled_from([1, 7, 64]),
    mask=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_variance_of_any_data(data, repeat, mask):
    """As above, for what hypothesis finds; a variance below the mean's rounding is left to that."""
    x = np.tile(np.float32(data), repeat)[:, None]
    valid = np.arange(len(x)) % 3 > 0 if mask and len(x) > 5 else np.ones(len(x), bool)
    _, stats = normalize(
        x, None, None, batch_norm.init_stats((1,)), train=True, mask=valid if mask else None
    )
    exact = np.float64(x[valid])
    # The mean is known to 6e-8 of the largest value, and its error squared enters the variance.
    rounding = 4 * (6e-8 * np.abs(exact).max()) ** 2 + 1e-30
    want = exact.var(ddof=1)
    assert abs(float(stats.var[0]) - want) <= 1e-5 * want + rounding


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
