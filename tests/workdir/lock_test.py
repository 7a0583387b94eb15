"""One run a workdir: who holds it, and what becomes of the lock of one that is gone."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from bn_jax.errors import LockedError
from bn_jax.workdir import guard
from tests.support.small_runs import CONFIG, open_run


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
    held = guard.WorkdirLock(tmp_path, watch=0.2)  # silent: taken over
    assert "host elsewhere" in held.taken_over
    held.release()

    (tmp_path / "lock").write_text(text)
    beat = subprocess.Popen(["sh", "-c", f"sleep 0.3; touch '{tmp_path}/lock'"])
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
