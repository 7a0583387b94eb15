"""Where the time of a run went: parts that sum to the wall, lost work, killed attempts."""

import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest

from bn_jax.workdir import guard, timing
from tests.support.small_runs import open_run, read_json, train


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
    found = timing.account(lines, [0, 10, 10])
    assert found["wall"] == 15 + 4 + 11
    assert found["lost"] == 4 + 2
    assert found["parts"]["step"] == 11 + 2 + 11
    assert timing.account(lines, [0, 10, 5])["lost"] == 14 + 4  # went back behind both
    assert timing.account([], [0])["wall"] == 0


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
        "import time; from bn_jax.workdir import timing;"
        "a, b = [timing.process_started() for _ in 'ab'];"
        "print(time.monotonic() - a, time.monotonic() - b)"
    )
    root = pathlib.Path(guard.__file__).parents[2]
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
