"""The network of 4.1: what it computes, what it records, what its initial weights are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import models
from bn_jax.layers import BatchNorm
from bn_jax.models.initializers import Gaussian
from bn_jax.models.mlp import Mlp
from configs import mnist, mnist_bn

KEY = jax.random.key(0)


def digits(n=12):
    return np.random.default_rng(0).integers(0, 256, (n, 28, 28, 1), dtype=np.uint8)


def test_equals_numpy():
    model = Mlp(widths=(5, 4), num_classes=3)
    images = digits()
    variables = model.init(KEY, images, train=True)
    x = (images.reshape(12, -1) > 127.5).astype(np.float64)
    for i in range(2):
        dense = variables["params"][f"dense_{i}"]["dense"]
        x = 1 / (1 + np.exp(-(x @ np.float64(dense["kernel"]) + np.float64(dense["bias"]))))
    last = variables["params"]["classifier"]
    want = x @ np.float64(last["kernel"]) + np.float64(last["bias"])
    got = model.apply(variables, images, train=False)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)  # float32 sums of 784 terms of size 0.1


def test_input_is_binary():
    """Above half of full intensity a pixel is 1: 127 and 0 are the same, and 128 and 255."""
    model = Mlp(widths=(4,), num_classes=3)
    images = digits()
    variables = model.init(KEY, images, train=True)
    rounded = np.where(images > 127, np.uint8(255), np.uint8(0))
    results = [model.apply(variables, x, train=False) for x in (images, rounded, rounded // 255)]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])  # intensities are of 255, not of 1


def test_bn_sits_before_every_sigmoid_and_replaces_the_bias():
    model = models.build(mnist_bn.get_config(), 10)
    images = digits(60)
    variables = model.init(KEY, images, train=True)
    params = variables["params"]
    for i in range(3):
        assert params[f"dense_{i}"]["dense"].keys() == {"kernel"}
        assert params[f"dense_{i}"]["bn"].keys() == {"scale", "bias"}
    assert params["classifier"].keys() == {"kernel", "bias"}
    logits, updates = model.apply(
        variables, images, train=True, mutable=["batch_stats", "activations"]
    )
    recorded = updates["activations"]["dense_2"]
    (inputs,), (before,) = recorded["input"], recorded["pre_bn"]
    # 60 examples are one group: Algorithm 1 in float64
    want = np.float64(before)
    want = (want - want.mean(0)) / np.sqrt(want.var(0) + 1e-3)
    np.testing.assert_allclose(inputs, want, atol=1e-5)  # float32 sums of 60 values of size 1
    assert before.shape == (60, 100)
    assert logits.shape == (60, 10)


def test_recorded_activations_without_bn():
    model = models.build(mnist.get_config(), 10)
    variables = model.init(KEY, digits(), train=True)
    assert "batch_stats" not in variables
    _, updates = model.apply(variables, digits(), train=True, mutable=["activations"])
    assert {k: set(v) for k, v in updates["activations"].items()} == {
        f"dense_{i}": {"input"} for i in range(3)
    }


def test_masked_rows_change_nothing():
    model = Mlp(widths=(6,), num_classes=3, norm=BatchNorm)
    images, mask = digits(), np.arange(12) < 9
    variables = model.init(KEY, images, train=True)
    other = np.where(mask[:, None, None, None], images, 255 - images)
    results = [
        model.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
        for x in (images, other)
    ]
    np.testing.assert_array_equal(results[0][0][:9], results[1][0][:9])
    jax.tree.map(np.testing.assert_array_equal, results[0][1], results[1][1])


def test_initial_weights():
    """Gaussian with the config's deviation; the pair of Fig. 1 starts from the same weights."""
    plain = models.build(mnist.get_config(), 10).init(KEY, digits(), train=True)["params"]
    normed = models.build(mnist_bn.get_config(), 10).init(KEY, digits(), train=True)["params"]
    kernel = np.asarray(plain["dense_0"]["dense"]["kernel"])
    n = kernel.size  # 78,400: five standard errors of a mean and of a deviation
    assert abs(kernel.mean()) < 5 * 0.1 / n**0.5
    assert abs(kernel.std() - 0.1) < 5 * 0.1 / (2 * n) ** 0.5
    assert abs((np.abs(kernel) > 0.2).mean() - 0.0455) < 0.004  # two deviations: not truncated
    for i in range(3):
        name = f"dense_{i}"
        np.testing.assert_array_equal(
            plain[name]["dense"]["kernel"], normed[name]["dense"]["kernel"]
        )
    other = models.build(mnist.get_config(), 10).init(jax.random.key(1), digits(), train=True)
    assert not np.array_equal(kernel, other["params"]["dense_0"]["dense"]["kernel"])


def test_pooled_init_draws_kernels_independently():
    params = Mlp(widths=(10, 784)).init(KEY, digits(), train=True)["params"]
    a = np.asarray(params["dense_0"]["dense"]["kernel"]).ravel()
    b = np.asarray(params["dense_1"]["dense"]["kernel"]).ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / a.size**0.5


def test_gaussian_alone_and_a_foreign_initializer():
    kernel = Gaussian(gain=2.0)(KEY, (3, 3, 40, 60))
    want = 2 * (2 / (9 * 100)) ** 0.5  # Glorot's, doubled
    assert abs(float(jnp.std(kernel)) - want) < 5 * want / (2 * kernel.size) ** 0.5
    kernel = Gaussian(rule="he")(KEY, (3, 3, 40, 60))
    want = (2 / (9 * 40)) ** 0.5
    assert abs(float(jnp.std(kernel)) - want) < 5 * want / (2 * kernel.size) ** 0.5
    with pytest.raises(TypeError, match="not Gaussian"):
        Mlp(kernel_init=jax.nn.initializers.ones).init(KEY, digits(), train=True)
