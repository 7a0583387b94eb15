"""Classes of pictures: what evaluation computes, without the data set; errors in one line each."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bn_jax import predict
from bn_jax.data import distort, memory, pipeline
from bn_jax.errors import CheckpointError, ConfigError
from bn_jax.evaluate import ensemble, members
from bn_jax.experiment import build
from tests.support.small_members import save_member
from tests.support.small_sets import encode, photo


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_member(tmp_path_factory.mktemp("predict") / "run", seed=0)


@pytest.fixture(scope="module")
def expected(run):
    """Probabilities of the test digits, by evaluation."""
    member = members.load_member(run, None, "population", build.from_workdir(run))
    return ensemble.predict(ensemble.Networks([member], 256), 1)[0].probabilities


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Three test digits as PNG files, and their places in the split."""
    folder = tmp_path_factory.mktemp("pictures")
    held = memory.digits().evaluation
    files = {k: folder / f"{k}.png" for k in (0, 555, 999)}
    for k, path in files.items():
        Image.fromarray(held.images[k, ..., 0]).save(path)
    return files


def type_in(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    predict.main()
    return capsys.readouterr()


def test_a_picture_gets_what_evaluation_gives_it(run, expected, digits, monkeypatch, capsys):
    def absent(*arguments):
        raise ConfigError("the data set is not needed")

    monkeypatch.setattr(pipeline, "open_data", absent)
    said = type_in(monkeypatch, capsys, f"--workdir={run}", "--json", *digits.values())
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in digits.values()]
    for line, place in zip(lines, digits, strict=True):
        best = np.argsort(-expected[place])[:5]
        assert [entry["class"] for entry in line["top"]] == best.tolist()
        assert [entry["name"] for entry in line["top"]] == [str(k) for k in best]
        odds = [entry["probability"] for entry in line["top"]]
        # another batch size is another program: a few units of float32
        np.testing.assert_allclose(odds, expected[place][best], rtol=1e-5)
    assert "read from the workdir" in said.err  # stdout is JSON lines alone


def test_text_and_several_networks(run, digits, monkeypatch, capsys, tmp_path):
    other = save_member(tmp_path / "other", seed=1)
    names = f"--workdir={run},{other}"
    out = type_in(monkeypatch, capsys, names, "--crops=10", *digits.values()).out.splitlines()
    assert len(out) == 3 * 6 and out[0] == str(digits[0])
    shares = [float(line.split("%")[0]) for line in out[1:6]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.01


def test_unreadable_pictures_have_a_line_each_and_the_others_are_named(
    run, expected, digits, monkeypatch, capsys, tmp_path
):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.jpg").write_bytes(encode(photo())[:500])
    bad = [tmp_path / "absent.jpg", tmp_path / "text.jpg", tmp_path / "cut.jpg", tmp_path]
    with pytest.raises(SystemExit) as end:
        type_in(monkeypatch, capsys, f"--workdir={run}", *bad, digits[0])
    said = capsys.readouterr()
    assert end.value.code == 3 and str(digits[0]) in said.out
    lines = [line for line in said.err.splitlines() if line.startswith("bn_jax: ")]
    assert len(lines) == 4 and all(str(p) in line for p, line in zip(bad, lines, strict=True))


def test_folders_without_a_checkpoint_are_one_line(run, digits, tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory"):
        predict.load(tmp_path, "population")
    shutil.copy(run / "run.json", tmp_path / "run.json")
    with pytest.raises(CheckpointError, match="has no checkpoint yet: train until"):
        predict.load(tmp_path, "population")
    (tmp_path / "run.json").write_text('{"config": ')
    with pytest.raises(ConfigError, match=r"run\.json cannot be read.*it is damaged"):
        predict.load(tmp_path, "population")


def test_statistics_that_need_an_absent_data_set_say_what_to_do(run, monkeypatch, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "population", ignore_errors=True)

    def absent(*arguments):
        raise ConfigError("no folder /gone/train")

    monkeypatch.setattr(pipeline, "open_data", absent)
    with pytest.raises(ConfigError, match="no folder /gone/train; or run bn_jax.evaluate"):
        predict.load(tmp_path / "moved", "population")
    assert predict.load(tmp_path / "moved", "running").statistics == "running"


def test_class_names_are_those_of_the_data(tmp_path):
    """Folders' names, TFDS' label file, else numbers."""
    from bn_jax.data import tfds
    from bn_jax.data.folder import source
    from tests.support.small_sets import write_tfds

    for split in ("train", "val"):
        for name in ("newt", "axolotl"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            (tmp_path / "set" / split / name / "a.jpg").write_bytes(encode(photo()))
    assert source(str(tmp_path / "set")).class_names == ("axolotl", "newt")
    few = [(encode(photo()), k) for k in range(3)]
    for labels, expected in (("x\ny\nz\n", ("x", "y", "z")), ("x\ny\n", ())):
        where = tmp_path / labels.replace("\n", "")
        made = write_tfds(where, {"train": few, "test": few}, file_format="tfrecord")
        (made / "label.labels.txt").write_text(labels)
        assert tfds.source("little", str(where)).class_names == expected
    data = pipeline.Data(memory.digits(), distort.Augmentation(28), shuffle="none")
    assert data.class_names == tuple("0123456789")
    held = pipeline.Data(memory.digits(), distort.Augmentation(28), shuffle="none", holdout=0.5)
    assert held.class_names == data.class_names


def test_equal_probabilities_are_in_the_order_of_the_classes():
    found = predict.top(np.array([0.1, 0.3, 0.3, 0.1, 0.1, 0.1], np.float32), tuple("abcdef"))
    assert [entry["class"] for entry in found] == [1, 2, 0, 3, 4]
    assert [entry["name"] for entry in found] == list("bcade")


def test_a_large_picture_becomes_a_small_grey_one_by_averaging():
    """Stripes of which every fourth pixel is white; other ways to reduce would miss them."""
    stripes = np.zeros((112, 112, 3), np.uint8)
    stripes[:, ::4] = 255
    grey = predict._grey(encode(stripes, "PNG"), 28, [])
    assert grey.shape == (28, 28, 1) and np.abs(grey.astype(int) - 64).max() <= 1


def test_classes_are_shown_in_percent(capsys):
    found = [{"class": 1, "name": "cat", "probability": 0.123456}]
    predict.show("a.jpg", found, as_json=False)
    assert capsys.readouterr().out == "a.jpg\n   12.35%  cat\n"


def test_a_damaged_scan_is_said_with_the_name_of_the_picture(tmp_path, capsys):
    """(The classes of a half-grey picture were printed without a word.)"""
    data = encode(photo(90, 120), quality=95)
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    for channels in (1, 3):
        seen = SimpleNamespace(
            data=SimpleNamespace(image_shape=(28, 28, channels)),
            config=SimpleNamespace(data=SimpleNamespace(mirror=False)),
        )
        assert predict.read(str(tmp_path / "cut.jpg"), seen, 1).image.shape == (1, 28, 28, channels)
        said = capsys.readouterr().err
        assert "cut.jpg: decoded, but its pixels may be wrong: Corrupt JPEG data" in said
        assert said.count("\n") == 1
