"""CRC-32C (Castagnoli, RFC 3720 appendix B.4), the checksum of TFRecord files, in NumPy.

The register is linear over GF(2), so a message need not be walked byte by byte: words that lie a
power of two apart are worked on together, and the results are folded in halves, the left half being
advanced over the zeros that the right one occupies. 0.3 ms for 77 KB amid JPEG decoding, a quarter
of that decoding; tables are small (4 KB a power of two), because decoding leaves little of the
cache to others.
"""

import bisect
import concurrent.futures
import functools
import hashlib
import itertools
import json
import mmap
import os
import pathlib
import resource
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from absl import logging

from bn_jax.data import decode, order, sources
from bn_jax.data.load import BadRecordError, Record, checked_label
from bn_jax.errors import ConfigError, DataError

try:
    from google_crc32c import value as _compiled  # optional: 0.01 ms instead of 0.3
except ImportError:
    _compiled = None

_POLYNOMIAL = 0x82F63B78  # reflected
_ONES = 0xFFFFFFFF
_MASK_DELTA = 0xA282EAD8  # of TFRecord's masked checksum (tensorflow/core/lib/hash/crc32c.h)
_SHORT = 400  # bytes below which a plain loop is faster


@functools.cache
def _byte_table() -> tuple[int, ...]:
    """The register after one more zero byte, for each low byte."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


@functools.cache
def _table(level: int) -> np.ndarray:
    """uint32 [4, 256]: the register after 2**level words of zeros, by each of its bytes."""
    if level:
        half = _table(level - 1)
        return _apply(half, half.reshape(-1)).reshape(4, 256)
    table = np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32)[:, None])
    byte = np.array(_byte_table(), np.uint32)
    for _ in range(4):
        table = (table >> 8) ^ byte[table & 0xFF]
    return table


def _apply(table: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """The registers advanced by a table."""
    parts = np.ascontiguousarray(registers, "<u4").view(np.uint8).reshape(-1, 4)
    result = table[0].take(parts[:, 0], mode="clip")  # any mode but the default saves a copy
    for byte in (1, 2, 3):
        result ^= table[byte].take(parts[:, byte], mode="clip")
    return result


def crc32c(data: bytes | memoryview) -> int:
    """The checksum of some bytes, by google-crc32c where that is installed."""
    return in_numpy(data) if _compiled is None else _compiled(bytes(data))


def in_numpy(data: bytes | memoryview) -> int:
    """The checksum of some bytes, without a compiled library."""
    n = len(data)
    if n < _SHORT:
        table, register = _byte_table(), _ONES
        for byte in data:
            register = (register >> 8) ^ table[(register ^ byte) & 0xFF]
        return register ^ _ONES
    level = (n // 4).bit_length() - 3  # 4 to 9 rows of 2**level words
    row = 4 << level
    padded = np.zeros(-(-n // row) * row, np.uint8)  # zeros in front leave a register of 0 as it is
    padded[-n:] = np.frombuffer(data, np.uint8)
    start = len(padded) - n
    padded[start : start + 4] ^= 0xFF  # the register starts with all ones
    rows = padded.view("<u4").reshape(-1, 1 << level)
    registers = rows[0]
    for words in rows[1:]:
        registers = _apply(_table(level), registers) ^ words
    while level:
        level -= 1
        left, right = registers.reshape(2, -1)
        registers = _apply(_table(level), left) ^ right
    return int(_apply(_table(0), registers)[0]) ^ _ONES


def masked(data: bytes | memoryview) -> int:
    """The checksum as TFRecord files store it."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & _ONES


def masked_pairs(words: np.ndarray) -> np.ndarray:
    """uint32 [n]: `masked` of each row of uint32 [n, 2] (8 bytes), many at a time."""
    register = _apply(_table(0), words[:, 0] ^ np.uint32(_ONES))
    register = _apply(_table(0), register ^ words[:, 1]) ^ np.uint32(_ONES)
    return ((register >> 15) | (register << 17)) + np.uint32(_MASK_DELTA)


# TFRecord files by random access, without TensorFlow.
#
# A file is a chain of records: uint64 length, uint32 masked CRC-32C of it, the data, uint32
# masked CRC-32C of the data, all little-endian (tensorflow/core/lib/io/record_writer.h). The
# chain is walked once; the places of its records are kept in the cache directory, never beside
# the data.


HEADER, FOOTER = 12, 4  # bytes around the data of a record


def cache_directory() -> pathlib.Path:
    """$BN_JAX_CACHE, or bn_jax in the user's cache directory."""
    if "BN_JAX_CACHE" in os.environ:
        return pathlib.Path(os.environ["BN_JAX_CACHE"])
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bn_jax"


def scan(path: pathlib.Path) -> np.ndarray:
    """int64 [n, 2]: place and length of the data of each record. Raises DataError if the chain is
    cut or a length is damaged."""
    size = path.stat().st_size
    if not size:
        return np.zeros((0, 2), np.int64)
    places: list[tuple[int, int]] = []
    headers, at = [], 0
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while at < size:
            length = struct.unpack_from("<Q", data, at)[0] if at + HEADER <= size else size
            if at + HEADER + length + FOOTER > size:
                raise DataError(
                    f"shard {path} is cut or damaged in record {len(places)} at byte {at} of "
                    f"{size}: fetch or write it again"
                )
            headers.append(data[at : at + HEADER])
            places.append((at + HEADER, length))
            at += HEADER + length + FOOTER
    stored = np.frombuffer(b"".join(headers), np.dtype([("length", "<u4", 2), ("crc", "<u4")]))
    wrong = np.flatnonzero(masked_pairs(stored["length"]) != stored["crc"])
    if len(wrong):
        raise DataError(
            f"shard {path} is damaged: the length of record {wrong[0]} fails its checksum; fetch "
            "or write it again"
        )
    return np.array(places, np.int64)


def read(path: pathlib.Path, place: int, length: int) -> bytes:
    """The data of one record. Raises ValueError if it is cut or fails its checksum."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        block = os.pread(descriptor, length + FOOTER, place)
    finally:
        os.close(descriptor)
    if len(block) != length + FOOTER:
        raise ValueError("the record is cut")
    data = block[:length]
    if masked(data) != struct.unpack_from("<I", block, length)[0]:
        raise ValueError("the record fails its checksum (CRC-32C)")
    return data


def write(path: pathlib.Path, records: list[bytes]) -> None:
    """Writes a file of these records (tests and small sets)."""
    with path.open("wb") as f:
        for data in records:
            length = struct.pack("<Q", len(data))
            f.write(length + struct.pack("<I", masked(length)))
            f.write(data + struct.pack("<I", masked(data)))


def index(paths: list[pathlib.Path]) -> list[np.ndarray]:
    """The scans of these files, from the cache if the files are as they were. Raises DataError."""
    if not paths:
        return []
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    name = hashlib.sha256(repr(stats).encode()).hexdigest()[:32]
    cached = cache_directory() / f"tfrecord-{name}.npz"
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            splits, places = arrays["splits"], arrays["places"]
        return np.split(places, splits)
    except (OSError, ValueError, KeyError, EOFError):
        pass  # absent or damaged: scan again
    scans = [scan(p) for p in paths]
    _store(cached, np.cumsum([len(s) for s in scans])[:-1], np.concatenate(scans))
    return scans


def _store(cached: pathlib.Path, splits: np.ndarray, places: np.ndarray) -> None:
    """Writes the index whole or not at all; without a writable cache the next start scans again."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False, suffix=".part") as f:
            np.savez(f, splits=splits, places=places)
        pathlib.Path(f.name).replace(cached)
    except OSError as e:
        logging.warning("the index of TFRecord files is not kept, %s: %s", cached, e)


# tf.train.Example without TensorFlow: the few lines of protobuf's wire format that it needs.
#
# message Example { Features features = 1; } message Features { map<string, Feature> feature = 1;
# } // an entry has key = 1, value = 2 message Feature { oneof { BytesList = 1; FloatList = 2;
# Int64List = 3; } } message BytesList { repeated bytes value = 1; } // Int64List: varints, packed
# or not


Value = bytes | int


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a varint is too long")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: integers and length-delimited parts."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
        elif kind == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("a field is longer than its message")
            yield tag >> 3, data[at : at + length]
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} is unknown")


def _part(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message should")
    return value


def _feature(data: memoryview) -> list[Value]:
    values: list[Value] = []
    for kind, items in _fields(data):
        for _, item in _fields(_part(items)):
            if kind == 1:
                values.append(bytes(_part(item)))
            elif kind == 3 and isinstance(item, int):
                values.append(item)
            elif kind == 3:
                packed, at = _part(item), 0
                while at < len(packed):
                    value, at = _varint(packed, at)
                    values.append(value)
    return [v - 2**64 if isinstance(v, int) and v >= 2**63 else v for v in values]


def parse(data: bytes) -> dict[str, list[Value]]:
    """The bytes and integer features of a serialized Example; lists of floats come back empty.
    Raises ValueError if it is none."""
    features: dict[str, list[Value]] = {}
    try:
        for number, message in _fields(memoryview(data)):
            for _, entry in _fields(_part(message)) if number == 1 else ():
                pair = dict(_fields(_part(entry)))
                features[bytes(_part(pair[1])).decode()] = _feature(
                    _part(pair.get(2, memoryview(b"")))
                )
    except (IndexError, KeyError, UnicodeDecodeError) as e:
        raise ValueError(f"not a tf.train.Example ({e})") from None
    return features


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    value &= 2**64 - 1
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _delimited(number: int, data: bytes) -> bytes:
    return _encode_varint(number << 3 | 2) + _encode_varint(len(data)) + data


def _entry(name: str, value: Value) -> bytes:
    if isinstance(value, int):
        feature = _delimited(3, _delimited(1, _encode_varint(value)))
    else:
        feature = _delimited(1, _delimited(1, value))
    return _delimited(1, _delimited(1, name.encode()) + _delimited(2, feature))


def serialize(features: dict[str, Value]) -> bytes:
    """A serialized Example with one value a feature, in the order of their names."""
    return _delimited(1, b"".join(_entry(name, value) for name, value in sorted(features.items())))


def serialized_size(features: dict[str, Value], name: str, size: int) -> int:
    """len(serialize(...)) of these features and one more, `name`, of `size` bytes that need not
    exist."""

    def delimited(n: int) -> int:
        return 1 + len(_encode_varint(n)) + n

    others = sum(len(_entry(*item)) for item in features.items())
    key, feature = delimited(len(name.encode())), delimited(delimited(delimited(size)))
    return delimited(others + delimited(key + feature))


# Shards of a set in TFDS' format, ArrayRecord or TFRecord, by random access and without
# TensorFlow.
#
# Every shard is looked at when a split is opened, so that a missing or cut one ends the run
# before it begins.


_AT_ONCE = 256  # records that a sequential reading holds in memory


@dataclass(frozen=True)
class Metadata:
    """What the two JSON files say. `splits`: name -> [(shard file, records in it)]."""

    directory: pathlib.Path
    name: str
    file_format: str
    image: str
    label: str
    num_classes: int
    image_dimensions: tuple[int, ...]
    splits: dict[str, list[tuple[pathlib.Path, int]]]


class Shards(sources.Records):
    """The records of a split, by index over all its shards."""

    def __init__(self, meta: Metadata, split: str):
        self.meta, self.split = meta, split
        self.files = meta.splits[split]
        for path, _ in self.files:
            if not path.is_file():
                raise DataError(f"shard {path} is missing: fetch or prepare it again")
        self.starts = [0, *itertools.accumulate(length for _, length in self.files)]
        super().__init__(self.starts[-1], meta.num_classes)
        self._open()

    def _open(self) -> None:
        raise NotImplementedError

    def _read(self, shard: int, place: int) -> bytes:
        raise NotImplementedError

    def where(self, index: int) -> tuple[int, int]:
        """(shard, place in it) of a record."""
        shard = bisect.bisect_right(self.starts, index) - 1
        return shard, index - self.starts[shard]

    def raw(self, index: int) -> bytes:
        """The serialized Example. Raises BadRecordError if it is damaged."""
        shard, place = self.where(index)
        try:
            return self._read(shard, place)
        except (ValueError, RuntimeError, OSError) as e:
            raise BadRecordError(self.name(index), " ".join(str(e).split())) from None

    def name(self, index: int) -> str:
        """What messages call a record."""
        shard, place = self.where(index)
        return f"record {place} of shard {self.files[shard][0].name}"

    def __getitem__(self, index: int) -> Record:
        return self._record(index, self.raw(index))

    def __iter__(self) -> Iterator[Record]:
        """All records in their order, cheaper than one by one. Raises BadRecordError."""
        for index in range(len(self)):
            yield self[index]

    def _record(self, index: int, data: bytes) -> Record:
        try:
            features = parse(data)
            (image,), (label,) = features[self.meta.image], features[self.meta.label]
            if not isinstance(image, bytes) or not isinstance(label, int):
                raise ValueError("image or label has the wrong type")
        except (ValueError, KeyError) as e:
            raise BadRecordError(self.name(index), f"not an image with a label: {e}") from None
        file_name = features.get("file_name", [b""])[0]
        name = file_name.decode(errors="replace") if isinstance(file_name, bytes) else ""
        name = f"{name} ({self.name(index)})" if name else self.name(index)
        return Record(image, label, name)

    def _check_lengths(self, counts: list[int]) -> None:
        for (path, length), count in zip(self.files, counts, strict=True):
            if count != length:
                raise DataError(
                    f"shard {path} holds {count} records, dataset_info.json says {length}: "
                    "fetch or prepare it again"
                )


class TFRecordShards(Shards):
    """Records of TFRecord files; the index of their places is built once and cached."""

    def _open(self) -> None:
        self._places = index([path for path, _ in self.files])
        self._check_lengths([len(places) for places in self._places])

    def _read(self, shard: int, place: int) -> bytes:
        start, length = self._places[shard][place].tolist()
        return read(self.files[shard][0], start, length)


class ArrayRecordShards(Shards):
    """Records of ArrayRecord files, whose readers check a hash of every chunk."""

    def _open(self) -> None:
        try:
            from array_record.python import array_record_module
        except ImportError:
            raise ConfigError(
                "ArrayRecord files need the package array-record, which exists for Linux only: use "
                "the set as TFRecord"
            ) from None
        _allow_open_files(2 * len(self.files))

        def reader(path: pathlib.Path):
            try:
                return array_record_module.ArrayRecordReader(
                    str(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768
                )
            except (RuntimeError, ValueError) as e:
                reason = " ".join(str(e).split())
                raise DataError(
                    f"shard {path} is cut or damaged ({reason[:200]}): fetch or prepare it again"
                ) from None

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            self._readers = list(pool.map(reader, [path for path, _ in self.files]))
        self._check_lengths([r.num_records() for r in self._readers])

    def _read(self, shard: int, place: int) -> bytes:
        return self._readers[shard].read([place])[0]

    def __iter__(self) -> Iterator[Record]:
        """All records in their order: calls for many records are cheaper than calls for one."""
        for shard, (_, length) in enumerate(self.files):
            for start in range(0, length, _AT_ONCE):
                first = self.starts[shard] + start
                try:
                    many = self._readers[shard].read(start, min(start + _AT_ONCE, length))
                except (ValueError, RuntimeError):
                    many = [self.raw(first + k) for k in range(min(_AT_ONCE, length - start))]
                for k, data in enumerate(many):
                    yield self._record(first + k, data)


def _allow_open_files(more: int) -> None:
    """Readers stay open, a thousand for ImageNet: many systems allow 1,024 files by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
    if soft < 65536 and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def only(meta: Metadata, split: str, files: list[tuple[pathlib.Path, int]]) -> Metadata:
    """The metadata of a set of which one split has only these shards."""
    return replace(meta, splits={split: files})


def open_split(meta: Metadata, split: str) -> Shards:
    """Opens a split. Raises DataError for damaged shards, ConfigError for other formats."""
    readers = {"tfrecord": TFRecordShards, "array_record": ArrayRecordShards}
    if meta.file_format not in readers:
        raise ConfigError(
            f"{meta.directory} is stored as {meta.file_format}: only {' and '.join(readers)} "
            "can be read"
        )
    return readers[meta.file_format](meta, split)


# Data sets in TFDS' format, read without TensorFlow or TFDS.
#
# A directory of one version holds features.json (which feature is the image, which the label),
# dataset_info.json (splits, shard lengths, file names) and the shards.


TEST_SPLITS = ("validation", "val", "test")  # the first that exists is evaluated


def default_directory() -> pathlib.Path:
    """Where TFDS keeps its sets: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def find(name: str, directory: str) -> pathlib.Path | None:
    """The newest version of a set in a data_dir (or the version's own directory), or None."""
    root = pathlib.Path(directory).expanduser() if directory else default_directory()
    places = [root, *(p for base in (root / name, root) if base.is_dir() for p in base.iterdir())]
    found = [
        p for p in places if (p / "dataset_info.json").is_file() and (p / "features.json").is_file()
    ]
    return max(found, key=lambda p: _version(p.name), default=None)


def _version(name: str) -> tuple[int, ...]:
    parts = name.split(".")
    return tuple(int(p) for p in parts) if all(p.isdigit() for p in parts) else ()


def metadata(directory: pathlib.Path) -> Metadata:
    """Reads the JSON files. Raises DataError if they do not describe an image classification
    set."""
    try:
        features = json.loads((directory / "features.json").read_text())
        info = json.loads((directory / "dataset_info.json").read_text())
        parts: dict[str, Any] = features["featuresDict"]["features"]
        image = next(name for name, part in parts.items() if "image" in part)
        label = next(name for name, part in parts.items() if "classLabel" in part)
        file_format = info.get("fileFormat", "tfrecord")
        splits = {
            split["name"]: [
                (directory / _file_name(info["name"], split, file_format, k), int(length))
                for k, length in enumerate(split["shardLengths"])
            ]
            for split in info["splits"]
        }
        return Metadata(
            directory=directory,
            name=info["name"],
            file_format=file_format,
            image=image,
            label=label,
            num_classes=int(parts[label]["classLabel"]["numClasses"]),
            image_dimensions=tuple(
                int(d) for d in parts[image]["image"].get("shape", {}).get("dimensions", ())
            ),
            splits=splits,
        )
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as e:
        raise DataError(
            f"{directory} is not a TFDS image classification set ({type(e).__name__}: {e}): it "
            "needs features.json with an image and a class label, and dataset_info.json"
        ) from None


def _file_name(name: str, split: dict[str, Any], file_format: str, shard: int) -> str:
    count = len(split["shardLengths"])
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    return template.format(
        DATASET=name,
        SPLIT=split["name"],
        FILEFORMAT=file_format,
        SHARD_X_OF_Y=f"{shard:05d}-of-{count:05d}",
        SHARD_INDEX=f"{shard:05d}",
        NUM_SHARDS=f"{count:05d}",
    )


def source(name: str, directory: str) -> sources.Source:
    """Opens a set. Raises ConfigError if it is absent, DataError if a shard is damaged."""
    found = find(name, directory)
    if found is None:
        raise ConfigError(absent(name, directory))
    meta = metadata(found)
    test = next((s for s in TEST_SPLITS if s in meta.splits), None)
    if "train" not in meta.splits or test is None:
        raise ConfigError(
            f"{found} has the splits {sorted(meta.splits)}: train and validation or test are needed"
        )
    train, evaluation = open_split(meta, "train"), open_split(meta, test)
    described = (
        f"{meta.name} {found.name} (TFDS, {meta.file_format}): {len(train):,} training images, "
        f"{len(evaluation):,} of split {test!r}, {meta.num_classes} classes"
    )
    build = functools.partial(
        sources.Source,
        num_classes=meta.num_classes,
        description=described,
        split=test,
        class_names=class_names(meta),
    )
    if meta.image_dimensions[-1:] == (1,) and max(meta.image_dimensions) <= 32:
        return build(_in_memory(train), _in_memory(evaluation), channels=1)
    files = max(len(train.files), order.VIRTUAL_SHARDS)
    return build(train, evaluation, channels=3, shards=files)


def class_names(meta: Metadata) -> tuple[str, ...]:
    """The names that TFDS keeps beside features.json (ImageNet: synsets), or none."""
    try:
        names = (meta.directory / f"{meta.label}.labels.txt").read_text().split("\n")
    except (OSError, UnicodeDecodeError):
        return ()
    names = names[:-1] if names[-1] == "" else names
    return tuple(names) if len(names) == meta.num_classes else ()


def _in_memory(records: Shards) -> sources.Arrays:
    """Small grey images decoded once (MNIST: 55 MB)."""
    images, labels = [], []
    for record in records:
        try:
            images.append(decode.pixels(record.data, decode.frame(record.data))[..., :1])
        except decode.BadImageError as e:
            raise DataError(f"{record.name}: {e}") from None
        labels.append(checked_label(record, records.meta.num_classes))
    return sources.Arrays(np.stack(images), np.array(labels, np.int32))


def absent(name: str, directory: str) -> str:
    """What is missing, how to prepare it, and what runs without it."""
    where = directory or f"{default_directory()} (the default; set data.dir or TFDS_DATA_DIR)"
    remedy = {
        "imagenet2012": "prepare it with python -m bn_jax.prepare imagenet --tars=DIR "
        "--data_dir=OUT, then --config.data.dir=OUT",
        "mnist": "give the folder of the four idx files, or a TFDS data_dir, as --config.data.dir",
    }
    prepare = remedy.get(name, f"build it with TFDS (tfds build {name})")
    return (
        f"no data set {name!r} in {where}: {prepare}; without any data use the embedded digits: "
        "--config=configs/NAME.py:digits"
    )
