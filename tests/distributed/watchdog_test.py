"""Of two processes one is killed, frozen, hangs or raises: both end within 30 s and name it."""

import concurrent.futures
import json
import os
import pathlib
import re
import signal
import time

import pytest

from bn_jax.distributed import watchdog
from bn_jax.errors import ConfigError, DataError, PeerLostError
from bn_jax.workdir import checkpoint
from tests.support.processes import TRAIN, spawn

PROMISED = 30.0  # seconds
SECRET = "hunter2-51bd09e6"  # planted in the environment

# The trainer, with a fault in the input of one process: argv is the fault, the process, the rest.
FAULTY = """
import os, runpy, signal, sys, time
from bn_jax import train
from bn_jax.errors import DataError
_, fault, culprit, *rest = sys.argv
sys.argv = ["bn_jax.main", *rest]
real = train.feed

def feed(*arguments):
    for number, fed in enumerate(real(*arguments)):
        if number == 5 and os.environ["JAX_PROCESS_ID"] == culprit:
            print("fault", flush=True)
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif fault == "hangs":
                time.sleep(600)
            else:
                raise DataError("record 7 of shard 3 is damaged")
        yield fed

train.feed = feed
runpy.run_module("bn_jax.main", run_name="__main__", alter_sys=True)
"""
SHORT = ["--config.steps_per_dispatch=5", "--config.checkpoint_every=10", "--config.log_every=5"]
LOST = PeerLostError.exit_code
# fault, what the line says of it, exit codes of the culprit and of the other one
KINDS = {
    "killed": ("was killed, or its machine failed", -signal.SIGKILL, LOST),
    "frozen": ("has given no sign of life for 15 s:", LOST, LOST),
    "hangs": (r"has been in 'input' of step 25 for \d+ s and does not go on", LOST, LOST),
    "raises": ("ended with DataError: record 7 of shard 3 is damaged", DataError.exit_code, LOST),
}
# Runs side by side, since most of their time is waiting: the fault and the process that has it.
CASES = [
    [("killed", 1), ("raises", 0)],
    pytest.param([("killed", 0), ("raises", 1)], marks=pytest.mark.faults),
    pytest.param([("frozen", 0), ("frozen", 1)], marks=pytest.mark.faults),
    pytest.param([("hangs", 0), ("hangs", 1)], marks=pytest.mark.faults),
]


@pytest.mark.parametrize("cases", CASES, ids=str)
def test_all_processes_end_and_name_the_culprit(tmp_path, cases, measured, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as beside:
        runs = [beside.submit(inject, tmp_path / str(case), *case) for case in cases]
    seconds = [run.result() for run in runs]
    for (fault, culprit), took in zip(cases, seconds, strict=True):
        measured(f"{fault} process {culprit} of 2", injected=1, detected=1, lost=0, seconds=took)


def inject(folder: pathlib.Path, fault: str, culprit: int) -> float:
    """A run of two processes with the fault: seconds until both have ended, as they should."""
    said, own_code, code = KINDS[fault]
    folder.mkdir()
    workdir, log = folder / "run", folder / "log"
    arguments = ["-c", FAULTY, fault, str(culprit), *TRAIN[2:], *SHORT, f"--workdir={workdir}"]
    children = spawn(arguments, log, processes=2)
    mine, other = children[culprit], children[1 - culprit]
    logs = [log.with_suffix(f".{i}") for i in range(2)]
    deadline = time.monotonic() + 240
    while "fault\n" not in logs[culprit].read_text():
        assert all(c.poll() is None for c in children), [x.read_text() for x in logs]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    assert other.wait(120) == code, logs[1 - culprit].read_text()
    took = time.monotonic() - began
    if fault == "frozen":
        os.kill(mine.pid, signal.SIGCONT)  # only then can it end: within as long again
        began = time.monotonic()
    assert mine.wait(120) == own_code, logs[culprit].read_text()
    took = max(took, time.monotonic() - began)
    last = logs[1 - culprit].read_text().strip().splitlines()[-1]
    assert last.startswith(f"bn_jax: process {culprit} (host "), last
    assert re.search(rf"pid {mine.pid}\) {said}", last), last
    # On a machine so busy that dispatches take seconds a hang is given ten times as long.
    limit = float(re.search(r"for (\d+) s", last)[1]) if fault == "hangs" else 0.0
    assert took < PROMISED + max(0.0, limit - watchdog.STUCK), took

    # Whole, and the last one that was due; process 0 may have been killed while it wrote that.
    saved = sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))
    assert saved[-1] == 20 or (saved[-1] == 10 and (fault, culprit) == ("killed", 0))
    newest = workdir / "checkpoints" / str(saved[-1])
    checkpoint.check_files(newest, checkpoint.load_manifest(newest, saved[-1]))
    run = json.loads((workdir / "run.json").read_text())
    if culprit and fault != "frozen":
        assert run["status"] == "failed" and re.search(said, run["results"]["error"])
        assert sum(run["ledger"]["parts"].values()) == pytest.approx(
            run["ledger"]["wall"], rel=0.01
        )
        assert not (workdir / "lock").exists()
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 8 and not [p for p in files if SECRET.encode() in p.read_bytes()]
    return took


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_a_time_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("BN_JAX_STEP_TIMEOUT", text)
    with pytest.raises(ConfigError, match=f"BN_JAX_STEP_TIMEOUT={text}: not a positive number"):
        watchdog.step_timeout()


def test_one_process_starts_nothing(tmp_path: pathlib.Path):
    with watchdog.Watchdog() as watch, watch.blaming():
        assert watch._star is None
    with pytest.raises(ZeroDivisionError), watchdog.Watchdog() as watch, watch.blaming():
        1 / 0  # noqa: B018
