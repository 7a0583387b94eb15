"""Scores one network during training, exactly and with population statistics.

Every example of the split counts once, for any batch size and number of devices: batches are padded
and masked, sums are added up, and the number of examples is checked.
"""

import concurrent.futures
import contextvars
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from bn_jax import layers, step
from bn_jax.distributed.mesh import put_batch, put_replicated, replicated, rounded_up, rows
from bn_jax.errors import DataError
from bn_jax.experiment import build, programs
from bn_jax.experiment.build import Experiment
from bn_jax.uncertainty import counted


class Evaluator:
    """Scores states of one experiment; its programs are compiled when needed, or by `begin`."""

    def __init__(self, exp: Experiment):
        self.exp = exp
        self._eval_batch: Any = None
        self._merge_batch: Any = None
        self._begun: concurrent.futures.Future | None = None
        self._cancelled = False

    def begin(self) -> None:
        """Compiles in another thread, beside the first steps; `check` raises its error, if any."""
        if jax.default_backend() == "gpu":  # XLA times kernels there, which steps would disturb
            self.compile()
            return

        with_context = contextvars.copy_context().run  # keeps what `ops.plain` has set
        threads = concurrent.futures.ThreadPoolExecutor(1)
        self._begun = threads.submit(with_context, self.compile)
        threads.shutdown(wait=False)

    def cancel(self) -> None:
        """Prevents that further programs are begun; one that is being compiled is finished."""
        self._cancelled = True

    def check(self, *, wait: bool = False) -> None:
        """Raises the error of what `begin` started, if that has ended; `wait` waits for the end."""
        if self._begun is not None and (wait or self._begun.done()):
            begun = self._begun
            self._begun = None
            begun.result()

    def compile(self) -> None:
        """Compiles what `scores` and `population` run."""
        exp = self.exp
        model = self.exp.model
        config = exp.config.to_dict()
        state = build.abstract_state(exp)
        variables = (state.params, state.batch_stats)
        jit = functools.partial(jax.jit, out_shardings=replicated(exp.mesh))

        score = functools.partial(step.eval_step, model=model)
        batch = build.abstract_batch(exp, self._eval_size(), train=False)
        arguments: tuple[Any, ...] = (*variables, batch)
        self._eval_batch = programs.compiled("evaluate", score, arguments, config, jit=jit)
        if not state.batch_stats or self._cancelled:
            return

        together = self._together()
        merge = functools.partial(step.statistics_step, model=model, mini_batches=together)
        size = together * mini_batch(exp.config)
        batch = build.abstract_batch(exp, size, train=True)
        if size % exp.mesh.size:
            everywhere = replicated(exp.mesh)
            batch = jax.tree.map(lambda leaf: leaf.update(sharding=everywhere), batch)
        total = state.batch_stats
        arguments = (*variables, total, batch, self._seed())
        self._merge_batch = programs.compiled(
            "population",
            merge,
            arguments,
            config,
            jit=jit,
            made_from=[together],
        )

    def _seed(self) -> Any:
        """Returns the run's seed on the devices, so that all seeds share the programs."""
        return put_replicated(self.exp.mesh, np.uint32(self.exp.config.seed))

    def _eval_size(self) -> int:
        """Returns the examples in an evaluation batch, a multiple of the number of devices."""
        return rounded_up(self.exp.mesh, self.exp.config.eval_batch_size)

    def _together(self) -> int:
        """Returns how many mini-batches are run at once, so that each device has its own."""
        return mini_batches_at_once(self.exp.config, self.exp.mesh.size)

    def population(self, params: Any, batch_stats: Any) -> Any:
        """Computes the training-mode network's population statistics (Algorithm 2, lines 9 to 11).

        Every call makes one pass over the same `statistics_batches` mini-batches. A mini-batch is
        one group of BN, so the statistics do not depend on the size of the training batch. Without
        BN there is nothing to estimate, and `batch_stats` is returned unchanged.

        Differs from the paper: population statistics are used for every evaluation, also during
        training, when the paper uses moving averages (section 3.1).
        """
        if not batch_stats:
            return batch_stats
        self.check(wait=True)
        if self._merge_batch is None:
            self.compile()

        config = self.exp.config
        mesh = self.exp.mesh
        together = self._together()
        size = together * mini_batch(config)
        cut = size % mesh.size == 0  # otherwise each device has the whole batch
        own = rows(mesh, size) if cut else slice(0, size)
        batches = self.exp.data.statistics(
            config.statistics_batches,
            mini_batch(config),
            own,
            config.seed,
            together,
        )

        fresh = layers.fresh_stats(batch_stats)
        total = put_replicated(mesh, jax.device_get(fresh))
        seed = self._seed()
        for batch in batches:
            fed = put_batch(mesh, batch, size) if cut else put_replicated(mesh, batch)
            total = self._merge_batch(params, batch_stats, total, fed, seed)
        return total

    def scores(self, params: Any, batch_stats: Any, data: Any = None) -> dict[str, Any]:
        """Scores the whole evaluation split with the given statistics.

        data: another set than the experiment's, with images of the same shape.

        Returns `top1`, `top5` (shares), `cross_entropy` (nats, mean), `examples`. Raises DataError
        if not every example was counted exactly once.
        """
        self.check(wait=True)
        if self._eval_batch is None:
            self.compile()

        mesh = self.exp.mesh
        data = self.exp.data if data is None else data
        size = self._eval_size()
        sums = []
        for batch in data.evaluation(size, rows(mesh, size)):
            fed = put_batch(mesh, batch, size)
            sums.append(self._eval_batch(params, batch_stats, fed))

        total = {name: sum(float(batch[name]) for batch in sums) for name in sums[0]}
        examples = int(total.pop("examples"))
        if examples != data.num_eval:
            raise DataError(f"evaluated {examples} examples, but the split holds {data.num_eval}")

        found: dict[str, Any] = {name: value / examples for name, value in total.items()}
        found["examples"] = examples
        return found


def mini_batches_at_once(config: Mapping[str, Any] | ConfigDict, devices: int) -> int:
    """Returns how many of the `statistics_batches` one program takes, each a group of BN."""
    if config["bn"]["group_size"] is None:  # then all of a batch is one group
        return 1
    return math.gcd(config["statistics_batches"], devices)


def mini_batch(config: Mapping[str, Any] | ConfigDict) -> int:
    """Returns the number of examples that BN normalizes together: a group, or the whole batch."""
    group = config["bn"]["group_size"]
    if group is None:
        return config["batch_size"]
    return group


def sentence(split: str, scores: dict[str, Any]) -> str:
    """Says the accuracy on a split, with its count and the count's 95% interval."""
    n = scores["examples"]
    top1 = scores["top1"]
    return (
        f"{split} accuracy {counted(top1, n)}, {round(top1 * n):,} of {n:,} examples; "
        f"top-5 {100 * scores['top5']:.2f}%"
    )


def running_gap(running: Any, exact: Any, epsilon: float) -> float:
    """Returns the largest distance between a running mean and its population mean.

    Its unit is the deviation that BN divides by, sqrt(var + epsilon) of the population. It says how
    far the moving average lags behind. running, exact: trees of batch_stats. It is NaN without BN.
    """
    running = traverse_util.flatten_dict(jax.device_get(running))
    exact = traverse_util.flatten_dict(jax.device_get(exact))
    gaps = []
    for *layer, name in exact:
        if name != "mean":
            continue
        mean = exact[*layer, "mean"]
        deviation = np.sqrt(exact[*layer, "var"] + epsilon)
        distance = np.abs(running[*layer, "mean"] - mean)
        gaps.append(float(np.max(distance / deviation)))
    return max(gaps, default=math.nan)
