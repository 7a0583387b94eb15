"""The study `shift`: a linear network has a known shift."""

import jax
import jax.numpy as jnp
import pytest

from bn_jax.studies import shift
from bn_jax.studies.frame import Result
from tests.support.small_studies import cells, run_study


def test_of_a_linear_network():
    """L = (c b a x - y)^2 / 2 with three scalar layers: dL/dc = (c b a x - y) b a x, and so on."""
    x, y = 2.0, 5.0
    before = {"a/kernel": 1.5, "b/kernel": -0.5, "c/kernel": 2.0}
    after = {"a/kernel": 1.0, "b/kernel": 1.0, "c/kernel": 7.0}
    layers = {name[0]: [name] for name in before}

    def gradient(flat):
        def loss(flat):
            return (flat["c/kernel"] * flat["b/kernel"] * flat["a/kernel"] * x - y) ** 2 / 2

        return jax.grad(loss)({name: jnp.float32(value) for name, value in flat.items()})

    found = shift.shifts(gradient, before, after, layers)
    assert list(found) == ["a", "b", "c"]
    assert found["a"].distance == 0 and found["a"].cosine == 1

    def of_b(a, b, c):
        return (c * b * a * x - y) * c * a * x

    def of_c(a, b, c):
        return (c * b * a * x - y) * b * a * x

    # b's gradient with the new a; c's with the new a and b.
    distance = abs(of_b(1.0, -0.5, 2.0) - of_b(1.5, -0.5, 2.0))
    assert found["b"].distance == pytest.approx(distance) and found["b"].norm == 48
    assert found["b"].cosine == pytest.approx(1)
    distance = abs(of_c(1.0, 1.0, 2.0) - of_c(1.5, -0.5, 2.0))
    assert found["c"].distance == pytest.approx(distance)
    assert found["c"].cosine == pytest.approx(-1)  # the gradient turns round


def test_layers_are_in_the_order_of_the_paths():
    paths = [
        *("stem/conv/kernel", "stem/bn/scale", "stem/bn/bias"),
        *("3a/1x1/conv/kernel", "3a/1x1/bn/scale", "classifier/kernel", "classifier/bias"),
    ]
    assert shift.layers_in_order(paths) == {
        "stem": paths[:3], "3a/1x1": paths[3:5], "classifier": paths[5:]
    }  # fmt: skip


def measured(distance: float) -> dict:
    """What is measured on a run with two layers."""
    layers = {
        "a": {"distance": 0.0, "cosine": 1.0, "norm": 2.0},
        "b": {"distance": distance, "cosine": 0.5, "norm": 2.0},
    }
    activations = {"a/pre_bn": {"moved": [9.0]}, "a/input": {"moved": [distance + 1]}}
    return {"steps": [{"step": 0, "layers": layers}], "activations": activations}


def test_the_table_has_medians_without_the_first_layer_and_divides_by_those_of_bn():
    results = {"bn": {0: Result(None, measured(3.0))}, "plain": {0: Result(None, measured(6.0))}}
    assert shift.table(results).rows == [
        ["L2 of G' - G", "3", "6", "2x (one seed)"],
        ["L2 of G' - G, by that of G", "1.5", "3", "2x (one seed)"],
        ["cosine of G and G'", "0.5", "0.5", "-"],
        ["distance that the median moved", "4", "7", "1.75x (one seed)"],
    ]


def test_a_small_study(tmp_path, monkeypatch):
    rows = cells(run_study("shift", tmp_path, monkeypatch))
    assert list(rows)[-4:] == [
        "L2 of G' - G", "L2 of G' - G, by that of G", "cosine of G and G'",
        "distance that the median moved",
    ]  # fmt: skip
    for name, row in rows.items():
        if name in list(rows)[-4:]:
            assert float(row[0]) > 0 and float(row[1]) > 0
