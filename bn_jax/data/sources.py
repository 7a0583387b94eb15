"""Where examples come from: what the sets of memory.py, tfds.py and folder.py have in common."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from bn_jax.data import order
from bn_jax.errors import DataError


@dataclass(frozen=True)
class Arrays:
    """A split in memory: images uint8 [N, H, W, C], labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of these examples: images [n, H, W, C], labels [n]."""
        return self.images[indices], self.labels[indices]

    def materialize(self) -> tuple[np.ndarray, np.ndarray]:
        """All images and labels."""
        return self.images, self.labels


class Record(NamedTuple):
    """One encoded example; `name` is what an error message calls it."""

    data: bytes
    label: int
    name: str


class BadRecordError(Exception):
    """A record that cannot be read: its name and the reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def checked_label(record: Record, num_classes: int) -> int:
    """The label. Raises DataError if it is out of range: then the set's metadata are wrong."""
    if not 0 <= record.label < num_classes:
        raise DataError(
            f"{record.name} has label {record.label}, the set has {num_classes} classes: its "
            "labels or metadata are wrong, prepare it again"
        )
    return record.label


class Records(Protocol):
    """A split of encoded images, read by index from any thread."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record:
        """Raises BadRecordError."""
        ...


@dataclass(frozen=True)
class Source:
    """Both splits of a data set. `shards`: the files the training split is stored in. `split`:
    what the evaluated examples are called. `class_names`: empty where a class is its number."""

    train: Arrays | Records
    evaluation: Arrays | Records
    num_classes: int
    channels: int
    description: str
    shards: int = order.VIRTUAL_SHARDS
    split: str = "test"
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Some records of a split."""

    records: Records
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.records[int(self.indices[index])]


def subset(split: Arrays | Records, indices: np.ndarray) -> Arrays | Records:
    """The examples of a split at these indices."""
    return Arrays(*split.take(indices)) if isinstance(split, Arrays) else Part(split, indices)
