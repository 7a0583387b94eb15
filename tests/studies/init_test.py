"""The study `init`: steps to a level by the size of the initial weights."""

import math
import pathlib

import numpy as np

from bn_jax.experiment.config import load
from bn_jax.studies import init
from bn_jax.studies.frame import Result
from bn_jax.workdir.reader import Run
from tests.support.small_studies import cells, run_study


def result(*accuracies, seed=0, status="done", batch=64):
    """A run of 100 steps, evaluated every 100 / n steps."""
    every = 100 // len(accuracies)
    lines = [{"step": every * (k + 1), "top1": a} for k, a in enumerate(accuracies)]
    config = {"seed": seed, "batch_size": batch, "total_steps": 100}
    data = {"eval_examples": 1000, "name": "digits", "split": "test", "classes": 10}
    kinds = {"train": [], "eval": lines, "test": [], "activation": []}
    return Result(Run(pathlib.Path(f"seed_{seed}"), config, data, kinds, status, "", {}), {})


def test_steps_to_a_level_are_interpolated_in_the_runs_own_steps():
    [found] = init.steps_to([result(0.2, 0.6, 1.0, 1.0)], 0.8)
    assert found == (50, 62.5, 75)
    [never] = init.steps_to([result(0.2, 0.3)], 0.8)
    assert never.low == 100 and never.high == math.inf


def test_the_speed_up_of_one_that_is_never_there_is_a_bound():
    results = {
        "bn/gain=1": {0: result(0.6, 1.0)},
        "plain/gain=1": {0: result(0.1, 0.2)},
    }
    found = init.speed_up(results, "1")
    assert found.bound == "at least" and found.lows == (1.0,)
    np.testing.assert_allclose(found.values, 100 / 75)


def test_parts_change_the_weights_alone():
    names = {part.name: part.settings for part in init.parts(load("bn_x5:digits"))}
    assert names["plain/gain=0.5"] == ("norm=none", "model.init_scale=0.5")
    names = {part.name: part.settings for part in init.parts(load("mnist_bn:digits"))}
    assert names["bn/gain=2"] == ("norm=batch_norm", "model.init_std=0.2")


def test_a_small_study(tmp_path, monkeypatch):
    monkeypatch.setattr(init, "GAINS", (1.0,))
    monkeypatch.setattr(init, "LEVEL", 0.999)
    [row] = [
        row for name, row in cells(run_study("init", tmp_path, monkeypatch)).items() if name == "1"
    ]
    assert row[0] == row[2] == "at least 20 (one seed)"
    assert row[4] == "unknown: bounds on both sides"
