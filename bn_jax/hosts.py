"""Bytes between the processes of one run: what only process 0 can read, everyone gets.

Used where a few bytes must be the same everywhere; the training step itself never comes here.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

_CHUNK = 1 << 26  # bytes per broadcast: bounds the extra device memory at restore to 64 MiB


def to_host(tree: list[jax.Array]) -> list[np.ndarray]:
    """Private host copies of whole arrays; collective where an array spans processes in shards."""
    for leaf in tree:
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            leaf.copy_to_host_async()
    return [_copy(leaf) for leaf in tree]


def _copy(leaf: jax.Array) -> np.ndarray:
    # On CPU np.asarray(jax.Array) is a view of a buffer that the next step may be given by
    # donation, so the copy is explicit.
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.array(leaf, copy=True)
    if leaf.is_fully_replicated:
        return np.array(leaf.addressable_data(0), copy=True)
    return np.array(multihost_utils.process_allgather(leaf, tiled=True), copy=True)


def broadcast(data: bytes | None) -> bytes:
    """`data` of process 0, on every process; collective, all processes must call it.

    Arrays go through it as raw bytes: a floating-point broadcast is a sum with zeros, which turns
    -0.0 into 0.0.
    """
    if jax.process_count() == 1:
        assert data is not None
        return data
    size = np.array([0 if data is None else len(data)], np.uint32)
    total = int(multihost_utils.broadcast_one_to_all(size)[0])
    parts = []
    for start in range(0, total, _CHUNK):
        stop = min(start + _CHUNK, total)
        if jax.process_index() == 0:
            part = np.frombuffer(data or b"", np.uint8, stop - start, start)
        else:
            part = np.zeros(stop - start, np.uint8)
        parts.append(np.asarray(multihost_utils.broadcast_one_to_all(part), np.uint8).tobytes())
    return b"".join(parts)
