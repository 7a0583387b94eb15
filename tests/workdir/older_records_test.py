"""Runs recorded before a field was added resume, and every field added since has its value.

golden/fields_9e66dde.json lists the fields of the configs at that commit.
"""

import json
import pathlib

import pytest
from ml_collections import ConfigDict

from bn_jax import train
from bn_jax.distributed import preempt
from bn_jax.errors import ConfigError, Preempted
from bn_jax.experiment.config import settled
from bn_jax.workdir import guard
from bn_jax.workdir.reader import ADDED, flat
from configs import inception, mnist
from tests.train_test import small

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "fields_9e66dde.json"
FIELDS = json.loads(GOLDEN.read_text())
DECAY_EXAMPLES = 1e6  # as the configs gave it then
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
    older["decay_examples"] = DECAY_EXAMPLES
    return older


@pytest.mark.parametrize("name", ROOTS)
def test_every_field_added_since_has_its_value_for_older_records(name):
    config = ROOTS[name].get_config("digits").to_dict()
    older = as_recorded_then(config)
    assert sorted(flat(older)) == FIELDS[name]
    assert set(flat(config)) - set(FIELDS[name]) <= ADDED.keys()


def test_a_workdir_made_then_resumes_with_the_same_bits(tmp_path, monkeypatch, capsys):
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
    assert "decay_epochs" not in run["config"]
    path.write_text(json.dumps(run))

    for field, value in (("precision", "highest"), ("deterministic", True)):
        with pytest.raises(ConfigError, match=f"{field} \\(.* there, {value} here\\)"):
            train.run(small(**{field: value}), cut)
    capsys.readouterr()
    assert train.run(small(), cut) == scores
    assert "was begun with an older version" in "".join(capsys.readouterr())
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    config = json.loads(path.read_text())["config"]
    assert config["precision"] == "default"
    assert (config["decay_epochs"], config["decay_examples"]) == (0.0, DECAY_EXAMPLES)


def test_an_inception_begun_then_keeps_its_weights_and_its_decay(tmp_path):
    config = inception.get_config("digits")
    older = {"config": as_recorded_then(config.to_dict()), "info": {}, "status": "preempted"}
    (tmp_path / "run.json").write_text(json.dumps(older))
    found = guard.as_begun(config, tmp_path)
    assert (found.model.init, found.decay_epochs) == ("glorot", 0.0)
    assert found.decay_examples == DECAY_EXAMPLES
    guard.check_workdir(tmp_path, settled(found, 4000).to_dict())

    # What the command line asks for by name is refused, as for any other field.
    changed = ConfigDict(config.to_dict())
    changed.model.init = "he"
    found = guard.as_begun(changed, tmp_path)
    with pytest.raises(ConfigError, match=r"model.init \(glorot there, he here\)"):
        guard.check_workdir(tmp_path, settled(found, 4000).to_dict())

    # A run of today is compared with today's config.
    today = {"config": settled(config, 4000).to_dict(), "info": {}, "status": "done"}
    (tmp_path / "run.json").write_text(json.dumps(today))
    assert guard.as_begun(config, tmp_path).to_dict() == config.to_dict()
    assert today["config"]["model"]["init"] == "glorot_relu"
    assert today["config"]["decay_examples"] == 32_000
