"""tf.train.Example, TFRecord and TFDS sets, read without TensorFlow."""

import contextlib
import json
import os
import pathlib
import pwd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_jax.data import tfds
from bn_jax.distributed import startup
from bn_jax.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_checksums_are_masked_as_in_tfrecord():
    """The CRC-32C of RFC 3720, rotated and moved as tensorflow/core/lib/hash/crc32c.h says."""
    assert tfds.masked(b"") == 0xA282EAD8  # the CRC of nothing is 0
    crc = 0xE3069283  # of this string, RFC 3720
    assert tfds.masked(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text(max_size=5), st.binary(max_size=200) | st.integers(-(2**63), 2**63 - 1))
)
def test_example_round_trip(features):
    data = tfds.serialize(features)
    assert tfds.parse(data) == {name: [value] for name, value in features.items()}
    size = tfds.serialized_size(features, "image/encoded", 70_000)
    assert size == len(tfds.serialize({**features, "image/encoded": bytes(70_000)})) or (
        "image/encoded" in features
    )


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_garbage_is_no_example(data):
    with contextlib.suppress(ValueError):  # any other exception is a failure
        tfds.parse(data)


def test_example_of_tensorflow():
    """Bytes written by tf.train.Example(...).SerializeToString() of TensorFlow 2.21."""
    data = bytes.fromhex(TENSORFLOW_EXAMPLE)
    assert tfds.parse(data) == {"image": [b"\x00\x01"], "label": [7], "list": [1, 300], "f": []}


TENSORFLOW_EXAMPLE = (
    "0a450a110a0166120c120a0a080000003f0000803f0a0f0a05696d61676512060a040a0200010a0e"
    "0a056c6162656c12051a030a01070a0f0a046c69737412071a050a0301ac02"
)


def test_tfrecord_round_trip_and_index(tmp_path, cache):
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "empty"]
    records = [[b"", b"one", os.urandom(5000)], [b"last"], []]
    for path, some in zip(paths, records, strict=True):
        tfds.write(path, some)
    for _ in range(2):  # scanned, then from the cache
        places = tfds.index(paths)
        found = [
            [tfds.read(path, *row) for row in p.tolist()]
            for path, p in zip(paths, places, strict=True)
        ]
        assert found == records
    assert len(list(cache.iterdir())) == 1
    assert sorted(tmp_path.iterdir()) == sorted([*paths, cache])  # nothing beside the data
    tfds.write(paths[1], [b"new", b"records"])
    assert len(tfds.index(paths)[1]) == 2  # a changed file is scanned again


def test_a_damaged_index_is_built_again(tmp_path, cache):
    """Whatever is wrong with the cached file: it is made again, and is right the next time. (Some
    damage was a traceback, and an index of another shape was believed.)"""
    tfds.write(tmp_path / "a", [b"x" * 50] * 9)
    expected = tfds.index([tmp_path / "a"])[0].tolist()
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    damaged = [b"", b"PK damaged", *(whole[:n] for n in (1, 30, 200, len(whole) - 1))]
    for place in range(0, len(whole), 7):
        damaged.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    for content in damaged:
        kept.write_bytes(content)
        assert tfds.index([tmp_path / "a"])[0].tolist() == expected
    np.savez(kept, splits=np.zeros(5, np.int64), places=np.zeros((5, 3)))  # of another shape
    assert tfds.index([tmp_path / "a"])[0].tolist() == expected


def test_without_a_home_no_index_is_kept(tmp_path, monkeypatch):
    """A container's user may have neither HOME nor an entry in the password file."""
    for name in ("HOME", "XDG_CACHE_HOME", "BN_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    tfds.write(tmp_path / "a", [b"x"] * 3)
    assert len(tfds.index([tmp_path / "a"])[0]) == 3
    with pytest.raises(ConfigError, match="no home directory; set HOME"):
        tfds.source("mnist", "")
    startup.use_compilation_cache()


def test_tfrecord_damage(tmp_path):
    path = tmp_path / "shard"
    tfds.write(path, [b"first record", b"second record"])
    whole = path.read_bytes()
    (first, second) = tfds.scan(path).tolist()
    flipped = bytearray(whole)
    flipped[second[0] + 3] ^= 0x10
    path.write_bytes(flipped)
    assert tfds.read(path, *first) == b"first record"
    with pytest.raises(ValueError, match="checksum"):
        tfds.read(path, *second)
    flipped = bytearray(whole)
    flipped[9] ^= 1  # in the checksum of the first length
    path.write_bytes(flipped)
    with pytest.raises(DataError, match="length of record 0"):
        tfds.scan(path)


def test_a_file_cut_anywhere_is_noticed(tmp_path):
    path = tmp_path / "shard"
    tfds.write(path, [b"first record", b"second record"])
    whole = path.read_bytes()
    first = len(b"first record") + tfds.HEADER + tfds.FOOTER
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        if length == first:  # a whole file of one record: dataset_info.json has the number
            assert len(tfds.scan(path)) == 1
            continue
        record = 0 if length < first else 1
        with pytest.raises(DataError, match=f"shard .* is cut in record {record}"):
            tfds.scan(path)


def described(features: dict, info: dict, folder: pathlib.Path) -> tfds.Metadata:
    """The metadata of a set that has these two files."""
    (folder / "features.json").write_text(json.dumps(features, sort_keys=True))
    about = {"name": "little", "splits": [], **info}
    (folder / "dataset_info.json").write_text(json.dumps(about))
    return tfds.metadata(folder)


def label(classes: int) -> dict:
    return {"classLabel": {"numClasses": str(classes)}}


IMAGE = {"image": {"shape": {"dimensions": ["32", "32", "3"]}}}
KEYS = {"supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}}}
TWO_LABELS = {
    "featuresDict": {
        "features": {"coarse_label": label(20), "id": {"text": {}}, "image": IMAGE}
        | {"label": label(100)}
    }
}


def test_the_supervised_keys_choose_between_two_labels(tmp_path):
    """TFDS' cifar100 has a coarse label, which comes first."""
    meta = described(TWO_LABELS, KEYS, tmp_path)
    assert (meta.image, meta.label, meta.num_classes) == ("image", "label", 100)
    assert meta.image_shape == (32, 32, 3)
    meta = described(
        TWO_LABELS, {"supervisedKeys": {"input": "image", "output": "coarse_label"}}, tmp_path
    )
    assert (meta.label, meta.num_classes) == ("coarse_label", 20)
    with pytest.raises(DataError, match=r"2 features of kind label \(coarse_label, label\)"):
        described(TWO_LABELS, {}, tmp_path)
    two_images = {"featuresDict": {"features": {"left": IMAGE, "right": IMAGE, "label": label(3)}}}
    with pytest.raises(DataError, match=r"2 features of kind image \(left, right\)"):
        described(two_images, {}, tmp_path)
    # Keys that are not an image and a label choose nothing.
    with pytest.raises(DataError, match="2 features of kind label"):
        described(TWO_LABELS, {"supervisedKeys": {"input": "image", "output": "id"}}, tmp_path)


OLD = "tensorflow_datasets.core.features."


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("as_message", [False, True])
def test_features_json_of_an_older_tfds(tmp_path, as_text, as_message):
    """The forms that TFDS 4.9 still reads: dictionaries, or messages as JSON or as JSON in text."""
    image = {"shape": [None, None, 3], "dtype": "uint8", "encoding_format": "jpeg"}
    content = {
        "image": {"type": OLD + "image_feature.Image", "content": image},
        "label": {"type": OLD + "class_label_feature.ClassLabel", "content": {"num_classes": 1000}},
        "file_name": {"type": OLD + "text_feature.Text", "content": {}},
    }
    features = {"type": OLD + "features_dict.FeaturesDict", "content": content}
    if as_message:
        features["proto_cls"] = "tensorflow_datasets.FeaturesDict"
        shape = {"dimensions": ["-1", "-1", "3"]}
        features["content"] = {
            "features": {"image": {"image": {"shape": shape}}, "label": label(1000)}
        }
    if as_text:
        features["content"] = json.dumps(features["content"])
    meta = described(features, {}, tmp_path)
    assert (meta.image, meta.label, meta.num_classes) == ("image", "label", 1000)
    assert meta.image_shape == (-1, -1, 3)


def test_a_set_without_features_json_says_who_made_it(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"no features\.json: an older TFDS made it"):
        tfds.source("little", str(tmp_path))
