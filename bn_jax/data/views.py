"""The evaluation split as rows of views: every example under one, 10 or 144 crops.

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
    """A batch of views.

    Attributes:
      image: uint8 [n, H, W, C].
      example: int64 [n], the place of the example in the split; -1: the row holds no example.
      weight: float32 [n], how many crops the view stands for.
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
    """How many views, coinciding ones included, an example is seen under."""
    return number if number == 1 or mirror else number // 2


def render(
    decoded: Callable[[int], np.ndarray], looks: Iterable[crops.Crop], size: int, channels: int
) -> np.ndarray:
    """uint8 [views, size, size, channels]: the pixels of these views. `decoded(reduce)` is
    the image reduced by 1, 2, 4 or 8."""
    squares: dict[tuple[crops.Box, int], np.ndarray] = {}
    found = []
    for look in looks:
        key = (look.square, look.side)
        if key not in squares:
            reduce = decode.reduction(look.square, look.side)
            squares[key] = np.empty((look.side, look.side, channels), np.uint8)
            decode.resized_crop(decoded(reduce), look.square, reduce, squares[key])
        if look.corner is None:
            view = cv2.resize(squares[key], (size, size), interpolation=cv2.INTER_LINEAR)
            view = view.reshape(size, size, channels)  # OpenCV drops a single channel's axis
        else:
            top, left = look.corner
            view = squares[key][top : top + size, left : left + size]
        found.append(view[:, ::-1] if look.mirror else view)
    return np.stack(found)


def of_file(
    data: bytes, number: int, size: int, mirror: bool, warnings: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Views of an encoded image, uint8 [views, size, size, 3], and their weights, float32 [views].

    One crop is the centre crop of evaluation. The decoder's warnings are appended to `warnings`.
    Raises decode.BadImageError.
    """
    if number == 1:
        image = np.empty((1, size, size, 3), np.uint8)
        load.center_crop(data, warnings, image[0])
        return image, np.ones(1, np.float32)
    height, width, decoded = load.lazily(data, warnings)
    return _rendered(height, width, decoded, channels=3, number=number, size=size, mirror=mirror)


def of_array(image: np.ndarray, number: int, mirror: bool) -> tuple[np.ndarray, np.ndarray]:
    """Views of an image [S, S, C] of the network's own size; one crop is the image itself."""
    if number == 1:
        return image[None], np.ones(1, np.float32)
    size, _, channels = image.shape
    return _rendered(
        size, size, lambda reduce: image, channels=channels, number=number, size=size, mirror=mirror
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
    """The pixels and the weights of all views of an image."""
    looks = crops.views(height, width, number, size, mirror)
    weights = np.array(list(looks.values()), np.float32)
    return render(decoded, looks, size, channels), weights


def batches(
    data: Data, number: int, size: int, *, process: int = 0, processes: int = 1
) -> Iterator[Rows]:
    """The evaluation split, every example once, as batches of `size` views of its `number` crops;
    the last batch is padded. Mirrored as in training (`data.mirror`), so digits are not.

    process, processes: each of several processes gets its own share of the examples (`share`).

    Raises DataError, with the record's name, for an example that cannot be read.
    """
    if number == 1:
        yield from _single(data, size, process, processes)
        return
    examples = Batches(
        share(data.num_eval, number, size, process, processes).tolist(),
        lambda index: _example(data, index, number),
        size=number * int(np.prod(data.image_shape)),
        one_thread=data.held.in_memory,
    )
    yield from in_batches(examples, size)


def share(examples: int, number: int, size: int, process: int, processes: int) -> np.ndarray:
    """The places of the examples that `batches` gives to this one of several processes."""
    place = np.arange(examples)
    together = size if number == 1 else 1  # so many side by side go to the same process
    return place[place // together % processes == process]


def in_batches(examples: Iterable[dict[str, np.ndarray]], size: int) -> Iterator[Rows]:
    """Examples (image [views, H, W, C], weight [views], label [], example []: its place) as batches
    of `size` views."""
    parts: list[Rows] = []
    waiting = 0  # rows in `parts`
    for example in examples:
        n = len(example["image"])
        label = np.full(n, example["label"], np.int32)
        place = np.full(n, example["example"], np.int64)
        parts.append(Rows(example["image"], place, example["weight"], label))
        waiting += n

        if waiting >= size:
            whole = Rows(*map(np.concatenate, zip(*parts, strict=True)))
            for start in range(0, waiting - size + 1, size):
                yield Rows(*(x[start : start + size] for x in whole))
            waiting %= size
            parts = [Rows(*(x[len(x) - waiting :] for x in whole))]

    if waiting:
        yield _padded(Rows(*map(np.concatenate, zip(*parts, strict=True))), size)


def _single(data: Data, size: int, process: int, processes: int) -> Iterator[Rows]:
    """Batches of one centre crop an example, as evaluation while training has them."""
    own = slice(process * size, (process + 1) * size)  # of a batch of all processes
    for k, batch in enumerate(data.evaluation(processes * size, own)):
        place = k * processes * size + own.start + np.arange(size)
        example = np.where(batch["mask"], place, -1)
        weight = batch["mask"].astype(np.float32)
        yield Rows(batch["image"], example, weight, batch["label"])


def _example(data: Data, index: int, number: int) -> dict[str, np.ndarray]:
    """The views of one example of the evaluation split."""
    look = functools.partial(
        _rendered,
        channels=data.image_shape[2],
        number=number,
        size=data.augmentation.image_size,
        mirror=data.augmentation.mirror,
    )
    (images, weights), label = data.held.example(index, look)
    found = {"image": images, "weight": weights, "label": np.asarray(label, np.int32)}
    return found | {"example": np.asarray(index, np.int64)}


def _padded(rows: Rows, size: int) -> Rows:
    """The rows and, up to `size`, rows that hold no example."""
    count = len(rows.weight)
    padded = Rows(
        *(np.concatenate([x, np.zeros((size - count, *x.shape[1:]), x.dtype)]) for x in rows)
    )
    padded.example[count:] = -1
    return padded
