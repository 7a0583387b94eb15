"""The places of files inside a tar (POSIX ustar, GNU), found without unpacking anything.

Nothing is ever written under a member's name, so a hostile name cannot reach the disk; all that is
not a plain file is refused. Only headers are read: 512 bytes a member.
"""

import concurrent.futures
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import simplejpeg

from bn_jax.data import decode, tfds
from bn_jax.errors import ConfigError, DataError, DiskError
from bn_jax.workdir.timing import ImageProgress

BLOCK = 512
_FILES, _DIRECTORY, _COMMENTS = b"0\0", b"5", b"xg"  # types of members (POSIX 1003.1, pax)


class TarMember(NamedTuple):
    """A plain file: name, place of its first byte in the outermost tar, size in bytes."""

    name: str
    place: int
    size: int


def tar_members(descriptor: int, start: int, stop: int, tar: str) -> Iterator[TarMember]:
    """The plain files of the tar that occupies bytes start..stop of an open file.

    Directories and pax comments are skipped. `tar` names it in messages. Raises DataError for a
    tar that is cut or damaged, and for links, devices and sparse files.
    """
    at = start
    while at < stop:
        header = os.pread(descriptor, BLOCK, at)
        if len(header) < BLOCK or at + BLOCK > stop:
            raise DataError(f"{tar} is cut at byte {at - start}: fetch it again")
        if not any(header):  # the end; a second block of zeros follows in whole tars
            return
        stored = _number(header[148:156], tar)
        if stored != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            raise DataError(f"{tar} is damaged: the header at byte {at - start} fails its checksum")
        name = header[:100].split(b"\0")[0].decode("utf-8", "backslashreplace")
        size, kind = _number(header[124:136], tar), header[156:157]
        place = at + BLOCK
        if place + size > stop:
            raise DataError(f"{tar} is cut within {name!r} at byte {at - start}: fetch it again")
        if kind in _FILES:
            yield TarMember(name, place, size)
        elif kind != _DIRECTORY and kind not in _COMMENTS:
            raise DataError(
                f"{tar} has a member {name!r} of type {kind!r}: only plain files are expected in it"
            )
        at = place + -(-size // BLOCK) * BLOCK
    raise DataError(f"{tar} is cut: its end mark is missing; fetch it again")


def _number(field: bytes, tar: str) -> int:
    """An octal number, or GNU's binary form for sizes above 8 GiB."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise DataError(f"{tar} is damaged: {field!r} is not a number in a header") from None


# ILSVRC2012 tars -> TFDS' `imagenet2012` as ArrayRecord, without TensorFlow.
#
# The same records as TFDS' own builder writes: features, labels, file names, order (records
# sorted by the MD5 of split and file name) and shards. The tars are read in place, in the order
# of the shards: nothing is unpacked, and no space is needed but that of the result. On a spinning
# disk that is slow, on an SSD not.
#
# Differs from TFDS: the 22 CMYK and 1 PNG images are found by their content and re-encoded as RGB
# JPEGs by libjpeg-turbo, not by TensorFlow, so their bytes differ.


NAME, VERSION = "imagenet2012", "5.1.0"
COUNTS = {"train": 1_281_167, "validation": 50_000}
TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
_SYNSET_TAR = re.compile(r"(n\d{8})\.tar")
_TRAIN_IMAGE = re.compile(r"(n\d{8})_\d+\.JPEG")
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@dataclass(frozen=True)
class Image:
    """A picture in a tar."""

    name: str
    label: int
    place: int
    size: int

    @property
    def features(self) -> dict[str, tfds.Value]:
        """Its features but the picture itself."""
        return {"label": self.label, "file_name": self.name.encode()}

    @property
    def serialized_size(self) -> int:
        """Bytes of its record, unless the picture is re-encoded."""
        return tfds.serialized_size(self.features, "image", self.size)


def label_files() -> tuple[list[str], list[int]]:
    """(synset of each class, class of each validation image by number), from the installed TFDS."""
    spec = importlib.util.find_spec("tensorflow_datasets")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the package tensorflow-datasets holds ImageNet's labels: install it")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "datasets" / NAME
    synsets = (folder / "labels.txt").read_text().split()
    validation = (folder / "validation_labels.txt").read_text().split()
    number = {synset: k for k, synset in enumerate(synsets)}
    return synsets, [number[synset] for synset in validation]


def list_images(split: str, tar: pathlib.Path) -> list[Image]:
    """The images of a split in TFDS' order. Raises DataError for members that ImageNet does not
    have: other names, images in the wrong class, links, duplicates."""
    synsets, validation = label_files()
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        members = tar_members(descriptor, 0, os.fstat(descriptor).st_size, str(tar))
        if split == "train":
            images = []
            number = {synset: k for k, synset in enumerate(synsets)}
            for member in members:
                images += _synset(descriptor, member, number, str(tar))
        else:
            images = [_validation_image(m, validation, str(tar)) for m in members]
    finally:
        os.close(descriptor)
    twice = [name for name, n in Counter(image.name for image in images).items() if n > 1]
    if twice:
        raise DataError(f"{tar} has {twice[0]!r} twice: fetch it again")
    return sorted(images, key=lambda image: hashlib.md5((split + image.name).encode()).digest())


def _synset(descriptor: int, member: TarMember, number: dict[str, int], tar: str) -> list[Image]:
    match = _SYNSET_TAR.fullmatch(member.name)
    if not match or match[1] not in number:
        raise DataError(
            f"{tar} has an unexpected member {member.name!r}: a synset's tar was expected"
        )
    label, inner = number[match[1]], f"{tar}:{member.name}"
    images = []
    for m in tar_members(descriptor, member.place, member.place + member.size, inner):
        found = _TRAIN_IMAGE.fullmatch(m.name)
        if not found or found[1] != match[1]:
            raise DataError(
                f"{inner} has an unexpected member {m.name!r}: {match[1]}_N.JPEG was expected"
            )
        images.append(Image(m.name, label, m.place, m.size))
    return images


def _validation_image(member: TarMember, labels: list[int], tar: str) -> Image:
    """TFDS gives labels by rank of the sorted names: in the complete tar that is the name's number,
    and the number stays right where a file is missing."""
    match = _VALIDATION_IMAGE.fullmatch(member.name)
    if not match or not 1 <= int(match[1]) <= len(labels):
        raise DataError(
            f"{tar} has an unexpected member {member.name!r}: ILSVRC2012_val_N.JPEG was expected"
        )
    return Image(member.name, labels[int(match[1]) - 1], member.place, member.size)


def check_complete(split: str, images: list[Image], tar: pathlib.Path, partial: bool) -> None:
    """Raises DataError for a tar without all images of its split, unless `partial`."""
    if len(images) != COUNTS[split] and not (partial and images):
        raise DataError(
            f"{tar} holds {len(images):,} of {COUNTS[split]:,} images: fetch it again, or pass "
            "--partial to prepare what there is"
        )


def record(descriptor: int, image: Image) -> bytes:
    """The serialized Example of one image. Raises DataError if the tar is cut."""
    data = os.pread(descriptor, image.size, image.place)
    if len(data) != image.size:
        raise DataError(f"the tar is cut within {image.name}: fetch it again")
    return tfds.serialize({"image": as_jpeg(data), **image.features})


def as_jpeg(data: bytes) -> bytes:
    """The image as it is, or as an RGB JPEG if it is CMYK or no JPEG (TFDS since 3.0.0 does the
    same). What cannot be decoded is kept: reading it will say so."""
    try:
        found = decode.frame(data)
        if found.kind == "jpeg" and found.components != 4:
            return data
        return simplejpeg.encode_jpeg(
            decode.pixels(data, found), quality=100, colorsubsampling="420"
        )
    except decode.BadImageError:
        return data


def features() -> dict:
    """features.json of this set, as TFDS writes it."""
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
    """dataset_info.json of this set. `splits`: name, numBytes, shardLengths of each."""
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
    """JSON as TFDS formats it."""
    return json.dumps(content, indent=4, sort_keys=True)


# Writes the shards of a prepared ImageNet: resumable, each shard whole or absent, metadata last.
#
# The folder becomes a data set at the moment its dataset_info.json appears.


_OVERHEAD = 1.02  # ArrayRecord files against the pictures in them (measured 1.002 to 1.01)
_PLAN = "plan.sha256"  # of the tars' content as listed: shards of other tars are not mixed in


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    path: pathlib.Path
    tar: pathlib.Path
    split: str
    images: list[Image]


def build(
    tars: pathlib.Path, data_dir: pathlib.Path, *, partial: bool, threads: int
) -> pathlib.Path:
    """Prepares both splits; returns the set's folder. Shards that are there already are kept.

    Raises ConfigError (no tars, or another set in the folder), DataError (tars damaged or
    incomplete), DiskError (too little space).
    """
    folder = data_dir / NAME / VERSION
    shards, digest = _plan(tars, folder, partial)
    plan = folder / _PLAN
    finished = (folder / "dataset_info.json").is_file()
    if (finished or plan.is_file()) and not (plan.is_file() and plan.read_text() == digest):
        raise ConfigError(
            f"{folder} holds a set of other tars: choose another --data_dir or remove it"
        )
    if finished:
        print(f"{folder} is complete already")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_text(digest)
    for left in folder.glob("*.part"):
        left.unlink()
    todo = [s for s in shards if not s.path.exists()]
    _check_space(folder, todo)
    stop = threading.Event()
    progress = ImageProgress(sum(len(s.images) for s in todo))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(_write, shard, progress, stop) for shard in todo]
        try:
            for job in concurrent.futures.as_completed(jobs):
                job.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    _finish(folder, shards)
    return folder


def _plan(tars: pathlib.Path, folder: pathlib.Path, partial: bool) -> tuple[list[Shard], str]:
    """All shards to write and a digest of what they will hold."""
    # Imported here: half a second. TFDS' own rules for the number and the bounds of shards.
    from tensorflow_datasets.core.utils import shard_utils

    shards, digest = [], hashlib.sha256()
    for split, file in TARS.items():
        tar = tars / file
        if not tar.is_file():
            raise ConfigError(f"no {tar}: --tars must hold {' and '.join(TARS.values())}")
        print(f"listing {tar}", flush=True)
        images = list_images(split, tar)
        check_complete(split, images, tar, partial)
        digest.update(repr((split, [(i.name, i.size, i.label) for i in images])).encode())
        total = sum(image.serialized_size for image in images)
        count = shard_utils.ShardConfig.calculate_number_shards(total, len(images))
        start = 0
        for k, stop in enumerate(shard_utils.get_shard_boundaries(len(images), count)):
            name = f"{NAME}-{split}.array_record-{k:05d}-of-{count:05d}"
            shards.append(Shard(folder / name, tar, split, images[start:stop]))
            start = stop
    return shards, digest.hexdigest()


def _check_space(folder: pathlib.Path, todo: list[Shard]) -> None:
    need = int(_OVERHEAD * sum(i.size for s in todo for i in s.images))
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DiskError(
            f"{folder} needs {need / 2**30:.1f} GiB and its disk has {free / 2**30:.1f} GiB free: "
            "make room or choose another --data_dir"
        )


def _write(shard: Shard, progress: ImageProgress, stop: threading.Event) -> None:
    """Writes one shard under another name and renames it when it is whole and on the disk."""
    from array_record.python import array_record_module

    part = shard.path.with_name(shard.path.name + ".part")
    descriptor = os.open(shard.tar, os.O_RDONLY)
    # One record a chunk, as TFDS: random access then reads one record only.
    writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
    try:
        for image in shard.images:
            if stop.is_set():
                raise DataError("preparation was stopped")
            writer.write(record(descriptor, image))
            progress.add(1)
    except OSError as e:
        raise DiskError(f"{part} cannot be written: {e}; the same command resumes") from None
    finally:
        os.close(descriptor)
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
        entry["numBytes"] = str(
            int(entry["numBytes"]) + sum(i.serialized_size for i in shard.images)
        )
    (folder / "label.labels.txt").write_text("\n".join(label_files()[0]) + "\n")
    (folder / "features.json").write_text(dump(features()))
    part = folder / "dataset_info.json.part"
    part.write_text(dump(dataset_info(list(splits.values()))))
    part.replace(folder / "dataset_info.json")
