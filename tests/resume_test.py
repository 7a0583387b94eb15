"""Trainers that are signalled and killed: saved at the same step, and the same bits afterwards."""

import json
import signal
import time

import jax
import pytest

from bn_jax import train
from bn_jax.distributed import preempt
from bn_jax.errors import Preempted
from bn_jax.experiment import build
from configs import bn_x30
from tests.support.processes import TRAIN, arrays, lines, spawn, wait_for


def test_after_sigterm_and_sigkill_the_run_ends_with_the_same_bits(tmp_path, measured):
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "log"
    spawned = time.time()
    (child,) = spawn([*TRAIN, f"--workdir={whole}"], log)
    assert child.wait(300) == 0, log.with_suffix(".0").read_text()
    check_ledger(whole, spawned)

    command = [*TRAIN, f"--workdir={cut}"]
    for number, at, code in (
        (signal.SIGTERM, "step 250:", Preempted.exit_code),
        (signal.SIGINT, "step 500:", Preempted.exit_code),
        (signal.SIGKILL, "step 750:", -signal.SIGKILL),
    ):
        (child,) = spawn(command, log)
        wait_for(at, log, [child])
        begin = time.monotonic()
        child.send_signal(number)
        assert child.wait(60) == code, log.with_suffix(".0").read_text()
        # Promised: 5 s, held to below. The rest is for a machine that runs other tests beside.
        assert time.monotonic() - begin < 15
    (child,) = spawn(command, log)
    assert child.wait(300) == 0, log.with_suffix(".0").read_text()

    assert lines(cut) == lines(whole)
    assert lines(whole).count(b"\n") > 36
    assert arrays(cut, 1500) == arrays(whole, 1500)
    run = json.loads((cut / "run.json").read_text())
    assert [a["status"] for a in run["attempts"]] == ["preempted"] * 2 + ["killed", "done"]
    assert run["attempts"][1]["resume_step"] >= 250
    assert run["attempts"][2]["resume_step"] >= 500
    # At most one save interval is done again.
    assert run["attempts"][3]["resume_step"] >= 500
    parts = sum(run["ledger"]["parts"].values()) + run["ledger"]["lost"]
    assert parts == pytest.approx(run["ledger"]["wall"], rel=0.01)
    assert {p.name for p in cut.iterdir()} == {p.name for p in whole.iterdir()}
    measured("SIGTERM, SIGINT, SIGKILL of the MLP", injected=3, detected=3, lost=0)


def check_ledger(workdir, spawned: float) -> None:
    """Its parts against a clock outside: from the start of the process to the end of run.json.

    Not in the ledger are the fork, of which the kernel keeps the time to 0.01 s, and writing the
    last file; after it Python takes to exit, which nobody can write down from within.
    """
    ledger = json.loads((workdir / "run.json").read_text())["ledger"]
    took = (workdir / "run.json").stat().st_mtime - spawned
    parts = sum(ledger["parts"].values()) + ledger["lost"]
    assert abs(parts - took) < 0.01 * took + 0.25, (ledger, took)


@pytest.mark.faults
@pytest.mark.clock
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signalled_run_has_saved_and_ended_within_5_seconds(tmp_path, number, measured):
    workdir, log = tmp_path / "run", tmp_path / "log"
    (child,) = spawn([*TRAIN, f"--workdir={workdir}"], log)
    wait_for("step 250:", log, [child])
    begin = time.monotonic()
    child.send_signal(number)
    assert child.wait(60) == Preempted.exit_code, log.with_suffix(".0").read_text()
    took = time.monotonic() - begin
    text = log.with_suffix(".0").read_text()
    assert f"stopped by {number.name} after step " in text
    assert arrays(workdir, int(text.split("after step ")[1].split(",")[0]))
    assert took < 5
    measured(f"{number.name} of the MLP", injected=1, detected=1, lost=0, seconds=took)


@pytest.mark.faults
@pytest.mark.clock
def test_two_trainers_save_the_same_step_and_one_goes_on(tmp_path, measured):
    cut, log = tmp_path / "cut", tmp_path / "log"
    # Over the loopback a step of two processes takes 0.05 to 0.15 s; they take 5 a dispatch.
    command = [*TRAIN, f"--workdir={cut}"]
    command += ["--config.eval_every=50", "--config.total_steps=100"]
    for signalled, number in ((1, signal.SIGTERM), (0, signal.SIGINT)):
        children = spawn(command, log, processes=2)
        # Not while it compiles, which is ended first: at its first line of progress.
        wait_for("step 50:" if signalled else "/100  loss", log, children)
        begin = time.monotonic()
        children[signalled].send_signal(number)
        assert [c.wait(60) for c in children] == [Preempted.exit_code] * 2
        took = time.monotonic() - begin
        assert took < 5
        name = f"{number.name} to process {signalled} of 2"
        measured(name, injected=1, detected=1, lost=0, seconds=took)
        texts = [log.with_suffix(f".{i}").read_text() for i in range(2)]
        ends = {text.split("after step ")[1].split(",")[0] for text in texts}
        assert len(ends) == 1, texts
    (child,) = spawn(command, log)  # on one process
    assert child.wait(300) == 0, log.with_suffix(".0").read_text()
    assert f"resumed from step {ends.pop()}" in log.with_suffix(".0").read_text()


def test_a_streamed_inception_with_dropout_and_distortion_goes_on_with_the_same_bits(
    tmp_path, monkeypatch, unoptimized
):
    real = build.mesh.make
    monkeypatch.setattr(build.mesh, "make", lambda *_: real(jax.devices()[:1]))
    config = bn_x30.get_config("digits")
    config.update_from_flattened_dict(
        {
            "model.width": 0.0625,  # with the dropout, kill_test's: one program for both
            "dropout": 0.4,
            "data.shift": 2,
            "data.distortion": 1.0,
            "total_steps": 4,
            "eval_every": 4,
            "checkpoint_every": 4,
            "log_every": 1,
            "statistics_batches": 1,
            "record.activation_every": 2,
            "record.tensorboard": False,
        }
    )
    scores = train.run(config, tmp_path / "whole")
    with monkeypatch.context() as stop:
        stop.setattr(preempt.Signals, "stop_at", lambda self, step: step == 2)
        with pytest.raises(Preempted):
            train.run(config, tmp_path / "cut")
    assert train.run(config, tmp_path / "cut") == scores
    once, twice = (arrays(tmp_path / name, 4) for name in ("whole", "cut"))
    assert once == twice and len(once) > 500  # parameters, velocity, statistics, step
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
