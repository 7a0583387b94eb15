"""Exact evaluation, with population statistics: `python -m bn_jax.evaluate --workdir=DIR`.

Every example of the split counts once, whatever the batch size and the number of devices: batches
are padded and masked, sums are added up, and the number of examples is asserted.
"""

import argparse
import functools
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

from bn_jax import command, experiment, layers, step
from bn_jax import mesh as meshes
from bn_jax.errors import DataError
from bn_jax.experiment import Experiment


class Evaluator:
    """Scores states of one experiment; its programs are compiled by `compile` or when needed."""

    def __init__(self, exp: Experiment):
        self.exp = exp
        self._eval_batch: Any = None
        self._merge_batch: Any = None

    def compile(self) -> None:
        """Compiles what `scores` and `population` run; may be called from another thread."""
        exp, model = self.exp, self.exp.model
        everywhere = meshes.replicated(exp.mesh)
        state = experiment.abstract_state(exp)
        variables = (state.params, state.batch_stats)
        score = jax.jit(functools.partial(step.eval_step, model=model), out_shardings=everywhere)
        batch = experiment.abstract_batch(exp, self._eval_size())
        self._eval_batch = score.lower(*variables, batch).compile()
        if not state.batch_stats:
            return

        def merge_batch(params, batch_stats, total, batch):
            _, updates = model.apply(
                {"params": params, "batch_stats": layers.fresh_stats(batch_stats)},
                batch["image"],
                train=True,
                mask=batch["mask"],
                rngs={"dropout": step.dropout_key(exp.config.seed, 0)},
                mutable=["batch_stats"],
            )
            return layers.merge_stats(total, updates["batch_stats"])

        merge = jax.jit(merge_batch, out_shardings=everywhere)
        batch = experiment.abstract_batch(exp, exp.config.batch_size)
        self._merge_batch = merge.lower(*variables, state.batch_stats, batch).compile()

    def _eval_size(self) -> int:
        """Examples of an evaluation batch: a multiple of the devices."""
        devices = self.exp.mesh.size
        return math.ceil(self.exp.config.eval_batch_size / devices) * devices

    def population(self, params: Any, batch_stats: Any) -> Any:
        """Population statistics of the training-mode network (Algorithm 2, lines 9 to 11).

        From the same `statistics_batches` fixed training batches at every call, one streamed pass.
        Without BN there is nothing to estimate and `batch_stats` comes back as it is.

        Differs from the paper: used for every evaluation, those during training included, where the
        paper follows accuracy with moving averages (section 3.1).
        """
        if not batch_stats:
            return batch_stats
        if self._merge_batch is None:
            self.compile()
        config, mesh = self.exp.config, self.exp.mesh
        n, size = config.statistics_batches, config.batch_size
        rows = meshes.rows(mesh, size)
        total = meshes.put_replicated(mesh, jax.device_get(layers.fresh_stats(batch_stats)))
        for batch in self.exp.data.statistics(n, size, rows, seed=config.seed):
            fed = meshes.put_batch(mesh, batch, size)
            total = self._merge_batch(params, batch_stats, total, fed)
        return total

    def scores(self, params: Any, batch_stats: Any) -> dict[str, Any]:
        """Accuracy over the whole evaluation split with the given statistics.

        Returns `top1`, `top5` (shares), `cross_entropy` (nats, mean), `examples`. Raises DataError
        if not every example was counted exactly once.
        """
        if self._eval_batch is None:
            self.compile()
        mesh, data, size = self.exp.mesh, self.exp.data, self._eval_size()
        sums = []
        for batch in data.evaluation(size, meshes.rows(mesh, size)):
            sums.append(self._eval_batch(params, batch_stats, meshes.put_batch(mesh, batch, size)))
        total = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
        examples = int(total.pop("examples"))
        if examples != data.num_eval:
            raise DataError(f"evaluated {examples} examples, but the split holds {data.num_eval}")
        return {name: value / examples for name, value in total.items()} | {"examples": examples}


def running_gap(running: Any, population: Any) -> float:
    """Largest distance of a running mean from its population mean, in population std deviations.

    It says how far the moving average lags behind. Trees of batch_stats; NaN without BN.
    """
    gaps = []

    def visit(a, b):
        if "mean" in a:
            std = np.sqrt(np.maximum(b["var"], 1e-12))  # a dead channel has no variance
            gaps.append(float(np.max(np.abs(a["mean"] - b["mean"]) / std)))
            return
        for name in a:
            visit(a[name], b[name])

    visit(*jax.device_get((running, population)))
    return max(gaps, default=math.nan)


def sentence(exp: Experiment, scores: dict[str, Any]) -> str:
    """Accuracy with the count it rests on and its standard error, in words."""
    n, top1 = scores["examples"], scores["top1"]
    error = 100 * math.sqrt(top1 * (1 - top1) / n)
    return (
        f"{exp.data.split} accuracy {100 * top1:.2f}% +- {error:.2f} "
        f"({round(top1 * n):,} of {n:,} examples), top-5 {100 * scores['top5']:.2f}%"
    )


def main() -> None:
    """Scores the newest checkpoint of a run, or the one of a given step."""
    parser = argparse.ArgumentParser("python -m bn_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="a trained run")
    parser.add_argument("--step", type=int, help="checkpoint to score (the newest)")
    parser.add_argument(
        "--statistics",
        choices=("population", "running"),
        default="population",
        help="statistics of BN: Algorithm 2 over fixed training batches, or the moving average",
    )
    args = parser.parse_args()
    meshes.use_compilation_cache()
    exp = experiment.from_workdir(args.workdir)
    found_step, state = experiment.restore(exp, args.workdir, args.step)
    evaluator = Evaluator(exp)
    batch_stats = state.batch_stats
    if args.statistics == "population":
        batch_stats = evaluator.population(state.params, batch_stats)
    scores = evaluator.scores(state.params, batch_stats)
    print(f"{args.workdir}, step {found_step:,}, {args.statistics} statistics")
    print(f"{sentence(exp, scores)}; {exp.data.description}")
    print(json.dumps({"step": found_step, "statistics": args.statistics, **scores}))


if __name__ == "__main__":
    command.run(main)
