"""Section 4.2's numbers from hand-made curves whose answers are known."""

import math

import numpy as np
import pytest

from bn_jax.figures import curves, fig3
from bn_jax.figures.curves import (
    AT_CHANCE,
    DIVERGED,
    NO_REFERENCE,
    NOT_REACHED,
    NOT_YET,
    PARENTS,
    Curve,
)
from tests.configs_test import DELTAS


def hand_made(top1, seed=0, status="done", every=100, examples=1000) -> Curve:
    """A curve evaluated every `every` steps; its run was meant to take 10 evaluations."""
    steps = every * np.arange(1.0, len(top1) + 1)
    last = float(steps[-1]) if top1 else 0.0
    return Curve(seed, steps, np.array(top1), status, last, 10.0 * every, examples)


BASELINE = hand_made([0.1, 0.5, 0.72, 0.76, 0.85, 0.8])  # final 0.8: levels 0.72, 0.76, 0.85


def test_levels_are_of_the_final_accuracy_and_the_maximum():
    assert curves.levels(BASELINE) == pytest.approx({"90%": 0.72, "95%": 0.76, "max": 0.85})
    assert curves.levels(BASELINE._replace(status="preempted")) is None


def test_the_first_evaluation_of_at_least_the_level_counts():
    found = curves.row("inception", [BASELINE], [BASELINE])
    assert {k: v[0] for k, v in found.steps.items()} == {"90%": 300, "95%": 400, "max": 500}
    assert all(v == [1.0] for v in found.speed_up.values())


def test_speed_up_is_paired_by_seed():
    reference = [BASELINE, hand_made([0.1, 0.2, 0.4], seed=1)]
    network = [hand_made([0.2, 0.9], seed=0), hand_made([0.4, 0.5], seed=1)]
    found = curves.row("x", network, reference)
    assert found.steps["max"] == [200, 100] and found.speed_up["max"] == [2.5, 3.0]
    assert fig3.cell(found.speed_up["max"], ".2f", unit="x") == "2.75x (2.50 to 3.00)"


@pytest.mark.parametrize(
    ("status", "word"),
    [("done", NOT_REACHED), ("diverged", DIVERGED), ("preempted", NOT_YET), ("running", NOT_YET)],
)
def test_what_is_not_reached_is_said(status, word):
    network = hand_made([0.1, 0.73], status=status)
    found = curves.row("x", [network], [BASELINE])
    assert found.steps == {"90%": [200.0], "95%": [word], "max": [word]}
    assert found.speed_up == {"90%": [1.5], "95%": [word], "max": [word]}
    assert found.final == [0.73 if status == "done" else DIVERGED if word == DIVERGED else NOT_YET]


@pytest.mark.parametrize(
    "reference", [[], [BASELINE._replace(status="diverged")], [BASELINE._replace(seed=5)]]
)
def test_without_a_finished_reference_nothing_is_claimed(reference):
    found = curves.row("x", [hand_made([0.99])], reference)
    assert all(v == [NO_REFERENCE] for v in (*found.steps.values(), *found.speed_up.values()))


def test_a_reference_at_chance_sets_no_level():
    """Of 1,000 examples in 10 classes guessing gets 10%, +- 0.95: two errors are 11.9%."""
    guessing = hand_made([0.1, 0.13, 0.118])._replace(classes=10)
    learnt = hand_made([0.1, 0.13, 0.12])._replace(classes=10)
    assert guessing.at_chance and curves.levels(guessing) is None
    assert not learnt.at_chance and curves.levels(learnt) is not None
    assert not guessing._replace(status="preempted").at_chance  # it has no final accuracy yet
    found = curves.row("x", [hand_made([0.99])], [guessing])
    assert all(v == [AT_CHANCE] for v in (*found.steps.values(), *found.speed_up.values()))


def test_a_run_without_an_evaluation_has_no_accuracy():
    found = curves.row("x", [hand_made([], status="running")], [BASELINE])
    assert found.final == found.maximum == [NOT_YET] and found.steps["max"] == [NOT_YET]


def test_steps_within_a_standard_error_of_the_level():
    """At p = 1/2 and n = 100 the standard error is 0.05."""
    assert curves.standard_error(0.5, 100) == pytest.approx(0.05)
    reference = hand_made([0.3, 0.5], examples=100)
    network = hand_made([0.44, 0.46, 0.51, 0.56], examples=100)
    assert curves.row("x", [network], [reference]).around["max"] == [(200.0, 400.0)]


def test_paired_difference_in_closed_form():
    # differences 0.01, 0.02, 0.03: mean 0.02, deviation 0.01, t(2) = 4.3027
    ours, parents = {0: 0.51, 1: 0.62, 2: 0.73, 7: 0.9}, {0: 0.5, 1: 0.6, 2: 0.7, 8: 0.1}
    found = curves.paired(ours, parents, examples=1000)
    assert found.n == 3 and found.mean == pytest.approx(0.02)
    assert found.interval == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    counted = sum(p * (1 - p) for p in (0.51, 0.62, 0.73, 0.5, 0.6, 0.7)) / 1000
    assert found.binomial == pytest.approx(math.sqrt(counted) / 3)


def test_one_seed_has_no_interval_and_none_has_no_difference():
    one = curves.paired({0: 0.5}, {0: 0.5}, examples=100)
    assert (one.n, one.mean, one.interval) == (1, 0.0, None)
    assert one.binomial == pytest.approx(0.05 * math.sqrt(2))
    assert curves.paired({0: 0.5}, {1: 0.5}, 100) == (0, None, None, None)


def test_mean_curve_is_over_the_steps_that_all_have():
    a, b = hand_made([0.2, 0.4, 0.9]), hand_made([0.4, 0.8], seed=1)
    steps, mean, low, high = curves.mean_curve([a, b])
    np.testing.assert_array_equal(steps, [100, 200])
    np.testing.assert_allclose(mean, [0.3, 0.6])
    np.testing.assert_allclose([low, high], [[0.2, 0.4], [0.4, 0.8]])


def test_parents_are_those_of_the_configs():
    assert {name: parent for name, (parent, _) in DELTAS.items()} == PARENTS


def test_a_cell_says_how_many_seeds_have_no_number():
    assert fig3.cell([100.0, 300.0, NOT_REACHED], ",.0f") == (
        "200 (100 to 300); not reached 1 of 3"
    )
    assert fig3.cell([NOT_REACHED] * 3, ",.0f") == NOT_REACHED
    assert fig3.cell([DIVERGED, NOT_YET], ",.0f") == "diverged (1), not yet (1)"
    assert fig3.cell([0.5, 0.5], ".1f", 100, "%") == "50.0%"
