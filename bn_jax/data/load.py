"""Encoded records -> rows of a batch: read, decode, crop, resize; and what happens to bad ones."""

import concurrent.futures
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

import cv2
import numpy as np
from absl import logging

from bn_jax.data import crops, decode, sources
from bn_jax.data.distort import Draw
from bn_jax.errors import ConfigError, DataError

BAD_SHARE, BAD_LEAST = 1e-3, 10  # of the training records may be bad: 0.1%, but 10 in a small set
HELD_BYTES = 16 * 2**30  # of decoded training images that are kept in memory
T = TypeVar("T")
GEOMETRY = (Draw.AREA, Draw.ASPECT, Draw.TOP, Draw.LEFT)


class BadRecords:
    """The bad training records met so far; too many end the run. Threads share it."""

    def __init__(self, total: int):
        self.limit = max(BAD_LEAST, int(BAD_SHARE * total))
        self.names: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Logs a record the first time. Raises DataError beyond the limit."""
        with self._lock:
            if name in self.names:
                return
            self.names.add(name)
            count = len(self.names)
        logging.warning("bad training record %s: %s; row masked (%d so far)", name, reason, count)
        if count > self.limit:
            raise DataError(
                f"{count} bad training records, the limit is {self.limit}; the last: {name}: "
                f"{reason}; look with python -m bn_jax.prepare check DIR"
            )


def train_rows(
    records: sources.Records,
    indices: Iterable[int],
    draws: np.ndarray,
    *,
    size: int,
    min_area: float,
    mirror: bool,
    num_classes: int,
    bad: BadRecords,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images uint8 [n, S, S, 3], labels int32 [n], mask bool [n]) with random crops and mirrors.

    min_area 1 stands for no random crop: the centre crop of evaluation. A record that cannot be
    read or decoded leaves a masked row of zeros, so that no other row moves. Raises DataError for a
    label out of range and for too many bad records.
    """
    images, labels, mask = _empty(len(draws), size)
    for row, index in enumerate(indices):
        try:
            record = records[int(index)]
            label = sources.checked_label(record, num_classes)
            _crop(record.data, images[row], draws[row], min_area)
        except sources.BadRecordError as e:
            bad.add(e.name, e.reason)
        except decode.BadImageError as e:
            bad.add(record.name, str(e))
        else:
            labels[row], mask[row] = label, True
            if mirror and draws[row, Draw.MIRROR] < 0.5:
                cv2.flip(images[row], 1, dst=images[row])
    return images, labels, mask


def _crop(data: bytes, out: np.ndarray, draws: np.ndarray, min_area: float) -> None:
    found = decode.frame(data)
    if min_area < 1:
        area, aspect, top, left = (float(draws[d]) for d in GEOMETRY)
        box = crops.random_box(found.height, found.width, (area, aspect, top, left), min_area)
    else:
        box = crops.center_box(found.height, found.width)
    reduce = decode.reduction(box, len(out))
    image = decode.pixels(data, found, reduce=reduce, exact=False)
    decode.resized_crop(image, box, reduce, out)


def evaluation_rows(
    records: sources.Records, indices: Iterable[int], *, size: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As train_rows, with the centre crop. Raises DataError, with the record's name, for every bad
    one: an evaluation that leaves examples out is not exact. Indices past the end leave masked
    rows."""
    places = list(indices)
    images, labels, mask = _empty(len(places), size)
    for row, index in enumerate(places):
        if index < len(records):
            look = functools.partial(center_crop, out=images[row])
            _, labels[row] = evaluation_example(records, index, num_classes, look)
            mask[row] = True
    return images, labels, mask


def evaluation_example(
    records: sources.Records, index: int, num_classes: int, look: Callable[[bytes], T]
) -> tuple[T, int]:
    """What `look` makes of the encoded image of one record, and its label. Raises DataError, with
    the record's name, if it is bad."""
    try:
        record = records[int(index)]
    except sources.BadRecordError as e:
        raise DataError(f"{e.name}: {e.reason}; evaluation leaves nothing out") from None
    label = sources.checked_label(record, num_classes)
    try:
        return look(record.data), label
    except decode.BadImageError as e:
        raise DataError(f"{record.name}: {e}; evaluation leaves nothing out") from None


def center_crop(data: bytes, out: np.ndarray) -> None:
    """Writes the centre crop of an encoded image into `out` [S, S, 3]. Raises BadImageError."""
    found = decode.frame(data)
    box = crops.center_box(found.height, found.width)
    reduce = decode.reduction(box, len(out))
    decode.resized_crop(decode.pixels(data, found, reduce=reduce), box, reduce, out)


def held_in_memory(source: sources.Source, size: int) -> sources.Source:
    """The set with its training split decoded once, as centre crops of `size` pixels.

    A split that is in memory already stays as it is, and evaluation still reads records. Raises
    ConfigError for more than HELD_BYTES, DataError for a record that cannot be read.
    """
    train = source.train
    if isinstance(train, sources.Arrays):
        return source

    need = len(train) * size * size * 3
    if need > HELD_BYTES:
        raise ConfigError(
            f"steps_per_dispatch above 1 keeps the training images in memory: {need / 2**30:.1f} "
            f"GiB, the limit is {HELD_BYTES / 2**30:.0f}; set steps_per_dispatch=1"
        )

    threads = os.cpu_count() or 1
    read = functools.partial(evaluation_rows, train, size=size, num_classes=source.num_classes)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(read, np.array_split(np.arange(len(train)), 8 * threads)))
    images, labels, _ = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return dataclasses.replace(source, train=sources.Arrays(images, labels))


def _empty(n: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.zeros((n, size, size, 3), np.uint8), np.zeros(n, np.int32), np.zeros(n, bool)
