"""Runs recorded before a field was added resume, and every field added since has its value.

golden/fields_9e66dde.json lists the fields of the configs at that commit.
"""

import json
import pathlib

import pytest

from bn_jax import train
from bn_jax.distributed import preempt
from bn_jax.errors import ConfigError, Preempted
from bn_jax.workdir.reader import ADDED, flat
from configs import inception, mnist
from tests.train_test import small

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "fields_9e66dde.json"
FIELDS = json.loads(GOLDEN.read_text())
ROOTS = {"inception": inception, "mnist": mnist}


def as_recorded_then(config: dict) -> dict:
    """The config without the fields that run.json lacked at 9e66dde."""
    known = FIELDS["mnist" if config["model"]["name"] == "mlp" else "inception"]
    older: dict = {}
    for name, value in config.items():
        if isinstance(value, dict):
            older[name] = {k: v for k, v in value.items() if f"{name}.{k}" in known}
        elif name in known:
            older[name] = value
    return older


@pytest.mark.parametrize("name", ROOTS)
def test_every_field_added_since_has_its_value_for_older_records(name):
    config = ROOTS[name].get_config("digits").to_dict()
    older = as_recorded_then(config)
    assert sorted(flat(older)) == FIELDS[name]
    assert set(flat(config)) - set(FIELDS[name]) <= ADDED.keys()


def test_a_workdir_made_then_resumes_with_the_same_bits(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    scores = train.run(small(), whole)
    with monkeypatch.context() as stop:
        stop.setattr(preempt.Signals, "stop_at", lambda self, step: step == 10)
        with pytest.raises(Preempted):
            train.run(small(), cut)
    path = cut / "run.json"
    run = json.loads(path.read_text())
    run["config"] = as_recorded_then(run["config"])
    assert "precision" not in run["config"] and "deterministic" not in run["config"]
    path.write_text(json.dumps(run))

    for field, value in (("precision", "highest"), ("deterministic", True)):
        with pytest.raises(ConfigError, match=f"{field} \\(.* there, {value} here\\)"):
            train.run(small(**{field: value}), cut)
    assert train.run(small(), cut) == scores
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert json.loads(path.read_text())["config"]["precision"] == "default"
