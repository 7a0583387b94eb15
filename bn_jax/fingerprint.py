"""A digest of a data set, to know it again when a run goes on: its folder may have moved."""

import hashlib
from typing import Any

import numpy as np

from bn_jax.data import memory, sources

SAMPLES = 32  # records of each split that are read, where a set does not lie in memory


def digest(data: Any) -> str:
    """SHA-256, 16 hex digits, of both splits of a `data.pipeline.Data`: all of a set in memory,
    else its sizes and `SAMPLES` records of each split, evenly spread, with their labels."""
    found = hashlib.sha256(repr((data.num_train, data.num_eval, data.num_classes)).encode())
    for split in (data._train, data.held):
        if isinstance(split, memory.Random):
            found.update(repr(split.images.shape).encode())  # drawn from a fixed seed
        elif isinstance(split, sources.Arrays):
            for array in split.materialize():
                found.update(np.ascontiguousarray(array).data)
        else:
            for index in np.linspace(0, len(split) - 1, SAMPLES, dtype=np.int64):
                found.update(_record(split, int(index)))
    return found.hexdigest()[:16]


def _record(split: sources.Records, index: int) -> bytes:
    try:
        record = split[index]
        return str(record.label).encode() + record.data
    except sources.BadRecordError:
        return b"bad"  # training masks it, too
