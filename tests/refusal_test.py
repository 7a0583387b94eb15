"""Every wrong config by the command: exit code 2, one line, nothing written, in how long."""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from tests.experiment.config_test import WRONG
from tests.support.processes import ROOT

pytestmark = pytest.mark.faults
REAL = 6  # one in so many is a process of its own, for the time that it takes

# What most of that time goes into is imported once; then each line of input, the words of a command
# line, is the command in a fork, but for what Python does to exit. Each line of output: exit code
# and stderr.
FORKS = """
import json, os, runpy, sys, tempfile
import bn_jax.experiment.config
for line in sys.stdin:
    with tempfile.TemporaryFile() as text:
        pid = os.fork()
        if not pid:
            os.dup2(text.fileno(), 2)
            sys.argv = ["bn_jax.main", *json.loads(line)]
            try:
                runpy.run_module("bn_jax.main", run_name="__main__", alter_sys=True)
            except SystemExit as end:
                sys.stderr.flush()
                os._exit(end.code)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        text.seek(0)
        print(json.dumps([code, text.read().decode()]), flush=True)
"""


def words(folder: pathlib.Path, index: int) -> list[str]:
    """The command line of a case."""
    experiment, changes, _ = WRONG[index]
    name, scale = experiment.split(":")
    found = [f"--config=configs/{name}.py:{scale}", f"--workdir={folder / f'run{index}'}"]
    return found + [f"--config.{field}={value}" for field, value in changes.items()]


def python(folder: pathlib.Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")},
        input=text,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def refuse(folder: pathlib.Path, index: int) -> tuple[float, int, str]:
    """Seconds, exit code and stderr of one command line as a user types it."""
    began = time.monotonic()
    done = python(folder, "-m", "bn_jax.main", *words(folder, index))
    return time.monotonic() - began, done.returncode, done.stderr


def test_each_wrong_config_is_refused_by_the_command(tmp_path, measured):
    assert len(WRONG) >= 40
    lines = [json.dumps(words(tmp_path, index)) for index in range(len(WRONG))]
    with concurrent.futures.ThreadPoolExecutor(2) as two:
        forks = two.submit(python, tmp_path, "-c", FORKS, text="\n".join(lines))
        alone = list(two.map(lambda i: refuse(tmp_path, i), range(0, len(WRONG), REAL)))
    found = [json.loads(line) for line in forks.result().stdout.splitlines()]
    assert len(found) == len(WRONG), forks.result().stderr
    for (code, text), case in zip(found, WRONG, strict=True):
        assert code == 2 and len(text.strip().splitlines()) == 1, (case, text)
        assert text.startswith("bn_jax: "), (case, text)
    assert [tuple(each[1:]) for each in alone] == [tuple(each) for each in found[::REAL]]
    assert not list(tmp_path.iterdir())  # nothing written, nothing compiled
    slowest = max(seconds for seconds, _, _ in alone)
    measured("wrong configs, slowest refusal", injected=len(found), detected=len(found), lost=0,
             seconds=slowest)  # fmt: skip
