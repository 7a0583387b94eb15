"""Defines what all data sets have in common: two splits, whose examples are read by index.

A split is either held in memory (`Arrays`) or consists of encoded images (`Records`). Both have the
same methods, so that callers need not distinguish them.
"""

import abc
import concurrent.futures
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from bn_jax.data import distort, load, order
from bn_jax.data.distort import Augmentation
from bn_jax.data.load import BadRecordError, BadRecords, Record
from bn_jax.distributed.cpus import usable_cpus
from bn_jax.errors import ConfigError

T = TypeVar("T")

# Rows of a batch: image uint8 [n, H, W, C] in 0..255, label int32 [n] and, unless the split is in
# memory and the batch is for training, mask bool [n] (False: the row holds no example).
Batch = dict[str, np.ndarray]

# Height and width of an image, and a function that decodes it at 1/1, 1/2, 1/4 or 1/8 of its size.
Look = Callable[[int, int, Callable[[int], np.ndarray]], T]

ROWS_A_TASK = 4  # the least number of rows of a batch that a thread decodes at a time

HELD_BYTES = 16 * 2**30  # of decoded training images that are kept in memory
SAMPLES = 32  # records of each split that a digest reads, unless the set is held in memory


class Split(abc.ABC):
    """The examples of one split of a data set, read by index from any thread.

    Attributes:
      in_memory: whether the examples are in memory, so that one thread is enough to read them.
      masked: whether training batches have a mask, because records can be bad.
    """

    in_memory = False
    masked = True

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def rows(
        self, indices: np.ndarray, augmentation: Augmentation, draws: np.ndarray | None = None
    ) -> Batch:
        """Returns the rows of a batch that hold these examples.

        Args:
          indices: int [n]; those past the end of the split leave masked rows.
          augmentation: what training does to an image; evaluation uses its image_size only.
          draws: float64 [n, distort.DRAWS] for training, None for evaluation.

        Returns:
          A `Batch` of image uint8 [n, S, S, C], label int32 [n], and, if `masked` or in evaluation,
          mask bool [n].

        Raises:
          DataError: a label is out of range, an example of an evaluation is bad, or too many
            training examples are.
        """

    @abc.abstractmethod
    def example(self, index: int, look: Look[T]) -> tuple[T, int]:
        """Returns what `look` makes of an image, and its label. Raises DataError if it is bad."""

    @abc.abstractmethod
    def subset(self, indices: np.ndarray) -> "Split":
        """Returns the split that has only these examples."""

    @abc.abstractmethod
    def decoded(self, size: int) -> "Split":
        """Returns the split in memory; encoded images become centre crops of `size` pixels.

        Raises ConfigError for more than HELD_BYTES, DataError for a record that cannot be read.
        """

    @abc.abstractmethod
    def content(self) -> Iterator[bytes | memoryview]:
        """Yields the bytes that a digest covers: of a split in memory all, else a sample."""

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns images uint8 [N, H, W, C] and labels int32 [N].

        Raises ConfigError if they are not held in memory.
        """
        raise ConfigError("this set is not held in memory")

    @abc.abstractmethod
    def check(self, shape: tuple[int, ...], augmentation: Augmentation) -> None:
        """Raises ConfigError if the split cannot give this shape (H, W, C) or augmentation."""


@dataclass(frozen=True)
class Source:
    """Both splits of a data set.

    Attributes:
      shards: the number of files that the training split is stored in.
      split: the name of the evaluated split.
      class_names: a name for each class; empty if classes only have numbers.
    """

    train: Split
    evaluation: Split
    num_classes: int
    channels: int
    description: str
    shards: int = order.VIRTUAL_SHARDS
    split: str = "test"
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arrays(Split):
    """A split in memory: images uint8 [N, H, W, C], labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    in_memory = True
    masked = False

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns copies of these examples: images [n, H, W, C], labels [n]."""
        return self.images[indices], self.labels[indices]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns all images and labels."""
        return self.images, self.labels

    def rows(
        self, indices: np.ndarray, augmentation: Augmentation, draws: np.ndarray | None = None
    ) -> Batch:
        """Returns the rows of a batch; see Split."""
        if draws is None:
            return self._evaluation_rows(indices)
        images, labels = self.take(indices)
        return {"image": distort.augment(images, draws, augmentation), "label": labels}

    def _evaluation_rows(self, indices: np.ndarray) -> Batch:
        mask = indices < len(self)
        images, labels = self.take(np.where(mask, indices, 0))
        images[~mask] = 0
        labels[~mask] = 0
        return {"image": images, "label": labels, "mask": mask}

    def example(self, index: int, look: Look[T]) -> tuple[T, int]:
        """Returns what `look` makes of one image, and the label."""
        (image,), (label,) = self.take(np.array([index]))
        # Images in memory have the network's own size, and crops are at least as large, so they are
        # never reduced.
        return look(image.shape[0], image.shape[1], lambda reduce: image), int(label)

    def subset(self, indices: np.ndarray) -> "Arrays":
        """Returns copies of these examples."""
        return Arrays(*self.take(indices))

    def decoded(self, size: int) -> "Arrays":
        """Returns this split, which is in memory already."""
        return self

    def content(self) -> Iterator[bytes | memoryview]:
        """Yields all images and labels."""
        for array in self.arrays():
            yield np.ascontiguousarray(array).data

    def check(self, shape: tuple[int, ...], augmentation: Augmentation) -> None:
        """Raises ConfigError for another image size and for random crops."""
        stored = self.images.shape[1:]
        if stored != shape:
            raise ConfigError(
                f"image_size={augmentation.image_size}, but this set's images are {stored[0]} "
                f"pixels: set image_size={stored[0]}"
            )
        if augmentation.crop < 1:
            raise ConfigError(
                f"data.crop={augmentation.crop}, but this set's small images are not cropped: set "
                "data.crop=1"
            )


def tasks(rows: int) -> int:
    """Returns how many threads make the rows of one batch of encoded images."""
    return max(1, min(usable_cpus(), rows // ROWS_A_TASK))


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """Makes one thread for each usable CPU; all batches and splits share them."""
    return concurrent.futures.ThreadPoolExecutor(usable_cpus(), "rows")


class Records(Split):
    """A split of encoded images.

    A subclass defines `__getitem__`, which raises BadRecordError for an image that cannot be read.

    Attributes:
      num_classes: labels are 0 to num_classes - 1.
      bad: the bad records that training has met so far.
      doubtful: the records that were decoded with a warning so far.
    """

    def __init__(self, length: int, num_classes: int):
        self.num_classes = num_classes
        self.bad = BadRecords(length)
        self.doubtful = load.DoubtfulRecords()
        self._length = length

    def __len__(self) -> int:
        return self._length

    @abc.abstractmethod
    def __getitem__(self, index: int, /) -> Record: ...

    def rows(
        self, indices: np.ndarray, augmentation: Augmentation, draws: np.ndarray | None = None
    ) -> Batch:
        """Returns the rows of a batch; see Split. Threads make parts of it side by side."""

        def make(part: np.ndarray) -> Batch:
            own = None if draws is None else draws[part]
            return self._rows(indices[part], augmentation, own)

        parts = np.array_split(np.arange(len(indices)), tasks(len(indices)))
        if len(parts) == 1:
            return make(parts[0])
        made = list(_threads().map(make, parts))
        return {name: np.concatenate([batch[name] for batch in made]) for name in made[0]}

    def _rows(
        self, indices: np.ndarray, augmentation: Augmentation, draws: np.ndarray | None
    ) -> Batch:
        """Makes the rows of a part of a batch."""
        size = augmentation.image_size
        if draws is None:
            images, labels, mask = load.evaluation_rows(
                self,
                indices,
                size=size,
                num_classes=self.num_classes,
                doubtful=self.doubtful,
            )
        else:
            images, labels, mask = load.train_rows(
                self,
                indices,
                draws,
                size=size,
                min_area=augmentation.crop,
                num_classes=self.num_classes,
                bad=self.bad,
                doubtful=self.doubtful,
            )
            images = distort.augment(images, draws, augmentation, mask)
        return {"image": images, "label": labels, "mask": mask}

    def example(self, index: int, look: Look[T]) -> tuple[T, int]:
        """Returns what `look` makes of one image, and the label."""
        return load.evaluation_example(
            self,
            index,
            self.num_classes,
            lambda data, warnings: look(*load.lazily(data, warnings)),
            self.doubtful,
        )

    def subset(self, indices: np.ndarray) -> "Records":
        """Returns a split of these records, which are not copied."""
        return Part(self, indices)

    def decoded(self, size: int) -> Arrays:
        """Decodes all examples, in threads, as evaluation sees them."""
        need = len(self) * size * size * 3
        if need > HELD_BYTES:
            raise ConfigError(
                f"steps_per_dispatch above 1 keeps the training images in memory, which takes "
                f"{need / 2**30:.1f} GiB, but the limit is {HELD_BYTES / 2**30:.0f} GiB: set "
                "steps_per_dispatch=1"
            )

        threads = usable_cpus()
        read = functools.partial(
            load.evaluation_rows,
            self,
            size=size,
            num_classes=self.num_classes,
            doubtful=self.doubtful,
        )
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(read, np.array_split(np.arange(len(self)), 8 * threads)))
        images, labels, _ = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Arrays(images, labels)

    def content(self) -> Iterator[bytes | memoryview]:
        """Yields SAMPLES records, evenly spread over the split, with their labels."""
        for index in np.linspace(0, len(self) - 1, SAMPLES, dtype=np.int64):
            try:
                record = self[int(index)]
            except BadRecordError:
                yield b"bad"  # it is not an error here, since training masks it
            else:
                yield str(record.label).encode() + record.data

    def check(self, shape: tuple[int, ...], augmentation: Augmentation) -> None:
        """Accepts everything, because encoded images are cropped and resized."""


class Part(Records):
    """Some records of a split."""

    def __init__(self, records: Records, indices: np.ndarray):
        super().__init__(len(indices), records.num_classes)
        self._records = records
        self._indices = indices

    def __getitem__(self, index: int) -> Record:
        return self._records[int(self._indices[index])]
