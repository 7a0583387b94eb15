"""Reads data sets in TFDS' format by random access, without TensorFlow and TFDS.

A directory of one version holds dataset_info.json (splits, shard lengths, file names),
features.json (which feature is the image, which the label) and the shards: ArrayRecord or TFRecord
files of serialized tf.train.Example messages. This file is ordered from the outside to the inside:
the set, its metadata, its shards, the index of a TFRecord file, the messages.
"""

import bisect
import concurrent.futures
import functools
import itertools
import json
import mmap
import os
import pathlib
import resource
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import google_crc32c
import numpy as np
from absl import logging
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from bn_jax.data import cache, decode, order, sources
from bn_jax.data.load import BadRecordError, Record, checked_label
from bn_jax.errors import ConfigError, DataError, expand_path

# ----------------------------------------------------------------------------------------------
# A data set
# ----------------------------------------------------------------------------------------------

TEST_SPLITS = ("validation", "val", "test")  # the first that exists is evaluated


def source(name: str, directory: str) -> sources.Source:
    """Opens a set. Raises ConfigError if it is absent, DataError if a shard is damaged."""
    found = find(name, directory)
    if found is None:
        raise ConfigError(absent(name, directory))
    meta = metadata(found)
    if name.partition("/")[0] not in (meta.name, *(folder.name for folder in found.parents)):
        logging.warning(
            "data.name is %s, but %s holds the set %s, which is used", name, found, meta.name
        )
    test = next((s for s in TEST_SPLITS if s in meta.splits), None)
    if "train" not in meta.splits or test is None:
        raise ConfigError(
            f"{found} has the splits {sorted(meta.splits)}: train and validation or test are needed"
        )

    train = open_split(meta, "train")
    evaluation = open_split(meta, test)
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
    if meta.image_shape[-1:] == (1,) and max(meta.image_shape) <= 32:
        return build(_in_memory(train), _in_memory(evaluation), channels=1)
    files = max(len(train.files), order.VIRTUAL_SHARDS)
    return build(train, evaluation, channels=3, shards=files)


def find(name: str, directory: str) -> pathlib.Path | None:
    """Finds the newest version of a set in a data_dir or a version's directory; None if absent."""
    root = expand_path(directory) if directory else default_directory()
    places = [root]
    for base in (root / name, root):
        if base.is_dir():
            places += base.iterdir()
    found = [p for p in places if (p / "dataset_info.json").is_file()]
    # A version without features.json, as TFDS wrote before 2021, cannot be read. It is only chosen
    # if there is no other, and then `metadata` says so.
    return max(
        found, key=lambda p: ((p / "features.json").is_file(), _version(p.name)), default=None
    )


def _version(name: str) -> tuple[int, ...]:
    parts = name.split(".")
    return tuple(int(p) for p in parts) if all(p.isdigit() for p in parts) else ()


def default_directory() -> pathlib.Path:
    """Returns where TFDS keeps its sets: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    named = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in named:
        raise ConfigError(
            f"TFDS_DATA_DIR={named} is not a local path: mount the bucket (gcsfuse), or give "
            "--config.data.dir"
        )
    return expand_path(named)


def absent(name: str, directory: str) -> str:
    """Says which set is missing, how to prepare it, and what runs without it."""
    where = directory or f"{default_directory()} (the default; set data.dir or TFDS_DATA_DIR)"
    root = expand_path(directory) if directory else default_directory()
    configs = sorted({p.parent.parent.name for p in root.glob(f"{name}/*/*/dataset_info.json")})
    if configs:
        return (
            f"{root / name} has the configs {', '.join(configs)}: choose one, such as "
            f"--config.data.name={name}/{configs[0]}"
        )
    remedy = {
        "imagenet2012": "prepare it with python -m bn_jax.prepare imagenet --from=PATH "
        "--data_dir=OUT, then --config.data.dir=OUT",
        "mnist": "download it with python -m bn_jax.prepare mnist, or give the folder of the four "
        "idx files, or a TFDS data_dir, as --config.data.dir",
    }
    prepare = remedy.get(name, f"build it with TFDS (tfds build {name})")
    return (
        f"no data set {name!r} in {where}: {prepare}; without any data use the embedded digits: "
        "--config=configs/NAME.py:digits"
    )


def class_names(meta: "Metadata") -> tuple[str, ...]:
    """Reads the names that TFDS keeps beside features.json (ImageNet: synsets); () if absent."""
    try:
        text = (meta.directory / f"{meta.label}.labels.txt").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ()
    names = tuple(name.strip() for name in text.split("\n") if name.strip())  # as TFDS reads them
    return names if len(names) == meta.num_classes else ()


def _in_memory(records: "Shards") -> sources.Arrays:
    """Decodes small grey images into memory (MNIST: 55 MB)."""
    images = []
    labels = []
    for record in records:
        try:
            images.append(decode.pixels(record.data, decode.frame(record.data))[..., :1])
        except decode.BadImageError as e:
            raise DataError(f"{record.name}: {e}") from None
        labels.append(checked_label(record, records.num_classes))
    return sources.Arrays(np.stack(images), np.array(labels, np.int32))


# ----------------------------------------------------------------------------------------------
# Its metadata: dataset_info.json and features.json
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """The contents of the two JSON files.

    Attributes:
      image, label: names of the features that hold them.
      image_shape: (H, W, C) of the images, -1 where they differ; () if the set does not say.
      splits: name -> [(shard file, records in it)].
    """

    directory: pathlib.Path
    name: str
    file_format: str
    image: str
    label: str
    num_classes: int
    image_shape: tuple[int, ...]
    splits: dict[str, list[tuple[pathlib.Path, int]]]


def metadata(directory: pathlib.Path) -> Metadata:
    """Reads the JSON files.

    Raises DataError if they do not describe an image classification set.
    """
    if not (directory / "features.json").is_file():
        raise DataError(
            f"{directory} has no features.json: an older TFDS made it; build the set again with "
            "TFDS 4.9"
        )
    try:
        # They are read as bytes, because json then allows for an editor's byte order mark.
        features = _features(json.loads((directory / "features.json").read_bytes()))
        info = json.loads((directory / "dataset_info.json").read_bytes())
        image, label = _image_and_label(directory, features, info)
        file_format = info.get("fileFormat", "tfrecord")
        splits = {}
        for split in info["splits"]:
            if "shardLengths" not in split:
                raise DataError(
                    f"{directory / 'dataset_info.json'} has no shardLengths for split "
                    f"{split['name']!r}: an older TFDS made it; build the set again with TFDS 4.9"
                )
            splits[split["name"]] = [
                (directory / _file_name(info["name"], split, file_format, k), int(length))
                for k, length in enumerate(split["shardLengths"])
            ]
        return Metadata(
            directory=directory,
            name=info["name"],
            file_format=file_format,
            image=image,
            label=label,
            num_classes=_num_classes(features[label].content),
            image_shape=_shape(features[image].content),
            splits=splits,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(
            f"{directory} is not a TFDS image classification set ({type(e).__name__}: {e}): it "
            "needs features.json with an image and a class label, and dataset_info.json"
        ) from None


@dataclass(frozen=True)
class Feature:
    """One feature of an example: its kind (image, label or other), and the file's description."""

    kind: str
    content: dict[str, Any]


def _features(described: dict[str, Any]) -> dict[str, Feature]:
    """Reads the features from features.json.

    It may have its present form, or the form that TFDS wrote before 4.5, which 4.9 still reads.
    """
    if "featuresDict" in described:
        return {n: _feature(f) for n, f in described["featuresDict"]["features"].items()}
    content = _old_content(described)
    # A message of its own (the key `proto_cls`) has one more level than a plain dictionary.
    return {n: _feature(f) for n, f in content.get("features", content).items()}


def _feature(described: dict[str, Any]) -> Feature:
    if "image" in described:
        return Feature("image", described["image"])
    if "classLabel" in described:
        return Feature("label", described["classLabel"])
    kinds = {"Image": "image", "ClassLabel": "label"}
    kind = kinds.get(described.get("type", "").rpartition(".")[2], "other")
    return Feature(kind, _old_content(described) if kind != "other" else {})


def _old_content(described: dict[str, Any]) -> dict[str, Any]:
    """Returns what the older form keeps under `content`: a dictionary, or JSON in a string."""
    content = described["content"]
    return json.loads(content) if isinstance(content, str) else content


def _num_classes(content: dict[str, Any]) -> int:
    return int(content.get("numClasses") or content.get("num_classes") or len(content["names"]))


def _shape(content: dict[str, Any]) -> tuple[int, ...]:
    shape = content.get("shape") or ()
    if isinstance(shape, dict):
        shape = shape.get("dimensions", ())
    return tuple(-1 if size is None else int(size) for size in shape)


def _image_and_label(
    directory: pathlib.Path, features: dict[str, Feature], info: dict[str, Any]
) -> tuple[str, str]:
    """Returns the names of the feature to learn from and of the one to predict.

    They are the supervised keys of the set if these are an image and a class label, else its only
    image and its only class label. Raises DataError if there are several of a kind, ValueError if
    there is none.
    """
    keys = _supervised_keys(info)
    if [features[k].kind for k in keys if k in features] == ["image", "label"]:
        return keys[0], keys[1]

    chosen = []
    for kind in ("image", "label"):
        names = sorted(name for name, feature in features.items() if feature.kind == kind)
        if not names:
            raise ValueError(f"no feature is of kind {kind}")
        if len(names) > 1:
            raise DataError(
                f"{directory} has {len(names)} features of kind {kind} ({', '.join(names)}), and "
                "dataset_info.json does not choose one: write its supervisedKeys"
            )
        chosen.append(names[0])
    return chosen[0], chosen[1]


def _supervised_keys(info: dict[str, Any]) -> list[str]:
    """Returns input and output as dataset_info.json names them, or []."""
    keys = info.get("supervisedKeys") or {}
    if "input" in keys and "output" in keys:
        return [keys["input"], keys["output"]]
    items = keys.get("tuple", {}).get("items", [])
    return [item.get("featureKey") for item in items[:2]]  # a third one would be weights


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


# ----------------------------------------------------------------------------------------------
# Its shards
# ----------------------------------------------------------------------------------------------

AT_ONCE = 256  # records that a sequential reader holds in memory


def open_split(meta: Metadata, split: str) -> "Shards":
    """Opens a split. Raises DataError for damaged shards, ConfigError for other formats."""
    readers = {"tfrecord": TFRecordShards, "array_record": ArrayRecordShards}
    if meta.file_format not in readers:
        raise ConfigError(
            f"{meta.directory} is stored as {meta.file_format}: only {' and '.join(readers)} "
            "can be read"
        )
    return readers[meta.file_format](meta, split)


def only(meta: Metadata, split: str, files: list[tuple[pathlib.Path, int]]) -> Metadata:
    """Returns the metadata with only these shards of one split."""
    return replace(meta, splits={split: files})


class Shards(sources.Records):
    """The records of a split, by index over all its shards.

    Every shard is looked at when the split is opened, so that a missing or cut one ends the run
    before it begins.
    """

    def __init__(self, meta: Metadata, split: str):
        self.meta = meta
        self.split = split
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

    def __getitem__(self, index: int) -> Record:
        return self._record(index, self.raw(index))

    def __iter__(self) -> Iterator[Record]:
        """Yields all records in their order. Raises BadRecordError if one cannot be read."""
        for index in range(len(self)):
            yield self[index]

    def raw(self, index: int) -> bytes:
        """Reads the serialized Example. Raises BadRecordError if it is damaged."""
        shard, place = self.where(index)
        try:
            return self._read(shard, place)
        except (ValueError, RuntimeError, OSError) as e:
            raise BadRecordError(self.name(index), " ".join(str(e).split())) from None

    def where(self, index: int) -> tuple[int, int]:
        """Returns (shard, place in it) of a record."""
        shard = bisect.bisect_right(self.starts, index) - 1
        return shard, index - self.starts[shard]

    def name(self, index: int) -> str:
        """Returns the name of a record in messages."""
        shard, place = self.where(index)
        return f"record {place} of shard {self.files[shard][0].name}"

    def _record(self, index: int, data: bytes) -> Record:
        try:
            features = parse(data)
            (image,) = features[self.meta.image]
            (label,) = features[self.meta.label]
            if not isinstance(image, bytes) or not isinstance(label, int):
                raise ValueError("image or label has the wrong type")
        except (ValueError, KeyError) as e:
            raise BadRecordError(self.name(index), f"not an image with a label: {e}") from None
        name = self.name(index)
        file_name = features.get("file_name", [b""])
        if file_name and isinstance(file_name[0], bytes) and file_name[0]:
            name = f"{file_name[0].decode(errors='replace')} ({name})"
        return Record(image, label, name)

    def _check_lengths(self, counts: list[int]) -> None:
        for (path, length), count in zip(self.files, counts, strict=True):
            if count != length:
                raise DataError(
                    f"shard {path} holds {count} records, but dataset_info.json says {length}: "
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
    """Records of ArrayRecord files, whose readers check a hash of every chunk.

    There is one reader a file, not array_record's ArrayRecordDataSource: that names no file when
    one of them is cut or damaged.
    """

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

        # ImageNet has a thousand files, each of which has to be opened and looked at.
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            self._readers = list(pool.map(reader, [path for path, _ in self.files]))
        self._check_lengths([r.num_records() for r in self._readers])

    def _read(self, shard: int, place: int) -> bytes:
        return self._readers[shard].read([place])[0]

    def __iter__(self) -> Iterator[Record]:
        """Yields all records in their order, read many at a time, which is cheaper."""
        for shard, (_, length) in enumerate(self.files):
            for start in range(0, length, AT_ONCE):
                stop = min(start + AT_ONCE, length)
                first = self.starts[shard] + start
                try:
                    many = self._readers[shard].read(start, stop)
                except (ValueError, RuntimeError):  # one is damaged; `raw` names it
                    many = [self.raw(first + k) for k in range(stop - start)]
                for k, data in enumerate(many):
                    yield self._record(first + k, data)


def _allow_open_files(more: int) -> None:
    """Raises the limit of open files of this process.

    Readers stay open, a thousand for ImageNet, and many systems allow 1,024 files by default.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
    if soft < 65536 and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# ----------------------------------------------------------------------------------------------
# TFRecord files
#
# A file is a chain of records: uint64 length, uint32 masked CRC-32C of it, the data, uint32 masked
# CRC-32C of the data, all little-endian (tensorflow/core/lib/io/record_writer.h). The chain is
# walked once; the places of its records are kept in the cache directory, never beside the data.
# ----------------------------------------------------------------------------------------------

HEADER = 12  # bytes before the data of a record
FOOTER = 4  # bytes after it

_MASK_DELTA = 0xA282EAD8  # of the masked checksum (tensorflow/core/lib/hash/crc32c.h)


def index(paths: list[pathlib.Path]) -> list[np.ndarray]:
    """Scans these files, or takes the scans from the cache if the files are unchanged."""
    if not paths:
        return []
    state = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    kept = cache.path_for("tfrecord", state)

    def is_whole(arrays: cache.Arrays) -> bool:
        places = arrays["places"]
        is_list = places.dtype == np.int64 and places.shape[1:] == (2,)
        return is_list and len(arrays["splits"]) == len(paths) - 1

    arrays = cache.load(kept, is_whole)
    if arrays is not None:
        return np.split(arrays["places"], arrays["splits"])
    scans = [scan(p) for p in paths]
    splits = np.cumsum([len(s) for s in scans])[:-1]
    cache.store(kept, splits=splits, places=np.concatenate(scans))
    return scans


def scan(path: pathlib.Path) -> np.ndarray:
    """Returns the place and the length of each record's data, int64 [n, 2].

    Raises DataError if the chain is cut or a length is damaged.
    """
    size = path.stat().st_size
    if not size:
        return np.zeros((0, 2), np.int64)
    places: list[tuple[int, int]] = []
    at = 0
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while at < size:
            header = data[at : at + HEADER]
            if len(header) == HEADER and masked(header[:8]) != _uint32(header[8:]):
                raise DataError(
                    f"shard {path} is damaged: the length of record {len(places)} fails its "
                    "checksum; fetch or write it again"
                )
            length = struct.unpack("<Q", header[:8])[0] if len(header) == HEADER else size
            if at + HEADER + length + FOOTER > size:
                raise DataError(
                    f"shard {path} is cut in record {len(places)} at byte {at} of {size}: fetch or "
                    "write it again"
                )
            places.append((at + HEADER, length))
            at += HEADER + length + FOOTER
    return np.array(places, np.int64)


def read(path: pathlib.Path, place: int, length: int) -> bytes:
    """Reads the data of one record. Raises ValueError if it is cut or fails its checksum."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        block = os.pread(descriptor, length + FOOTER, place)
    finally:
        os.close(descriptor)
    if len(block) != length + FOOTER:
        raise ValueError("the record is cut")
    data = block[:length]
    if masked(data) != _uint32(block[length:]):
        raise ValueError("the record fails its checksum (CRC-32C)")
    return data


def write(path: pathlib.Path, records: list[bytes]) -> None:
    """Writes a file of these records (tests and small sets)."""
    with path.open("wb") as f:
        for data in records:
            length = struct.pack("<Q", len(data))
            f.write(length + struct.pack("<I", masked(length)))
            f.write(data + struct.pack("<I", masked(data)))


def masked(data: bytes) -> int:
    """Computes the CRC-32C of some bytes in the masked form of TFRecord files."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def _uint32(data: bytes) -> int:
    return struct.unpack("<I", data)[0]


# ----------------------------------------------------------------------------------------------
# Messages: tf.train.Example
#
# The messages are declared here and read by protobuf. The generated classes inside the package
# tensorflow-datasets take 0.6 s to import, because they import the whole package; this takes
# 0.01 s.
# ----------------------------------------------------------------------------------------------

Value = bytes | int


def parse(data: bytes) -> dict[str, list[Value]]:
    """Parses the bytes and integer features of a serialized Example; lists of floats are left out.

    Raises ValueError if it is not an Example.
    """
    try:
        features = _example_class().FromString(data).features.feature
    except message.DecodeError as e:
        raise ValueError(f"not a tf.train.Example ({e})") from None
    return {
        name: [*feature.bytes_list.value, *feature.int64_list.value]
        for name, feature in features.items()
    }


def serialize(features: dict[str, Value]) -> bytes:
    """Serializes an Example with one value for each feature, in the order of their names."""
    return _example(features).SerializeToString(deterministic=True)


def serialized_size(features: dict[str, Value], name: str, size: int) -> int:
    """Returns the length of an Example of these features and one more, `name`, of `size` bytes.

    The bytes of the latter need not exist.
    """
    lengths = {n: _varint_size(v) if isinstance(v, int) else len(v) for n, v in features.items()}
    return _field_size(
        sum(
            # An entry of the map: its key, and a Feature around a list around the value.
            _field_size(
                _field_size(len(key.encode())) + _field_size(_field_size(_field_size(length)))
            )
            for key, length in {**lengths, name: size}.items()
        )
    )


def _field_size(length: int) -> int:
    """Returns the size of a field with content of this length: a tag, the length, the content."""
    return 1 + _varint_size(length) + length


def _varint_size(value: int) -> int:
    """Returns the size of an integer in protobuf's variable-length form."""
    return max(1, -(-(value % 2**64).bit_length() // 7))


def _example(features: dict[str, Value]) -> Any:
    example = _example_class()()
    for name, value in features.items():
        feature = example.features.feature[name]
        values = feature.int64_list if isinstance(value, int) else feature.bytes_list
        values.value.append(value)
    return example


@functools.cache
def _example_class() -> Any:
    """Builds the class of tf.train.Example (tensorflow/core/example, example and feature.proto)."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="bn_jax/example.proto", package="bn_jax", syntax="proto3"
    )

    def add(messages, name: str, *fields: tuple[str, int, int, int, str | None]):
        added = messages.add(name=name)
        for field_name, number, kind, label, type_name in fields:
            added.field.add(
                name=field_name, number=number, type=kind, label=label, type_name=type_name
            )
        return added

    one = field.LABEL_OPTIONAL
    many = field.LABEL_REPEATED
    nested = field.TYPE_MESSAGE
    add(file.message_type, "BytesList", ("value", 1, field.TYPE_BYTES, many, None))
    add(file.message_type, "FloatList", ("value", 1, field.TYPE_FLOAT, many, None))
    add(file.message_type, "Int64List", ("value", 1, field.TYPE_INT64, many, None))
    feature = add(
        file.message_type,
        "Feature",
        ("bytes_list", 1, nested, one, ".bn_jax.BytesList"),
        ("float_list", 2, nested, one, ".bn_jax.FloatList"),
        ("int64_list", 3, nested, one, ".bn_jax.Int64List"),
    )
    feature.oneof_decl.add(name="kind")
    for alternative in feature.field:
        alternative.oneof_index = 0

    # map<string, Feature> feature = 1;
    features = add(
        file.message_type,
        "Features",
        ("feature", 1, nested, many, ".bn_jax.Features.FeatureEntry"),
    )
    entry = add(
        features.nested_type,
        "FeatureEntry",
        ("key", 1, field.TYPE_STRING, one, None),
        ("value", 2, nested, one, ".bn_jax.Feature"),
    )
    entry.options.map_entry = True
    add(file.message_type, "Example", ("features", 1, nested, one, ".bn_jax.Features"))

    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("bn_jax.Example"))
