"""A folder of pictures: DIR/train/CLASS/* and DIR/val/CLASS/*."""

import os
import pathlib

from bn_jax.data import sources
from bn_jax.data.load import BadRecordError, Record
from bn_jax.errors import ConfigError, expand_path

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TRAIN, EVALUATION = ("train",), ("val", "validation", "test")


class Files(sources.Records):
    """A split: (path, label) of each picture, sorted by class and name."""

    def __init__(self, root: pathlib.Path, classes: list[str]):
        self.root = root
        self.items: list[tuple[str, int]] = []
        self.skipped = 0
        for label, name in enumerate(classes):
            if (root / name).is_dir():
                files = sorted(e.name for e in os.scandir(root / name) if e.is_file())
                pictures = [f for f in files if f.lower().endswith(SUFFIXES)]
                self.skipped += len(files) - len(pictures)
                self.items += [(f"{name}/{f}", label) for f in pictures]
        super().__init__(len(self.items), len(classes))

    def __getitem__(self, index: int) -> Record:
        name, label = self.items[index]
        try:
            return Record((self.root / name).read_bytes(), label, str(self.root / name))
        except OSError as e:
            raise BadRecordError(str(self.root / name), str(e)) from None


def open_splits(root: pathlib.Path) -> tuple[Files, Files, list[str]]:
    """The training and the evaluation split, and the classes: the folders of train/, sorted. Raises
    ConfigError if a split is absent or empty, or val/ has a class that train/ has not."""
    train, evaluation = (_split(root, names) for names in (TRAIN, EVALUATION))
    classes, others = _classes(train), _classes(evaluation)
    strange = sorted(set(others) - set(classes))
    if strange:
        raise ConfigError(
            f"{evaluation} has {len(strange)} classes that {train} has not, the first is "
            f"{strange[0]!r}: both need the same class folders"
        )
    splits = [Files(train, classes), Files(evaluation, classes)]
    for split in splits:
        if not len(split):
            raise ConfigError(
                f"no pictures in {split.root}: it needs CLASS/* of {', '.join(SUFFIXES)}"
            )
    return splits[0], splits[1], classes


def source(directory: str) -> sources.Source:
    """Opens a folder. Raises ConfigError as `open_splits` does."""
    root = expand_path(directory)
    train, evaluation, classes = open_splits(root)
    skipped = train.skipped + evaluation.skipped
    return sources.Source(
        train=train,
        evaluation=evaluation,
        num_classes=len(classes),
        channels=3,
        split="validation",
        class_names=tuple(classes),
        description=(
            f"folder {root}: {len(train):,} training and {len(evaluation):,} evaluation "
            f"pictures of {len(classes)} classes"
            + (f", {skipped} other files skipped" if skipped else "")
        ),
    )


def _split(root: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ConfigError(
        f"no folder {root / names[0]}: give a folder that holds train/CLASS/* and val/CLASS/* as "
        "--config.data.dir"
    )


def _classes(split: pathlib.Path) -> list[str]:
    return sorted(e.name for e in os.scandir(split) if e.is_dir() and not e.name.startswith("."))
