"""Run records: bit-equal metrics after a resume, the ledger, the lock, whose workdir it is."""

import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import disk, ledger, lock, provenance, record, workdir
from bn_jax.errors import ConfigError, DiskError, DivergedError, LockedError, Preempted
from bn_jax.progress import Progress, duration

CONFIG = {
    "learning_rate": 0.045,
    "total_steps": 20,
    "model": {"width": 0.125, "sizes": (1, 2)},
    "record": {"tensorboard": False},
}


def open_run(folder: pathlib.Path, **changes: Any) -> record.Recorder:
    arguments = {
        "config": CONFIG,
        "info": {"note": "test"},
        "total_steps": 20,
        "tensorboard": False,
        "is_main": True,
    }
    return record.Recorder(folder, **(arguments | changes))


def train(recorder: record.Recorder, first: int, last: int) -> None:
    """Records as a trainer does, with numbers that are a function of the step."""
    for step in range(first, last + 1):
        if step % 2 == 0:
            recorder.write("train", step, loss=np.float32(1) / np.float32(step), rate=0.1 * step)
        if step % 5 == 0:
            recorder.write("eval", step, top1=jnp.float32(step) / 7, top5=0.5, examples=1000)


def read_json(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_metrics_after_any_interruption_are_those_of_one_attempt(tmp_path: pathlib.Path):
    with open_run(tmp_path / "whole") as recorder:
        recorder.begin(0)
        train(recorder, 1, 20)
    for resume, reached in ((0, 3), (10, 17), (15, 15)):
        cut = tmp_path / f"cut{resume}"
        with open_run(cut) as recorder:
            recorder.begin(0)
            train(recorder, 1, reached)
        with (cut / "metrics.jsonl").open("a") as file:
            file.write('{"step": 18, "kind": "tr')  # killed in the middle of a line
        with open_run(cut) as recorder:
            recorder.begin(resume)
            train(recorder, resume + 1, 20)
        whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
        assert (cut / "metrics.jsonl").read_bytes() == whole
    assert whole.count(b"\n") == 14


def test_from_scratch_the_lines_of_step_0_are_not_there_twice(tmp_path: pathlib.Path):
    for _ in range(2):  # killed before the first checkpoint, and started again
        with open_run(tmp_path) as recorder:
            recorder.begin(0)
            recorder.write("activation", 0, mean=0.5)
            train(recorder, 1, 3)
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 2]
    with open_run(tmp_path) as recorder:
        recorder.begin(1)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1  # a resume keeps it


def test_lines_begin_with_step_and_kind_and_floats_come_back_exactly(tmp_path: pathlib.Path):
    values = {"a": np.float32(1) / np.float32(3), "b": 0.1 + 0.2, "c": 5e-324, "d": -0.0}
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
        recorder.write("train", 1, **values, v=np.arange(3, dtype=np.float32) / 10, n=np.int64(2))
        recorder.write("train", 2, loss=np.nan, big=np.float32(np.inf), layer="x", ok=True)
    one, two = (json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert list(one)[:2] == ["step", "kind"]
    for name, value in values.items():
        assert np.float64(one[name]).tobytes() == np.float64(value).tobytes(), name
    assert np.float32(one["v"]).tobytes() == (np.arange(3, dtype=np.float32) / 10).tobytes()
    assert one["n"] == 2 and two["layer"] == "x" and two["ok"] is True
    # Strict JSON has no NaN: other readers must be able to read a diverged run.
    assert two["loss"] == "nan" and float(two["big"]) == np.inf


def test_run_json_says_what_made_the_result(tmp_path: pathlib.Path):
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
        assert read_json(tmp_path)["status"] == "running"
        recorder.finish("done", top1=jnp.float32(0.5), examples=1000)
    run = read_json(tmp_path)
    assert run["status"] == "done" and run["results"] == {"top1": 0.5, "examples": 1000}
    assert run["config"]["model"]["width"] == 0.125 and run["info"] == {"note": "test"}
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= run[
        "versions"
    ].keys()
    assert run["hardware"]["devices"] == 8 and run["hardware"]["processes"] == 1
    assert run["hardware"]["cpu_threads"] >= 1
    assert "commit" in run["source"] or "version" in run["source"]
    assert not (tmp_path / "lock").exists()


def test_each_attempt_keeps_its_origin_and_a_change_is_said(tmp_path, monkeypatch, capsys):
    versions, source = provenance.versions(), provenance.source() | {"commit": "aaa"}

    def attempt(step: int) -> str:
        monkeypatch.setattr(provenance, "versions", lambda: versions)
        monkeypatch.setattr(provenance, "source", lambda: source)
        with open_run(tmp_path) as recorder:
            recorder.begin(step)
        return capsys.readouterr().out

    assert attempt(0) == "" and attempt(1) == ""
    versions, source = versions | {"jax": "0.0.1"}, source | {"commit": "bbb"}
    said = attempt(2)
    assert said.count("\n") == 1 and "commit aaa, now bbb; jax " in said and "now 0.0.1" in said
    assert attempt(3) == ""
    run = read_json(tmp_path)
    assert [a["source"]["commit"] for a in run["attempts"]] == ["aaa", "aaa", "bbb", "bbb"]
    assert [a["versions"]["jax"] for a in run["attempts"]][2:] == ["0.0.1"] * 2
    assert run["attempts"][0]["hardware"] == run["hardware"]
    assert run["source"]["commit"] == "bbb" and run["versions"]["jax"] == "0.0.1"
    for old in run["attempts"]:  # a record of before attempts had these
        del old["source"], old["versions"], old["hardware"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    source = source | {"commit": "ccc"}
    assert "commit bbb, now ccc" in attempt(4)


def test_without_begin_the_records_stay_as_they_are(tmp_path: pathlib.Path):
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
        train(recorder, 1, 4)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with open_run(tmp_path) as recorder:
        recorder.say("nothing to do")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DivergedError("step 3"), "diverged"),
        (Preempted("step 3"), "preempted"),
        (KeyboardInterrupt(), "preempted"),
        (ValueError("no"), "failed"),
    ],
)
def test_an_exception_ends_the_record_with_its_status(tmp_path, error, status):
    with pytest.raises(type(error)), open_run(tmp_path) as recorder:
        recorder.begin(0)
        raise error
    run = read_json(tmp_path)
    assert run["status"] == status and run["attempts"][-1]["status"] == status
    assert run["results"]["error"].startswith(type(error).__name__)
    assert not (tmp_path / "lock").exists()


def test_a_process_other_than_the_first_writes_nothing(tmp_path: pathlib.Path):
    with open_run(tmp_path / "run") as first, open_run(tmp_path / "run", is_main=False) as recorder:
        before = sorted((tmp_path / "run").iterdir())
        recorder.begin(0)
        with recorder.timed("step"):
            train(recorder, 1, 10)
        recorder.progress(1, 0.5, 32)
        recorder.say("nothing")
        recorder.finish("done")
        assert sorted((tmp_path / "run").iterdir()) == before
        first.begin(0)


def test_tensorboard_events_hold_the_scalars(tmp_path: pathlib.Path):
    with open_run(tmp_path, tensorboard=True) as recorder:
        recorder.begin(0)
        recorder.write("train", 2, loss=0.5)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


# The workdir


def test_a_workdir_of_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    other = CONFIG | {"learning_rate": 0.0075, "extra": 1, "total_steps": 99}
    message = r"learning_rate \(0.045 there, 0.0075 here\)"
    for attempt in (workdir.check_workdir, lambda w, c: open_run(w, config=c)):
        with pytest.raises(ConfigError, match=message) as caught:
            attempt(tmp_path, other)
        assert "extra (absent there, 1 here)" in str(caught.value)
        assert "total_steps" not in str(caught.value)  # a longer run may go on
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    workdir.check_workdir(tmp_path, CONFIG | {"total_steps": 99})


def test_a_workdir_that_cannot_be_written_is_refused_before_anything_is(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not a directory"):
        workdir.check_workdir(tmp_path / "file" / "run", CONFIG)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="not writable"):
        workdir.check_workdir(tmp_path / "new", CONFIG)
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
        workdir.check_workdir(tmp_path, CONFIG)


def test_a_second_run_is_refused_and_names_the_first(tmp_path: pathlib.Path):
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
        for attempt in (workdir.check_workdir, lambda w, c: open_run(w, config=c)):
            with pytest.raises(
                LockedError, match=f"host {socket.gethostname()}, pid {os.getpid()}"
            ):
                attempt(tmp_path, CONFIG)
    with open_run(tmp_path) as recorder:
        recorder.begin(0)


HOLD = """
import pathlib, sys, time
from bn_jax import lock
held = lock.WorkdirLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_taken_over_with_a_line(tmp_path, capsys):
    root = pathlib.Path(lock.__file__).parent.parent
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(LockedError, match=f"pid {holder.pid}"):
        open_run(tmp_path)
    holder.kill()
    holder.wait()
    assert (tmp_path / "lock").exists()
    with open_run(tmp_path):
        assert f"run that is gone (host {socket.gethostname()}, pid {holder.pid}" in (
            capsys.readouterr().out
        )


def test_a_lock_of_another_host_is_watched_for_a_heartbeat(tmp_path: pathlib.Path):
    text = json.dumps({"host": "elsewhere", "pid": 1, "started": "2015-02-11"})
    (tmp_path / "lock").write_text(text)
    held = lock.WorkdirLock(tmp_path, watch=0.2)  # silent: taken over
    assert "host elsewhere" in held.taken_over
    held.release()

    (tmp_path / "lock").write_text(text)
    beat = subprocess.Popen(["sh", "-c", f"sleep 0.3; touch '{tmp_path}/lock'"])
    with pytest.raises(LockedError, match="host elsewhere, pid 1"):
        lock.WorkdirLock(tmp_path, watch=5)
    beat.wait()
    assert json.loads((tmp_path / "lock").read_text())["host"] == "elsewhere"


def test_a_live_lock_beats(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    held = lock.WorkdirLock(tmp_path)
    os.utime(tmp_path / "lock", (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / "lock").stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "lock").stat().st_mtime > 0
    held.release()
    held.release()  # does nothing


def test_an_interrupted_replacement_leaves_the_old_file(tmp_path: pathlib.Path, monkeypatch):
    path = tmp_path / "run.json"
    disk.write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"No space left on device; .* MB free\. Free space"):
        disk.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# Time


def test_the_parts_of_the_ledger_sum_to_the_wall_time(tmp_path: pathlib.Path):
    begin = time.monotonic()
    with open_run(tmp_path, started=begin - 0.5) as recorder:
        recorder.begin(0)
        for step in range(1, 6):
            with recorder.timed("step"):
                time.sleep(0.02)
                with recorder.timed("save"):  # pauses the step
                    time.sleep(0.02)
            recorder.write("train", step, loss=0.0)
        time.sleep(0.05)
    outside = time.monotonic() - begin + 0.5
    found = read_json(tmp_path)["ledger"]
    parts = found["parts"]
    assert sum(parts.values()) == pytest.approx(found["wall"], abs=0.01)  # each is rounded to 1 ms
    # What is left out is the last write of run.json: on a busy disk longer than a short test's 1%.
    assert 0 <= outside - found["wall"] < 0.5
    assert parts["startup"] >= 0.5 and parts["other"] >= 0.05
    # A sleep is never too short; on a busy machine it may be several times too long.
    assert 0.1 <= parts["step"] < 0.5 and 0.1 <= parts["save"] < 0.5
    assert found["lost"] == 0


def test_work_that_a_later_attempt_redid_is_lost(tmp_path: pathlib.Path):
    def line(attempt: int, step: int, wall: float) -> dict[str, Any]:
        return {"attempt": attempt, "step": step, "wall": wall, "parts": {"step": wall}}

    lines = [
        line(0, 0, 1.0), line(0, 10, 11.0), line(0, 14, 15.0),  # killed; 4 s after step 10 lost
        line(1, 10, 2.0), line(1, 12, 4.0),  # damaged checkpoints: all but its start lost
        line(2, 10, 1.0), line(2, 20, 11.0),
    ]  # fmt: skip
    found = ledger.account(lines, [0, 10, 10])
    assert found["wall"] == 15 + 4 + 11
    assert found["lost"] == 4 + 2
    assert found["parts"]["step"] == 11 + 2 + 11
    assert ledger.account(lines, [0, 10, 5])["lost"] == 14 + 4  # went back behind both
    assert ledger.account([], [0])["wall"] == 0


def test_a_killed_attempt_is_marked_and_its_time_counts(tmp_path: pathlib.Path):
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
        train(recorder, 1, 2)
        time.sleep(0.01)
        train(recorder, 3, 4)
    run = read_json(tmp_path)
    run["status"] = run["attempts"][0]["status"] = "running"  # as SIGKILL leaves it
    (tmp_path / "run.json").write_text(json.dumps(run))
    with open_run(tmp_path) as recorder:
        recorder.begin(2)
    run = read_json(tmp_path)
    assert [a["status"] for a in run["attempts"]] == ["killed", "done"]
    assert run["ledger"]["attempts"] == 2 and run["ledger"]["lost"] >= 0.01


def test_the_process_began_before_this_test():
    code = (
        "import time; from bn_jax import ledger; a, b = [ledger.process_started() for _ in 'ab'];"
        "print(time.monotonic() - a, time.monotonic() - b)"
    )
    root = pathlib.Path(lock.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    first, second = map(float, done.stdout.split())
    assert 0 <= second < 0.1 <= first + 0.1 < 30 and first >= second


def test_an_unknown_part_or_status_is_refused(tmp_path: pathlib.Path):
    with open_run(tmp_path) as recorder:
        with pytest.raises(ValueError, match="'steps' is not one of"), recorder.timed("steps"):
            pass
        with pytest.raises(ValueError, match="'finished' is not one of"):
            recorder.finish("finished")


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_step_loss_rate_and_time_left():
    out = io.StringIO()
    progress = Progress(100, out, every=0)
    progress.update(1, 2.5, 32, clock=0.0)
    progress.update(11, np.float32(0.25), 320, clock=5.0)
    first, second = out.getvalue().splitlines()
    assert first == "step 1/100  loss 2.5000"
    assert second == "step 11/100  loss 0.2500  64 images/s  ETA 0:44"  # 89 steps at 0.5 s


def test_a_terminal_gets_one_rewritten_line_and_kept_sentences():
    out = Terminal()
    progress = Progress(10, out, every=0)
    progress.update(1, 12345.0, 32, clock=0.0)
    progress.update(2, 1.0, 32, clock=1.0)
    assert out.getvalue().count("\n") == 0 and out.getvalue().count("\r") == 2
    progress.say("accuracy 0.9")
    assert out.getvalue().endswith("\raccuracy 0.9\n")
    progress.end()
    assert out.getvalue().endswith("\raccuracy 0.9\n")


def test_between_two_lines_the_loss_is_not_fetched():
    class Loss:
        def __float__(self) -> float:
            raise AssertionError

    out = io.StringIO()
    progress = Progress(100, out, every=1000)
    progress.update(1, 1.0, 32)
    progress.update(2, Loss(), 32)
    progress.update(100, 0.5, 32)  # the last step is always shown
    assert len(out.getvalue().splitlines()) == 2


def test_durations():
    assert [duration(x) for x in (0.4, 75, 7500)] == ["0:00", "1:15", "2:05:00"]


def test_the_size_of_xlas_thread_pool_is_recorded(monkeypatch):
    monkeypatch.setenv("NPROC", "3")
    assert provenance.cpu_threads() == 3
    assert provenance.hardware()["variables"]["NPROC"] == "3"
    monkeypatch.delenv("NPROC")
    assert provenance.cpu_threads() == len(os.sched_getaffinity(0))


def test_a_cpu_run_does_not_go_on_under_another_thread_pool(tmp_path, monkeypatch):
    monkeypatch.setenv("NPROC", "3")
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
    monkeypatch.setenv("NPROC", "4")
    with pytest.raises(ConfigError, match=r"with 3 CPU threads, this process has 4.*NPROC=3"):
        open_run(tmp_path)
    workdir.require_same_threads(tmp_path, "gpu", 4)  # there the pool does not matter
    monkeypatch.setenv("BN_JAX_ANY_THREADS", "1")
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
