"""Which example is seen when: pure functions of (seed, step), without any state to save.

Random numbers here are hashes of counters (splitmix64, Steele et al. 2014), not draws from a
generator, so that any step is reached directly, any number of hosts sees the same batches, and a
new NumPy cannot change an experiment.
"""

import functools

import numpy as np

MODES = ("none", "within_shard", "global")
VIRTUAL_SHARDS = 16  # a set stored in fewer files is cut into this many

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*words: int) -> int:
    """A 64-bit hash of integers, as the key of one stream: key(seed, purpose, epoch)."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _mix(state + np.uint64((word * _GOLDEN + _GOLDEN) & _WORD))
    return int(state[0])


def hashes(stream: int, count: int, start: int = 0) -> np.ndarray:
    """uint64 [count]: numbers `start`, `start + 1`, ... of a stream."""
    counter = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    return _mix(np.uint64(stream & _WORD) + counter * np.uint64(_GOLDEN))


def uniforms(seed: int, step: int, rows: slice, count: int) -> np.ndarray:
    """float64 [rows, count] in [0, 1): the draws of each example of one step.

    `rows` is the slice of the global batch that this process holds: a row's draws depend on its
    place in the global batch, never on the host that computes them.
    """
    n = rows.stop - rows.start
    bits = hashes(key(seed, 2, step), n * count, rows.start * count)
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(n, count)


def permutation(n: int, stream: int) -> np.ndarray:
    """int64 [n]: a permutation drawn from a stream."""
    return np.argsort(hashes(stream, n), kind="stable")


def shard_of(n: int, shards: int) -> np.ndarray:
    """int64 [n]: the shard of each position; shard sizes differ by at most one."""
    return np.arange(n, dtype=np.int64) * shards // n


@functools.lru_cache(maxsize=4)
def order(n: int, *, seed: int, epoch: int, mode: str, shards: int = VIRTUAL_SHARDS) -> np.ndarray:
    """int64 [n], read-only: the order of the n examples in one epoch.

    none          one permutation of the set, the same in every epoch: the same examples always
                  meet, but a set sorted by class never yields batches of one class.
    within_shard  that permutation cut into `shards`, and each shard shuffled anew in every epoch
                  (paper, 4.2.1: "prevents the same examples from always appearing in a mini-batch
                  together").
    global        a new permutation of the whole set in every epoch.

    Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"shuffle mode {mode!r} is unknown: choose one of {', '.join(MODES)}")
    if mode == "global":
        result = permutation(n, key(seed, 1, epoch))
    else:
        result = permutation(n, key(seed, 0))
        if mode == "within_shard":
            # Sorted by shard first (the high bits) and within it at random (the low 44 bits).
            shard = shard_of(n, min(shards, n)).astype(np.uint64)
            noise = hashes(key(seed, 1, epoch), n) >> np.uint64(20)
            result = result[np.argsort((shard << np.uint64(44)) | noise, kind="stable")]
    result.setflags(write=False)
    return result


def batch_indices(
    step: int, batch_size: int, rows: slice, *, n: int, seed: int, mode: str, shards: int
) -> np.ndarray:
    """int64 [rows]: the examples of one step. Batches never straddle epochs: the last n mod
    batch_size examples of an epoch's order are dropped."""
    epoch, place = divmod(step, n // batch_size)  # the place of the batch in its epoch
    first = place * batch_size
    epoch_order = order(n, seed=seed, epoch=epoch, mode=mode, shards=shards)
    return epoch_order[first + rows.start : first + rows.stop]


def co_occurrence(n: int, batch_size: int, *, seed: int, mode: str, shards: int) -> float:
    """The share of pairs that meet in a batch of epoch 0 and meet again in a batch of epoch 1.

    1 for `none`; about batch_size/shard size for `within_shard` and batch_size/n for `global`.
    """
    used = n // batch_size * batch_size  # the rest of an epoch is dropped
    batch_of = np.full((2, n), -1, np.int64)  # of each example, in both epochs
    for epoch in range(2):
        places = order(n, seed=seed, epoch=epoch, mode=mode, shards=shards)[:used]
        batch_of[epoch, places] = np.arange(used) // batch_size

    # Examples with the same pair of batches have met in both.
    both = batch_of[:, (batch_of >= 0).all(axis=0)]
    _, met = np.unique(both[0] * n + both[1], return_counts=True)
    pairs = used * (batch_size - 1) / 2
    return float((met * (met - 1) / 2).sum() / pairs) if pairs else 0.0
