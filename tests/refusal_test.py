"""Every wrong config by the real command: exit code 2, one line, nothing written, in how long."""

import concurrent.futures
import os
import subprocess
import sys
import time

import pytest
from processes import ROOT
from validate_test import WRONG

pytestmark = pytest.mark.faults


def refuse(folder, index: int) -> tuple[float, int, str]:
    """Seconds, exit code and stderr of one command line."""
    experiment, changes, _ = WRONG[index]
    name, scale = experiment.split(":")
    workdir = folder / f"run{index}"
    words = [f"--config=configs/{name}.py:{scale}", f"--workdir={workdir}"]
    words += [f"--config.{field}={value}" for field, value in changes.items()]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "bn_jax.main", *words],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return time.monotonic() - began, done.returncode, done.stderr


def test_each_wrong_config_is_refused_by_the_command(tmp_path, measured):
    assert len(WRONG) >= 40
    with concurrent.futures.ThreadPoolExecutor(2) as two:
        found = list(two.map(lambda index: refuse(tmp_path, index), range(len(WRONG))))
    for (seconds, code, text), case in zip(found, WRONG, strict=True):
        assert code == 2 and len(text.strip().splitlines()) == 1, (case, seconds, text)
        assert text.startswith("bn_jax: "), (case, text)
    assert not list(tmp_path.iterdir())  # nothing written, nothing compiled
    slowest = max(seconds for seconds, _, _ in found)
    measured("wrong configs, slowest refusal", injected=len(found), detected=len(found), lost=0,
             seconds=slowest)  # fmt: skip
