"""A contact sheet: one picture, distorted as training would, a row for each strength."""

import pathlib

import cv2
import numpy as np

from bn_jax.data import decode, distort, load, memory, order
from bn_jax.errors import ConfigError

COLUMNS, GAP = 8, 4  # pictures a row; pixels between them


def draw(image: str, out: str, strengths: list[float], *, size: int, seed: int) -> pathlib.Path:
    """Writes the sheet and returns its path. The first column is the picture itself; every row has
    the same draws, so that a column shows one distortion at several strengths. Raises ConfigError
    for what is no picture."""
    if image == "digits":
        rows = [_digits(s, seed) for s in strengths]
    else:
        rows = [_picture(pathlib.Path(image), s, size, seed) for s in strengths]
    rows = [np.stack([_resize(tile, size) for tile in row]) for row in rows]
    path = pathlib.Path(out)
    padded = np.pad(
        np.stack(rows), ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255
    )
    height, width, channels = padded.shape[0] * padded.shape[2], COLUMNS * padded.shape[3], 3
    sheet = padded.transpose(0, 2, 1, 3, 4).reshape(height, width, channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)):
        raise ConfigError(f"{path} cannot be written: give --out a name that ends in .png")
    return path


def _draws(seed: int) -> np.ndarray:
    return order.uniforms(seed, 0, slice(0, COLUMNS - 1), distort.DRAWS)


def _picture(path: pathlib.Path, strength: float, size: int, seed: int) -> np.ndarray:
    try:
        record = load.Record(path.read_bytes(), 0, str(path))
        found = decode.frame(record.data)
        original = decode.pixels(record.data, found)
    except (OSError, decode.BadImageError) as e:
        raise ConfigError(f"{path} is no picture: {e}") from None
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
