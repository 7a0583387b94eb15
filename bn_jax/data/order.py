"""Which example is seen when: pure functions of (seed, step), without any state to save.

Random numbers here are hashes of counters (splitmix64, Steele et al. 2014), not draws from a
generator, so that any step is reached directly, any number of hosts sees the same batches, and a
new NumPy cannot change an experiment.
"""

import functools

import numpy as np

MODES = ("none", "within_shard", "global")
VIRTUAL_SHARDS = 16  # a set stored in fewer files is cut into this many

# Of splitmix64: the step of its counter, 2^64 divided by the golden ratio.
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1  # keeps the low 64 bits of a Python integer

# What a stream is used for: the second word of its key.
_FIXED_ORDER = 0
_EPOCH_ORDER = 1
_DRAWS = 2


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, a bijection of uint64."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*words: int) -> int:
    """A 64-bit hash of integers, as the key of one stream: key(seed, purpose, epoch)."""
    state = np.zeros(1, np.uint64)
    for word in words:
        step = (word + 1) * _GOLDEN & _WORD
        state = _mix(state + np.uint64(step))
    return int(state[0])


def hashes(stream: int, count: int, start: int = 0) -> np.ndarray:
    """uint64 [count]: numbers `start`, `start + 1`, ... of a stream."""
    first = start + 1  # as splitmix64, which advances before it draws
    counter = np.arange(first, first + count, dtype=np.uint64)
    state = np.uint64(stream & _WORD) + counter * np.uint64(_GOLDEN)
    return _mix(state)


def uniforms(seed: int, step: int, rows: slice, count: int) -> np.ndarray:
    """float64 [rows, count] in [0, 1): the draws of each example of one step.

    `rows` is the slice of the global batch that this process holds: a row's draws depend on its
    place in the global batch, never on the host that computes them.
    """
    examples = rows.stop - rows.start
    stream = key(seed, _DRAWS, step)
    bits = hashes(stream, examples * count, start=rows.start * count)

    # A float64 has 53 significant bits.
    fractions = (bits >> np.uint64(11)) * 2.0**-53
    return fractions.reshape(examples, count)


def permutation(n: int, stream: int) -> np.ndarray:
    """int64 [n]: a permutation drawn from a stream."""
    ranks = hashes(stream, n)
    return np.argsort(ranks, kind="stable")


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
        result = permutation(n, key(seed, _EPOCH_ORDER, epoch))
    else:
        result = permutation(n, key(seed, _FIXED_ORDER))
    if mode == "within_shard":
        # The high bits sort by shard, the low 44 bits shuffle within it.
        shard = shard_of(n, min(shards, n)).astype(np.uint64)
        noise = hashes(key(seed, _EPOCH_ORDER, epoch), n) >> np.uint64(20)
        ranks = (shard << np.uint64(44)) | noise
        result = result[np.argsort(ranks, kind="stable")]

    result.setflags(write=False)  # the cache gives the same array to every caller
    return result


def batch_indices(
    step: int, batch_size: int, rows: slice, *, n: int, seed: int, mode: str, shards: int
) -> np.ndarray:
    """int64 [rows]: the examples of one step.

    Batches never straddle epochs: the last n mod batch_size examples of an epoch's order are
    dropped.
    """
    batches = n // batch_size  # of one epoch
    epoch, batch = divmod(step, batches)
    epoch_order = order(n, seed=seed, epoch=epoch, mode=mode, shards=shards)

    first = batch * batch_size
    return epoch_order[first + rows.start : first + rows.stop]


def co_occurrence(n: int, batch_size: int, *, seed: int, mode: str, shards: int) -> float:
    """The share of pairs that meet in a batch of epoch 0 and meet again in a batch of epoch 1.

    1 for `none`; about batch_size/shard size for `within_shard` and batch_size/n for `global`.
    """
    used = n // batch_size * batch_size  # the rest of an epoch is dropped
    pairs = used * (batch_size - 1) / 2  # that meet in a batch of one epoch
    if not pairs:
        return 0.0

    batch_of = np.full((2, n), -1, np.int64)  # the batch of each example, in both epochs
    for epoch in range(2):
        places = order(n, seed=seed, epoch=epoch, mode=mode, shards=shards)
        batch_of[epoch, places[:used]] = np.arange(used) // batch_size

    # Examples with the same pair of batches meet in both epochs.
    seen_twice = (batch_of >= 0).all(axis=0)
    first, second = batch_of[:, seen_twice]
    _, together = np.unique(first * n + second, return_counts=True)
    meet_again = (together * (together - 1) / 2).sum()
    return float(meet_again / pairs)
