"""CRC-32C, tf.train.Example, TFRecord and TFDS sets, read without TensorFlow."""

import contextlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_jax.data import tfds
from bn_jax.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def naive_crc(data: bytes) -> int:
    """Bit by bit, from RFC 3720."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_crc_of_rfc_3720():
    assert tfds.crc32c(b"123456789") == 0xE3069283
    assert tfds.crc32c(bytes(32)) == 0x8A9136AA  # appendix B.4
    assert tfds.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert tfds.crc32c(bytes(range(32))) == 0x46DD794E
    assert tfds.masked(b"") == 0xA282EAD8  # the CRC of nothing is 0


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300) | st.integers(380, 6000).map(os.urandom))
def test_crc_of_any_length(data):
    assert tfds.in_numpy(data) == tfds.crc32c(data) == naive_crc(data)


def test_crc_of_many_headers():
    words = np.array([[0, 0], [1, 2], [0xFFFFFFFF, 0x12345678]], np.uint32)
    single = [tfds.masked(row.astype("<u4").tobytes()) for row in words]
    assert tfds.masked_pairs(words).tolist() == single


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
    tfds.write(tmp_path / "a", [b"x"])
    tfds.index([tmp_path / "a"])
    (kept,) = cache.iterdir()
    kept.write_bytes(b"PK damaged")
    assert len(tfds.index([tmp_path / "a"])[0]) == 1


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
    path.write_bytes(whole[:-6])
    with pytest.raises(DataError, match=r"shard .* is cut .* record 1"):
        tfds.scan(path)
    flipped = bytearray(whole)
    flipped[9] ^= 1  # in the checksum of the first length
    path.write_bytes(flipped)
    with pytest.raises(DataError, match="length of record 0"):
        tfds.scan(path)
