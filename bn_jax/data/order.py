"""Decides which example is seen when: pure functions of (seed, step), without state to save.

Random numbers here are hashes of counters (splitmix64, Steele et al. 2014), not draws from a
generator. So any step is reached directly, any number of hosts sees the same batches, and a new
version of NumPy cannot change an experiment.
"""

import functools

import numpy as np

MODES = ("none", "within_shard", "global")
VIRTUAL_SHARDS = 16  # a set that is stored in fewer files is cut into so many shards

# The step of splitmix64's counter: 2^64 divided by the golden ratio.
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1  # keeps the low 64 bits of a Python integer

# What a stream is used for: the second word of its key.
_FIXED_ORDER = 0
_EPOCH_ORDER = 1
_DRAWS = 2


# The constants of splitmix64's finalizer.
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """Applies the finalizer of splitmix64, a bijection of uint64."""
    x = x ^ (x >> np.uint64(30))
    x = x * _FIRST_FACTOR
    x = x ^ (x >> np.uint64(27))
    x = x * _SECOND_FACTOR
    return x ^ (x >> np.uint64(31))


def key(*words: int) -> int:
    """Hashes integers to 64 bits, the key of one stream: key(seed, purpose, epoch)."""
    state = np.zeros(1, np.uint64)
    for word in words:
        step = (word + 1) * _GOLDEN & _WORD
        state = _mix(state + np.uint64(step))
    return int(state[0])


def hashes(stream: int, count: int, start: int = 0) -> np.ndarray:
    """Returns the numbers `start`, `start + 1`, ... of a stream, uint64 [count]."""
    first = start + 1  # splitmix64 advances its counter before it draws
    counter = np.arange(first, first + count, dtype=np.uint64)

    start_state = np.uint64(stream & _WORD)
    state = start_state + counter * np.uint64(_GOLDEN)
    return _mix(state)


def uniforms(seed: int, step: int, rows: slice, count: int) -> np.ndarray:
    """Draws `count` numbers in [0, 1) for each example of one step, float64 [rows, count].

    `rows` is the slice of the global batch that this process holds. The draws of a row depend on
    its place in the global batch, not on the host that computes them.
    """
    examples = rows.stop - rows.start
    stream = key(seed, _DRAWS, step)
    bits = hashes(
        stream,
        count=examples * count,
        start=rows.start * count,
    )

    # A float64 has 53 significant bits.
    high_bits = bits >> np.uint64(11)
    fractions = high_bits * 2.0**-53
    return fractions.reshape(examples, count)


def permutation(n: int, stream: int) -> np.ndarray:
    """Returns a permutation of 0 to n - 1 that is drawn from a stream, int64 [n]."""
    ranks = hashes(stream, n)
    return np.argsort(ranks, kind="stable")


def shard_of(n: int, shards: int) -> np.ndarray:
    """Returns the shard of each position, int64 [n]; the sizes of shards differ by at most one."""
    position = np.arange(n, dtype=np.int64)
    return position * shards // n


@functools.lru_cache(maxsize=4)
def order(
    n: int,
    *,
    seed: int,
    epoch: int,
    mode: str,
    shards: int = VIRTUAL_SHARDS,
) -> np.ndarray:
    """Returns the order of the n examples in one epoch, int64 [n], read-only.

    none          is one permutation of the set, the same in every epoch: the same examples always
                  meet, but a set that is sorted by class does not give batches of one class.
    within_shard  cuts that permutation into `shards`, and shuffles each shard anew in every epoch
                  (paper, 4.2.1: "prevents the same examples from always appearing in a mini-batch
                  together").
    global        is a new permutation of the whole set in every epoch.

    Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"shuffle mode {mode!r} is unknown: choose one of {', '.join(MODES)}")

    of_epoch = key(seed, _EPOCH_ORDER, epoch)
    of_all_epochs = key(seed, _FIXED_ORDER)

    stream = of_epoch if mode == "global" else of_all_epochs
    result = permutation(n, stream)

    if mode == "within_shard":
        # Positions are sorted by numbers whose high bits are the shard, so that every position
        # stays in its shard, and whose low 44 bits are random.
        shards = min(shards, n)
        shard = shard_of(n, shards).astype(np.uint64)
        random = hashes(of_epoch, n)
        high_bits = shard << np.uint64(44)
        low_bits = random >> np.uint64(20)
        ranks = high_bits | low_bits
        result = result[np.argsort(ranks, kind="stable")]

    result.setflags(write=False)  # the cache gives the same array to every caller
    return result


def batch_indices(
    step: int,
    batch_size: int,
    rows: slice,
    *,
    n: int,
    seed: int,
    mode: str,
    shards: int,
) -> np.ndarray:
    """Returns the examples of one step that this process holds, int64 [rows].

    A batch never holds examples of two epochs: the last n mod batch_size examples of each epoch's
    order are dropped.
    """
    batches_per_epoch = n // batch_size
    epoch, batch = divmod(step, batches_per_epoch)
    examples = order(
        n,
        seed=seed,
        epoch=epoch,
        mode=mode,
        shards=shards,
    )

    # `rows` counts from the first example of the batch.
    first = batch * batch_size
    start = first + rows.start
    stop = first + rows.stop
    return examples[start:stop]


def co_occurrence(
    n: int,
    batch_size: int,
    *,
    seed: int,
    mode: str,
    shards: int,
) -> float:
    """Returns the share of the pairs in batches of epoch 0 that meet again in one of epoch 1.

    It is 1 for `none`, and about batch_size / shard size for `within_shard` and batch_size / n for
    `global`.
    """
    batches = n // batch_size
    used = batches * batch_size  # the rest of an epoch is dropped
    pairs = used * (batch_size - 1) / 2  # in the batches of one epoch
    if not pairs:
        return 0.0

    # The batch of each example in both epochs; -1 if the example was dropped.
    batch_of = np.full((2, n), -1, np.int64)
    for epoch in range(2):
        examples = order(
            n,
            seed=seed,
            epoch=epoch,
            mode=mode,
            shards=shards,
        )
        used_examples = examples[:used]
        batch_of[epoch, used_examples] = np.arange(used) // batch_size

    seen_twice = (batch_of >= 0).all(axis=0)
    first, second = batch_of[:, seen_twice]

    # Examples meet in both epochs if they have the same pair of batches.
    pair_of_batches = first * n + second
    _, together = np.unique(pair_of_batches, return_counts=True)
    meet_again = together * (together - 1) / 2
    return float(meet_again.sum() / pairs)
