"""Writes files such that after a kill they are old or new, and lines of JSON that survive a kill.

Errors of the disk become one line. Nothing here depends on experiments.
"""

import contextlib
import datetime
import errno
import json
import math
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bn_jax.errors import ConfigError, DiskError

# What a full, read-only, removed or failing disk raises. Any other error (such as a directory where
# a file should be) is a mistake of the program and keeps its traceback.
_DISK_ERRNO = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
        errno.EACCES,
        errno.EPERM,
        errno.ESTALE,
        errno.EFBIG,
        errno.ENOENT,
    )
)


@contextlib.contextmanager
def reported(path: pathlib.Path, doing: str) -> Iterator[None]:
    """Turns an OSError of the disk under `path` into a DiskError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRNO:
            raise

        remedy = f"{free_text(path)}. Free space or make the directory writable"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "make the directory writable for this user"
        raise DiskError(
            f"{doing} {path}: {error.strerror or error}; {remedy}, then run the same command again."
        ) from error


@contextlib.contextmanager
def readable(path: pathlib.Path) -> Iterator[None]:
    """Turns an OSError on reading `path` into a ConfigError of one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}; make it readable for this user, or "
            "give another folder"
        ) from error


# Whole files


def write_atomic(path: pathlib.Path, data: bytes) -> None:
    """Replaces the content of `path`; after a kill or power loss it is the old or the new one.

    Raises:
      DiskError: the disk is full or cannot be written; `path` is unchanged.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with reported(path, "cannot write"):
        try:
            with scratch.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise

        sync_directory(path.parent)


def is_scratch(path: pathlib.Path) -> bool:
    """Whether a call of `write_atomic` made this file, and not only one with a name like that."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None


def remove_scratch(directory: pathlib.Path) -> None:
    """Removes what killed calls of `write_atomic` have left in `directory`."""
    for path in directory.glob(".*.tmp"):
        if is_scratch(path):
            with contextlib.suppress(OSError):
                path.unlink()


def sync_directory(path: pathlib.Path) -> None:
    """Makes renames inside `path` survive a power loss, if the file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Space


def existing_parent(path: pathlib.Path) -> pathlib.Path:
    """Returns `path` or its nearest ancestor that exists, as far as this user may see."""
    path = path.absolute()
    while not os.access(path, os.F_OK) and path != path.parent:
        path = path.parent
    return path


def require_free(path: pathlib.Path, needed: int) -> None:
    """Raises DiskError unless `needed` bytes are free on the disk that holds `path`."""
    free = shutil.disk_usage(existing_parent(path)).free
    if free < needed:
        raise DiskError(
            f"{path}: {free / 1e6:.1f} MB free on this disk, {needed / 1e6:.1f} MB needed for the "
            "next checkpoint. Free space (or lower keep_last), then run the same command again."
        )


def free_text(path: pathlib.Path) -> str:
    """Says for messages how much is free on the disk that holds `path`."""
    try:
        return f"{shutil.disk_usage(existing_parent(path)).free / 1e6:.1f} MB free"
    except OSError:
        return "free space unknown"


# Lines of JSON


def truncate(path: pathlib.Path, last: int | None) -> list[str]:
    """Drops damaged lines and, given `last`, lines of later steps; returns messages for the user.

    Each line is a JSON object with a `step`.
    """
    if not path.exists():
        return []

    data = path.read_bytes()
    kept = []
    damaged = 0
    for line in data.splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
            whole = line.endswith(b"\n")
        except (ValueError, TypeError, KeyError):
            whole = False

        if not whole:
            damaged += 1
        elif last is None or step <= last:
            kept.append(line)

    if b"".join(kept) != data:
        write_atomic(path, b"".join(kept))
    return [f"{path}: dropped {damaged} damaged line(s)"] if damaged else []


class Lines:
    """A file of JSON objects, one in each line, to which lines are appended.

    Args:
      path: is made if it is absent.
      seconds: the least time between two writes; meanwhile lines are kept in memory. With 0 every
        line is written at once.
    """

    def __init__(self, path: pathlib.Path, seconds: float):
        self._file = path.open("a", encoding="utf-8")
        self._seconds = seconds
        self._kept: list[str] = []
        self._written = -math.inf  # time.monotonic() of the last write

    def append(self, line: Mapping[str, Any]) -> None:
        """Appends a line, and writes it if that is due. Raises OSError if the disk fails."""
        self._kept.append(json.dumps(line, allow_nan=False) + "\n")
        if time.monotonic() - self._written >= self._seconds:
            self._write()

    def _write(self) -> None:
        text = "".join(self._kept)
        self._kept = []  # the file object has them now, and tries again if the disk is full
        self._file.write(text)
        self._file.flush()
        self._written = time.monotonic()

    def sync(self) -> None:
        """Writes all lines to the disk itself. Raises OSError if that fails."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes the kept lines, and closes the file."""
        self._write()
        self._file.close()


def plain(value: Any) -> Any:
    """Converts `value` to strict JSON: arrays become lists, NaN and infinity become strings.

    A float is read back as the same float; a float32 becomes the float64 of equal value.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if not isinstance(value, float):
        return plain(np.asarray(value).tolist())
    return value if math.isfinite(value) else str(value)


# Words for the user and the records


def now() -> str:
    """Returns the time in UTC: '2026-11-27T19:05:04.123456+00:00'. Such texts sort by time."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def warn(line: str) -> None:
    """Prints one line for the user on stderr."""
    print(f"bn_jax: {line}", file=sys.stderr, flush=True)
