"""A contact sheet: one picture, distorted as training would, a row for each strength."""

import pathlib

import cv2
import numpy as np

from bn_jax.data import decode, distort, load, memory, order
from bn_jax.errors import ConfigError

COLUMNS = 8  # pictures a row
GAP = 4  # pixels between them


def draw(image: str, out: str, strengths: list[float], *, size: int, seed: int) -> pathlib.Path:
    """Writes the sheet and returns its path.

    The first column is the picture itself. Every row has the same draws, so that a column shows one
    distortion at several strengths.

    Args:
      image: a picture file, or `digits` for one of the embedded digits.
      out: the PNG to write.
      strengths: of the distortion of colours, one a row.
      size: pixels of each picture in the sheet.
      seed: of the draws.

    Raises:
      ConfigError: the file is not a picture, or `out` cannot be written.
    """
    if image == "digits":
        rows = [_digits(s, seed) for s in strengths]
    else:
        rows = [_picture(pathlib.Path(image), s, size, seed) for s in strengths]
    tiles = np.stack([np.stack([_resize(tile, size) for tile in row]) for row in rows])

    # [rows, columns, height, width, 3] -> [rows * height, columns * width, 3]
    gaps = ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0))
    padded = np.pad(tiles, gaps, constant_values=255)
    _, _, height, width, _ = padded.shape
    sheet = padded.transpose(0, 2, 1, 3, 4).reshape(len(rows) * height, COLUMNS * width, 3)

    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)):
        raise ConfigError(f"{path} cannot be written: give --out a name that ends in .png")
    return path


def _draws(seed: int) -> np.ndarray:
    """The draws of every column but the first."""
    return order.uniforms(seed, 0, slice(0, COLUMNS - 1), distort.DRAWS)


def _picture(path: pathlib.Path, strength: float, size: int, seed: int) -> np.ndarray:
    """A row of the sheet: the picture and random crops of it, mirrored and distorted."""
    try:
        record = load.Record(path.read_bytes(), 0, str(path))
        found = decode.frame(record.data)
        original = decode.pixels(record.data, found)
    except (OSError, decode.BadImageError) as e:
        raise ConfigError(f"{path} is not a picture: {e}") from None
    images, _, _ = load.train_rows(
        [record],
        [0] * (COLUMNS - 1),
        _draws(seed),
        size=size,
        min_area=0.08,
        num_classes=1,
        bad=load.BadRecords(1),
    )
    augmentation = distort.Augmentation(size, mirror=True, distortion=strength)
    distorted = distort.augment(images, _draws(seed), augmentation)
    return np.concatenate([_resize(original, size)[None], distorted])


def _digits(strength: float, seed: int) -> np.ndarray:
    """A row of the sheet: a digit, and the digit shifted and distorted."""
    images, _ = memory.digits().train.arrays()
    digit = images[:1]
    augmentation = distort.Augmentation(len(digit[0]), shift=2, distortion=strength)
    repeated = np.repeat(digit, COLUMNS - 1, axis=0)
    distorted = distort.augment(repeated, _draws(seed), augmentation)
    return np.repeat(np.concatenate([digit, distorted]), 3, axis=-1)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """Fits a picture into a square, on grey."""
    scale = size / max(image.shape[:2])
    height, width = (max(round(scale * side), 1) for side in image.shape[:2])
    tile = np.full((size, size, 3), 128, np.uint8)
    tile[:height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return tile
