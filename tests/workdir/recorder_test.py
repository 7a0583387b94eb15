"""Run records: bit-equal metrics after a resume, what made the result, how a run ended."""

import itertools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.errors import DivergedError, Preempted
from bn_jax.workdir import files, provenance
from tests.support.small_runs import open_run, read_json, train


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


def test_lines_wait_for_the_seconds_between_two_writes(tmp_path, monkeypatch):
    """As in a bucket, which takes one write a second of each file."""
    now = 1000.0
    monkeypatch.setattr(files.time, "monotonic", lambda: now)
    recorder = open_run(tmp_path, write_seconds=30.0)
    recorder.begin(0)

    def steps(name: str) -> list[int]:
        text = (tmp_path / name).read_text()
        return [json.loads(line)["step"] for line in text.splitlines()]

    written = []
    for step in range(2, 70, 2):  # a line every two seconds
        now = 1000.0 + step
        recorder.write("train", step, loss=0.5)
        written.append((len(steps("metrics.jsonl")), len(steps("timing.jsonl"))))
    changes = [now != before for before, now in itertools.pairwise(written)]
    assert sum(changes) == 4  # of metrics.jsonl after 32 and 62 s, of timing.jsonl after 30 and 60
    recorder.sync()  # as before a checkpoint
    assert steps("metrics.jsonl") == list(range(2, 70, 2))
    recorder.write("train", 70, loss=0.5)
    assert steps("metrics.jsonl")[-1] == 68
    recorder.finish("preempted")
    assert steps("metrics.jsonl")[-1] == steps("timing.jsonl")[-1] == 70


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


def test_an_attempt_that_could_not_record_its_end_is_said_to_be_killed(tmp_path, capsys):
    for status, said in (("running", True), ("done", False)):
        with open_run(tmp_path) as recorder:
            recorder.begin(0)
        run = read_json(tmp_path)
        run["attempts"][-1]["status"] = status
        (tmp_path / "run.json").write_text(json.dumps(run))
        capsys.readouterr()
        with open_run(tmp_path) as recorder:
            recorder.begin(0)
        assert ("previous attempt was killed, or jax ended it" in capsys.readouterr().out) is said


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


def test_time_is_marked_after_training_lines_only(tmp_path: pathlib.Path):
    def marks() -> list[int]:
        text = (tmp_path / "timing.jsonl").read_text()
        return [json.loads(line)["step"] for line in text.splitlines()]

    with open_run(tmp_path) as recorder:
        recorder.begin(0)
        recorder.write("train", 3, loss=0.5)
        assert marks() == [0, 3]
        recorder.write("eval", 4, top1=0.5)
        recorder.write("activation", 4, layer="x", p50=[0.5])
        assert marks() == [0, 3]
        recorder.write("train", 5, loss=0.5)
        assert marks() == [0, 3, 5]
    assert marks() == [0, 3, 5, 5]  # and at the end
