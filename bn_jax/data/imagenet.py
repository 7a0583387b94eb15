"""ILSVRC2012 tars -> TFDS' `imagenet2012` as ArrayRecord, without TensorFlow.

The same records as TFDS' own builder writes: features, labels, file names, order (records sorted by
the MD5 of split and file name) and shards. The tars are read in place, in the order of the shards:
nothing is unpacked, and no space is needed but that of the result. On a spinning disk that is slow,
on an SSD not.

Differs from TFDS: the 22 CMYK and 1 PNG images are found by their content and re-encoded as RGB
JPEGs by libjpeg-turbo, not by TensorFlow, so their bytes differ.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import re
from collections import Counter
from dataclasses import dataclass

import simplejpeg

from bn_jax.data import decode, example, tarfiles
from bn_jax.errors import ConfigError, DataError

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
    def features(self) -> dict[str, example.Value]:
        """Its features but the picture itself."""
        return {"label": self.label, "file_name": self.name.encode()}

    @property
    def serialized_size(self) -> int:
        """Bytes of its record, unless the picture is re-encoded."""
        return example.serialized_size(self.features, "image", self.size)


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
        members = tarfiles.members(descriptor, 0, os.fstat(descriptor).st_size, str(tar))
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


def _synset(
    descriptor: int, member: tarfiles.Member, number: dict[str, int], tar: str
) -> list[Image]:
    match = _SYNSET_TAR.fullmatch(member.name)
    if not match or match[1] not in number:
        raise DataError(
            f"{tar} has an unexpected member {member.name!r}: a synset's tar was expected"
        )
    label, inner = number[match[1]], f"{tar}:{member.name}"
    images = []
    for m in tarfiles.members(descriptor, member.place, member.place + member.size, inner):
        found = _TRAIN_IMAGE.fullmatch(m.name)
        if not found or found[1] != match[1]:
            raise DataError(
                f"{inner} has an unexpected member {m.name!r}: {match[1]}_N.JPEG was expected"
            )
        images.append(Image(m.name, label, m.place, m.size))
    return images


def _validation_image(member: tarfiles.Member, labels: list[int], tar: str) -> Image:
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
    return example.serialize({"image": as_jpeg(data), **image.features})


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
