"""Makes batches of views for evaluation: every example is seen under 1, 10 or 144 crops.

crops.py says where the crops lie. Views that coincide are computed once and weighted.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import cv2
import numpy as np

from bn_jax.data import crops, decode, load
from bn_jax.data.pipeline import Batches, Data
from bn_jax.errors import ConfigError

CROPS = (1, 10, 144)


class Rows(NamedTuple):
    """A batch of n views.

    Attributes:
      image: uint8 [n, H, W, C].
      example: int64 [n], the place of the example in the split; -1 if the row holds no example.
      weight: float32 [n], the number of crops that the view stands for.
      label: int32 [n].
    """

    image: np.ndarray
    example: np.ndarray
    weight: np.ndarray
    label: np.ndarray


def check_crops(number: int) -> None:
    """Raises ConfigError for a number of crops that is not defined here."""
    if number not in CROPS:
        raise ConfigError(f"--crops={number} is not one of {', '.join(map(str, CROPS))}")


def total_weight(number: int, mirror: bool) -> int:
    """Returns the number of views of an example, including those that coincide."""
    return number if number == 1 or mirror else number // 2


def render(
    decoded: Callable[[int], np.ndarray], looks: Iterable[crops.Crop], size: int, channels: int
) -> np.ndarray:
    """Returns the pixels of these views, uint8 [views, size, size, channels].

    `decoded(reduce)` is the image reduced by 1, 2, 4 or 8.
    """

    @functools.cache
    def resized(square: crops.Box, side: int) -> np.ndarray:
        """Cuts a square from the image and resizes it; many views share one."""
        reduce = decode.reduction(square, side)
        out = np.empty((side, side, channels), np.uint8)
        decode.resized_crop(decoded(reduce), square, reduce, out)
        return out

    found = []
    for look in looks:
        square = resized(look.square, look.side)
        if look.corner is None:
            view = cv2.resize(square, (size, size), interpolation=cv2.INTER_LINEAR)
            view = view.reshape(size, size, channels)  # OpenCV drops a single channel's axis
        else:
            top, left = look.corner
            view = square[top : top + size, left : left + size]
        if look.mirror:
            view = view[:, ::-1]
        found.append(view)
    return np.stack(found)


def of_file(
    data: bytes, number: int, size: int, mirror: bool, warnings: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns an encoded image's views, uint8 [views, size, size, 3], and weights, float32 [views].

    One crop is the centre crop of evaluation. The decoder's warnings are appended to `warnings`.
    Raises decode.BadImageError if the image cannot be decoded.
    """
    if number == 1:
        image = np.empty((1, size, size, 3), np.uint8)
        load.center_crop(data, warnings, image[0])
        return image, np.ones(1, np.float32)
    height, width, decoded = load.lazily(data, warnings)
    return _rendered(height, width, decoded, channels=3, number=number, size=size, mirror=mirror)


def of_array(image: np.ndarray, number: int, mirror: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns views and weights of an image [S, S, C] of the network's size; one crop is all."""
    if number == 1:
        return image[None], np.ones(1, np.float32)

    def decoded(reduce: int) -> np.ndarray:
        return image  # `reduce` is 1: all crops are resized to more than the network's own size

    size, _, channels = image.shape
    return _rendered(
        size, size, decoded, channels=channels, number=number, size=size, mirror=mirror
    )


def _rendered(
    height: int,
    width: int,
    decoded: Callable[[int], np.ndarray],
    *,
    channels: int,
    number: int,
    size: int,
    mirror: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Renders all views of an image; returns their pixels and weights."""
    looks = crops.views(height, width, number, size, mirror)
    weights = np.array(list(looks.values()), np.float32)
    return render(decoded, looks, size, channels), weights


def batches(
    data: Data, number: int, size: int, *, process: int = 0, processes: int = 1
) -> Iterator[Rows]:
    """Yields the views of the evaluation split in batches of `size`; the last batch is padded.

    Every example is seen once, under `number` crops. They are mirrored if training mirrors
    (`data.mirror`), so those of digits are not. Of several processes each gets its own share of the
    examples (`share`).

    Raises DataError, with the record's name, for an example that cannot be read.
    """
    if number == 1:
        yield from _single(data, size, process, processes)
        return

    # Threads prepare one example at a time, with all its views.
    own = share(data.num_eval, number, size, process, processes)
    bytes_of_example = number * int(np.prod(data.image_shape))

    def example(index: int) -> dict[str, np.ndarray]:
        return _example(data, index, number)

    examples = Batches(
        own.tolist(),
        example,
        size=bytes_of_example,
        one_thread=data.held.in_memory,
    )
    yield from in_batches(examples, size)


def share(examples: int, number: int, size: int, process: int, processes: int) -> np.ndarray:
    """Returns the places of the examples that `batches` gives to this one of several processes."""
    place = np.arange(examples)
    together = size if number == 1 else 1  # so many neighbours go to the same process
    owner = place // together % processes
    return place[owner == process]


def in_batches(examples: Iterable[dict[str, np.ndarray]], size: int) -> Iterator[Rows]:
    """Yields the views of examples in batches of `size`; the last batch is padded.

    An example is a dict of image [views, H, W, C], weight [views], label [] and example [], its
    place in the split.
    """
    parts: list[Rows] = []
    waiting = 0  # rows in `parts`
    for example in examples:
        n = len(example["image"])
        label = np.full(n, example["label"], np.int32)
        place = np.full(n, example["example"], np.int64)
        parts.append(Rows(example["image"], place, example["weight"], label))
        waiting += n

        if waiting >= size:
            whole = _joined(parts)
            for start in range(0, waiting - size + 1, size):
                yield _cut(whole, start, start + size)

            # What does not fill a batch waits for the next examples.
            left = waiting % size
            parts = [_cut(whole, waiting - left, waiting)]
            waiting = left

    if waiting:
        yield _padded(_joined(parts), size)


def _joined(parts: list[Rows]) -> Rows:
    """Joins batches of views to one."""
    fields = zip(*parts, strict=True)
    return Rows(*map(np.concatenate, fields))


def _cut(rows: Rows, start: int, stop: int) -> Rows:
    """Returns the views from `start` to `stop`."""
    return Rows(*(array[start:stop] for array in rows))


def _single(data: Data, size: int, process: int, processes: int) -> Iterator[Rows]:
    """Yields batches of one centre crop for each example, as evaluation in training uses them."""
    together = processes * size  # a batch of all processes
    own = slice(process * size, (process + 1) * size)  # of such a batch
    for k, batch in enumerate(data.evaluation(together, own)):
        place = k * together + own.start + np.arange(size)
        example = np.where(batch["mask"], place, -1)
        weight = batch["mask"].astype(np.float32)
        yield Rows(batch["image"], example, weight, batch["label"])


def _example(data: Data, index: int, number: int) -> dict[str, np.ndarray]:
    """Makes the views of one example of the evaluation split."""
    look = functools.partial(
        _rendered,
        channels=data.image_shape[2],
        number=number,
        size=data.augmentation.image_size,
        mirror=data.augmentation.mirror,
    )
    (images, weights), label = data.held.example(index, look)
    return {
        "image": images,
        "weight": weights,
        "label": np.asarray(label, np.int32),
        "example": np.asarray(index, np.int64),
    }


def _padded(rows: Rows, size: int) -> Rows:
    """Fills a batch up to `size` with rows that hold no example."""
    count = len(rows.weight)
    missing = size - count
    empty = []
    for array in rows:
        shape = (missing, *array.shape[1:])
        empty.append(np.zeros(shape, array.dtype))

    padded = _joined([rows, Rows(*empty)])
    padded.example[count:] = -1
    return padded
