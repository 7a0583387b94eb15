"""Batches computed ahead of the step by threads."""

import time
from collections.abc import Callable, Iterator

import numpy as np

Batch = dict[str, np.ndarray]


class Batches(Iterator[Batch]):
    """Batches of the given steps, computed by threads (grain). `waited`: seconds that next() has
    blocked; `alive`: seconds since the first batch was asked for, so waited/alive is the share
    spent waiting."""

    def __init__(self, steps: range, batch: Callable[[int], Batch], *, threads: int, ahead: int):
        import grain  # takes a second to import

        dataset = grain.MapDataset.range(steps.start, steps.stop).map(batch)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        self._batches = iter(dataset.to_iter_dataset(options))
        self._count, self._began = len(steps), 0.0
        self.waited = 0.0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        now = time.perf_counter()
        self._began = self._began or now
        try:
            return next(self._batches)
        finally:
            self.waited += time.perf_counter() - now

    @property
    def alive(self) -> float:
        """Seconds since the first batch was asked for."""
        return time.perf_counter() - self._began if self._began else 0.0
