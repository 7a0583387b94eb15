"""Of two processes one is killed, frozen, hangs or raises: both end within 30 s."""

import concurrent.futures
import json
import os
import pathlib
import re
import signal
import time

import pytest

from bn_jax.distributed import watchdog
from bn_jax.distributed.watchdog import (
    ALWAYS,
    FACTOR,
    FIRST,
    FROZEN,
    OUTSIDE,
    STEP_SHARE,
    Dispatches,
    Place,
    StallDetector,
)
from bn_jax.errors import ConfigError, DataError, DivergedError, PeerLostError
from bn_jax.workdir import checkpoint
from tests.support.processes import TRAIN, spawn

PROMISED = 30.0  # seconds
SECRET = "hunter2-51bd09e6"  # planted in the environment


# When the loop is stuck: without a clock.


def stuck_after(place: Place, *, always: float = ALWAYS) -> float:
    """Seconds after which a loop that stays in `place` is found to be stuck."""
    detector = StallDetector(always)
    for second in range(4000):
        if detector.look(place, 100.0 + second):
            return second
    raise AssertionError("never")


@pytest.mark.parametrize(
    ("part", "slowest", "limit"),
    [
        ("input", 0.5, ALWAYS),
        ("input", 4.0, FACTOR * 4.0),
        ("input", None, FIRST),
        ("step", 0.5, STEP_SHARE * ALWAYS),
        ("step", 4.0, STEP_SHARE * FACTOR * 4.0),
        ("step", None, STEP_SHARE * FIRST),
        ("save", 0.5, OUTSIDE),
        ("evaluate", None, OUTSIDE),
        ("compile", 4.0, OUTSIDE),
        ("other", 0.5, OUTSIDE),
    ],
)
def test_how_long_a_loop_may_stay_in_one_place(part, slowest, limit):
    assert stuck_after(Place(7, part, slowest)) == limit + 1


def test_slow_storage_is_given_more_time():
    assert stuck_after(Place(7, "input", 0.5), always=120.0) == 121
    assert stuck_after(Place(7, "save", 0.5), always=2000.0) == 2001


def test_a_loop_that_advances_is_not_stuck():
    detector = StallDetector()
    now = 0.0
    for step in range(20):
        for part in ("input", "step"):
            for _ in range(int(ALWAYS)):
                assert detector.look(Place(step, part, 0.5), now) == ""
                now += 1.0


def test_the_line_says_where_it_is_stuck():
    detector = StallDetector()
    for second in range(21):
        assert detector.look(Place(1200, "input", 0.5), float(second)) == ""
    said = detector.look(Place(1200, "input", 0.5), 21.0)
    assert said == "no progress for 20 s in 'input' of step 1,200"


def test_time_in_which_the_process_itself_did_not_run_does_not_count():
    detector = StallDetector()
    place = Place(7, "step", 0.5)
    assert detector.look(place, 0.0) == ""
    assert detector.look(place, 1000.0) == ""  # stopped and woken up
    assert detector.look(place, 1000.0 + FROZEN) == ""
    for second in range(1, 26):
        late = detector.look(place, 1000.0 + second)
    assert late == ""
    assert detector.look(place, 1026.0) != ""


def test_the_first_dispatch_counts_until_there_is_another():
    dispatches = Dispatches()
    assert dispatches.slowest() is None
    for total, slowest in ((30.0, 30.0), (31.0, 1.0), (33.0, 2.0), (33.5, 2.0)):
        dispatches.finished(total)
        assert dispatches.slowest() == slowest
    for total in range(40, 60):
        dispatches.finished(total)
    assert dispatches.slowest() == 6.5
    dispatches.finished(60)
    assert dispatches.slowest() == 1.0  # the last 20


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_a_time_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("BN_JAX_STEP_TIMEOUT", text)
    with pytest.raises(ConfigError, match=f"BN_JAX_STEP_TIMEOUT={text} must be a positive number"):
        watchdog.step_timeout()


def test_one_process_is_left_alone():
    with pytest.raises(ZeroDivisionError), watchdog.Watchdog():
        1 / 0  # noqa: B018
    with pytest.raises(ValueError, match="^Gloo"), watchdog.reporting_lost_processes():
        raise ValueError("Gloo all-reduce failed")


def test_the_error_of_a_collective_says_that_a_process_is_lost(monkeypatch):
    monkeypatch.setattr(watchdog.jax, "process_count", lambda: 2)
    said = "has lost another process .*Gloo all-reduce failed: x"
    with pytest.raises(PeerLostError, match=said), watchdog.reporting_lost_processes():
        raise ValueError("UNKNOWN: Gloo all-reduce failed: x\nand more")
    for error in (ValueError("shapes differ"), DataError("the file Gloo.jpg is damaged")):
        with pytest.raises(type(error)) as caught, watchdog.reporting_lost_processes():
            raise error
        assert caught.value is error


# In earnest: the trainer, with a fault in one of two processes.

# argv is the fault, the process, the rest.
FAULTY = """
import os, runpy, signal, sys, time
from bn_jax import train
from bn_jax.errors import DataError, DivergedError
_, fault, culprit, *rest = sys.argv
sys.argv = ["bn_jax.main", *rest]
real, save = train.feed, train.Checkpoints.save
mine = os.environ["JAX_PROCESS_ID"] == culprit

def feed(*arguments):
    for number, fed in enumerate(real(*arguments)):
        if number == 5 and mine and fault != "saves slowly":
            print("fault", flush=True)
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif fault == "hangs":
                time.sleep(600)
            elif fault == "diverges":
                raise DivergedError("diverged at step 25")
            else:
                raise DataError("record 7 of shard 3 is damaged")
        yield fed

def slow_save(self, step, *arguments, **more):
    save(self, step, *arguments, **more)
    if step == 20 and mine and fault == "saves slowly":
        time.sleep(20)

train.feed, train.Checkpoints.save = feed, slow_save
runpy.run_module("bn_jax.main", run_name="__main__", alter_sys=True)
"""
SHORT = ["--config.steps_per_dispatch=5", "--config.checkpoint_every=10", "--config.log_every=5"]
LOST = PeerLostError.exit_code
ABORTED = -signal.SIGABRT  # by jax; 134 in a shell
# fault, exit codes of the process at fault, what its last line says. One that is woken up learns
# from jax that it counts as lost, or from a collective that the other is gone.
KINDS = {
    "killed": ([-signal.SIGKILL], ""),
    "frozen": ([LOST, ABORTED], ""),
    "hangs": ([LOST], r"no progress for \d+ s in 'input' of step 25; the newest checkpoint"),
    "raises": ([DataError.exit_code], "record 7 of shard 3 is damaged"),
    "diverges": ([DivergedError.exit_code], "diverged at step 25"),
}
# Runs side by side, since most of their time is waiting: the fault and the process that has it.
CASES = [
    [("killed", 1), ("raises", 0)],
    pytest.param([("killed", 0), ("raises", 1)], marks=pytest.mark.faults),
    pytest.param([("frozen", 0), ("frozen", 1)], marks=pytest.mark.faults),
    pytest.param([("hangs", 0), ("hangs", 1)], marks=pytest.mark.faults),
    pytest.param([("diverges", 0), ("diverges", 1)], marks=pytest.mark.faults),
]


@pytest.mark.parametrize("cases", CASES, ids=str)
def test_all_processes_end(tmp_path, cases, measured, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as beside:
        runs = [beside.submit(inject, tmp_path / str(case), *case) for case in cases]
    seconds = [run.result() for run in runs]
    for (fault, culprit), took in zip(cases, seconds, strict=True):
        measured(f"{fault} process {culprit} of 2", injected=1, detected=1, lost=0, seconds=took)


def last_message(log: pathlib.Path) -> str:
    """The program's last line on stderr; jax's own threads may write more before the end."""
    text = log.read_text()
    lines = [line for line in text.splitlines() if line.startswith("bn_jax: ")]
    assert lines, text
    return lines[-1]


def inject(folder: pathlib.Path, fault: str, culprit: int) -> float:
    """A run of two processes with the fault: seconds until both have ended, as they should."""
    own_codes, said = KINDS[fault]
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
    assert other.wait(120) in (LOST, ABORTED), logs[1 - culprit].read_text()
    took = time.monotonic() - began
    if fault == "frozen":
        os.kill(mine.pid, signal.SIGCONT)  # only then can it end: within as long again
        began = time.monotonic()
    assert mine.wait(120) in own_codes, logs[culprit].read_text()
    took = max(took, time.monotonic() - began)

    limit = 0.0
    if said:
        last = last_message(logs[culprit])
        assert re.search(said, last), last
        if fault == "hangs":
            # On a machine so busy that dispatches take seconds a hang is given ten times as long.
            limit = float(re.search(r"for (\d+) s", last)[1])
    if other.returncode == LOST:
        last = last_message(logs[1 - culprit])
        assert last.startswith(f"bn_jax: process {1 - culprit} has lost another process ("), last
    assert took < PROMISED + max(0.0, limit - ALWAYS), took

    # Whole, and the last one that was due; process 0 may have been ended while it wrote that.
    saved = sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))
    main = children[0].returncode
    assert saved[-1] == 20 or (saved[-1] == 10 and main in (ABORTED, -signal.SIGKILL))
    newest = workdir / "checkpoints" / str(saved[-1])
    checkpoint.check_files(newest, checkpoint.load_manifest(newest, saved[-1]))
    run = json.loads((workdir / "run.json").read_text())
    if main == -signal.SIGKILL:
        assert run["status"] == "running"  # the next start says so
    elif main == ABORTED:  # perhaps after it had closed its records
        assert run["status"] in ("running", "failed")
    else:
        assert run["status"] == ("diverged" if main == DivergedError.exit_code else "failed")
        assert culprit or re.search(said, run["results"]["error"])
        assert sum(run["ledger"]["parts"].values()) == pytest.approx(
            run["ledger"]["wall"], rel=0.01
        )
        assert not (workdir / "lock").exists()
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 8 and not [p for p in files if SECRET.encode() in p.read_bytes()]
    return took


@pytest.mark.faults
def test_a_slow_save_is_not_a_stall(tmp_path, monkeypatch):
    """Process 0 saves for longer than a step may take, while process 1 has nothing to do."""
    monkeypatch.setenv("BN_JAX_STEP_TIMEOUT", "0.5")
    options = [*TRAIN[2:], *SHORT, "--config.total_steps=30", f"--workdir={tmp_path / 'run'}"]
    children = spawn(["-c", FAULTY, "saves slowly", "0", *options], tmp_path / "log", processes=2)
    codes = [child.wait(240) for child in children]
    assert codes == [0, 0], [(tmp_path / f"log.{i}").read_text() for i in range(2)]


@pytest.mark.faults
def test_where_all_diverge_all_say_so(tmp_path):
    options = [*TRAIN, *SHORT, "--config.learning_rate=1e30", f"--workdir={tmp_path / 'run'}"]
    children = spawn(options, tmp_path / "log", processes=2)
    codes = [child.wait(240) for child in children]
    logs = [(tmp_path / f"log.{i}").read_text() for i in range(2)]
    assert codes == [DivergedError.exit_code] * 2, logs
    assert all("bn_jax: diverged at step" in text for text in logs)
