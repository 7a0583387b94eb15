"""What runs have recorded, read back: which kinds of lines there are, what may be compared."""

import json
import os
import pathlib
from typing import Any

import pytest

from bn_jax.errors import ConfigError
from bn_jax.workdir import reader
from bn_jax.workdir.lines import ActivationLine, EvalLine, TrainLine
from configs import mnist
from tests.support.small_runs import open_run


def write_run(workdir: pathlib.Path, *, seed: int = 0, **data: Any) -> pathlib.Path:
    """A recorded run without lines."""
    config = mnist.get_config("digits")
    config.seed = seed
    data = {"name": "digits", "split": "test", "description": "", "eval_examples": 1000} | data
    run = {"config": config.to_dict(), "info": {"data": data}, "status": "done", "results": {}}
    workdir.mkdir(parents=True)
    (workdir / "run.json").write_text(json.dumps(run | {"source": {}, "hardware": {}}))
    (workdir / "metrics.jsonl").write_text("")
    return workdir


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"eval_examples": 999}, r"number of evaluated examples \(1000, 999\)"),
        ({"description": "other"}, "data.description"),
    ],
)
def test_runs_on_other_data_are_not_compared(tmp_path, changed, said):
    write_run(tmp_path / "mnist" / "seed_0")
    write_run(tmp_path / "mnist" / "seed_1", seed=1)
    (group,) = reader.read_groups(tmp_path).values()
    assert [run.config["seed"] for run in group] == [0, 1]
    write_run(tmp_path / "mnist" / "seed_2", seed=2, **changed)
    with pytest.raises(ConfigError, match=said):
        reader.read_groups(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"config": {}', "it is damaged"),
        ('{"config": {}}', "it has no 'info'"),
        ('{"info": {}}', "it has no 'config'"),
        ('{"config": 1, "info": {}}', "it is damaged"),
        ('{"config": {}, "info": []}', "info is not an object"),
        ("[]", "it is damaged"),
        ("", "it is damaged"),
    ],
)
def test_a_file_that_is_not_a_record_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=f"run.json cannot be read .*{said}") as caught:
        reader.read_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_a_record_there_is_no_run(tmp_path):
    assert reader.read_record(tmp_path) is None
    (tmp_path / "file").write_text("")
    assert reader.read_record(tmp_path / "file") is None
    with pytest.raises(ConfigError, match="is not a run directory"):
        reader.require_record(tmp_path)


def test_half_a_line_and_unknown_kinds_are_not_read(tmp_path):
    run = write_run(tmp_path / "run")
    whole = {"step": 1, "kind": "eval", "top1": 0.5}
    other = {"step": 1, "kind": "of a later version"}
    text = f"{json.dumps(whole)}\n{json.dumps(other)}\n" + '{"step": 2, "ki'
    (run / "metrics.jsonl").write_text(text)
    assert reader.read_run(run).lines == {
        "train": [],
        "eval": [whole],
        "test": [],
        "activation": [],
    }


def test_a_field_of_a_config_has_one_flat_name():
    tree = {"a": 1, "data": {"name": "x", "sizes": (1, 2)}, "empty": {}}
    assert reader.flat(tree) == {"a": 1, "data.name": "x", "data.sizes": (1, 2)}


def test_lines_are_as_their_types_say(tmp_path):
    """The recorder's own lines; the trainer's are compared in train_test."""
    assert {"step", "kind"} <= TrainLine.__required_keys__
    assert EvalLine.__optional_keys__ == {"running_gap"}
    assert {f"p{p}" for p in (15, 50, 85)} <= ActivationLine.__required_keys__
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
    (first, *_) = (tmp_path / "timing.jsonl").read_text().splitlines()
    assert list(json.loads(first)) == ["attempt", "step", "wall", "parts"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("part", ["", "run.json", "metrics.jsonl"])
def test_a_run_of_another_user_is_one_line(tmp_path, part):
    run = write_run(tmp_path / "closed" / "run")
    place = run / part if part else run.parent
    place.chmod(0)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match="cannot be read.*Permission denied") as caught:
            reader.read_run(run)
    finally:
        os.seteuid(0)
        place.chmod(0o700)
    assert "\n" not in str(caught.value)


def test_both_records_make_a_run(tmp_path):
    for name in (reader.RUN, reader.METRICS):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("{}")
        assert not reader.is_run(folder)
    assert list(reader.find_runs(tmp_path)) == []
    (folder / reader.RUN).write_text("{}")
    assert reader.is_run(folder) and list(reader.find_runs(tmp_path)) == [folder]


def test_seeds_are_in_the_order_of_their_numbers(tmp_path):
    """Not of their folders' names, in which 10 is before 2."""
    for seed in (2, 10):
        write_run(tmp_path / "net" / f"seed_{seed}", seed=seed)
    groups = reader.read_groups(tmp_path)
    assert [run.config["seed"] for run in groups["net"]] == [2, 10]


def test_a_run_counts_once_whatever_links_lead_to_it(tmp_path):
    """`latest`, and a link to the folder above. (A run was an experiment of its own for each link
    to it, and 40 of them where links make a circle.)"""
    runs = tmp_path / "runs"
    write_run(runs / "net" / "seed_0")
    (runs / "latest").symlink_to(runs / "net" / "seed_0")
    (runs / "a_latest").symlink_to("net")
    (runs / "net" / "all").symlink_to(runs)
    (runs / "self").symlink_to("self")
    assert list(reader.find_runs(runs)) == [runs / "net" / "seed_0"]
    # Links that lead elsewhere are how results of several disks are put together.
    write_run(tmp_path / "disk" / "other" / "seed_0")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "disk")
    (runs / "more").symlink_to(tmp_path / "disk")
    assert list(reader.find_runs(runs)) == [
        runs / "more" / "other" / "seed_0", runs / "net" / "seed_0"
    ]  # fmt: skip
    assert list(reader.find_runs(runs / "latest")) == [runs / "latest"]


def test_hidden_copies_of_runs_are_not_runs(tmp_path):
    """(A copy that a notebook server keeps was a second seed 0 or an experiment of its own.)"""
    write_run(tmp_path / "net" / "seed_0")
    write_run(tmp_path / ".ipynb_checkpoints" / "net" / "seed_0")
    write_run(tmp_path / "net" / "._seed_0")
    assert list(reader.find_runs(tmp_path)) == [tmp_path / "net" / "seed_0"]


def test_records_that_an_editor_has_marked_are_read(tmp_path):
    """A byte order mark and Windows' line ends. (Of metrics.jsonl the mark was damage.)"""
    workdir = write_run(tmp_path / "net" / "seed_0")
    line = b'{"step": 1, "kind": "eval", "top1": 0.5, "top5": 0.9, "examples": 10}'
    (workdir / "metrics.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n")
    record = (workdir / "run.json").read_bytes()
    (workdir / "run.json").write_bytes(b"\xef\xbb\xbf" + record.replace(b"\n", b"\r\n"))
    assert reader.read_run(workdir).lines["eval"][0]["top1"] == 0.5
