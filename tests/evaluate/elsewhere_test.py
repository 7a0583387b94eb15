"""A run that is used elsewhere: its data moved, other devices, a disk that cannot be written."""

import errno
import json
import pathlib
import shutil
import struct
import sys

import jax
import numpy as np
import pytest

from bn_jax import export, predict, train
from bn_jax.distributed import mesh
from bn_jax.errors import ConfigError
from bn_jax.evaluate import __main__ as evaluate
from bn_jax.evaluate.members import load_member, which_checkpoint
from bn_jax.experiment import build
from bn_jax.experiment.evaluator import Evaluator
from bn_jax.weights import network
from bn_jax.workdir.checkpoint import Checkpoints
from tests.support.small_members import save_member
from tests.train_test import small


def command(monkeypatch, capsys, *arguments):
    """What `python -m bn_jax.evaluate` prints, its last line, and what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    evaluate.main()
    said = capsys.readouterr()
    return said.out, json.loads(said.out.splitlines()[-1]), said.err


def write_idx(folder: pathlib.Path, train: int = 96, test: int = 20) -> None:
    """MNIST's four files with noise for digits."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for pre, n in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, n * 784, np.uint8).tobytes()
        labels = bytes(k % 10 for k in range(n))
        (folder / f"{pre}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 2051, n, 28, 28) + images
        )
        (folder / f"{pre}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, n) + labels)


def on(monkeypatch, count):
    """From here on there are `count` devices."""
    make = mesh.make
    monkeypatch.setattr(mesh, "make", lambda *_: make(jax.devices()[:count]))


def make_read_only(monkeypatch, folder: pathlib.Path) -> None:
    """Python can write nothing below `folder`. Permissions would not stop root."""
    real_open = pathlib.Path.open
    real_mkdir = pathlib.Path.mkdir

    def refuse(path):
        if path.is_relative_to(folder):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    def open_file(path, mode="r", *args, **kwargs):
        if mode not in ("r", "rb"):
            refuse(path)
        return real_open(path, mode, *args, **kwargs)

    def mkdir(path, *args, **kwargs):
        refuse(path)
        return real_mkdir(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", open_file)
    monkeypatch.setattr(pathlib.Path, "mkdir", mkdir)


@pytest.fixture
def moved(tmp_path):
    """A member whose MNIST files have been moved to the folder `there`."""
    write_idx(tmp_path / "here")
    changes = {"data.name": "mnist", "data.dir": str(tmp_path / "here")}
    run = save_member(tmp_path / "run", seed=0, **changes)
    (tmp_path / "here").rename(tmp_path / "there")
    return run


def test_the_data_have_moved(moved, monkeypatch, capsys):
    place = f"--data_dir={moved.parent / 'there'}"
    with pytest.raises(ConfigError, match="here.*if the data have moved, give --data_dir=DIR"):
        command(monkeypatch, capsys, f"--workdir={moved}")
    with pytest.raises(ConfigError, match="--data_dir=DIR"):
        predict.load(moved, "population")
    with pytest.raises(ConfigError, match="--data_dir=DIR"):
        export.main([f"--workdir={moved}", "--format=safetensors"])

    export.main([f"--workdir={moved}", "--format=safetensors", place])
    assert "newest checkpoint, step 10" in capsys.readouterr().out
    shutil.rmtree(moved / "population")
    predict.load(moved, "population", str(moved.parent / "there"))
    out, line, _ = command(monkeypatch, capsys, f"--workdir={moved}", place, "--batch_size=7")
    assert line["members"][0]["which"] == "newest"
    assert "newest checkpoint, step 10: top-1 error" in out


def test_other_data_are_refused(moved, tmp_path):
    write_idx(tmp_path / "other", train=70)
    with pytest.raises(ConfigError, match="other data: train_examples"):
        build.from_workdir(moved, str(tmp_path / "other"))


@pytest.mark.parametrize("devices", [1, 3])
def test_any_number_of_devices(tmp_path, monkeypatch, capsys, devices):
    """64 examples a step do not divide by 3, nor does a group of 32."""
    run = save_member(tmp_path / "run", seed=0)
    wanted = load_member(run, None, "population", build.from_workdir(run))
    shutil.rmtree(run / "population")

    on(monkeypatch, devices)
    member = load_member(run, None, "population", build.from_workdir(run))
    assert member.exp.mesh.size == devices
    for one, other in zip(
        jax.tree.leaves(wanted.batch_stats), jax.tree.leaves(member.batch_stats), strict=True
    ):
        # float32 sums in another order
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5)

    _, line, _ = command(monkeypatch, capsys, f"--workdir={run}", "--batch_size=100")
    assert line["examples"] == 1000


def test_training_still_wants_a_batch_that_divides(monkeypatch):
    on(monkeypatch, 3)
    with pytest.raises(ConfigError, match="not divisible by the 3 devices"):
        build.build(small())


def test_statistics_do_not_depend_on_the_training_batch():
    """The same groups, whether a training batch is one of them or several."""
    found = []
    for batch in (32, 64, 256):
        exp = build.build(small(batch_size=batch))
        state = build.initial_state(exp)
        found.append(Evaluator(exp).population(state.params, state.batch_stats))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)


def test_a_workdir_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    run = save_member(tmp_path / "run", seed=0)
    make_read_only(monkeypatch, run)
    _, line, said = command(monkeypatch, capsys, f"--workdir={run}")
    assert line["examples"] == 1000
    assert "the statistics are not kept" in said
    assert "the evaluation was not recorded" in said and "--out=DIR" in said

    out = tmp_path / "new" / "place"
    _, line, said = command(monkeypatch, capsys, f"--workdir={run}", f"--out={out}")
    assert "not recorded" not in said
    assert json.loads((out / "evaluations.jsonl").read_text())["top1"] == line["top1"]
    command(monkeypatch, capsys, f"--workdir={run}", f"--record={out}")
    assert len((out / "evaluations.jsonl").read_text().splitlines()) == 2


def test_a_copy_whose_name_holds_a_comma(tmp_path, monkeypatch, capsys):
    run = save_member(tmp_path / "run", seed=0)
    copy = tmp_path / "lr=0.1,bs=60"
    run.rename(copy)
    _, line, _ = command(monkeypatch, capsys, f"--workdir={copy}", "--statistics=running")
    assert line["members"][0]["workdir"] == str(copy)
    assert network.load(copy, None, "running").about["step"] == "10"


@pytest.mark.parametrize("size", ["0", "-3", "x"])
def test_a_batch_of_no_images_is_refused(size, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, capsys, f"--workdir={tmp_path}", f"--batch_size={size}")
    assert end.value.code == 2
    assert "is not a whole number of at least 1" in capsys.readouterr().err


def test_which_checkpoint_a_step_is(tmp_path):
    state = {"a": np.zeros(2, np.float32)}
    with Checkpoints(tmp_path / "checkpoints", keep_last=3, keep_best=0) as checkpoints:
        for step, metric in ((1, 0.5), (2, 0.7), (3, 0.7)):
            checkpoints.save(step, state, metric=metric)
    found = [which_checkpoint(tmp_path, step) for step in (1, 2, 3)]
    assert found == ["kept", "best", "newest"]


def test_a_finished_run_records_where_its_data_lie_now(tmp_path):
    write_idx(tmp_path / "here")
    settings = {
        "data.name": "mnist",
        "batch_size": 32,
        "total_steps": 5,
        "record.activation_examples": 32,
    }
    run = tmp_path / "run"
    train.run(small(**settings, **{"data.dir": str(tmp_path / "here")}), run)
    before = json.loads((run / "run.json").read_text())
    (tmp_path / "here").rename(tmp_path / "there")
    train.run(small(**settings, **{"data.dir": str(tmp_path / "there")}), run)

    after = json.loads((run / "run.json").read_text())
    assert after["config"]["data"].pop("dir") == str(tmp_path / "there")
    before["config"]["data"].pop("dir")
    description = after["info"]["data"].pop("description")
    assert "here" not in description.replace("there", "")
    before["info"]["data"].pop("description")
    assert after == before
