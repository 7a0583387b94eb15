"""Processes that a test starts end with the test, when it fails, too."""

import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

FAILING = """
import os, pathlib, time
from tests.support.processes import start

def test_that_fails():
    pids = pathlib.Path(os.environ["PIDS"])
    start(["sh", "-c", f"sleep 300 & echo $$ $! > {pids}.part; mv {pids}.part {pids}; wait"])
    while not pids.exists():
        time.sleep(0.01)
    raise AssertionError("as a test fails in the middle")
"""


def is_running(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_children_and_their_children_end_when_a_test_fails(tmp_path):
    """(A preemption test that hung left two trainers that took the machine's time for minutes.)"""
    (tmp_path / "failing_test.py").write_text(FAILING)
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "BN_JAX_FAULTS"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, str(tmp_path / "failing_test.py")],
        cwd=ROOT,
        env=clean | {"PIDS": str(tmp_path / "pids"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "as a test fails in the middle" in done.stdout, done.stdout
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_process_that_outlives_a_statement_is_started_by_the_helper():
    """subprocess.run ends its child itself."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("*.py")
        if path != pathlib.Path(__file__) and "Popen(" in path.read_text()
    }
    assert found == {"tests/support/processes.py"}
