"""Makes batches for training and evaluation: config -> `open_data` -> `Data` -> `Batches`.

A batch is a dict: image uint8 [n, H, W, C] in 0..255, label int32 [n], and mask bool [n], which is
False if the row holds no example. Training batches of a set in memory have no mask, because its
records cannot be bad. n is the number of rows of the global batch that this process holds. The
batch of step k is a pure function of (seed, k), so only the step has to be saved.
"""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import cv2
import numpy as np
from absl import logging

from bn_jax.data import distort, folder, memory, order, sources, tfds
from bn_jax.data.distort import Augmentation
from bn_jax.data.sources import Batch
from bn_jax.distributed.cpus import usable_cpus
from bn_jax.errors import ConfigError, expand_path, reading

PREFETCH_BYTES = 512 * 2**20  # at most this much is decoded ahead of the step

# Streams of random numbers (order.key) beside those that order.py uses for training.
_HOLDOUT = 5
_STATISTICS = 6


def open_data(config) -> "Data":
    """Opens a config's data set. Raises ConfigError if it is absent or does not fit the config."""
    source = open_source(config.data.name, config.data.dir, config.image_size)
    if config.steps_per_dispatch > 1:
        source = replace(source, train=source.train.decoded(config.image_size))
    augmentation = Augmentation(
        image_size=config.image_size,
        crop=config.data.crop,
        mirror=config.data.mirror,
        shift=config.data.shift,
        distortion=config.data.distortion,
    )
    return Data(source, augmentation, shuffle=config.data.shuffle, holdout=config.data.holdout)


def open_source(name: str, directory: str, image_size: int) -> sources.Source:
    """Opens the data set `name` in `directory`. Raises ConfigError if it cannot be read."""
    if name == "digits":
        return memory.digits()
    if name == "synthetic":
        return memory.synthetic(image_size)
    with reading(directory):
        if name == "folder":
            return folder.source(directory)
        if name == "mnist":
            found = _mnist_files(directory)
            if found is not None:
                return found
        return tfds.source(name, directory)


def _mnist_files(directory: str) -> sources.Source | None:
    """Opens MNIST from its four files in `directory`; returns None if they are absent.

    Without a directory, and unless TFDS has the set, they are looked for where bn_jax.prepare puts
    them.
    """
    if directory:
        return memory.mnist_idx(expand_path(directory))
    folder = memory.mnist_cache()
    if folder is None or tfds.find("mnist", "") is not None:
        return None
    return memory.mnist_idx(folder)


class Data:
    """A data set as the trainer sees it.

    Attributes:
      num_classes: labels are 0 to num_classes - 1.
      class_names: a name for each class.
      image_shape: (H, W, C).
      num_train: examples to train on.
      num_eval: examples to evaluate.
      description: a line that states the set's limits.
      split: what the evaluated examples are called.
      held: the evaluated examples.
      test: the set's own evaluation split, if held-out training examples are evaluated instead.
      augmentation: what training does to an image.
      masked: whether training batches have a mask.
    """

    def __init__(
        self,
        source: sources.Source,
        augmentation: Augmentation,
        *,
        shuffle: str,
        holdout: float = 0.0,
    ):
        if shuffle not in order.MODES:
            raise ConfigError(f"data.shuffle={shuffle!r} is not one of {', '.join(order.MODES)}")
        self.test: sources.Split | None = None
        if holdout:
            self.test = source.evaluation
            self.test_split = source.split
            self._whole = source.description
            source = hold_out(source, holdout)
        self._train = source.train
        self._shards = source.shards
        self._shuffle = shuffle

        self.held = source.evaluation
        self.masked = source.train.masked
        self.augmentation = augmentation
        self.num_classes = source.num_classes
        self.class_names = source.class_names or tuple(map(str, range(source.num_classes)))
        self.image_shape = (augmentation.image_size, augmentation.image_size, source.channels)
        self.num_train = len(source.train)
        self.num_eval = len(source.evaluation)
        self.description = source.description
        self.split = source.split

        for split in (source.train, source.evaluation):
            if not len(split):
                raise ConfigError(f"a split of the data set is empty: {source.description}")
            split.check(self.image_shape, augmentation)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of full batches in an epoch. Raises ConfigError if there is none."""
        if batch_size > self.num_train:
            raise ConfigError(
                f"batch_size={batch_size} exceeds the {self.num_train} training examples"
            )
        return self.num_train // batch_size

    # Training.

    def train(
        self, start_step: int, stop_step: int, batch_size: int, rows: slice, *, seed: int
    ) -> "Batches":
        """Returns batches of steps start_step..stop_step - 1, prepared ahead by threads."""
        left = self.num_train - self.steps_per_epoch(batch_size) * batch_size
        if left:
            logging.info("the last %d of %d examples of an epoch are dropped", left, self.num_train)
        return self._ahead(
            range(start_step, stop_step),
            lambda k: self.train_batch(k, batch_size, rows, seed),
            rows,
            self._train,
        )

    def train_batch(self, step: int, batch_size: int, rows: slice, seed: int) -> Batch:
        """Makes the rows of the batch of one step."""
        return self._shuffled_batch(step, batch_size, rows, seed, self._shuffle)

    def train_indices(self, step: int, batch_size: int, *, seed: int) -> np.ndarray:
        """Returns the places in `resident()` of the examples of one step, int32 [batch_size]."""
        everything = slice(0, batch_size)
        return self._indices(step, batch_size, everything, seed, self._shuffle).astype(np.int32)

    def statistics(
        self, n: int, batch_size: int, rows: slice, seed: int, together: int = 1
    ) -> "Batches":
        """Yields fixed batches of training examples, distorted as in training, for Algorithm 2.

        They are shuffled on their own, so that population statistics do not depend on shards or on
        the order of classes.

        n: the number of batches. together: so many of them are joined, so that n / together are
        yielded. rows: the rows of such a joined batch that this process holds.
        """
        self.steps_per_epoch(batch_size)  # raises if a batch is larger than the set
        own = order.key(seed, _STATISTICS)

        def batches(k: int) -> Batch:
            parts = []
            for place in range(together):
                first = max(rows.start - place * batch_size, 0)
                last = min(rows.stop - place * batch_size, batch_size)
                if first < last:
                    number = k * together + place
                    part = slice(first, last)
                    parts.append(self._shuffled_batch(number, batch_size, part, own, "global"))
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

        return self._ahead(range(n // together), batches, rows, self._train)

    def _shuffled_batch(
        self, step: int, batch_size: int, rows: slice, seed: int, mode: str
    ) -> Batch:
        indices = self._indices(step, batch_size, rows, seed, mode)
        draws = order.uniforms(seed, step, rows, distort.DRAWS)
        return self._train.rows(indices, self.augmentation, draws)

    def _indices(self, step: int, batch_size: int, rows: slice, seed: int, mode: str) -> np.ndarray:
        return order.batch_indices(
            step, batch_size, rows, n=self.num_train, seed=seed, mode=mode, shards=self._shards
        )

    # Evaluation.

    def tested(self) -> "Data":
        """Returns these data with the set's own evaluation split in place of held-out examples."""
        if self.test is None:
            return self

        found = copy.copy(self)
        found.held = self.test
        found.num_eval = len(self.test)
        found.split = self.test_split
        found.description = self._whole
        found.test = None
        return found

    def evaluation(self, batch_size: int, rows: slice) -> "Batches":
        """Yields every example of the evaluation split once, in its stored order.

        The last batch is padded with rows whose mask is False.
        """
        steps = -(-self.num_eval // batch_size)

        def batch(step: int) -> Batch:
            first = step * batch_size
            indices = np.arange(first + rows.start, first + rows.stop)
            return self.held.rows(indices, self.augmentation)

        return self._ahead(range(steps), batch, rows, self.held)

    # The set as a whole.

    def resident(self, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Returns the `train` or `evaluation` split: images uint8 [N, H, W, C], labels int32 [N].

        The images are not distorted. Raises ConfigError if the set is not held in memory.
        """
        try:
            return {"train": self._train, "evaluation": self.held}[split].arrays()
        except ConfigError as e:
            raise ConfigError(f"{e}: {self.description}") from None

    def digest(self) -> str:
        """Returns 16 hex digits of a SHA-256, by which a resumed run recognizes the set.

        The set's folder may have moved. The digest covers all of a set in memory; of others it
        covers their sizes and a sample of their records.
        """
        sizes = (self.num_train, self.num_eval, self.num_classes)
        found = hashlib.sha256(repr(sizes).encode())
        for split in (self._train, self.held):
            for part in split.content():
                found.update(part)
        return found.hexdigest()[:16]

    def _ahead(
        self,
        steps: range,
        batch: Callable[[int], Batch],
        rows: slice,
        split: sources.Split,
    ) -> "Batches":
        """Makes Batches of a split, which threads prepare."""
        count = rows.stop - rows.start
        size = count * int(np.prod(self.image_shape))
        tasks = 1 if split.in_memory else sources.tasks(count)
        return Batches(steps, batch, size=size, one_thread=split.in_memory, tasks=tasks)


def hold_out(source: sources.Source, amount: float) -> sources.Source:
    """Returns a set that is evaluated on a fixed share of its training split, trained on the rest.

    The test split is not used, so that rates can be chosen without it. Raises ConfigError if either
    part would be empty.
    """
    n = len(source.train)
    count = round(amount * n)
    if not 0 < count < n:
        raise ConfigError(
            f"data.holdout={amount} of {n} examples leaves {count} to evaluate and {n - count} to "
            "train on: choose a share between 0 and 1"
        )
    places = order.permutation(n, order.key(_HOLDOUT))
    return replace(
        source,
        train=source.train.subset(np.sort(places[count:])),
        evaluation=source.train.subset(np.sort(places[:count])),
        description=f"{source.description}; evaluated on {count:,} held-out training examples",
        split="held-out training",
    )


class Batches(Iterator[Batch]):
    """Batches of the given steps, computed by threads (grain), a bounded number ahead.

    Args:
      steps: what `batch` is called with, in this order.
      batch: makes the batch of one step; called from several threads.
      size: bytes of a batch, which bounds how many are kept ahead.
      one_thread: whether one thread is enough, because making a batch takes almost no time.
      tasks: how many threads `batch` itself keeps busy.

    Attributes:
      waited: the seconds for which next() has blocked.
      alive: seconds since the first batch was asked for; waited / alive is the share of waiting.
    """

    def __init__(
        self,
        steps: Sequence[int],
        batch: Callable[[int], Batch],
        *,
        size: int,
        one_thread: bool,
        tasks: int = 1,
    ):
        import grain  # takes a second to import

        ahead = max(2, min(64, PREFETCH_BYTES // size))
        # As many batches are made at a time as keep all CPUs busy, and one more, which is begun
        # while the last rows of another are made.
        at_once = 1 if one_thread else min(ahead, math.ceil(usable_cpus() / tasks) + 1)
        # Our threads keep all CPUs busy; threads of OpenCV would only compete with them.
        cv2.setNumThreads(0)
        dataset = grain.MapDataset.source(steps).map(batch)
        options = grain.ReadOptions(num_threads=at_once, prefetch_buffer_size=ahead)
        self._batches = iter(dataset.to_iter_dataset(options))
        self._count = len(steps)
        self._began = 0.0
        self.waited = 0.0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        now = time.perf_counter()
        self._began = self._began or now
        try:
            return next(self._batches)
        finally:
            self.waited += time.perf_counter() - now

    @property
    def alive(self) -> float:
        """Seconds since the first batch was asked for."""
        return time.perf_counter() - self._began if self._began else 0.0
