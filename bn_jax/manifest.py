"""What a checkpoint step must contain, and how to tell that it no longer does.

Orbax restores flipped bits without a word, so every step directory carries `manifest.json`:

* `arrays`: for each leaf, by tree path, its shape, dtype and the BLAKE2b digest of its bytes in C
  order, taken from the host copy before anything is written;
* `files`: for each file of the step, its size and digest, taken after writing;
* `step`, `metric`, `meta`, and a digest of all the above. The file is canonical JSON: a manifest
  that differs in any byte from its own re-encoding is damaged.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

NAME = "manifest.json"
_DIGEST_BYTES = 20  # 160 bits: an accidental collision is out of the question


class DamagedError(Exception):
    """A step does not hold what was saved; the message says where."""


def digest(data: Any) -> str:
    """BLAKE2b of a bytes-like object, hexadecimal."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def array_entry(array: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and digest of one host array."""
    # ascontiguousarray makes a scalar one-dimensional; the bytes are the same.
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {"shape": list(array.shape), "dtype": array.dtype.name, "digest": digest(data)}


def file_entries(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every file below `directory` but the manifest, by relative path."""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory).as_posix()
        if path.is_dir() or relative == NAME:
            continue
        with path.open("rb") as file:
            value = hashlib.file_digest(
                file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)
            ).hexdigest()
        entries[relative] = {"size": path.stat().st_size, "digest": value}
    return entries


def canonical(value: Any) -> bytes:
    """The one JSON encoding of `value`: sorted keys, no spaces, a final newline.

    Raises:
      ValueError, TypeError: not plain JSON, or NaN or infinity in it.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode() + b"\n"


def seal(body: Mapping[str, Any]) -> bytes:
    """Canonical JSON of `body` with its own digest."""
    return canonical({"body": body, "digest": digest(canonical(body))})


def unseal(data: bytes, what: str) -> dict[str, Any]:
    """The body of sealed JSON.

    Raises:
      DamagedError: `data` is not exactly what `seal` wrote; `what` names it in the message.
    """
    try:
        value = json.loads(data)
        whole = value.keys() == {"body", "digest"} and canonical(value) == data
        if whole and digest(canonical(value["body"])) == value["digest"]:
            return value["body"]
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise DamagedError(f"{what} is damaged ({len(data)} bytes)")


def load(directory: pathlib.Path, step: int) -> dict[str, Any]:
    """The manifest of a step directory, checked against itself and the step's number.

    Raises:
      DamagedError: missing, altered, or of another step.
    """
    try:
        data = (directory / NAME).read_bytes()
    except OSError as error:
        raise DamagedError(f"{NAME} cannot be read: {error.strerror}") from error
    body = unseal(data, NAME)
    if body["step"] != step:
        raise DamagedError(f"the directory is named {step} but holds step {body['step']}")
    return body


def check_files(directory: pathlib.Path, body: Mapping[str, Any]) -> None:
    """Raises DamagedError unless the step's files are, byte for byte, those of the manifest."""
    try:
        found = file_entries(directory)
    except OSError as error:
        raise DamagedError(f"unreadable: {error}") from error
    for name, entry in body["files"].items():
        if name not in found:
            raise DamagedError(f"{name} is missing")
        if found[name]["size"] != entry["size"]:
            raise DamagedError(
                f"{name} has {found[name]['size']} bytes, {entry['size']} were written"
            )
        if found[name] != entry:
            raise DamagedError(f"{name} has changed: its digest differs")
    extra = found.keys() - body["files"].keys()
    if extra:
        raise DamagedError(f"{min(extra)} was not there when the step was saved")


def check_arrays(arrays: Mapping[str, np.ndarray], body: Mapping[str, Any]) -> None:
    """Raises DamagedError unless the restored arrays are, bit for bit, those that were saved."""
    for name, entry in body["arrays"].items():
        if name not in arrays:
            raise DamagedError(f"array {name} is missing")
        if array_entry(arrays[name]) != entry:
            raise DamagedError(f"array {name} differs from what was saved")
