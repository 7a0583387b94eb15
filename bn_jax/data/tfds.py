"""Data sets in TFDS' format, read without TensorFlow or TFDS.

A directory of one version holds features.json (which feature is the image, which the label),
dataset_info.json (splits, shard lengths, file names) and the shards.
"""

import functools
import json
import os
import pathlib
from typing import Any

import numpy as np

from bn_jax.data import decode, order, shards, sources
from bn_jax.data.shards import Metadata
from bn_jax.errors import ConfigError, DataError

TEST_SPLITS = ("validation", "val", "test")  # the first that exists is evaluated


def default_directory() -> pathlib.Path:
    """Where TFDS keeps its sets: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def find(name: str, directory: str) -> pathlib.Path | None:
    """The newest version of a set in a data_dir (or the version's own directory), or None."""
    root = pathlib.Path(directory).expanduser() if directory else default_directory()
    places = [root, *(p for base in (root / name, root) if base.is_dir() for p in base.iterdir())]
    found = [
        p for p in places if (p / "dataset_info.json").is_file() and (p / "features.json").is_file()
    ]
    return max(found, key=lambda p: _version(p.name), default=None)


def _version(name: str) -> tuple[int, ...]:
    parts = name.split(".")
    return tuple(int(p) for p in parts) if all(p.isdigit() for p in parts) else ()


def metadata(directory: pathlib.Path) -> Metadata:
    """Reads the JSON files. Raises DataError if they do not describe an image classification
    set."""
    try:
        features = json.loads((directory / "features.json").read_text())
        info = json.loads((directory / "dataset_info.json").read_text())
        parts: dict[str, Any] = features["featuresDict"]["features"]
        image = next(name for name, part in parts.items() if "image" in part)
        label = next(name for name, part in parts.items() if "classLabel" in part)
        file_format = info.get("fileFormat", "tfrecord")
        splits = {
            split["name"]: [
                (directory / _file_name(info["name"], split, file_format, k), int(length))
                for k, length in enumerate(split["shardLengths"])
            ]
            for split in info["splits"]
        }
        return Metadata(
            directory=directory,
            name=info["name"],
            file_format=file_format,
            image=image,
            label=label,
            num_classes=int(parts[label]["classLabel"]["numClasses"]),
            image_dimensions=tuple(
                int(d) for d in parts[image]["image"].get("shape", {}).get("dimensions", ())
            ),
            splits=splits,
        )
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as e:
        raise DataError(
            f"{directory} is not a TFDS image classification set ({type(e).__name__}: {e}): it "
            "needs features.json with an image and a class label, and dataset_info.json"
        ) from None


def _file_name(name: str, split: dict[str, Any], file_format: str, shard: int) -> str:
    count = len(split["shardLengths"])
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    return template.format(
        DATASET=name,
        SPLIT=split["name"],
        FILEFORMAT=file_format,
        SHARD_X_OF_Y=f"{shard:05d}-of-{count:05d}",
        SHARD_INDEX=f"{shard:05d}",
        NUM_SHARDS=f"{count:05d}",
    )


def source(name: str, directory: str) -> sources.Source:
    """Opens a set. Raises ConfigError if it is absent, DataError if a shard is damaged."""
    found = find(name, directory)
    if found is None:
        raise ConfigError(absent(name, directory))
    meta = metadata(found)
    test = next((s for s in TEST_SPLITS if s in meta.splits), None)
    if "train" not in meta.splits or test is None:
        raise ConfigError(
            f"{found} has the splits {sorted(meta.splits)}: train and validation or test are needed"
        )
    train, evaluation = shards.open_split(meta, "train"), shards.open_split(meta, test)
    described = (
        f"{meta.name} {found.name} (TFDS, {meta.file_format}): {len(train):,} training images, "
        f"{len(evaluation):,} of split {test!r}, {meta.num_classes} classes"
    )
    build = functools.partial(
        sources.Source,
        num_classes=meta.num_classes,
        description=described,
        split=test,
        class_names=class_names(meta),
    )
    if meta.image_dimensions[-1:] == (1,) and max(meta.image_dimensions) <= 32:
        return build(_in_memory(train), _in_memory(evaluation), channels=1)
    files = max(len(train.files), order.VIRTUAL_SHARDS)
    return build(train, evaluation, channels=3, shards=files)


def class_names(meta: Metadata) -> tuple[str, ...]:
    """The names that TFDS keeps beside features.json (ImageNet: synsets), or none."""
    try:
        names = (meta.directory / f"{meta.label}.labels.txt").read_text().split("\n")
    except (OSError, UnicodeDecodeError):
        return ()
    names = names[:-1] if names[-1] == "" else names
    return tuple(names) if len(names) == meta.num_classes else ()


def _in_memory(records: shards.Shards) -> sources.Arrays:
    """Small grey images decoded once (MNIST: 55 MB)."""
    images, labels = [], []
    for record in records:
        try:
            images.append(decode.pixels(record.data, decode.frame(record.data))[..., :1])
        except decode.BadImageError as e:
            raise DataError(f"{record.name}: {e}") from None
        labels.append(sources.checked_label(record, records.meta.num_classes))
    return sources.Arrays(np.stack(images), np.array(labels, np.int32))


def absent(name: str, directory: str) -> str:
    """What is missing, how to prepare it, and what runs without it."""
    where = directory or f"{default_directory()} (the default; set data.dir or TFDS_DATA_DIR)"
    remedy = {
        "imagenet2012": "prepare it with python -m bn_jax.prepare imagenet --tars=DIR "
        "--data_dir=OUT, then --config.data.dir=OUT",
        "mnist": "give the folder of the four idx files, or a TFDS data_dir, as --config.data.dir",
    }
    prepare = remedy.get(name, f"build it with TFDS (tfds build {name})")
    return (
        f"no data set {name!r} in {where}: {prepare}; without any data use the embedded digits: "
        "--config=configs/NAME.py:digits"
    )
