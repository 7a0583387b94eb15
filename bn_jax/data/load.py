"""Turns records into the rows of a batch: reads, decodes, crops, resizes; masks bad records."""

import functools
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from absl import logging

from bn_jax.data import crops, decode
from bn_jax.data.distort import Draw
from bn_jax.errors import DataError

T = TypeVar("T")

# How many training records may be bad: 0.1% of them, but at least 10.
BAD_SHARE = 1e-3
BAD_LEAST = 10

GEOMETRY = (Draw.AREA, Draw.ASPECT, Draw.TOP, Draw.LEFT)  # the draws of a random crop


class Record(NamedTuple):
    """One encoded example; `name` is its name in error messages."""

    data: bytes
    label: int
    name: str


class BadRecordError(Exception):
    """A record cannot be read; the error has its name and the reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class Readable(Protocol):
    """Records that are read by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record:
        """Raises BadRecordError."""
        ...


class DoubtfulRecords:
    """The records that were decoded although libjpeg warned of them: a damaged scan, stray bytes.

    They are used, as by other readers, and each is logged once. Threads may share this object.
    """

    SHOWN = 20  # so many are logged by name; an odd program may have written thousands of them

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str, warnings: list[str]) -> None:
        """Logs a record when it is met for the first time; without warnings it does nothing."""
        if not warnings:
            return
        with self._lock:
            if name in self.names:
                return
            self.names.add(name)
            count = len(self.names)
        if count <= self.SHOWN:
            logging.warning(
                "record %s: decoded, but its pixels may be wrong: %s", name, warnings[0]
            )
        if count == self.SHOWN:
            logging.warning("more such records are not named: python -m bn_jax.prepare check DIR")


class BadRecords:
    """The bad training records so far; too many of them end the run. Threads may share it."""

    def __init__(self, total: int):
        self.limit = max(BAD_LEAST, int(BAD_SHARE * total))
        self.names: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Logs a record when it is met for the first time. Raises DataError beyond the limit."""
        with self._lock:
            if name in self.names:
                return
            self.names.add(name)
            count = len(self.names)
        logging.warning("bad training record %s: %s; row masked (%d so far)", name, reason, count)
        if count > self.limit:
            raise DataError(
                f"{count} bad training records, the limit is {self.limit}; the last one is "
                f"{name}: {reason}; python -m bn_jax.prepare check DIR lists them"
            )


def checked_label(record: Record, num_classes: int) -> int:
    """Returns a record's label. Raises DataError if it is out of range."""
    if not 0 <= record.label < num_classes:
        raise DataError(
            f"{record.name} has label {record.label}, but the set has {num_classes} classes: its "
            "labels or metadata are wrong; prepare it again"
        )
    return record.label


def train_rows(
    records: Readable,
    indices: Iterable[int],
    draws: np.ndarray,
    *,
    size: int,
    min_area: float,
    num_classes: int,
    bad: BadRecords,
    doubtful: DoubtfulRecords | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes rows of random crops: images uint8 [n, S, S, 3], labels int32 [n], mask bool [n].

    If min_area is 1, they are evaluation's centre crops instead. A record that cannot be read or
    decoded leaves a masked row of zeros, so that the other rows stay where they are. Raises
    DataError for a label out of range and for too many bad records.
    """
    images, labels, mask = _empty(len(draws), size)
    doubtful = doubtful or DoubtfulRecords()
    for row, index in enumerate(indices):
        warnings: list[str] = []
        try:
            record = records[int(index)]
            label = checked_label(record, num_classes)
            _train_crop(record.data, images[row], draws[row], min_area, warnings)
        except BadRecordError as e:
            bad.add(e.name, e.reason)
        except decode.BadImageError as e:
            bad.add(record.name, str(e))
        else:
            labels[row] = label
            mask[row] = True
            doubtful.add(record.name, warnings)
    return images, labels, mask


def _train_crop(
    data: bytes, out: np.ndarray, draws: np.ndarray, min_area: float, warnings: list[str]
) -> None:
    """Writes a random crop of an encoded image into `out` [S, S, 3]. Raises BadImageError."""
    found = decode.frame(data)
    if min_area < 1:
        area, aspect, top, left = (float(draws[d]) for d in GEOMETRY)
        box = crops.random_box(found.height, found.width, (area, aspect, top, left), min_area)
    else:
        box = crops.center_box(found.height, found.width)

    reduce = decode.reduction(box, len(out))
    # The fast inverse DCT is good enough here: its errors are far below those of any distortion.
    image = decode.pixels(data, found, reduce=reduce, exact=False, warnings=warnings)
    decode.resized_crop(image, box, reduce, out)


def evaluation_rows(
    records: Readable,
    indices: Iterable[int],
    *,
    size: int,
    num_classes: int,
    doubtful: DoubtfulRecords | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes rows as `train_rows` does, of centre crops. Indices past the end leave masked rows.

    Raises DataError, with the record's name, for any bad record: an evaluation without it would not
    be exact.
    """
    places = list(indices)
    images, labels, mask = _empty(len(places), size)
    for row, index in enumerate(places):
        if index < len(records):
            look = functools.partial(center_crop, out=images[row])
            _, labels[row] = evaluation_example(records, index, num_classes, look, doubtful)
            mask[row] = True
    return images, labels, mask


def evaluation_example(
    records: Readable,
    index: int,
    num_classes: int,
    look: Callable[[bytes, list[str]], T],
    doubtful: DoubtfulRecords | None = None,
) -> tuple[T, int]:
    """Returns what `look` makes of the encoded image of one record, and the record's label.

    `look` is also given a list for the decoder's warnings, which are logged with the record's name.
    Raises DataError, with the record's name, if the record is bad.
    """
    warnings: list[str] = []
    try:
        record = records[int(index)]
    except BadRecordError as e:
        raise DataError(f"{e.name}: {e.reason}; evaluation leaves nothing out") from None
    label = checked_label(record, num_classes)
    try:
        seen = look(record.data, warnings)
    except decode.BadImageError as e:
        raise DataError(f"{record.name}: {e}; evaluation leaves nothing out") from None
    (doubtful or DoubtfulRecords()).add(record.name, warnings)
    return seen, label


def center_crop(data: bytes, warnings: list[str], out: np.ndarray) -> None:
    """Writes the centre crop of an encoded image into `out` [S, S, 3]. Raises BadImageError."""
    found = decode.frame(data)
    box = crops.center_box(found.height, found.width)
    reduce = decode.reduction(box, len(out))
    image = decode.pixels(data, found, reduce=reduce, warnings=warnings)
    decode.resized_crop(image, box, reduce, out)


def lazily(data: bytes, warnings: list[str]) -> tuple[int, int, Callable[[int], np.ndarray]]:
    """Returns an encoded image's height and width, and a function of 1, 2, 4 or 8 that decodes it.

    The function reduces the image by that factor, and decodes each reduction only once. Both this
    call and the function raise BadImageError.
    """
    found = decode.frame(data)

    @functools.cache
    def decoded(reduce: int) -> np.ndarray:
        return decode.pixels(data, found, reduce=reduce, warnings=warnings)

    return found.height, found.width, decoded


def _empty(n: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes images, labels and mask of n rows that hold no example yet."""
    return np.zeros((n, size, size, 3), np.uint8), np.zeros(n, np.int32), np.zeros(n, bool)
