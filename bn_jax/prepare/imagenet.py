"""Writes ILSVRC2012 as TFDS' set `imagenet2012` in ArrayRecord files, without TensorFlow.

The records are those of TFDS' own builder: features, labels, file names, order (sorted by the MD5
of split and file name) and shards. Pictures are read from their source (layouts.py) in the order of
the shards, which is slow on a spinning disk. Preparation can be interrupted: each shard is whole or
absent, and dataset_info.json, which makes the folder a data set, is written last.

Differs from TFDS: the 22 CMYK and 1 PNG images are found by their content and re-encoded as RGB
JPEGs by libjpeg-turbo, not by TensorFlow, so their bytes differ.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
import threading
from dataclasses import dataclass

import simplejpeg

from bn_jax.data import decode, tfds
from bn_jax.errors import ConfigError, DataError, DiskError, printable
from bn_jax.prepare import layouts
from bn_jax.prepare.layouts import Image
from bn_jax.workdir.files import reported, warn
from bn_jax.workdir.timing import ImageProgress

NAME = "imagenet2012"
VERSION = "5.1.0"
COUNTS = {"train": 1_281_167, "validation": 50_000}

_OVERHEAD = 1.02  # size of ArrayRecord files / that of their pictures (measured 1.002 to 1.01)
_PLAN = "plan.sha256"  # digest of the list of pictures, so that sources are not mixed


def build(
    source: pathlib.Path, data_dir: pathlib.Path, *, partial: bool, threads: int
) -> pathlib.Path:
    """Prepares both splits and returns the set's folder. Shards that exist are kept.

    Args:
      source: a file or folder in one of the forms of layouts.py.
      data_dir: a TFDS data_dir to write to.
      partial: whether to accept a source that lacks pictures.
      threads: the number of shards that are written at a time.

    Raises:
      ConfigError: the source is not there, or the folder holds another set.
      DataError: the source is damaged or incomplete.
      DiskError: there is too little space.
    """
    folder = data_dir / NAME / VERSION
    unpacked = folder.with_name(f"{VERSION}.unpacked")
    shards, digest = _plan(source, folder, unpacked, partial)

    plan = folder / _PLAN
    finished = (folder / "dataset_info.json").is_file()
    if (finished or plan.is_file()) and not (plan.is_file() and plan.read_text() == digest):
        raise ConfigError(
            f"{folder} holds a set of other pictures: choose another --data_dir or remove it"
        )
    if finished:
        shutil.rmtree(unpacked, ignore_errors=True)
        print(f"{folder} is already complete")
        return folder

    with reported(folder, "cannot write"):
        folder.mkdir(parents=True, exist_ok=True)
        plan.write_text(digest)
        for left in folder.glob("*.part"):
            left.unlink()
    todo = [shard for shard in shards if not shard.path.exists()]
    _check_space(folder, todo)
    _write_all(todo, threads)
    _finish(folder, shards)
    shutil.rmtree(unpacked, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    path: pathlib.Path
    split: str
    images: list[Image]


def _plan(
    source: pathlib.Path, folder: pathlib.Path, unpacked: pathlib.Path, partial: bool
) -> tuple[list[Shard], str]:
    """Lists all shards to write, and makes a digest of what they will hold."""
    found = layouts.find(source, unpacked)

    # TFDS' own rules for the number and the bounds of shards; importing them takes half a second.
    # After the source was found: `find` says what is wrong with it, or that TFDS is not installed.
    from tensorflow_datasets.core.utils import shard_utils

    shards = []
    digest = hashlib.sha256()
    for split in COUNTS:
        images = in_tfds_order(split, found[split])
        check_complete(split, images, source, partial)
        digest.update(repr((split, [(i.name, i.size, i.label) for i in images])).encode())

        total = sum(serialized_size(image) for image in images)
        count = shard_utils.ShardConfig.calculate_number_shards(total, len(images))
        start = 0
        for k, stop in enumerate(shard_utils.get_shard_boundaries(len(images), count)):
            name = f"{NAME}-{split}.array_record-{k:05d}-of-{count:05d}"
            shards.append(Shard(folder / name, split, images[start:stop]))
            start = stop
    return shards, digest.hexdigest()


def in_tfds_order(split: str, images: list[Image]) -> list[Image]:
    """Sorts images as TFDS does: by the MD5 of the split's name and the file name."""
    return sorted(images, key=lambda image: hashlib.md5((split + image.name).encode()).digest())


def check_complete(split: str, images: list[Image], source: pathlib.Path, partial: bool) -> None:
    """Raises DataError for a source without all images of a split, unless `partial`."""
    if len(images) != COUNTS[split] and not partial:
        raise DataError(
            f"{source} holds {len(images):,} of {COUNTS[split]:,} images of {split}: fetch it "
            "again, or pass --partial to prepare what there is"
        )


# Writing.


def _check_space(folder: pathlib.Path, todo: list[Shard]) -> None:
    need = int(_OVERHEAD * sum(i.size for s in todo for i in s.images))
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DiskError(
            f"{folder} needs {need / 2**30:.1f} GiB and its disk has {free / 2**30:.1f} GiB free: "
            "make room or choose another --data_dir"
        )


def _write_all(shards: list[Shard], threads: int) -> None:
    """Writes shards in threads; the first error stops all of them."""
    stop = threading.Event()
    progress = ImageProgress(sum(len(shard.images) for shard in shards))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(_write, shard, progress, stop) for shard in shards]
        try:
            for job in concurrent.futures.as_completed(jobs):
                job.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write(shard: Shard, progress: ImageProgress, stop: threading.Event) -> None:
    """Writes one shard under another name and renames it when it is whole and on the disk."""
    from array_record.python import array_record_module

    part = shard.path.with_name(shard.path.name + ".part")
    # As in TFDS, each chunk holds one record, so that random access reads only that record.
    writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
    try:
        for image in shard.images:
            if stop.is_set():
                raise DataError("preparation was stopped")
            writer.write(record(image))
            progress.add(1)
    except OSError as e:
        raise DiskError(f"{part} cannot be written: {e}; the same command resumes") from None
    finally:
        writer.close()
    with part.open("rb+") as f:
        os.fsync(f.fileno())
    part.replace(shard.path)


def _finish(folder: pathlib.Path, shards: list[Shard]) -> None:
    """Counts every shard's records once more and writes the metadata, dataset_info.json last."""
    from array_record.python import array_record_module

    splits: dict[str, dict] = {}
    for shard in shards:
        reader = array_record_module.ArrayRecordReader(str(shard.path))
        if reader.num_records() != len(shard.images):
            raise DataError(
                f"{shard.path} holds {reader.num_records()} records, {len(shard.images)} were "
                "written: remove it and run the command again"
            )
        reader.close()
        entry = splits.setdefault(
            shard.split, {"name": shard.split, "numBytes": "0", "shardLengths": []}
        )
        entry["shardLengths"].append(str(len(shard.images)))
        written = sum(serialized_size(image) for image in shard.images)
        entry["numBytes"] = str(int(entry["numBytes"]) + written)

    (folder / "label.labels.txt").write_text("\n".join(layouts.label_files()[0]) + "\n")
    (folder / "features.json").write_text(dump(features()))
    part = folder / "dataset_info.json.part"
    part.write_text(dump(dataset_info(list(splits.values()))))
    part.replace(folder / "dataset_info.json")


# Records.


def record(image: Image) -> bytes:
    """Serializes the Example of one image. Raises DataError if its file is cut."""
    warnings: list[str] = []
    data = as_jpeg(image.read(), warnings)
    if warnings:
        # The new file would hide the damage from every later reader.
        warn(f"{printable(image.name)}: re-encoded, but its pixels may be wrong: {warnings[0]}")
    return tfds.serialize({"image": data, **_other_features(image)})


def serialized_size(image: Image) -> int:
    """Returns the bytes of an image's record, assuming that it is not re-encoded."""
    return tfds.serialized_size(_other_features(image), "image", image.size)


def _other_features(image: Image) -> dict[str, tfds.Value]:
    return {"label": image.label, "file_name": image.name.encode()}


def as_jpeg(data: bytes, warnings: list[str]) -> bytes:
    """Returns an image unchanged, or re-encoded as an RGB JPEG if it is CMYK or not a JPEG.

    TFDS does the same since 3.0.0. What cannot be decoded is kept unchanged, and reading it will
    fail. If an image is re-encoded, the decoder's warnings are appended to `warnings`.
    """
    try:
        found = decode.frame(data)
        if found.kind == "jpeg" and found.components != 4:
            return data
        return simplejpeg.encode_jpeg(
            decode.pixels(data, found, warnings=warnings), quality=100, colorsubsampling="420"
        )
    except decode.BadImageError:
        return data


# Metadata.


def features() -> dict:
    """Returns the features.json of this set, as TFDS writes it."""
    base = "tensorflow_datasets.core.features."
    image = {
        "dtype": "uint8",
        "encodingFormat": "jpeg",
        "shape": {"dimensions": ["-1", "-1", "3"]},
    }
    parts = {
        "file_name": {"pythonClassName": base + "text_feature.Text", "text": {}},
        "image": {"image": image, "pythonClassName": base + "image_feature.Image"},
        "label": {
            "classLabel": {"numClasses": "1000"},
            "pythonClassName": base + "class_label_feature.ClassLabel",
        },
    }
    return {
        "featuresDict": {"features": parts},
        "pythonClassName": base + "features_dict.FeaturesDict",
    }


def dataset_info(splits: list[dict]) -> dict:
    """Returns this set's dataset_info.json. `splits`: name, numBytes, shardLengths of each."""
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    return {
        "description": "ILSVRC 2012, 'ImageNet', written by bn_jax.prepare in TFDS' format.",
        "fileFormat": "array_record",
        "location": {"urls": ["https://image-net.org/"]},
        "moduleName": "tensorflow_datasets.datasets.imagenet2012.imagenet2012_dataset_builder",
        "name": NAME,
        "splits": [{"filepathTemplate": template, **split} for split in splits],
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
        "version": VERSION,
    }


def dump(content: dict) -> str:
    """Formats JSON as TFDS does."""
    return json.dumps(content, indent=4, sort_keys=True)
