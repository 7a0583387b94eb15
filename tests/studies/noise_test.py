"""The study `noise`: BN with wrong statistics, and frozen BN."""

import json

from bn_jax.experiment import build
from bn_jax.experiment.config import load
from bn_jax.studies import frame, noise
from bn_jax.workdir import reader
from tests.support.small_studies import cells, run_study


def test_the_last_fifth_is_frozen():
    config = load("mnist_bn:digits").unlock()
    config.total_steps = 1500
    settings = {part.name: part.settings for part in noise.parts(config)}
    assert settings["frozen"] == ("norm=batch_norm", "bn.freeze_after=1200")
    assert settings["noise=0.3"] == ("norm=batch_norm", "bn.noise=0.3")


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
