"""TFRecord files by random access, without TensorFlow.

A file is a chain of records: uint64 length, uint32 masked CRC-32C of it, the data, uint32 masked
CRC-32C of the data, all little-endian (tensorflow/core/lib/io/record_writer.h). The chain is walked
once; the places of its records are kept in the cache directory, never beside the data.
"""

import hashlib
import mmap
import os
import pathlib
import struct
import tempfile

import numpy as np
from absl import logging

from bn_jax.data import crc32c
from bn_jax.errors import DataError

HEADER, FOOTER = 12, 4  # bytes around the data of a record


def cache_directory() -> pathlib.Path:
    """$BN_JAX_CACHE, or bn_jax in the user's cache directory."""
    if "BN_JAX_CACHE" in os.environ:
        return pathlib.Path(os.environ["BN_JAX_CACHE"])
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bn_jax"


def scan(path: pathlib.Path) -> np.ndarray:
    """int64 [n, 2]: place and length of the data of each record. Raises DataError if the chain is
    cut or a length is damaged."""
    size = path.stat().st_size
    if not size:
        return np.zeros((0, 2), np.int64)
    places: list[tuple[int, int]] = []
    headers, at = [], 0
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while at < size:
            length = struct.unpack_from("<Q", data, at)[0] if at + HEADER <= size else size
            if at + HEADER + length + FOOTER > size:
                raise DataError(
                    f"shard {path} is cut or damaged in record {len(places)} at byte {at} of "
                    f"{size}: fetch or write it again"
                )
            headers.append(data[at : at + HEADER])
            places.append((at + HEADER, length))
            at += HEADER + length + FOOTER
    stored = np.frombuffer(b"".join(headers), np.dtype([("length", "<u4", 2), ("crc", "<u4")]))
    wrong = np.flatnonzero(crc32c.masked_pairs(stored["length"]) != stored["crc"])
    if len(wrong):
        raise DataError(
            f"shard {path} is damaged: the length of record {wrong[0]} fails its checksum; fetch "
            "or write it again"
        )
    return np.array(places, np.int64)


def read(path: pathlib.Path, place: int, length: int) -> bytes:
    """The data of one record. Raises ValueError if it is cut or fails its checksum."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        block = os.pread(descriptor, length + FOOTER, place)
    finally:
        os.close(descriptor)
    if len(block) != length + FOOTER:
        raise ValueError("the record is cut")
    data = block[:length]
    if crc32c.masked(data) != struct.unpack_from("<I", block, length)[0]:
        raise ValueError("the record fails its checksum (CRC-32C)")
    return data


def write(path: pathlib.Path, records: list[bytes]) -> None:
    """Writes a file of these records (tests and small sets)."""
    with path.open("wb") as f:
        for data in records:
            length = struct.pack("<Q", len(data))
            f.write(length + struct.pack("<I", crc32c.masked(length)))
            f.write(data + struct.pack("<I", crc32c.masked(data)))


def index(paths: list[pathlib.Path]) -> list[np.ndarray]:
    """The scans of these files, from the cache if the files are as they were. Raises DataError."""
    if not paths:
        return []
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    name = hashlib.sha256(repr(stats).encode()).hexdigest()[:32]
    cached = cache_directory() / f"tfrecord-{name}.npz"
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            splits, places = arrays["splits"], arrays["places"]
        return np.split(places, splits)
    except (OSError, ValueError, KeyError, EOFError):
        pass  # absent or damaged: scan again
    scans = [scan(p) for p in paths]
    _store(cached, np.cumsum([len(s) for s in scans])[:-1], np.concatenate(scans))
    return scans


def _store(cached: pathlib.Path, splits: np.ndarray, places: np.ndarray) -> None:
    """Writes the index whole or not at all; without a writable cache the next start scans again."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False, suffix=".part") as f:
            np.savez(f, splits=splits, places=places)
        pathlib.Path(f.name).replace(cached)
    except OSError as e:
        logging.warning("the index of TFRecord files is not kept, %s: %s", cached, e)
