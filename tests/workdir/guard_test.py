"""Whose workdir it is, whether it can be written, and files that are the old or the new one."""

import json
import os
import pathlib
from typing import Any

import pytest

from bn_jax.errors import ConfigError, DiskError
from bn_jax.experiment import build
from bn_jax.workdir import files, guard, provenance, reader
from configs import inception
from tests.support.small_runs import CONFIG, open_run


def test_a_workdir_of_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    other = CONFIG | {"learning_rate": 0.0075, "extra": 1, "total_steps": 99}
    message = r"learning_rate \(0.045 there, 0.0075 here\)"
    for attempt in (guard.check_workdir, lambda w, c: open_run(w, config=c)):
        with pytest.raises(ConfigError, match=message) as caught:
            attempt(tmp_path, other)
        assert "extra (absent there, 1 here)" in str(caught.value)
        assert "total_steps" not in str(caught.value)  # the run may be made longer
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    guard.check_workdir(tmp_path, CONFIG | {"total_steps": 99, "checkpoint_wait": 0.04})
    # A field that was added later, with the value of what runs did before, makes no difference.
    guard.check_workdir(tmp_path, CONFIG | {"warmup_examples": 0.0})
    with pytest.raises(ConfigError, match=r"warmup_examples \(0.0 there, 5.0 here\)"):
        guard.check_workdir(tmp_path, CONFIG | {"warmup_examples": 5.0})


def test_a_workdir_that_cannot_be_written_is_refused_before_anything_is(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not a directory"):
        guard.check_workdir(tmp_path / "file" / "run", CONFIG)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="not writable"):
        guard.check_workdir(tmp_path / "new", CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("number", "kind"), [(2, ConfigError), (13, ConfigError), (28, DiskError)])
def test_a_workdir_that_cannot_be_made_is_the_users_choice_or_the_disks_fault(
    tmp_path, monkeypatch, number, kind
):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(kind):
        open_run(tmp_path / "new")


def test_a_damaged_run_json_is_refused_not_overwritten(tmp_path: pathlib.Path):
    (tmp_path / "run.json").write_text('{"config"')
    with pytest.raises(ConfigError, match=r"run\.json cannot be read"):
        guard.check_workdir(tmp_path, CONFIG)


def test_an_interrupted_replacement_leaves_the_old_file(tmp_path: pathlib.Path, monkeypatch):
    path = tmp_path / "run.json"
    files.write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"No space left on device; .* MB free\. Free space"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_size_of_xlas_thread_pool_is_recorded(monkeypatch):
    monkeypatch.setenv("NPROC", "13")
    assert provenance.cpu_threads() == 13
    assert provenance.hardware()["variables"]["NPROC"] == "13"
    monkeypatch.setenv("NPROC", "3")
    assert provenance.cpu_threads() == 8  # one for each of the 8 virtual devices
    monkeypatch.delenv("NPROC")
    assert provenance.cpu_threads() == max(8, len(os.sched_getaffinity(0)))
    comm = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    pool = sum(name.startswith("tf_XLAEigen") for name in comm)
    assert pool in (0, provenance.cpu_threads())  # 0: not on Linux, or no devices yet


def test_a_cpu_run_does_not_resume_with_another_thread_pool(tmp_path, monkeypatch):
    monkeypatch.setenv("NPROC", "13")
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
    monkeypatch.setenv("NPROC", "14")
    with pytest.raises(ConfigError, match=r"with 13 CPU threads, this process has 14.*NPROC=13"):
        open_run(tmp_path)
    guard.require_same_threads(tmp_path, "gpu", 4)  # there the pool does not matter
    monkeypatch.setenv("BN_JAX_ANY_THREADS", "1")
    with open_run(tmp_path) as recorder:
        recorder.begin(0)


def test_records_from_before_a_field_was_added_can_be_evaluated(tmp_path):
    config = inception.get_config("digits").to_dict()
    for field in reader.ADDED:
        *section, name = field.split(".")
        part = config[section[0]] if section else config
        part.pop(name, None)
    config["decay_examples"] = 1e7
    data = {"image_shape": [28, 28, 1], "classes": 10, "class_names": [], "split": "test"}
    info = {"data": data | {"description": "", "eval_examples": 1000}}
    (tmp_path / "run.json").write_text(json.dumps({"config": config, "info": info}))
    assert build.without_data(tmp_path).hyper.warmup_from == 1
