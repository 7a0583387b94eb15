"""Finds the pictures of ImageNet in the forms in which people have it.

    tars      ILSVRC2012_img_train.tar (tars of the synsets) and ILSVRC2012_img_val.tar
    folders   train/nXXXXXXXX/*.JPEG and val/nXXXXXXXX/*.JPEG
    Kaggle's  ILSVRC/Data/CLS-LOC/train/nXXXXXXXX/*.JPEG and val/*.JPEG
    parquet   files with an image and a label column, as the hub's copy has them

All forms give the same list, in which a picture is a range of bytes of a file. Only parquet files
are unpacked, because their pictures cannot be read one by one. A name that was read is never used
to write a file. Names are those of the original tars. The label follows from the name, and is
compared with any label that the source has.
"""

import csv
import functools
import importlib.util
import json
import os
import pathlib
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from bn_jax.data.folder import is_hidden
from bn_jax.errors import ConfigError, DataError, printable, reading
from bn_jax.workdir.files import reported, write_atomic

TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}

_FORMS = (
    f"a folder (or a file in it) of {' and '.join(TARS.values())}, of class folders "
    "train/nXXXXXXXX and val, of Kaggle's ILSVRC/Data/CLS-LOC, or of parquet files"
)

_PICTURE = r"\.jpe?g"  # the tars have .JPEG
_TRAIN_NAME = re.compile(rf"((n\d{{8}})_\d+)(?:_n\d{{8}})?{_PICTURE}", re.IGNORECASE)
_VALIDATION_NAME = re.compile(rf"(ILSVRC2012_val_(\d{{8}}))(?:_n\d{{8}})?{_PICTURE}", re.IGNORECASE)
_TEST_NAME = re.compile(rf"ILSVRC2012_test_\d{{8}}{_PICTURE}", re.IGNORECASE)
_SYNSET = re.compile(r"n\d{8}")

_NAME_COLUMNS = ("file_name", "filename", "path")  # of parquet files


@dataclass(frozen=True)
class Image:
    """A picture: `size` bytes of a file, which begin at byte `place`."""

    name: str
    label: int
    file: pathlib.Path
    place: int
    size: int

    def read(self) -> bytes:
        """Reads the bytes. Raises DataError if the file cannot be read or is cut."""
        try:
            descriptor = os.open(self.file, os.O_RDONLY)
            try:
                data = os.pread(descriptor, self.size, self.place)
            finally:
                os.close(descriptor)
        except OSError as e:
            raise DataError(f"{self.file} cannot be read: {e}") from None
        if len(data) != self.size:
            raise DataError(f"{self.file} is cut within {self.name}: fetch it again")
        return data


Found = dict[str, list[Image]]  # split -> its pictures


def find(source: pathlib.Path, unpacked: pathlib.Path) -> Found:
    """Finds the pictures of both splits in a file or folder; its content decides the form.

    Args:
      source: a folder, or one of its tars or parquet files.
      unpacked: where pictures of parquet files are kept meanwhile.

    Raises:
      ConfigError: there is no ImageNet.
      DataError: a file is damaged, or has what ImageNet does not have: other names, a picture
        twice or in the wrong class.
    """
    if source.is_file() and not (_is_tar(source) or source.suffix == ".parquet"):
        raise ConfigError(f"{source} is not a tar or a parquet file: unpack it and give the folder")
    folder = source.parent if source.is_file() else source
    if not folder.is_dir():
        raise ConfigError(f"no file or folder {source}: --from takes {_FORMS}")
    skipped: Counter[str] = Counter()
    with reading(folder):
        found = _find(folder, unpacked, skipped)
    for what, count in skipped.items():
        print(f"skipped: {count:,} {what}", flush=True)

    for split in TARS:
        if not found.get(split):
            raise ConfigError(f"{source} has no pictures of the {split} split: both are needed")
        names = Counter(image.name for image in found[split])
        twice = [name for name, n in names.items() if n > 1]
        if twice:
            raise DataError(f"{source} has {twice[0]!r} twice: fetch it again")
    return found


def _find(folder: pathlib.Path, unpacked: pathlib.Path, skipped: Counter[str]) -> Found:
    tars = [folder / name for name in TARS.values()]
    if not all(tar.is_file() for tar in tars):  # under other names, then
        tars = [path for path in _shown(folder.iterdir()) if _is_tar(path)]
    if tars:
        return _in_tars(tars, skipped)

    for inner in (".", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"):
        root = folder / inner
        if (root / "train").is_dir():
            return _in_folders(root, skipped)

    for root in (folder, folder / "data"):
        parquet = _shown(root.glob("*.parquet"))
        if parquet:
            return _in_parquet(parquet, unpacked, skipped)
    raise ConfigError(f"{folder} does not hold ImageNet in a known form: --from takes {_FORMS}")


def _shown(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the paths that are not hidden, sorted."""
    return sorted(path for path in paths if not is_hidden(path.name))


def _is_tar(path: pathlib.Path) -> bool:
    """Whether a file is an uncompressed tar, by its name or its content."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(257)
        return path.suffix == ".tar" or file.read(5) == b"ustar"


# Names and labels.


@functools.cache
def label_files() -> tuple[list[str], list[int]]:
    """Reads (synset of each class, class of each validation image) from the installed TFDS."""
    spec = importlib.util.find_spec("tensorflow_datasets")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "ImageNet's labels are in the package tensorflow-datasets, which is not installed: "
            "pip install tensorflow-datasets, or `make setup` in a clone"
        )
    root = pathlib.Path(spec.submodule_search_locations[0]) / "datasets" / "imagenet2012"
    synsets = (root / "labels.txt").read_text().split()
    validation = (root / "validation_labels.txt").read_text().split()
    number = {synset: k for k, synset in enumerate(synsets)}
    return synsets, [number[synset] for synset in validation]


@functools.cache
def _class_of() -> dict[str, int]:
    synsets, _ = label_files()
    return {synset: k for k, synset in enumerate(synsets)}


def named(name: str) -> tuple[str, str, int] | None:
    """Returns (split, name in the original tars, label) of a file name; None if it is unknown.

    The label of a validation picture follows from the number in its name. (In TFDS it follows from
    the rank in the sorted tar, which is the same if no file is missing.)
    """
    train = _TRAIN_NAME.fullmatch(name)
    if train:
        stem = train[1].lower()
        label = _class_of().get(train[2].lower())
        return None if label is None else ("train", f"{stem}.JPEG", label)

    validation = _VALIDATION_NAME.fullmatch(name)
    if validation:
        _, labels = label_files()
        number = int(validation[2])
        if 1 <= number <= len(labels):
            return "validation", f"ILSVRC2012_val_{number:08d}.JPEG", labels[number - 1]
    return None


def _wrong_class(where: str, said: object, name: str, label: int) -> DataError:
    synsets, _ = label_files()
    synset = synsets[label]
    return DataError(
        f"{where}: {name} is of class {label} ({synset}) by its name, but of class {said} here: "
        "the labels belong to another set"
    )


# Tars, read in place.


def _in_tars(tars: list[pathlib.Path], skipped: Counter[str]) -> Found:
    found: Found = {split: [] for split in TARS}
    for path in tars:
        print(f"listing {path}", flush=True)
        if path.stem in _class_of():  # the outer tar was unpacked
            found["train"] += _in_tar_of_synset(path, skipped)
            continue
        with path.open("rb") as file:
            for name, place, size in members(file, str(path)):
                base = _plain_name(name, skipped)
                synset = base.removesuffix(".tar")
                picture = named(base)
                if not base:
                    continue
                if base.endswith(".tar") and synset in _class_of():
                    inner = Slice(file, place, size)
                    found["train"] += _of_synset(inner, synset, path, place, skipped)
                elif picture:
                    split, original, label = picture
                    found[split].append(Image(original, label, path, place, size))
                elif _TEST_NAME.fullmatch(base):
                    skipped["pictures of the test split, which have no labels"] += 1
                else:
                    raise DataError(
                        f"{path} has an unexpected member {name!r}: nXXXXXXXX.tar or "
                        "ILSVRC2012_val_N.JPEG was expected"
                    )
    return found


def _in_tar_of_synset(path: pathlib.Path, skipped: Counter[str]) -> list[Image]:
    """Lists the pictures of a file nXXXXXXXX.tar, one of those in the training split's tar."""
    with path.open("rb") as file:
        return list(_of_synset(file, path.stem, path, 0, skipped))


def _of_synset(
    file: "Slice | BinaryIO", synset: str, path: pathlib.Path, start: int, skipped: Counter[str]
) -> Iterator[Image]:
    """Yields the pictures in a synset's tar, which begins at byte `start` of the tar at `path`."""
    tar = f"{path}:{synset}.tar"
    for name, place, size in members(file, tar):
        base = _plain_name(name, skipped)
        if not base:
            continue
        picture = named(base)
        if picture is None or not picture[1].startswith(f"{synset}_"):
            raise DataError(
                f"{tar} has an unexpected member {name!r}: {synset}_N.JPEG was expected"
            )
        _, original, label = picture
        yield Image(original, label, path, start + place, size)


def _plain_name(name: str, skipped: Counter[str]) -> str:
    """Removes the folders from a member's name; returns "" for a hidden file, which is skipped.

    A name with .. is returned unchanged, so that it is refused.
    """
    parts = [part for part in name.split("/") if part != "."]
    if ".." in parts or name.startswith("/"):
        return name
    if any(is_hidden(part) for part in parts):
        skipped["hidden files"] += 1
        return ""
    return parts[-1]


class Slice:
    """Some bytes of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file = file
        self._start = start
        self._size = size
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a byte, counted from the start, from here or from the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """Returns the position of the next byte."""
        return self._at

    def read(self, count: int = -1) -> bytes:
        """Reads the next bytes, fewer at the end."""
        left = max(self._size - self._at, 0)
        wanted = left if count < 0 else min(count, left)
        data = os.pread(self._file.fileno(), wanted, self._start + self._at)
        self._at += len(data)
        return data


def members(file: Any, tar: str) -> Iterator[tuple[str, int, int]]:
    """Yields (name, place of the first byte, size) of a tar's plain files; only reads headers.

    tar: its name in messages. Directories are left out. Raises DataError for a tar that is cut or
    damaged, and for links, devices and sparse files.
    """
    try:
        # With `errors` a name that is not UTF-8 is returned, and judged by the caller.
        with tarfile.open(fileobj=file, mode="r:", errors="backslashreplace") as opened:
            for member in opened:
                if member.isdir():
                    continue
                if not member.isfile() or member.issparse():
                    raise DataError(
                        f"{tar} has a member {member.name!r} of type {member.type!r}: only plain "
                        "files are expected in it"
                    )
                yield member.name, member.offset_data, member.size
            end = opened.offset
    except (tarfile.TarError, ValueError, EOFError) as e:
        raise DataError(f"{tar} is cut or damaged ({e}): fetch it again") from None

    # tarfile silently stops at a header that it cannot read, but a tar ends with zeros.
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(f"{tar} is cut: its end mark is missing; fetch it again")
    if any(block):
        raise DataError(f"{tar} is damaged: the header at byte {end} fails its checksum")


# Folders, with validation pictures in class folders or in one folder.


def _in_folders(root: pathlib.Path, skipped: Counter[str]) -> Found:
    folders = {"train": root / "train"}
    for name in ("validation", "val"):  # if there are both, it is the latter
        if (root / name).is_dir():
            folders["validation"] = root / name
    if "validation" not in folders:
        raise ConfigError(
            f"{root} lacks the folder val with the validation pictures, which are needed, too"
        )

    found: Found = {}
    for split, folder in folders.items():
        print(f"listing {folder}", flush=True)
        images = found.setdefault(split, [])
        for entry in _entries(folder, skipped):
            if entry.is_dir() and _SYNSET.fullmatch(entry.name):
                inner = _entries(pathlib.Path(entry.path), skipped)
                images += _pictures(inner, split, entry.name, skipped)
            elif entry.is_dir():
                raise DataError(
                    f"{printable(entry.path)} is not the folder of a class: nXXXXXXXX is expected"
                )
            elif split == "validation":
                images += _pictures([entry], split, None, skipped)
            elif entry.name.endswith(".tar") and entry.name.removesuffix(".tar") in _class_of():
                images += _in_tar_of_synset(pathlib.Path(entry.path), skipped)
            else:
                skipped[f"files beside the class folders of {folder}"] += 1
    _compare_with_kaggle(root, found["validation"])
    return found


def _entries(folder: pathlib.Path, skipped: Counter[str]) -> list[os.DirEntry[str]]:
    """Lists a folder, sorted by name; hidden files are counted and left out."""
    with os.scandir(folder) as scanned:
        entries = sorted(scanned, key=lambda e: e.name)
    shown = [e for e in entries if not is_hidden(e.name)]
    if len(shown) < len(entries):
        skipped["hidden files"] += len(entries) - len(shown)
    return shown


def _pictures(
    entries: Iterable[os.DirEntry[str]], split: str, synset: str | None, skipped: Counter[str]
) -> Iterator[Image]:
    """Yields the pictures among the files of a class folder, or of no class.

    Raises DataError for names that ImageNet does not have there.
    """
    for entry in entries:
        if not re.search(rf"{_PICTURE}$", entry.name, re.IGNORECASE):
            skipped["files that are not pictures by their names"] += 1
            continue
        picture = named(entry.name)
        if picture is None or picture[0] != split:
            raise DataError(
                f"{printable(entry.path)} is not named as a picture of the {split} split"
            )
        _, original, label = picture
        if synset is not None and _class_of().get(synset) != label:
            raise _wrong_class(entry.path, synset, original, label)
        size = entry.stat().st_size
        yield Image(original, label, pathlib.Path(entry.path), 0, size)


def _compare_with_kaggle(root: pathlib.Path, images: list[Image]) -> None:
    """Compares labels with Kaggle's LOC_val_solution.csv, if it lies beside the pictures."""
    above = list(root.parents)[:3]
    tables = [folder / "LOC_val_solution.csv" for folder in (root, *above)]
    table = next((path for path in tables if path.is_file()), None)
    if table is None:
        return

    # ImageId,PredictionString: the synset and the box of each object, the same synset for all.
    synsets = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                synset, *_ = row["PredictionString"].split()
                synsets[row["ImageId"]] = synset
    except (UnicodeDecodeError, csv.Error, KeyError, ValueError, AttributeError):
        synsets = {}
    if not synsets:
        raise DataError(
            f"{table} is not Kaggle's table of ImageId and PredictionString: fetch it again, or "
            "remove it (the labels follow from the names)"
        )
    for image in images:
        said = synsets.get(image.name.removesuffix(".JPEG"))
        if said is not None and _class_of().get(said) != image.label:
            raise _wrong_class(str(table), said, image.name, image.label)


# Parquet files. Their rows cannot be read one by one, and shards need them in another order. So the
# pictures of each file are copied into one plain file, which is removed at the end.


def _in_parquet(files: list[pathlib.Path], unpacked: pathlib.Path, skipped: Counter[str]) -> Found:
    found: Found = {}
    for number, path in enumerate(files):
        print(f"unpacking {path}", flush=True)
        pictures = unpacked / f"{number:05d}.pictures"
        for name, said, place, size in _unpack(path, pictures):
            base = name.rpartition("/")[2]
            picture = named(base)
            if _TEST_NAME.fullmatch(base):
                skipped["pictures of the test split, which have no labels"] += 1
                continue
            if picture is None:
                raise DataError(f"{path} has a picture {name!r}, which ImageNet does not have")
            split, original, label = picture
            if said != label:
                raise _wrong_class(str(path), said, original, label)
            found.setdefault(split, []).append(Image(original, label, pictures, place, size))
    return found


def _unpack(path: pathlib.Path, pictures: pathlib.Path) -> list[tuple[str, int, int, int]]:
    """Copies the pictures of one file, unless that is done, into the file `pictures`.

    Returns (name, label, place, size) of each picture.
    """
    listing = pictures.with_suffix(".json")
    stat = path.stat()
    known = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    if listing.is_file() and pictures.is_file():
        kept = json.loads(listing.read_text())
        size = sum(row[3] for row in kept["rows"])
        if kept["file"] == known and pictures.stat().st_size == size:
            return [tuple(row) for row in kept["rows"]]

    rows = []
    place = 0
    with reported(pictures, "cannot write"):
        pictures.parent.mkdir(parents=True, exist_ok=True)
        with pictures.open("wb") as out:
            for name, label, data in _parquet_rows(path):
                out.write(data)
                rows.append((name, label, place, len(data)))
                place += len(data)
    # The listing is written last, so that it means that the pictures are complete.
    write_atomic(listing, json.dumps({"file": known, "rows": rows}).encode())
    return rows


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[str, int, bytes]]:
    """Yields (file name, label, encoded picture) of each row.

    Raises ConfigError without pyarrow, DataError for a file that is damaged or has other columns.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "parquet files are read by pyarrow: pip install 'bn_jax[parquet]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            image, name, label = _columns(path, file.schema_arrow)
            columns = [c for c in (image, name, label) if c]
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    picture = row[image]
                    is_struct = isinstance(picture, dict)
                    data = picture["bytes"] if is_struct else picture
                    file_name = row[name] if name else picture["path"]
                    if data is None or file_name is None or row[label] is None:
                        raise DataError(
                            f"{path} has a row without picture, file name or label: ImageNet's "
                            "file names are needed for the order of the shards"
                        )
                    yield file_name, row[label], data
    except (pyarrow.ArrowException, OSError) as e:
        reason = " ".join(str(e).split())
        raise DataError(f"{path} cannot be read ({reason[:200]}): fetch it again") from None


def _columns(path: pathlib.Path, schema: Any) -> tuple[str, str | None, str]:
    """Finds the columns of pictures, of file names (None: inside the pictures') and of labels."""
    import pyarrow

    images = []
    names = []
    labels = []
    for field in schema:
        if _holds_pictures(field.type):
            images.append(field.name)
        elif pyarrow.types.is_string(field.type) and field.name in _NAME_COLUMNS:
            names.append(field.name)
        elif pyarrow.types.is_integer(field.type) and "label" in field.name:
            labels.append(field.name)
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{path} has the columns {', '.join(schema.names)}: one of pictures (binary, or bytes "
            "and path) and one integer label are needed"
        )
    inside = pyarrow.types.is_struct(schema.field(images[0]).type)
    if not names and not inside:
        raise DataError(f"{path} lacks file names: add a column file_name")
    return images[0], names[0] if names else None, labels[0]


def _holds_pictures(kind: Any) -> bool:
    """Whether a column of this type can hold pictures: bytes, or a struct of bytes and path."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
