"""Evaluation counts every example once and uses Algorithm 2's statistics."""

import jax
import numpy as np
import pytest

from bn_jax.errors import DataError
from bn_jax.experiment import build
from bn_jax.experiment.evaluator import Evaluator
from tests.train_test import small


@pytest.fixture(scope="module")
def trained():
    """An experiment with its initial state and evaluator."""
    exp = build.build(small())
    return exp, build.initial_state(exp), Evaluator(exp)


def test_the_scores_do_not_depend_on_the_batch_size(trained):
    _, state, evaluator = trained
    population = evaluator.population(state.params, state.batch_stats)
    scores = evaluator.scores(state.params, population)
    assert scores["examples"] == 1000
    other = build.build(small(eval_batch_size=333))  # rounded up to the 8 devices: 336
    again = Evaluator(other).scores(state.params, population)
    assert (again["top1"], again["top5"]) == (scores["top1"], scores["top5"])
    np.testing.assert_allclose(again["cross_entropy"], scores["cross_entropy"], rtol=1e-6)


def test_a_lost_example_is_an_error(trained, monkeypatch):
    exp, state, evaluator = trained
    monkeypatch.setattr(exp.data, "num_eval", 1001)
    with pytest.raises(DataError, match="1001"):
        evaluator.scores(state.params, state.batch_stats)


def test_population_statistics_are_algorithm_2(trained):
    exp, state, evaluator = trained
    population = evaluator.population(state.params, state.batch_stats)
    means, variances = [], []
    for batch in exp.data.statistics(2, 32, slice(0, 32), seed=0):  # training batches are of 64
        x = (batch["image"] > 127.5).reshape(1, 32, -1).astype(np.float64)
        u = x @ np.asarray(state.params["dense_0"]["dense"]["kernel"], np.float64)
        means.append(u.mean(axis=1))
        variances.append(u.var(axis=1, ddof=1))  # m/(m-1) times the biased variance
    first = population["dense_0"]["bn"]
    # float32 sums of 784 terms against float64
    np.testing.assert_allclose(first["mean"], np.mean(np.concatenate(means), 0), atol=2e-5)
    np.testing.assert_allclose(first["var"], np.mean(np.concatenate(variances), 0), rtol=1e-4)
    assert float(first["count"]) == 2


def test_population_statistics_do_not_depend_on_what_came_before(trained):
    _, state, evaluator = trained
    spoilt = jax.tree.map(lambda a: a + 100.0, state.batch_stats)
    a, b = (evaluator.population(state.params, s) for s in (state.batch_stats, spoilt))
    jax.tree.map(np.testing.assert_array_equal, a, b)
