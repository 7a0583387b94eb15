"""One run a workdir: who holds it, and what becomes of the lock of one that is gone."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from bn_jax.errors import LockedError
from bn_jax.workdir import guard
from tests.support import processes
from tests.support.small_runs import CONFIG, open_run, train


def test_a_second_run_is_refused_and_names_the_first(tmp_path: pathlib.Path):
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
        for attempt in (guard.check_workdir, lambda w, c: open_run(w, config=c)):
            with pytest.raises(
                LockedError, match=f"host {socket.gethostname()}, pid {os.getpid()}"
            ):
                attempt(tmp_path, CONFIG)
    with open_run(tmp_path) as recorder:
        recorder.begin(0)


HOLD = """
import pathlib, sys, time
from bn_jax.workdir import guard
held = guard.WorkdirLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_taken_over_with_a_line(tmp_path, capsys):
    root = pathlib.Path(guard.__file__).parents[2]
    holder = processes.start(
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
    held = guard.WorkdirLock(tmp_path, watch=0.2)  # silent: taken over
    assert "host elsewhere" in held.taken_over
    held.release()

    (tmp_path / "lock").write_text(text)
    beat = processes.start(["sh", "-c", f"sleep 0.3; touch '{tmp_path}/lock'"])
    with pytest.raises(LockedError, match="host elsewhere, pid 1"):
        guard.WorkdirLock(tmp_path, watch=5)
    beat.wait()
    assert json.loads((tmp_path / "lock").read_text())["host"] == "elsewhere"


def test_a_live_lock_beats(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.setattr(guard, "BEAT", 0.01)
    held = guard.WorkdirLock(tmp_path)
    os.utime(tmp_path / "lock", (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / "lock").stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "lock").stat().st_mtime > 0
    held.release()
    held.release()  # does nothing


def test_a_run_that_lost_its_workdir_writes_nothing_more(tmp_path, monkeypatch):
    """On a disk without flock, as between hosts: the first run was paused, a second took over."""
    monkeypatch.setattr(guard.fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(socket, "gethostname", lambda: "one")
    first = open_run(tmp_path)
    first.begin(0)
    train(first, 1, 4)
    first._lock._stop.set()  # no heartbeat while it is paused
    first._lock._beat.join()

    monkeypatch.setattr(socket, "gethostname", lambda: "two")
    monkeypatch.setattr(guard.WorkdirLock.__init__, "__defaults__", (0.2,))
    second = open_run(tmp_path)
    second.begin(4)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for attempt in (lambda: train(first, 5, 6), first.sync):
        with pytest.raises(LockedError, match="taken over by another run") as caught:
            attempt()
    first.fail(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    train(second, 5, 6)
    second.finish("done")
    assert not (tmp_path / "lock").exists()


PAUSED = """
import fcntl, pathlib, socket, sys
fcntl.flock = lambda *_: None  # as between hosts without it
socket.gethostname = lambda: "paused"
from bn_jax.workdir import guard
guard.BEAT = 0.1
lock = guard.WorkdirLock(pathlib.Path(sys.argv[1]))
with open(sys.argv[2], "a") as out:
    while True:
        lock.require_held()
        out.write("line\\n")
        out.flush()
"""


def test_a_holder_that_was_stopped_notices_before_it_writes(tmp_path, monkeypatch):
    """SIGSTOP, another host takes over, SIGCONT: at most the line it was stopped in is written."""
    out = tmp_path / "out"
    holder = processes.start(
        [sys.executable, "-c", PAUSED, str(tmp_path), str(out)],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(guard.__file__).parents[2])},
    )
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    holder.send_signal(signal.SIGSTOP)
    time.sleep(0.1)

    monkeypatch.setattr(guard.fcntl, "flock", lambda *_: None)
    mine = guard.WorkdirLock(tmp_path, watch=1.0)
    assert "host paused" in mine.taken_over
    before = out.read_text().count("\n")
    holder.send_signal(signal.SIGCONT)
    _, error = holder.communicate(timeout=60)
    assert out.read_text().count("\n") <= before + 1
    assert b"LockedError" in error
    mine.release()
