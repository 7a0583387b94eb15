"""prepare check: what it finds in a set, and its verdict."""

import re

import pytest

from bn_jax.errors import DataError
from bn_jax.prepare import check, imagenet
from tests.support import small_sets

JPEG = small_sets.encode(small_sets.photo())


def pairs(n: int, first: int = 0) -> list[tuple[bytes, int]]:
    return [(small_sets.encode(small_sets.photo(seed=first + k)), k % 3) for k in range(n)]


def test_a_sound_set(tmp_path, capsys):
    splits = {"train": [*pairs(5), pairs(1)[0]], "test": pairs(1)}
    small_sets.write_tfds(tmp_path, splits, file_format="array_record")
    check.check(tmp_path, "little", threads=2)
    out = capsys.readouterr().out
    assert "train: 6 images read, 6 decoded" in out and "/s" in out
    assert "3 of 3 classes have images, 1 to 3 each" in out
    assert "1 duplicates" in out and "1 also in another split" in out
    assert "is sound" in out


def test_a_damaged_set(tmp_path, capsys):
    bad = (JPEG[:-200], 0)
    splits = {"train": [*pairs(4), bad, (JPEG, 7)], "test": pairs(2)}
    written = small_sets.write_tfds(tmp_path, splits, file_format="array_record")
    (written / "little-test.array_record-00001-of-00002").unlink()
    with pytest.raises(DataError, match="NOT sound, 4 problems"):
        check.check(tmp_path, "little", threads=2)
    out = capsys.readouterr().out
    assert "train: 6 images read, 4 decoded" in out
    assert re.search(
        r"record 1 of shard little-train\S+-00001-of-00002: .*premature end", out, re.I
    )
    assert "has label 7, but the set has 3 classes" in out
    assert "little-test.array_record-00001-of-00002 is missing" in out
    assert "1 readable images, 2 expected" in out


def test_a_split_without_labels_is_not_judged(tmp_path, capsys):
    """As the test split of TFDS' own imagenet2012 5.1.0: all its labels are -1."""
    unlabelled = [(image, -1) for image, _ in pairs(3, 20)]
    splits = {"train": pairs(4), "validation": pairs(2, 10), "test": unlabelled}
    small_sets.write_tfds(tmp_path, splits, file_format="tfrecord")
    check.check(tmp_path, "little", threads=1)
    out = capsys.readouterr().out
    assert "test: 3 images read, 3 decoded" in out and "labels: none (-1)" in out
    assert "is sound" in out


def test_some_labels_that_are_missing_are_a_problem(tmp_path, capsys):
    splits = {"train": [*pairs(4), (JPEG, -1)], "test": pairs(2, 10)}
    small_sets.write_tfds(tmp_path, splits, file_format="tfrecord")
    with pytest.raises(DataError, match="NOT sound, 1 problems"):
        check.check(tmp_path, "little", threads=1)
    assert "1 of 5 records have no label (-1)" in capsys.readouterr().out


def test_bad_pictures_of_a_split_without_labels_are_a_problem(tmp_path, capsys):
    splits = {"train": pairs(4), "validation": pairs(2, 10), "test": [(b"bad", -1)] * 2}
    small_sets.write_tfds(tmp_path, splits, file_format="tfrecord")
    with pytest.raises(DataError, match="NOT sound, 2 problems"):
        check.check(tmp_path, "little", threads=1)


def test_more_records_than_imagenet_has_are_a_problem(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(imagenet, "COUNTS", {"train": 4, "validation": 2})
    splits = {"train": pairs(5), "validation": pairs(2, 10)}
    small_sets.write_tfds(tmp_path, splits, file_format="tfrecord", name="imagenet2012")
    with pytest.raises(DataError, match="NOT sound, 1 problems"):
        check.check(tmp_path, "imagenet2012", threads=1)
    assert "5 readable images, 4 expected" in capsys.readouterr().out
