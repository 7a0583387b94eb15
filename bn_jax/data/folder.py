"""Reads a folder of pictures: DIR/train/CLASS/* and DIR/val/CLASS/*.

Every file that is named like a picture is an example, also in folders inside a class folder. A file
that cannot be read or decoded is a bad record: training masks it, and evaluation ends with an
error. Hidden files, macOS's __MACOSX and files of other kinds are counted and skipped.
"""

import concurrent.futures
import errno
import os
import pathlib
import stat
import time
import unicodedata

import numpy as np

from bn_jax.data import cache, sources
from bn_jax.data.load import BadRecordError, Record
from bn_jax.errors import ConfigError, expand_path, printable, reading

TRAIN = ("train",)
EVALUATION = ("val", "validation", "test")  # the first that exists is evaluated

# Suffixes of pictures. Kinds that cannot be decoded are listed, too, so that such files are bad
# records, which are reported, and not silently skipped.
_COMMON = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp")
_OTHERS = (".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif")
_NOT_DECODED = (".heic", ".heif", ".jxl", ".svg", ".ico")
SUFFIXES = (*_COMMON, *_OTHERS, *_NOT_DECODED)

KEPT = 10_000  # listings of so many files are cached: on a network disk they take minutes
_SETTLED = 2.0  # seconds after a change from which on any further change alters a folder's mtime


class Files(sources.Records):
    """A split: its pictures, sorted by class and name.

    Attributes:
      root: the folder of the split.
      classes: names of the class folders, as the file system has them.
      skipped: how many files are not pictures by their names.
      labels: int32 [N].
    """

    def __init__(self, root: pathlib.Path, classes: list[str], beside: int = 0):
        """Lists the pictures. `beside`: how many files beside the class folders were skipped."""
        self.root = root
        self.classes = classes
        listing = _listing(root, classes)
        self.skipped = int(listing["skipped"]) + beside
        self.labels = listing["labels"]
        self._names = listing["names"]
        self._ends = listing["ends"]
        super().__init__(len(self.labels), len(classes))

    def path(self, index: int) -> pathlib.Path:
        """Returns the path of a picture."""
        start = self._ends[index - 1] if index else 0
        name = os.fsdecode(self._names[start : self._ends[index]].tobytes())
        return self.root / self.classes[self.labels[index]] / name

    def __getitem__(self, index: int) -> Record:
        path = self.path(index)
        name = printable(path)
        try:
            data = _read(path)
        except OSError as e:
            raise BadRecordError(name, e.strerror or str(e)) from None
        return Record(data, int(self.labels[index]), name)


def source(directory: str) -> sources.Source:
    """Opens a folder. Raises ConfigError as `open_splits` does."""
    root = expand_path(directory)
    train, evaluation = open_splits(root)
    described = (
        f"folder {printable(root)}: {len(train):,} training and {len(evaluation):,} "
        f"evaluation pictures of {train.num_classes} classes"
    )
    empty = train.num_classes - len(np.unique(train.labels))
    if empty:
        described += f", {empty} of them without training pictures"
    if train.skipped + evaluation.skipped:
        described += f", {train.skipped + evaluation.skipped} other files skipped"
    return sources.Source(
        train=train,
        evaluation=evaluation,
        num_classes=train.num_classes,
        channels=3,
        split="validation",
        class_names=tuple(map(printable, train.classes)),
        description=described,
    )


def open_splits(root: pathlib.Path) -> tuple[Files, Files]:
    """Opens the training and the evaluation split; the sorted folders of train/ are the classes.

    Raises ConfigError if a split is absent or empty, if a folder cannot be read, if val/ has a
    class that train/ does not have, or if pictures lie beside the class folders.
    """
    train = _split(root, TRAIN)
    evaluation = _split(root, EVALUATION)
    classes, beside_train = _classes(train)
    others, beside_evaluation = _classes(evaluation)
    strange = sorted(set(others) - set(classes))
    if strange:
        hint = _look_alike(strange[0], classes)
        raise ConfigError(
            f"{evaluation} has {len(strange)} classes that {train} does not have; the first is "
            f"{printable(strange[0])!r}: both need the same class folders{hint}"
        )
    splits = Files(train, classes, beside_train), Files(evaluation, classes, beside_evaluation)
    for split in splits:
        if not len(split):
            raise ConfigError(
                f"no pictures in {split.root}: it needs CLASS/* of {', '.join(_COMMON + _OTHERS)}"
            )
    return splits


def _look_alike(strange: str, classes: list[str]) -> str:
    """Returns a hint if a name only looks the same: macOS writes an accent as its own character."""
    composed = {unicodedata.normalize("NFC", name): name for name in classes}
    twin = composed.get(unicodedata.normalize("NFC", strange))
    if twin is None:
        return ""
    return (
        f"; {strange!a} and {twin!a} look the same but are written differently, as "
        "macOS and others do: rename one of them (convmv -f utf8 -t utf8 --nfc)"
    )


def _split(root: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ConfigError(
        f"no folder {root / names[0]}: give a folder that holds train/CLASS/* and val/CLASS/* as "
        f"--config.data.dir{_near(root, names)}"
    )


def _near(root: pathlib.Path, names: tuple[str, ...]) -> str:
    """Returns a hint if the split lies one folder deeper, or is called Train."""
    if not root.is_dir():
        return ""
    inside = [pathlib.Path(entry.path) for entry in _scan(root) if _is_folder(entry)]
    for folder in inside:
        if folder.name.lower() in names:
            return f"; {printable(folder)} is there: rename it"
        if any((folder / name).is_dir() for name in names):
            return f"; {printable(folder)} has it"
    return ""


def _classes(split: pathlib.Path) -> tuple[list[str], int]:
    """Returns the class folders of a split, and the number of other files beside them.

    Raises ConfigError for pictures beside them, which would be left out, and for a folder that
    cannot be read.
    """
    classes = []
    others = 0
    for entry in _scan(split):
        if is_hidden(entry.name):
            others += 1
        elif _is_folder(entry):
            classes.append(entry.name)
        elif entry.is_symlink() and not pathlib.Path(entry.path).exists():
            raise ConfigError(f"{printable(entry.path)} is a broken link: mend or remove it")
        elif entry.name.lower().endswith(SUFFIXES):
            raise ConfigError(
                f"{printable(entry.path)} lies beside the class folders: move it into one of them "
                "(python -m bn_jax.prepare imagenet --from reads ImageNet's flat val)"
            )
        else:
            others += 1
    return sorted(classes), others


def _listing(root: pathlib.Path, classes: list[str]) -> cache.Arrays:
    """Lists the pictures of a split; from the cache if no folder has changed.

    Returns names (uint8: all file names, one after another), ends (int64 [N]: where each name
    ends), labels (int32 [N]) and skipped (a number of files).
    """
    folders = [root / name for name in classes]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        changed = list(pool.map(_change_time, folders))
        kept = cache.path_for("folder", (str(root.resolve()), classes, changed))
        arrays = cache.load(kept, _is_whole)
        if arrays is not None:
            return arrays
        found = list(pool.map(_pictures, folders))

    names = [os.fsencode(name) for pictures, _, _ in found for name in pictures]
    labels = [label for label, (pictures, _, _) in enumerate(found) for _ in pictures]
    listing: cache.Arrays = {
        "names": np.frombuffer(b"".join(names), np.uint8),
        "ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "labels": np.array(labels, np.int32),
        "skipped": np.array(sum(skipped for _, skipped, _ in found)),
    }
    # Folders inside class folders may change without a trace in the class folder.
    is_flat = not any(nested for _, _, nested in found)
    is_settled = time.time() - max(changed) / 1e9 > _SETTLED
    if len(names) >= KEPT and is_flat and is_settled:
        cache.store(kept, **listing)
    return listing


def _is_whole(listing: cache.Arrays) -> bool:
    ends = listing["ends"]
    whole = len(ends) == len(listing["labels"]) and "skipped" in listing
    return whole and (not len(ends) or ends[-1] == len(listing["names"]))


def _change_time(folder: pathlib.Path) -> int:
    """Returns when a file in a folder was last made, renamed or removed, in nanoseconds.

    It is 0 if the folder does not exist, since val/ need not have all classes.
    """
    with reading(folder):
        try:
            return folder.stat().st_mtime_ns
        except FileNotFoundError:
            return 0


def _pictures(folder: pathlib.Path) -> tuple[list[str], int, bool]:
    """Lists the pictures in a class folder, and in the folders inside it.

    Returns their sorted paths relative to the folder, the number of files that were skipped, and
    whether there were folders inside.
    """
    pictures: list[str] = []
    skipped = 0
    nested = False
    folders = [""] if folder.exists() else []
    while folders:
        inside = folders.pop()
        for entry in _scan(folder / inside):
            name = f"{inside}{entry.name}"
            if is_hidden(entry.name):
                skipped += 1
            elif _is_folder(entry):
                folders.append(f"{name}/")
                nested = True
            elif entry.name.lower().endswith(SUFFIXES):
                pictures.append(name)
            else:
                skipped += 1
    return sorted(pictures), skipped, nested


def _scan(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    """Lists what is in a folder. Raises ConfigError if it cannot be read."""
    with reading(folder), os.scandir(folder) as entries:
        return list(entries)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether this is a folder.

    Raises ConfigError for a circular link, unless it is named like a picture: such a file is a bad
    record.
    """
    with reading(entry.path):
        try:
            return entry.is_dir()
        except OSError:
            if entry.name.lower().endswith(SUFFIXES):
                return False
            raise


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or was added to an archive by macOS."""
    return name.startswith(".") or name == "__MACOSX"


def _read(path: pathlib.Path) -> bytes:
    """Reads a file. Raises OSError if it cannot be read, or is a pipe or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a file")
        return file.read()
