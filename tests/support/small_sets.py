"""Small data sets in the formats that users have, written by tests."""

import io
import itertools
import json
import pathlib
import struct
import tarfile
import zlib

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from bn_jax.data import tfds
from bn_jax.prepare import imagenet, layouts


def photo(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: smooth colours, which survive JPEG compression."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    waves = [np.sin(x / (7 + seed % 5) + k) + np.cos(y / (9 + k)) for k in range(3)]
    return np.clip(127 + 50 * np.stack(waves, axis=-1), 0, 255).astype(np.uint8)


def encode(array: np.ndarray, kind: str = "JPEG", mode: str | None = None, **options) -> bytes:
    """An image file, by Pillow."""
    image = Image.fromarray(array)
    out = io.BytesIO()
    (image.convert(mode) if mode else image).save(out, kind, **options)
    return out.getvalue()


def png_bomb(side: int = 16_000) -> bytes:
    """A PNG of black pixels: side 16,000 is 0.75 MB that unpack to 768 MB. The same compressed
    block is repeated, which takes no time."""
    raw = (3 * side + 1) * side
    block = 1 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    tail = last.compress(bytes(raw % block)) + last.flush()
    adler = struct.pack(">I", (raw % 65521) << 16 | 1)  # of zeros
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", b"\x78\xda" + piece * (raw // block) + tail + adler),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write_tfds(
    data_dir: pathlib.Path,
    splits: dict[str, list[tuple[bytes, int]]],
    *,
    file_format: str,
    name: str = "little",
    classes: int = 3,
    shards: int = 2,
) -> pathlib.Path:
    """A set in TFDS' format: lists of (image file, label). Returns the version's folder."""
    folder = data_dir / name / "1.0.0"
    folder.mkdir(parents=True)
    info = []
    for split, examples in splits.items():
        bounds = [len(examples) * k // shards for k in range(shards + 1)]
        for k in range(shards):
            records = [
                tfds.serialize({"image": image, "label": label})
                for image, label in examples[bounds[k] : bounds[k + 1]]
            ]
            path = folder / f"{name}-{split}.{file_format}-{k:05d}-of-{shards:05d}"
            _write(path, records, file_format)
        lengths = [str(b - a) for a, b in itertools.pairwise(bounds)]
        info.append({"name": split, "numBytes": "0", "shardLengths": lengths})
    features = imagenet.features()
    del features["featuresDict"]["features"]["file_name"]
    features["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = str(classes)
    (folder / "features.json").write_text(json.dumps(features))
    described = {**imagenet.dataset_info(info), "name": name, "fileFormat": file_format}
    (folder / "dataset_info.json").write_text(json.dumps(described))
    return folder


def _write(path: pathlib.Path, records: list[bytes], file_format: str) -> None:
    if file_format == "tfrecord":
        tfds.write(path, records)
        return
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


SYNSETS = ("n01440764", "n01443537")  # classes 0 and 1


def tar_bytes(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_tars(folder: pathlib.Path, each: int = 6) -> pathlib.Path:
    """A pair of tars: two synsets of `each` pictures, and three validation pictures."""
    folder.mkdir(exist_ok=True)
    picture = encode(photo())
    train = {
        f"{s}.tar": tar_bytes({f"{s}_{k}.JPEG": picture + bytes([k]) for k in range(each)})
        for s in SYNSETS
    }
    validation = {f"ILSVRC2012_val_{k:08d}.JPEG": picture for k in (1, 2, 50_000)}
    (folder / layouts.TARS["train"]).write_bytes(tar_bytes(train))
    (folder / layouts.TARS["validation"]).write_bytes(tar_bytes(validation))
    return folder
