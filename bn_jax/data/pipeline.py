"""Batches computed ahead of the step by threads."""

import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from absl import logging

from bn_jax.data import distort, folder, load, memory, order, sources, tfds
from bn_jax.errors import ConfigError

Batch = dict[str, np.ndarray]


class Batches(Iterator[Batch]):
    """Batches of the given steps, computed by threads (grain). `waited`: seconds that next() has
    blocked; `alive`: seconds since the first batch was asked for, so waited/alive is the share
    spent waiting."""

    def __init__(self, steps: range, batch: Callable[[int], Batch], *, threads: int, ahead: int):
        import grain  # takes a second to import

        dataset = grain.MapDataset.range(steps.start, steps.stop).map(batch)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        self._batches = iter(dataset.to_iter_dataset(options))
        self._count, self._began = len(steps), 0.0
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


# Batches for training and evaluation: config -> `open_data` -> `Data`.
#
# A batch is a dict: image uint8 [n, H, W, C] in 0..255, label int32 [n], mask bool [n] (False:
# this row holds no example; not in training batches of a set in memory, whose records cannot be
# bad), n being the rows of the global batch that this process holds. What step k holds is a pure
# function of (seed, k), so nothing is saved but the step.


PREFETCH_BYTES = 512 * 2**20  # at most this much is decoded ahead
_HOLDOUT, _STATISTICS = 5, 6  # purposes of streams (order.key)


@dataclass(frozen=True)
class View:
    """What training does to an image. Units as in the config: `crop` smallest area (1: no crop),
    `shift` pixels, `distortion` strength."""

    image_size: int
    crop: float = 1.0
    mirror: bool = False
    shift: int = 0
    distortion: float = 0.0


def open_data(config) -> "Data":
    """The data set of a config. Raises ConfigError if it is not there or does not fit it."""
    source = open_source(config.data.name, config.data.dir, config.image_size)
    if config.steps_per_dispatch > 1:
        source = load.held_in_memory(source, config.image_size)
    view = View(
        image_size=config.image_size,
        crop=config.data.crop,
        mirror=config.data.mirror,
        shift=config.data.shift,
        distortion=config.data.distortion,
    )
    return Data(source, view, shuffle=config.data.shuffle, holdout=config.data.holdout)


def open_source(name: str, directory: str, image_size: int) -> sources.Source:
    """The data set `name` in `directory`. Raises ConfigError if it is absent."""
    if name == "digits":
        return memory.digits()
    if name == "synthetic":
        return memory.synthetic(image_size)
    if name == "folder":
        return folder.source(directory)
    if name == "mnist" and directory:
        found = memory.mnist_idx(pathlib.Path(directory).expanduser())
        if found is not None:
            return found
    return tfds.source(name, directory)


class Data:
    """A data set as the trainer sees it.

    Attributes: num_classes, image_shape (H, W, C), num_train, num_eval (examples), description (a
    line that states the set's limits), split (what the evaluated examples are called), held (those
    examples), view (what training does to an image), class_names, masked (so are training batches).
    """

    def __init__(self, source: sources.Source, view: View, *, shuffle: str, holdout: float = 0.0):
        if shuffle not in order.MODES:
            raise ConfigError(f"data.shuffle={shuffle!r} is none of {', '.join(order.MODES)}")
        if holdout:
            source = hold_out(source, holdout)
        self._train, self.held = source.train, source.evaluation
        # Random images stand for a set whose records can be bad.
        whole = isinstance(source.train, sources.Arrays)
        self.masked = not whole or isinstance(source.train, memory.Random)
        self._shards, self._shuffle, self.view = source.shards, shuffle, view
        self.num_classes = source.num_classes
        self.class_names = source.class_names or tuple(map(str, range(source.num_classes)))
        self.image_shape = (view.image_size, view.image_size, source.channels)
        self.num_train, self.num_eval = len(source.train), len(source.evaluation)
        self.description, self.split = source.description, source.split
        self.bad_records = load.BadRecords(self.num_train)
        for split in (source.train, source.evaluation):
            _check(split, self.image_shape, view, source.description)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches in an epoch. Raises ConfigError if there is none."""
        if batch_size > self.num_train:
            raise ConfigError(
                f"batch_size={batch_size} exceeds the {self.num_train} training examples"
            )
        return self.num_train // batch_size

    def train_batch(self, step: int, batch_size: int, rows: slice, seed: int) -> Batch:
        """The rows of the batch of one step."""
        return self._batch(step, batch_size, rows, seed, self._shuffle)

    def train_indices(self, step: int, batch_size: int, *, seed: int) -> np.ndarray:
        """int32 [batch_size]: the examples of one step, by their place in `resident()`."""
        everything = slice(0, batch_size)
        return order.batch_indices(
            step,
            batch_size,
            everything,
            n=self.num_train,
            seed=seed,
            mode=self._shuffle,
            shards=self._shards,
        ).astype(np.int32)

    def train(
        self, start_step: int, stop_step: int, batch_size: int, rows: slice, *, seed: int
    ) -> Batches:
        """Batches of steps start_step..stop_step - 1, prepared ahead by threads."""
        left = self.num_train - self.steps_per_epoch(batch_size) * batch_size
        if left:
            logging.info("the last %d of %d examples of an epoch are dropped", left, self.num_train)
        return self._ahead(
            range(start_step, stop_step),
            lambda k: self.train_batch(k, batch_size, rows, seed),
            rows,
            self._train,
        )

    def evaluation(self, batch_size: int, rows: slice) -> Batches:
        """The evaluation split as stored, every example once; at the end padded (mask False)."""
        steps = -(-self.num_eval // batch_size)

        def batch(step: int) -> Batch:
            first = step * batch_size
            indices = np.arange(first + rows.start, first + rows.stop)
            return self._load(self.held, indices, None)

        return self._ahead(range(steps), batch, rows, self.held)

    def statistics(self, n: int, batch_size: int, rows: slice, seed: int) -> Batches:
        """n fixed batches of training examples, distorted as in training, for Algorithm 2
        (population statistics). They come from a shuffle of their own, so that shards and class
        order play no part."""
        self.steps_per_epoch(batch_size)
        own = order.key(seed, _STATISTICS)
        return self._ahead(
            range(n),
            lambda k: self._batch(k, batch_size, rows, own, "global"),
            rows,
            self._train,
        )

    def resident(self, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """(images uint8 [N, H, W, C], labels int32 [N]) of the `train` or `evaluation` split,
        undistorted. Raises ConfigError if the set is not held in memory."""
        arrays = {"train": self._train, "evaluation": self.held}[split]
        if isinstance(arrays, sources.Arrays):
            return arrays.materialize()
        raise ConfigError(f"this set is not held in memory: {self.description}")

    def _batch(self, step: int, batch_size: int, rows: slice, seed: int, mode: str) -> Batch:
        indices = order.batch_indices(
            step, batch_size, rows, n=self.num_train, seed=seed, mode=mode, shards=self._shards
        )
        return self._load(self._train, indices, order.uniforms(seed, step, rows, distort.DRAWS))

    def _load(
        self, split: sources.Arrays | sources.Records, indices: np.ndarray, draws: np.ndarray | None
    ) -> Batch:
        """The examples of these indices; without draws, of evaluation. Those past the end are
        padding."""
        if isinstance(split, sources.Arrays):
            mask = indices < len(split)
            images, labels = split.take(np.where(mask, indices, 0))
            images[~mask], labels[~mask] = 0, 0
            if draws is not None and not isinstance(split, memory.Random):
                if self.view.mirror:
                    images = distort.mirror(images, draws)
                images = self._distort(images, draws)
            if draws is not None and not self.masked:
                return {"image": images, "label": labels}
        elif draws is None:
            images, labels, mask = load.evaluation_rows(
                split, indices, size=self.view.image_size, num_classes=self.num_classes
            )
        else:
            images, labels, mask = load.train_rows(
                split,
                indices,
                draws,
                size=self.view.image_size,
                min_area=self.view.crop,
                mirror=self.view.mirror,
                num_classes=self.num_classes,
                bad=self.bad_records,
            )
            images = self._distort(images, draws, mask)
        return {"image": images, "label": labels, "mask": mask}

    def _distort(
        self, images: np.ndarray, draws: np.ndarray, mask: np.ndarray | None = None
    ) -> np.ndarray:
        if self.view.shift:
            images = distort.shift(images, draws, self.view.shift)
        return distort.photometric(images, draws, self.view.distortion, mask)

    def _ahead(
        self,
        steps: range,
        batch: Callable[[int], Batch],
        rows: slice,
        split: sources.Arrays | sources.Records,
    ) -> Batches:
        """Prepares batches of a split in threads, a bounded number ahead; of one in memory in
        one thread."""
        size = (rows.stop - rows.start) * int(np.prod(self.image_shape))
        ahead = max(2, min(64, PREFETCH_BYTES // size))
        threads = 1 if isinstance(split, sources.Arrays) else min(os.cpu_count() or 1, ahead)
        return Batches(steps, batch, threads=threads, ahead=ahead)


def _check(
    split: sources.Arrays | sources.Records, shape: tuple[int, ...], view: View, description: str
) -> None:
    """Raises ConfigError for an empty split, and for views that images in memory do not have."""
    if not len(split):
        raise ConfigError(f"a split of the data set is empty: {description}")
    if not isinstance(split, sources.Arrays):
        return
    stored = split.images.shape[1:]
    if stored != shape:
        raise ConfigError(
            f"image_size={view.image_size}, but this set's images are {stored[0]} pixels: set "
            f"image_size={stored[0]}"
        )
    if view.crop < 1 and not isinstance(split, memory.Random):
        raise ConfigError(
            f"data.crop={view.crop}, but this set's small images are not cropped: set data.crop=1"
        )


def hold_out(source: sources.Source, amount: float) -> sources.Source:
    """Evaluates on a fixed share of the training split and trains on the rest; the test split stays
    untouched. For choosing rates. Raises ConfigError if either part would be empty."""
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
        train=sources.subset(source.train, np.sort(places[count:])),
        evaluation=sources.subset(source.train, np.sort(places[:count])),
        description=f"{source.description}; evaluated on {count:,} held-out training examples",
        split="held-out training",
    )


# A digest of a data set, to know it again when a run goes on: its folder may have moved.


SAMPLES = 32  # records of each split that are read, where a set does not lie in memory


def data_digest(data: Any) -> str:
    """SHA-256, 16 hex digits, of both splits of a `data.pipeline.Data`: all of a set in memory,
    else its sizes and `SAMPLES` records of each split, evenly spread, with their labels."""
    found = hashlib.sha256(repr((data.num_train, data.num_eval, data.num_classes)).encode())
    for split in (data._train, data.held):
        if isinstance(split, memory.Random):
            found.update(repr(split.images.shape).encode())  # drawn from a fixed seed
        elif isinstance(split, sources.Arrays):
            for array in split.materialize():
                found.update(np.ascontiguousarray(array).data)
        else:
            for index in np.linspace(0, len(split) - 1, SAMPLES, dtype=np.int64):
                found.update(_record(split, int(index)))
    return found.hexdigest()[:16]


def _record(split: sources.Records, index: int) -> bytes:
    try:
        record = split[index]
        return str(record.label).encode() + record.data
    except sources.BadRecordError:
        return b"bad"  # training masks it, too
