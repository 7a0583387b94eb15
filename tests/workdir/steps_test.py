"""Killed in the middle of a save: what was saved is whole, what was not is cleaned away."""

import pathlib
import random
import shutil
import subprocess
import sys
import time

import pytest

from tests.support import processes
from tests.support.small_states import is_state_of, open_checkpoints, save_three, state_at

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three good steps: 10, 20, 30."""
    return save_three(tmp_path_factory.mktemp("template") / "checkpoints")


SAVE_FOREVER = """
import pathlib, sys
sys.path[:0] = sys.argv[1:3]
from tests.support.small_states import open_checkpoints, state_at
with open_checkpoints(pathlib.Path(sys.argv[3])) as checkpoints:
    found = checkpoints.restore(state_at(0))
    step = found[0] if found else 0
    print("start", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, state_at(step), meta={"step": step})
        checkpoints.wait()
        print("saved", step, flush=True)
"""


def test_sigkill_during_saves_loses_nothing_that_was_saved(tmp_path: pathlib.Path):
    directory, rng, newest = tmp_path / "checkpoints", random.Random(4), 0
    command = [sys.executable, "-c", SAVE_FOREVER, str(ROOT), str(ROOT / "tests"), str(directory)]
    for _ in range(4):  # the trainer itself is killed by other tests; this one hits only saves
        with (tmp_path / "log").open("w+") as log:
            child = processes.start(command, stdout=log, stderr=subprocess.STDOUT)
            deadline = time.monotonic() + 60
            while "saved" not in (text := (tmp_path / "log").read_text()):
                assert child.poll() is None and time.monotonic() < deadline, text
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            child.kill()
            child.wait()
        lines = (tmp_path / "log").read_text().split("\n")
        assert lines[0].startswith("start ") and int(lines[0].split()[1]) >= newest, lines
        newest = int([line for line in lines if line.startswith("saved")][-1].split()[1])
    with open_checkpoints(directory) as checkpoints:
        step, state, meta = checkpoints.restore(state_at(0)) or pytest.fail()
    assert step in (newest, newest + 1) and is_state_of(step, state) and meta == {"step": step}
    names = [p.name for p in directory.iterdir()]
    assert not [n for n in names if n.startswith(("tmp", ".", "quarantine"))], names


def test_unfinished_saves_are_cleaned_and_never_restored(template, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(template, directory)
    shutil.copytree(directory / "30", directory / "tmp.40")
    shutil.copytree(directory / "10", directory / "tmp.delete.5")
    (directory / ".index.json.77.tmp").write_text("{")
    with open_checkpoints(directory) as checkpoints:
        step, _, _ = checkpoints.restore(state_at(0)) or pytest.fail()
    assert step == 30
    assert sorted(p.name for p in directory.iterdir()) == ["10", "20", "30", "index.json"]
