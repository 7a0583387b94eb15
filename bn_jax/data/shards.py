"""Shards of a set in TFDS' format, ArrayRecord or TFRecord, by random access and without
TensorFlow.

Every shard is looked at when a split is opened, so that a missing or cut one ends the run before it
begins.
"""

import bisect
import concurrent.futures
import itertools
import pathlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bn_jax.data import example, sources, tfrecord
from bn_jax.errors import ConfigError, DataError

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


class Shards:
    """The records of a split, by index over all its shards."""

    def __init__(self, meta: Metadata, split: str):
        self.meta, self.split = meta, split
        self.files = meta.splits[split]
        for path, _ in self.files:
            if not path.is_file():
                raise DataError(f"shard {path} is missing: fetch or prepare it again")
        self.starts = [0, *itertools.accumulate(length for _, length in self.files)]
        self._open()

    def _open(self) -> None:
        raise NotImplementedError

    def _read(self, shard: int, place: int) -> bytes:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.starts[-1]

    def where(self, index: int) -> tuple[int, int]:
        """(shard, place in it) of a record."""
        shard = bisect.bisect_right(self.starts, index) - 1
        return shard, index - self.starts[shard]

    def raw(self, index: int) -> bytes:
        """The serialized Example. Raises sources.BadRecordError if it is damaged."""
        shard, place = self.where(index)
        try:
            return self._read(shard, place)
        except (ValueError, RuntimeError, OSError) as e:
            raise sources.BadRecordError(self.name(index), " ".join(str(e).split())) from None

    def name(self, index: int) -> str:
        """What messages call a record."""
        shard, place = self.where(index)
        return f"record {place} of shard {self.files[shard][0].name}"

    def __getitem__(self, index: int) -> sources.Record:
        return self._record(index, self.raw(index))

    def __iter__(self) -> Iterator[sources.Record]:
        """All records in their order, cheaper than one by one. Raises BadRecordError."""
        for index in range(len(self)):
            yield self[index]

    def _record(self, index: int, data: bytes) -> sources.Record:
        try:
            features = example.parse(data)
            (image,), (label,) = features[self.meta.image], features[self.meta.label]
            if not isinstance(image, bytes) or not isinstance(label, int):
                raise ValueError("image or label has the wrong type")
        except (ValueError, KeyError) as e:
            raise sources.BadRecordError(
                self.name(index), f"not an image with a label: {e}"
            ) from None
        file_name = features.get("file_name", [b""])[0]
        name = file_name.decode(errors="replace") if isinstance(file_name, bytes) else ""
        name = f"{name} ({self.name(index)})" if name else self.name(index)
        return sources.Record(image, label, name)

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
        self._places = tfrecord.index([path for path, _ in self.files])
        self._check_lengths([len(places) for places in self._places])

    def _read(self, shard: int, place: int) -> bytes:
        start, length = self._places[shard][place].tolist()
        return tfrecord.read(self.files[shard][0], start, length)


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

    def __iter__(self) -> Iterator[sources.Record]:
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
