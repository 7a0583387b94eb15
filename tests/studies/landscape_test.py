"""The study `landscape`: a quadratic loss has a known smoothness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.studies import landscape
from bn_jax.studies.frame import Result
from tests.support.small_studies import cells, run_study


def test_of_a_quadratic_loss():
    """f(x) = x'Ax / 2: its gradient g is Ax, f(x - r g) = f - r g'g + r^2 g'Ag / 2, and the
    gradient changes by r Ag, whatever r: effective smoothness |Ag| / |g|."""
    random = np.random.default_rng(0)
    root = random.normal(size=(5, 5))
    a = root @ root.T
    x = random.normal(size=5)
    g = a @ x
    rates = [0.01, 0.1, 0.3]

    def loss(params):
        flat = jnp.concatenate([params["w"], params["b"]])
        return flat @ jnp.asarray(a, jnp.float32) @ flat / 2

    params = {"w": jnp.asarray(x[:3], jnp.float32), "b": jnp.asarray(x[3:], jnp.float32)}
    found = landscape.along_gradient(jax.value_and_grad(loss), params, rates)

    close = {"rel": 1e-4}  # float32: 25 products
    assert found["loss"] == pytest.approx(x @ g / 2, **close)
    assert found["norm"] == pytest.approx(np.linalg.norm(g), **close)
    expected = [x @ g / 2 - r * g @ g + r**2 * g @ a @ g / 2 for r in rates]
    assert found["losses"] == pytest.approx(expected, **close)
    assert found["changes"] == pytest.approx([r * np.linalg.norm(a @ g) for r in rates], **close)
    smoothness = np.linalg.norm(a @ g) / np.linalg.norm(g)
    assert found["smoothness"] == pytest.approx(smoothness, **close)
    assert smoothness <= np.linalg.eigvalsh(a)[-1]


def test_smoothness_is_the_largest_along_the_gradient():
    """x^4 at 1: its gradient 4 becomes 4 * 0.6^3 at a rate of 0.1, and 4 * 0.2^3 at 0.2."""
    loss = jax.value_and_grad(lambda x: x**4)
    found = landscape.along_gradient(loss, jnp.ones(()), [0.1, 0.2])
    assert found["changes"] == pytest.approx([4 - 0.864, 4 - 0.032])
    assert found["smoothness"] == pytest.approx((4 - 0.864) / 0.4)


def test_a_run_s_numbers_are_medians_without_the_initial_network():
    steps = [
        {"smoothness": 9.0, "changes": [80.0, 90.0], "losses": [0.0, 99.0]},
        {"smoothness": 2.0, "changes": [3.0, 1.0], "losses": [2.0, 0.5, 1.0]},
        {"smoothness": 4.0, "changes": [5.0, 7.0], "losses": [11.0, 14.0]},
    ]
    results = {"bn": {3: Result(None, {"steps": steps}), 4: Result(None, {})}}
    found = {kind: landscape.typical(results, "bn", kind) for kind in landscape.KINDS}
    assert found == {"range": {3: 2.25}, "change": {3: 5.0}, "smoothness": {3: 3.0}}


def test_where_the_gradient_is_zero():
    found = landscape.along_gradient(jax.value_and_grad(lambda x: x**2), jnp.zeros(()), [0.5, 1])
    assert found["smoothness"] == 0 and found["changes"] == [0, 0]


def test_a_small_study(tmp_path, monkeypatch):
    rows = cells(run_study("landscape", tmp_path, monkeypatch))
    for words in landscape.KINDS.values():
        bn, plain, times = rows[words]
        assert float(bn) > 0 and float(plain) > 0
        quotient = float(times.removesuffix("x (one seed)"))
        assert quotient == pytest.approx(float(plain) / float(bn), rel=0.02)  # three digits each
