"""The study `population`: accuracy with either kind of statistics."""

import json

import jax
import numpy as np
import pytest

from bn_jax.experiment import build
from bn_jax.experiment.evaluator import Evaluator
from bn_jax.studies import frame, population
from bn_jax.studies.frame import Result
from tests.support.small_studies import cells, run_study


def test_numbers_are_those_of_the_evaluator(tmp_path, monkeypatch):
    text = run_study("population", tmp_path, monkeypatch)
    assert list(cells(text))[1:3] == ["step 10", "step 20"]
    workdir = tmp_path / "bn" / "seed_0"
    measured = json.loads((workdir / frame.MEASURED).read_text())
    lines = frame.reader.read_run(workdir).lines["eval"]
    assert [one["population"] for one in measured["steps"]] == [line["top1"] for line in lines]
    assert [one["gap"] for one in measured["steps"]] == [line["running_gap"] for line in lines]

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


def test_the_difference_is_what_population_statistics_gain():
    steps = [{"step": 1000, "moving": 0.2, "population": 0.5, "gap": 3.0}]
    sizes = [{"examples": 96, "top1": 0.4}]
    results = {"bn": {0: Result(None, {"steps": steps, "sizes": sizes})}}
    one = " (one seed)"
    assert population.table(results).rows == [
        ["step 1,000", f"20.00%{one}", f"50.00%{one}", f"+30.00{one}", f"3.00{one}"],
        ["the end, from 96 examples", "-", f"40.00%{one}", "-", "-"],
    ]


@pytest.mark.parametrize(("examples", "size", "count"), [(100, 32, 3), (100, 60, 2), (5, 32, 1)])
def test_mini_batches_come_closest(examples, size, count):
    assert population.mini_batches(examples, size) == count
