"""How long a save holds training up: until it is on disk, or for the share the config allows."""

import errno
import json
import os
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from bn_jax import train
from bn_jax.distributed import preempt
from bn_jax.errors import DiskError, Preempted
from bn_jax.experiment import build, evaluator
from bn_jax.experiment.evaluator import Evaluator
from bn_jax.workdir import checkpoint, timing
from bn_jax.workdir.checkpoint import Checkpoints, Steps
from tests.train_test import small


@pytest.fixture
def disk(monkeypatch) -> threading.Event:
    """Saves begin to be written once it is set, or after a minute."""
    go, real = threading.Event(), Checkpoints._write
    monkeypatch.setattr(Checkpoints, "_write", lambda *a: (go.wait(60), real(*a))[1])
    return go


@pytest.mark.parametrize("seconds", [5.0, 1e300])  # longer than any lock can be waited for
def test_a_save_that_is_quick_enough_is_there_afterwards(tmp_path, disk, seconds):
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)})
        threading.Timer(0.2, disk.set).start()
        checkpoints.settle(seconds)
        assert checkpoints.steps() == [1]


def test_a_save_that_is_too_slow_continues_beside_training(tmp_path, disk):
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)})
        began = time.monotonic()
        checkpoints.settle(0.1)
        assert 0.1 <= time.monotonic() - began < 30 and checkpoints.steps() == []
        disk.set()
    assert checkpoints.steps() == [1]


def follow(monkeypatch, look) -> None:
    """Calls look(loop, step) after every dispatch, before the next one."""
    real = train.Loop.due

    def due(self, step):
        return [*real(self, step), lambda step, state: look(self, step)]

    monkeypatch.setattr(train.Loop, "due", due)


@pytest.fixture
def quick(monkeypatch) -> ConfigDict:
    """A run of 40 steps in dispatches of 5 on one device that evaluates nothing: compiles fast."""
    make = build.mesh.make
    monkeypatch.setattr(build.mesh, "make", lambda *_: make(jax.devices()[:1]))
    monkeypatch.setattr(Evaluator, "compile", lambda self: None)
    monkeypatch.setattr(train.Loop, "evaluate", lambda self, step, state: None)
    monkeypatch.setattr(evaluator, "sentence", lambda *_: "not evaluated")
    return small(**{"record.activations": ()})


def test_with_a_large_share_a_save_is_on_disk_before_the_next_step(tmp_path, monkeypatch, quick):
    real, newest = Checkpoints._write, []
    monkeypatch.setattr(Checkpoints, "_write", lambda *a: (time.sleep(0.2), real(*a))[1])
    follow(monkeypatch, lambda loop, step: newest.append((step, loop.checkpoints.steps()[-1:])))
    quick.checkpoint_wait = 1e9
    train.run(quick, tmp_path)
    assert newest == [(5, [])] + [(step, [step // 10 * 10]) for step in range(10, 41, 5)]


@pytest.mark.parametrize(
    ("seconds", "every", "saved"),
    [(0.0, 0, [10, 20, 30, 40]), (1e6, 0, [10, 40]), (1e6, 30, [10, 30, 40])],
)
def test_between_two_saves_there_are_the_seconds_that_the_config_asks_for(
    tmp_path, quick, seconds, every, saved
):
    quick.keep_last = 9
    quick.keep_every = every
    quick.write_seconds = seconds
    train.run(quick, tmp_path)
    assert Steps(tmp_path / "checkpoints", read_only=True).numbers() == saved


def test_a_run_that_is_stopped_is_saved_at_once(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(preempt.Signals, "stop_at", lambda self, step: step == 15)
    quick.write_seconds = 1e6
    with pytest.raises(Preempted):
        train.run(quick, tmp_path)
    assert Steps(tmp_path / "checkpoints", read_only=True).numbers() == [10, 15]


def test_training_continues_while_a_slow_disk_writes(tmp_path, monkeypatch, quick, disk):
    newest = []

    def look(loop, step: int) -> None:
        newest.append((step, loop.checkpoints.steps()))
        if step == 15:
            disk.set()

    follow(monkeypatch, look)
    train.run(quick, tmp_path)
    assert newest[:3] == [(5, []), (10, []), (15, [])]


def test_a_disk_that_fails_beside_training_ends_it_in_the_same_dispatch(
    tmp_path, monkeypatch, quick, measured
):
    """The save of step 40 is slow, and fails while the dispatch of steps 46 to 50 is under way."""
    fail, begun, reported = threading.Event(), [], []
    save, report = checkpoint.save_arrays, train.Loop.report

    def failing(path, arrays) -> None:
        if path.parent.name == "tmp.40":
            fail.wait(60)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, arrays)

    def follow(self, pending) -> None:
        report(self, pending)
        begun.append(self.begun)
        reported.append(pending and pending[0])
        if self.begun == 50:
            fail.set()
            self.checkpoints.settle(60)

    quick.total_steps, quick.eval_every, quick.checkpoint_every = 80, 80, 20
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "save_arrays", failing)
        broken.setattr(train.Loop, "report", follow)
        with pytest.raises(DiskError, match="cannot save a checkpoint in .*: No space left"):
            train.run(quick, tmp_path)
    assert begun[-1] == 50 and max(filter(None, reported)) == 45  # no other dispatch, no report
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "failed" and run["results"]["error"].startswith("DiskError: ")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["20", "index.json"]
    train.run(quick, tmp_path)  # there is space again
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "done" and run["attempts"][1]["resume_step"] == 20
    measured("disk full during a save of a run", injected=1, detected=1, lost=0)


@pytest.mark.faults
@pytest.mark.clock
def test_saves_block_for_less_than_a_twentieth_with_the_copying(tmp_path, monkeypatch, quick):
    """15 MB after every 20 steps, which are made to last 2 s at least by a pause in each."""
    report = train.Loop.report
    monkeypatch.setattr(train.Loop, "report", lambda *a: (time.sleep(0.1), report(*a))[1])
    quick.model.widths, quick.steps_per_dispatch = (1000, 1000, 100), 1
    quick.total_steps, quick.eval_every, quick.checkpoint_every = 60, 60, 20
    train.run(quick, tmp_path)
    marks = [json.loads(x) for x in (tmp_path / "timing.jsonl").read_text().splitlines()]
    parts = {mark["step"]: mark["parts"] for mark in reversed(marks)}  # the first of each step
    blocked, trained = parts[45]["save"], parts[40]["step"] + parts[40]["input"]
    assert trained >= 2 * 2.0 and blocked > 0  # two intervals, each with the save at its end
    print(f"saves block for {blocked / trained:.1%} of the steps' time")
    assert blocked <= 0.05 * trained, (blocked, trained)


def test_a_slow_disk_holds_training_up_for_less_than_a_twentieth(tmp_path, monkeypatch, quick):
    """By a clock that stands still but for 1 s a dispatch, and for all of what each save is given:
    the share then does not depend on how busy this machine is."""
    clock, real = [0.0], train.Loop.report
    frozen = vars(time) | {"monotonic": lambda: clock[0]}
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(**frozen))

    def report(self, pending) -> None:
        clock[0] += pending is not None
        real(self, pending)

    def settle(self, seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(train.Loop, "report", report)
    monkeypatch.setattr(Checkpoints, "settle", settle)
    quick.checkpoint_every = 20
    train.run(quick, tmp_path)
    parts = json.loads((tmp_path / "run.json").read_text())["ledger"]["parts"]
    assert parts["step"] == 8 and parts["save"] < 0.05 * parts["step"]
    assert parts["save"] == pytest.approx(0.04 * 8)  # all of it: not the half of one interval
