"""Draws a contact sheet: one picture, distorted as in training, a row for each strength."""

import pathlib

import cv2
import numpy as np

from bn_jax.data import decode, distort, load, memory, order
from bn_jax.errors import ConfigError

COLUMNS = 8  # pictures a row
DISTORTED = COLUMNS - 1  # the first picture of a row is not distorted
GAP = 4  # pixels between them
WHITE = 255
GREY = 128


def draw(image: str, out: str, strengths: list[float], *, size: int, seed: int) -> pathlib.Path:
    """Writes the sheet and returns its path.

    The first column is the picture itself. Every row has the same draws, so that a column shows one
    distortion at several strengths.

    Args:
      image: a picture file, or `digits` for one of the embedded digits.
      out: the PNG to write.
      strengths: of the distortion of colours, one for each row.
      size: pixels of each picture in the sheet.
      seed: of the random draws.

    Raises:
      ConfigError: the file is not a picture, or `out` cannot be written.
    """
    draws = order.uniforms(seed, 0, slice(0, DISTORTED), distort.DRAWS)
    rows = []
    for strength in strengths:
        if image == "digits":
            pictures = _digits(strength, draws)
        else:
            pictures = _picture(pathlib.Path(image), strength, size, draws)
        tiles = [_with_gaps(_resize(picture, size)) for picture in pictures]
        rows.append(np.concatenate(tiles, axis=1))
    sheet = np.concatenate(rows, axis=0)

    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)):
        raise ConfigError(f"{path} cannot be written: give --out a name that ends in .png")
    return path


def _picture(path: pathlib.Path, strength: float, size: int, draws: np.ndarray) -> np.ndarray:
    """Makes a row of the sheet: the picture, and random crops of it, mirrored and distorted."""
    try:
        record = load.Record(path.read_bytes(), 0, str(path))
        found = decode.frame(record.data)
        original = decode.pixels(record.data, found)
    except (OSError, decode.BadImageError) as e:
        raise ConfigError(f"{path} is not a picture: {e}") from None

    images, _, _ = load.train_rows(
        [record],
        [0] * DISTORTED,
        draws,
        size=size,
        min_area=0.08,
        num_classes=1,
        bad=load.BadRecords(1),
    )
    augmentation = distort.Augmentation(size, mirror=True, distortion=strength)
    distorted = distort.augment(images, draws, augmentation)
    first = _resize(original, size)
    return np.concatenate([first[None], distorted])


def _digits(strength: float, draws: np.ndarray) -> np.ndarray:
    """Makes a row of the sheet: a digit, and the same digit shifted and distorted."""
    images, _ = memory.digits().train.arrays()
    digit = images[:1]

    size = digit.shape[1]
    augmentation = distort.Augmentation(size, shift=2, distortion=strength)
    repeated = np.repeat(digit, DISTORTED, axis=0)
    distorted = distort.augment(repeated, draws, augmentation)

    grey = np.concatenate([digit, distorted])
    return np.repeat(grey, 3, axis=-1)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """Fits a picture into a square, on grey."""
    scale = size / max(image.shape[:2])
    height = max(round(scale * image.shape[0]), 1)
    width = max(round(scale * image.shape[1]), 1)
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    tile = np.full((size, size, 3), GREY, np.uint8)
    tile[:height, :width] = resized
    return tile


def _with_gaps(tile: np.ndarray) -> np.ndarray:
    """Adds the gaps to the pictures on the right and below."""
    return np.pad(tile, ((0, GAP), (0, GAP), (0, 0)), constant_values=WHITE)
