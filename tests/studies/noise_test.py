"""The study `noise`: BN with wrong statistics, and frozen BN."""

import json
import pathlib

from bn_jax.experiment import build
from bn_jax.experiment.config import load
from bn_jax.studies import frame, noise
from bn_jax.studies.frame import Result
from bn_jax.workdir import reader
from bn_jax.workdir.reader import Run
from tests.support.small_studies import cells, run_study


def test_the_last_fifth_is_frozen():
    config = load("mnist_bn:digits").unlock()
    config.total_steps = 1500
    settings = {part.name: part.settings for part in noise.parts(config)}
    assert settings["frozen"] == ("norm=batch_norm", "bn.freeze_after=1200")
    assert settings["noise=0.3"] == ("norm=batch_norm", "bn.noise=0.3")


def result(accuracy: float, running: float) -> Result:
    """A run of 20 recorded steps; the loss of step k is k."""
    lines = {
        "train": [{"step": k, "cross_entropy": float(k)} for k in range(1, 21)],
        "eval": [{"step": 10, "top1": 0.3}, {"step": 20, "top1": accuracy}],
    }
    return Result(Run(pathlib.Path(), {}, {}, lines, "done", "", {}), {"running": running})


def test_the_table_compares_with_bn_at_the_end():
    results = {"bn": {0: result(0.8, 0.7)}, "plain": {0: result(0.5, 0.5)}}
    assert noise.table(results).rows == [
        ["bn", "80.00% (one seed)", "-", "70.00% (one seed)", "19.500"],
        ["plain", "50.00% (one seed)", "-30.00 (one seed)", "50.00% (one seed)", "19.500"],
    ]


def test_a_small_study(tmp_path, monkeypatch):
    rows = cells(run_study("noise", tmp_path, monkeypatch))
    assert list(rows)[1:] == ["bn", "plain", "noise=0.3", "noise=1", "frozen"]
    runs = [reader.read_run(tmp_path / name / "seed_0") for name in list(rows)[1:]]
    losses = [run.lines["train"][-1]["loss"] for run in runs]
    assert len(set(losses)) == 5  # five different trainings

    frozen = tmp_path / "frozen" / "seed_0"
    _, state = build.restore(build.from_workdir(frozen), frozen)
    assert float(state.batch_stats["dense_0"]["bn"]["count"]) == 16  # of 20 steps
    measured = json.loads((frozen / frame.MEASURED).read_text())
    assert rows["frozen"][2] == f"{100 * measured['running']:.2f}% (one seed)"
