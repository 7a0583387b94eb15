"""BN with noise in its statistics, and frozen BN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import models
from bn_jax.layers import BatchNorm
from bn_jax.models.perturbed import PerturbedBatchNorm
from configs import mnist_bn

X = 3 * jax.random.normal(jax.random.key(0), (64, 5)) + 2
PARAMS = {"scale": jnp.arange(1.0, 6), "bias": jnp.arange(5.0)}
STATS = {"mean": jnp.zeros(5), "var": jnp.ones(5), "count": jnp.zeros(())}
VARIABLES = {"params": PARAMS, "batch_stats": STATS}


def train(layer, variables=VARIABLES, **options):
    rngs = options.pop("rngs", None)
    x = options.pop("x", X)
    y, updates = layer.apply(variables, x, False, mutable=["batch_stats"], rngs=rngs, **options)
    return y, updates["batch_stats"]


def equal(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_without_noise_it_is_batch_norm():
    y, stats = train(BatchNorm())
    equal(train(PerturbedBatchNorm()), (y, stats))
    # Where no stream of noise is given there is none: so it is for population statistics.
    equal(train(PerturbedBatchNorm(noise=0.5)), (y, stats))
    key = {"noise": jax.random.key(1)}
    equal(PerturbedBatchNorm(noise=0.5).apply(VARIABLES, X, True, rngs=key),
          BatchNorm().apply(VARIABLES, X, True))  # fmt: skip
    fresh = PerturbedBatchNorm(noise=0.5).init(key | {"params": key["noise"]}, X, False)
    assert jax.tree.structure(fresh) == jax.tree.structure(VARIABLES)


@pytest.mark.parametrize("relu", [False, True])
def test_noise_is_one_number_a_feature_and_leaves_the_running_estimate(relu):
    """What comes out is scale * (x_hat - noise * a) * exp(noise * b) + bias."""
    y, stats = train(PerturbedBatchNorm(noise=0.5), rngs={"noise": jax.random.key(1)}, relu=relu)
    equal(stats, train(BatchNorm())[1])

    values = np.asarray(X, np.float64)
    x_hat = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5)
    y, _ = train(PerturbedBatchNorm(noise=0.5), rngs={"noise": jax.random.key(1)})
    # A straight line of x_hat for every feature; slope and offset tell both numbers.
    for k in range(5):
        slope, offset = np.polyfit(x_hat[:, k], np.asarray(y[:, k], np.float64), 1)
        b = np.log(slope / (k + 1)) / 0.5
        a = -(offset - k) / slope / 0.5
        assert 1e-3 < abs(a) < 5 and 1e-3 < abs(b) < 5
        line = slope * x_hat[:, k] + offset
        np.testing.assert_allclose(y[:, k], line, atol=1e-4)  # float32 values near 10

    rectified, _ = train(
        PerturbedBatchNorm(noise=0.5), rngs={"noise": jax.random.key(1)}, relu=True
    )
    equal(rectified, np.maximum(y, 0))
    other, _ = train(PerturbedBatchNorm(noise=0.5), rngs={"noise": jax.random.key(2)})
    assert np.abs(other - y).max() > 0.1


def test_masked_rows_stay_zero():
    mask = jnp.arange(64) < 40
    key = {"noise": jax.random.key(1)}
    y, _ = train(PerturbedBatchNorm(noise=0.5), rngs=key, mask=mask)
    alone, _ = train(PerturbedBatchNorm(noise=0.5), rngs=key, x=X[:40])
    np.testing.assert_allclose(y[:40], alone, rtol=1e-5, atol=1e-5)
    equal(y[40:], np.zeros((24, 5), np.float32))


def test_frozen_after_so_many_updates():
    layer = PerturbedBatchNorm(freeze_after=2)
    variables = VARIABLES
    for number in range(4):
        x = X + number
        y, stats = train(layer, variables, x=x)
        usual, updated = train(BatchNorm(), variables, x=x)
        if number < 2:
            equal((y, stats), (usual, updated))
        else:
            equal(y, BatchNorm().apply(variables, x, True))
            equal(stats, variables["batch_stats"])
        variables = {"params": PARAMS, "batch_stats": stats}
    assert stats["count"] == 2


def test_gradients_of_a_frozen_layer_are_those_of_inference():
    frozen = {"params": PARAMS, "batch_stats": STATS | {"count": jnp.float32(7)}}

    def loss(layer, frozen_by_call):
        def of(x):
            y = layer.apply(frozen, x, frozen_by_call, mutable=["batch_stats"])[0]
            return jnp.sum(jnp.sin(y))

        return jax.grad(of)(X)

    equal(loss(PerturbedBatchNorm(freeze_after=2), False), loss(BatchNorm(), True))


def test_the_config_chooses_it():
    config = mnist_bn.get_config("digits").unlock()
    assert models.build(config, 10).norm.func is BatchNorm
    config.bn.freeze_after = 100
    built = models.build(config, 10).norm
    assert built.func is PerturbedBatchNorm and built.keywords["freeze_after"] == 100
