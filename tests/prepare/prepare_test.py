"""prepare: ImageNet from its tars, the check of a set, the contact sheet."""

import csv
import hashlib
import importlib.util
import pathlib
import shutil
import subprocess
import sys
import tarfile

import cv2
import numpy as np
import pytest

from bn_jax.data import decode, tfds
from bn_jax.errors import ConfigError, DataError, DiskError
from bn_jax.prepare import __main__ as prepare
from bn_jax.prepare import imagenet, layouts
from tests.support import small_sets

ROOT = pathlib.Path(__file__).resolve().parents[2]
JPEG = small_sets.encode(small_sets.photo())


def built(tars: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    return imagenet.build(tars, out, partial=True, threads=2)


@pytest.fixture
def four_shards(monkeypatch):
    from tensorflow_datasets.core.utils import shard_utils

    monkeypatch.setattr(
        shard_utils.ShardConfig, "calculate_number_shards", classmethod(lambda *a: min(4, a[2]))
    )


def test_the_real_pair(test_data, tmp_path):
    """Every record has its picture, label and name, in TFDS' order; TFDS itself reads the
    result."""
    import tensorflow_datasets

    folder = built(test_data / "ilsvrc", tmp_path)
    with (test_data / "ilsvrc" / "CONTENTS.csv").open() as f:
        truth = {row["file_name"]: int(row["label"]) for row in csv.DictReader(f)}
    pictures = {}
    with tarfile.open(test_data / "ilsvrc" / layouts.TARS["train"]) as tar:
        for synset in tar:
            with tarfile.open(fileobj=tar.extractfile(synset)) as inner:
                pictures |= {m.name: inner.extractfile(m).read() for m in inner}
    with tarfile.open(test_data / "ilsvrc" / layouts.TARS["validation"]) as tar:
        pictures |= {m.name: tar.extractfile(m).read() for m in tar}
    meta = tfds.metadata(folder)
    for split, count in (("train", 122), ("validation", 60)):
        records = [tfds.parse(r) for r in map(tfds.open_split(meta, split).raw, range(count))]
        names = [r["file_name"][0].decode() for r in records]
        assert names == sorted(names, key=lambda n: hashlib.md5((split + n).encode()).hexdigest())
        assert [r["label"] for r in records] == [[truth[n]] for n in names]
        assert [r["image"] for r in records] == [[pictures[n]] for n in names]
    read = tensorflow_datasets.builder_from_directory(folder).as_data_source(split="validation")
    assert len(read) == 60 and read[0]["label"] == truth[read[0]["file_name"].decode()]
    assert "tensorflow" not in sys.modules


@pytest.mark.slow
def test_against_tfds_own_builder(test_data, tmp_path):
    """TFDS builds the same pair with TensorFlow, where that is installed: the same records
    throughout."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("TensorFlow is not installed")
    code = (
        "import sys, tensorflow_datasets as t; t.builder('imagenet2012', data_dir=sys.argv[1], "
        "file_format='array_record').download_and_prepare(download_config="
        "t.download.DownloadConfig(manual_dir=sys.argv[2]))"
    )
    arguments = [str(tmp_path / "tfds"), str(test_data / "ilsvrc")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    ours = tfds.metadata(built(test_data / "ilsvrc", tmp_path / "ours"))
    theirs = tfds.metadata(tfds.find("imagenet2012", str(tmp_path / "tfds")))
    assert [p.name for p, _ in ours.splits["train"]] == [p.name for p, _ in theirs.splits["train"]]
    for split in ("train", "validation"):
        a, b = tfds.open_split(ours, split), tfds.open_split(theirs, split)
        assert len(a) == len(b)
        for k in range(len(b)):
            assert tfds.parse(a.raw(k)) == tfds.parse(b.raw(k))
    for name in ("features.json", "label.labels.txt"):
        assert (ours.directory / name).read_text() == (theirs.directory / name).read_text()


def test_incomplete_tars_are_refused(tmp_path):
    tars = small_sets.write_tars(tmp_path / "tars")
    with pytest.raises(DataError, match=r"12 of 1,281,167 images of train.*--partial"):
        imagenet.build(tars, tmp_path / "out", partial=False, threads=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"ILSVRC2012_img_train\.tar"):
        built(tmp_path, tmp_path / "out")


def test_labels_survive_missing_validation_files(tmp_path):
    """By number, not by rank of what there is: number 50,000 has its own label."""
    meta = tfds.metadata(built(small_sets.write_tars(tmp_path / "tars"), tmp_path / "out"))
    records = map(tfds.parse, map(tfds.open_split(meta, "validation").raw, range(3)))
    labels = {r["file_name"][0].decode(): r["label"][0] for r in records}
    expected = layouts.label_files()[1]
    assert len(expected) == 50_000
    assert labels["ILSVRC2012_val_00050000.JPEG"] == expected[-1]
    assert labels["ILSVRC2012_val_00000002.JPEG"] == expected[1]


@pytest.mark.usefixtures("four_shards")
def test_interrupted_preparation_resumes(tmp_path, monkeypatch):
    tars = small_sets.write_tars(tmp_path / "tars")
    clean = built(tars, tmp_path / "clean")
    whole, calls = imagenet.record, []

    def fails(image):
        calls.append(image)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return whole(image)

    monkeypatch.setattr(imagenet, "record", fails)
    with pytest.raises(KeyboardInterrupt):
        imagenet.build(tars, tmp_path / "out", partial=True, threads=1)
    folder = tmp_path / "out" / "imagenet2012" / "5.1.0"
    ready = {p.name: p.stat().st_mtime_ns for p in folder.glob("*-of-00004")}
    assert len(ready) == 2  # of three pictures each
    assert tfds.find("imagenet2012", str(tmp_path / "out")) is None  # no set yet
    monkeypatch.setattr(imagenet, "record", whole)
    built(tars, tmp_path / "out")
    assert {n: (folder / n).stat().st_mtime_ns for n in ready} == ready  # kept, not written again
    files = sorted(p.name for p in clean.iterdir())
    assert sorted(p.name for p in folder.iterdir()) == files
    assert [(folder / n).read_bytes() for n in files] == [(clean / n).read_bytes() for n in files]


def test_a_finished_set_is_left_alone(tmp_path, capsys):
    tars = small_sets.write_tars(tmp_path / "tars")
    folder = built(tars, tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    built(tars, tmp_path / "out")
    assert "is already complete" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    with pytest.raises(ConfigError, match="other pictures"):
        built(small_sets.write_tars(tmp_path / "more", each=7), tmp_path / "out")


def test_disk_space_is_checked_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(imagenet.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskError, match="GiB free"):
        built(small_sets.write_tars(tmp_path / "tars"), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*array_record*"))


def test_cmyk_and_png_become_rgb_jpegs():
    photo = small_sets.photo()
    for data in (
        small_sets.encode(photo, mode="CMYK", quality=95),
        small_sets.encode(photo, "PNG"),
    ):
        fixed = imagenet.as_jpeg(data, [])
        found = decode.frame(fixed)
        assert (found.kind, found.components) == ("jpeg", 3)
        # Quality 100 with halved chroma: measured 0.4 levels in the mean.
        assert np.abs(decode.pixels(fixed, found).astype(int) - photo).mean() < 1
    assert imagenet.as_jpeg(JPEG, []) == JPEG
    assert imagenet.as_jpeg(b"damaged", []) == b"damaged"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bn_jax.prepare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_commands_and_exit_codes(tmp_path):
    assert run("check", str(tmp_path)).returncode == 2
    tars = small_sets.write_tars(tmp_path / "tars")
    out = str(tmp_path / "out")
    refused = run("imagenet", f"--tars={tars}", f"--data_dir={out}")
    assert refused.returncode == 3 and refused.stderr.count("\n") == 1
    done = run("imagenet", f"--tars={tars}", f"--data_dir={out}", "--partial")
    assert done.returncode == 0 and "images/s" in done.stderr and "left" in done.stderr
    checked = run("check", out)  # 12 of 1,281,167 images
    assert checked.returncode == 3 and "1,281,167 expected" in checked.stdout


def test_contact_sheet(tmp_path, monkeypatch, capsys):
    (tmp_path / "photo.jpg").write_bytes(JPEG)
    for image in (str(tmp_path / "photo.jpg"), "digits"):
        out = tmp_path / "sheet.png"
        arguments = ["prepare", "sheet", image, f"--out={out}", "--size=40", "--strengths=0,1"]
        monkeypatch.setattr(sys, "argv", arguments)
        prepare.main()
        assert str(out) in capsys.readouterr().out
        sheet = cv2.imread(str(out))
        assert sheet.shape == (2 * 44, 8 * 44, 3)
        undistorted, distorted = sheet[:40, 44:], sheet[44:84, 44:]
        assert np.abs(undistorted.astype(int) - distorted).mean() > 1
        assert np.array_equal(sheet[:40, :40], sheet[44:84, :40])  # the original, in every row
    monkeypatch.setattr(sys, "argv", ["prepare", "sheet", str(tmp_path / "none.jpg")])
    with pytest.raises(ConfigError, match="is not a picture"):
        prepare.main()


def test_without_tensorflow_datasets_there_is_one_line(test_data, tmp_path, monkeypatch):
    """The demo's environment lacks it. A source that is not there is what is said first."""
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    layouts.label_files.cache_clear()
    with pytest.raises(ConfigError, match="no file or folder .*none"):
        built(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ConfigError, match="tensorflow-datasets, which is not installed: pip inst"):
        built(test_data / "ilsvrc", tmp_path / "out")
    assert not (tmp_path / "out").exists()
