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
    Reached,
)
from tests.configs_test import DELTAS


def hand_made(top1, seed=0, status="done", every=100, examples=1000) -> Curve:
    """A curve evaluated every `every` steps; its run was meant to take 10 evaluations."""
    steps = every * np.arange(1.0, len(top1) + 1)
    last = float(steps[-1]) if top1 else 0.0
    return Curve(seed, steps, np.array(top1), status, last, 10.0 * every, examples)


BASELINE = hand_made([0.1, 0.5, 0.72, 0.78, 0.85, 0.8])  # final 0.8: levels 0.72, 0.76, 0.8


def test_levels_are_of_the_final_accuracy_and_not_of_the_maximum():
    expected = {"90%": 0.72, "95%": 0.76, "100%": 0.8}
    assert curves.levels(BASELINE) == pytest.approx(expected)
    assert curves.levels(BASELINE._replace(status="preempted")) is None


def test_steps_are_interpolated_between_the_two_evaluations_around_the_level():
    # 0.76 lies 2/3 of the way from 0.72 at 300 to 0.78 at 400.
    assert curves.reach(BASELINE, 0.76) == pytest.approx((300, 366.667, 400), abs=1e-3)
    assert curves.reach(BASELINE, 0.72) == pytest.approx((200, 300, 300))
    # Evaluations at uneven steps: 100, 110, 121.
    uneven = hand_made([0.2, 0.4, 0.6])._replace(steps=np.array([100.0, 110.0, 121.0]))
    assert curves.reach(uneven, 0.5) == pytest.approx((110, 115.5, 121))
    assert curves.reach(uneven, 0.5).resolved
    assert not curves.reach(BASELINE, 0.76).resolved
    assert Reached(5, 5.5, 6).resolved  # nothing lies between two steps


def test_steps_that_were_not_observed_are_bounds():
    assert curves.reach(BASELINE, 0.1) == (0, 100, 100)  # the first evaluation has it already
    assert curves.reach(BASELINE, 0.9) == (1000, 1000, math.inf)
    assert curves.reach(BASELINE._replace(status="running"), 0.9) == NOT_YET
    assert not curves.reach(BASELINE, 0.1).resolved and not curves.reach(BASELINE, 0.9).resolved


def test_a_speed_up_is_a_geometric_mean_of_ratios_paired_by_seed():
    reference = [hand_made([0.2, 0.4], seed=0), hand_made([0.1, 0.1, 0.1, 0.4], seed=1)]
    network = [hand_made([0.4], seed=1), hand_made([0.2, 0.4], seed=0)]
    found = curves.compare("x", network, reference)
    # Seed 1: 400 steps against at most 100; seed 0: 200 against 200.
    assert found.ratios["100%"] == [(3.0, 4.0, math.inf), (0.5, 1.0, 2.0)]
    effect = found.speed_up("100%")
    assert (effect.n, effect.bound) == (2, "at least")
    assert effect.value == pytest.approx(math.sqrt(3 * 0.5))  # of the lower ends
    assert fig3.ratio_cell(found, "100%").startswith("at least 1.22x (")


def test_a_network_that_never_reaches_the_level_has_a_ratio_of_at_most():
    found = curves.compare("x", [hand_made([0.1, 0.73])], [BASELINE])
    low, value, high = found.ratios["95%"][0]
    assert (low, value, high) == pytest.approx((0, 0.366667, 0.4), abs=1e-6)
    assert fig3.ratio_cell(found, "95%") == "at most 0.40x (one seed)"
    assert fig3.steps_cell(found.steps["95%"]) == NOT_REACHED


@pytest.mark.parametrize(
    ("status", "word"),
    [("done", 0.73), ("diverged", DIVERGED), ("preempted", NOT_YET), ("running", NOT_YET)],
)
def test_what_is_not_finished_is_said(status, word):
    network = hand_made([0.1, 0.73], status=status)
    found = curves.compare("x", [network], [BASELINE])
    assert found.final == [word]
    unfinished = word == NOT_YET
    assert (found.steps["95%"] == [NOT_YET]) == unfinished
    assert (found.ratios["95%"] == [NOT_YET]) == unfinished
    assert found.accuracy.n == (status == "done")


@pytest.mark.parametrize(
    "reference", [[], [BASELINE._replace(status="diverged")], [BASELINE._replace(seed=5)]]
)
def test_without_a_finished_reference_nothing_is_claimed(reference):
    found = curves.compare("x", [hand_made([0.99])], reference)
    assert all(v == [NO_REFERENCE] for v in (*found.steps.values(), *found.ratios.values()))
    assert fig3.ratio_cell(found, "95%") == NO_REFERENCE and found.accuracy.n == 0


def test_a_reference_at_chance_sets_no_level():
    """Of 1,000 examples in 10 classes: the interval of 118 contains 10%, that of 120 does not."""
    guessing = hand_made([0.1, 0.13, 0.118])._replace(classes=10)
    learnt = hand_made([0.1, 0.13, 0.12])._replace(classes=10)
    assert guessing.at_chance and curves.levels(guessing) is None
    assert not learnt.at_chance and curves.levels(learnt) is not None
    assert not guessing._replace(status="preempted").at_chance  # it has no final accuracy yet
    found = curves.compare("x", [hand_made([0.99])], [guessing])
    assert all(v == [AT_CHANCE] for v in (*found.steps.values(), *found.ratios.values()))


def test_a_run_without_an_evaluation_has_no_accuracy():
    found = curves.compare("x", [hand_made([], status="running")], [BASELINE])
    assert found.final == [NOT_YET] and found.steps["100%"] == [NOT_YET]


def test_mean_curve_is_over_the_steps_that_all_have():
    a, b = hand_made([0.2, 0.4, 0.9]), hand_made([0.4, 0.8], seed=1)
    steps, mean, low, high = curves.mean_curve([a, b])
    np.testing.assert_array_equal(steps, [100, 200])
    np.testing.assert_allclose(mean, [0.3, 0.6])
    np.testing.assert_allclose([low, high], [[0.2, 0.4], [0.4, 0.8]])


def test_parents_are_those_of_the_configs():
    assert {name: parent for name, (parent, _) in DELTAS.items()} == PARENTS


def test_a_cell_says_how_many_seeds_have_no_number():
    never = Reached(500.0, 500.0, math.inf)
    found = [Reached(90.0, 100.0, 110.0), Reached(350.0, 400.0, 450.0)]
    assert fig3.steps_cell([*found, never]) == "200 [100 to 400]; not reached 1 of 3"
    assert fig3.steps_cell([never] * 3) == NOT_REACHED
    assert fig3.steps_cell([NOT_YET, never]) == "not yet (1), not reached (1)"
    assert fig3.steps_cell([Reached(0.0, 250.0, 250.0)]) == "at most 250"


def test_the_accuracy_of_one_seed_has_the_interval_of_its_count():
    one = curves.compare("x", [hand_made([0.9])], [])
    assert fig3.accuracy_cell(one) == "90.00% (87.98 to 91.71), counted"
    several = curves.compare("x", [hand_made([0.5]), hand_made([1.0], seed=1)], [])
    assert fig3.accuracy_cell(several) == "75.00% (0.00 to 100.00)"


def test_the_accuracy_of_the_only_finished_seed_has_the_interval_of_its_own_count():
    """(It was that of the first seed's evaluations, whatever split they were of.)"""
    partial = hand_made([0.2], seed=0, status="preempted", examples=400)
    done = hand_made([0.5, 0.8], seed=1, examples=400)._replace(test=0.8, test_examples=10_000)
    row = curves.compare("x", [partial, done], [])
    assert fig3.accuracy_cell(row) == "80.00% (79.20 to 80.77), counted; not yet 1 of 2"
