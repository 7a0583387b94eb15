"""The study `population`: accuracy with either kind of statistics."""

import json

import jax
import numpy as np
import pytest

from bn_jax.experiment import build
from bn_jax.experiment.evaluator import Evaluator
from bn_jax.studies import frame, population
from tests.support.small_studies import cells, run_study


def test_numbers_are_those_of_the_evaluator(tmp_path, monkeypatch):
    text = run_study("population", tmp_path, monkeypatch)
    assert list(cells(text))[1:3] == ["step 10", "step 20"]
    workdir = tmp_path / "bn" / "seed_0"
    measured = json.loads((workdir / frame.MEASURED).read_text())
    recorded = [line["top1"] for line in frame.reader.read_run(workdir).lines["eval"]]
    assert [one["population"] for one in measured["steps"]] == recorded

    exp = build.from_workdir(workdir)
    _, state = build.restore(exp, workdir)
    evaluator = Evaluator(exp)
    moving = evaluator.scores(state.params, state.batch_stats)["top1"]
    assert measured["steps"][-1]["moving"] == moving
    assert [one["examples"] for one in measured["sizes"]] == [96, 288, 992, 3008, 9984]

    # As many mini-batches as `statistics_batches` give what the evaluator's own pass gives.
    own = evaluator.population(state.params, state.batch_stats)
    found = population.from_examples(exp, state, exp.config.statistics_batches)
    # The evaluator takes one or more mini-batches at once: float32 sums in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), own, found)


@pytest.mark.parametrize(("examples", "size", "count"), [(100, 32, 3), (100, 60, 2), (5, 32, 1)])
def test_mini_batches_come_closest(examples, size, count):
    assert population.mini_batches(examples, size) == count
