"""Moving average or population statistics?

Accuracy is measured with both during training, and at the end for several numbers of examples from
which the population's statistics are computed.
"""

import pathlib
from typing import Any

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from bn_jax.experiment.build import Experiment
from bn_jax.experiment.evaluator import Evaluator, mini_batch, running_gap
from bn_jax.figures.plotting import BLUE, ORANGE, subplots
from bn_jax.step import TrainState
from bn_jax.studies.frame import (
    Part,
    Results,
    Study,
    Table,
    kept_evenly,
    measurements,
    percent,
    states,
)
from bn_jax.uncertainty import difference, single, written

EXAMPLES = (100, 300, 1000, 3000, 10_000)


def parts(config: ConfigDict) -> list[Part]:
    """Makes the only part, a network with BN."""
    return [Part("bn", ("norm=batch_norm",))]


def mini_batches(examples: int, size: int) -> int:
    """Returns how many mini-batches of `size` come closest to so many examples, at least one."""
    return max(1, round(examples / size))


def from_examples(exp: Experiment, state: TrainState, number: int) -> Any:
    """Computes population statistics (Algorithm 2) from the first `number` mini-batches."""
    config = exp.config.copy_and_resolve_references()
    config.statistics_batches = number
    evaluator = Evaluator(exp._replace(config=config))
    return evaluator.population(state.params, state.batch_stats)


def measure(exp: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures accuracies (shares) of every kept checkpoint, and of the last one by EXAMPLES."""
    evaluator = Evaluator(exp)
    kept = []
    for number, state in states(exp, workdir):
        if not number:
            continue  # there is no moving average yet
        moving = state.batch_stats
        population = evaluator.population(state.params, moving)
        kept.append(
            {
                "step": number,
                "moving": evaluator.scores(state.params, moving)["top1"],
                "population": evaluator.scores(state.params, population)["top1"],
                "gap": running_gap(moving, population, exp.config.bn.epsilon),
            }
        )

    size = mini_batch(exp.config)
    sizes = []
    for examples in EXAMPLES:
        count = mini_batches(examples, size)
        population = from_examples(exp, state, count)
        scores = evaluator.scores(state.params, population)
        sizes.append({"examples": count * size, "top1": scores["top1"]})
    return {"steps": kept, "sizes": sizes}


def _at(results: Results, key: str, place: int, name: str) -> dict[int, float]:
    """Returns {seed: value} of one measured number."""
    found = {}
    for seed, measured in measurements(results["bn"]).items():
        found[seed] = float(measured[key][place][name])
    return found


def _numbers(results: Results, key: str, name: str) -> list[int]:
    """Lists the steps, or the numbers of examples, that were measured."""
    measured = list(measurements(results["bn"]).values())
    if not measured:
        return []
    return [one[name] for one in measured[0][key]]


def table(results: Results) -> Table:
    """Makes a table with a row for every kept step, then for every number of examples."""
    rows = []
    for k, number in enumerate(_numbers(results, "steps", "step")):
        moving = _at(results, "steps", k, "moving")
        population = _at(results, "steps", k, "population")
        gain = difference(population, moving)
        gap = single(list(_at(results, "steps", k, "gap").values()))
        rows.append(
            [
                f"step {number:,}",
                percent(moving),
                percent(population),
                written(gain, ".2f", factor=100, sign=True),
                written(gap, ".2f"),
            ]
        )

    for k, examples in enumerate(_numbers(results, "sizes", "examples")):
        shares = _at(results, "sizes", k, "top1")
        rows.append([f"the end, from {examples:,} examples", "-", percent(shares), "-", "-"])
    head = ["when", "moving average", "population", "difference, points", "gap"]
    legend = (
        "Accuracy of one network with either kind of statistics. Gap: the largest distance between "
        "the means of the two, in standard deviations of the population."
    )
    return Table(head, rows, legend)


def draw(results: Results) -> Figure:
    """Draws accuracy during training with both, and the error at the end by examples."""
    figure, (left, right) = subplots(1, 2, figsize=(10.4, 4))
    for seed, measured in measurements(results["bn"]).items():
        kept = measured["steps"]
        numbers = [one["step"] for one in kept]
        moving = [100 * one["moving"] for one in kept]
        population = [100 * one["population"] for one in kept]
        labels = (None, None) if seed else ("moving average", "population")
        left.plot(numbers, moving, "s--", color=ORANGE, label=labels[0])
        left.plot(numbers, population, "o-", color=BLUE, label=labels[1])

        examples = [one["examples"] for one in measured["sizes"]]
        errors = [100 * (1 - one["top1"]) for one in measured["sizes"]]
        right.plot(examples, errors, "o-", color=BLUE)
        right.axhline(100 - moving[-1], color=ORANGE, linestyle="--")

    left.set_xlabel("step")
    left.set_ylabel("accuracy (%)")
    left.legend(fontsize=8)
    right.set_xscale("log")
    right.set_xlabel("training examples for the population's statistics")
    right.set_ylabel("error at the end (%); dashed: moving average")
    right.set_ylim(bottom=0)
    return figure


STUDY = Study(
    name="population",
    question="Moving average or population statistics?",
    follows="Wu & Johnson 2021 (arXiv:2105.07576); Algorithm 2",
    minutes="2",
    config="bn_x30:digits",
    sizes={
        "mlp": (*kept_evenly(total=3000, every=250), "steps_per_dispatch=50"),
        "inception": kept_evenly(total=500, every=50),
    },
    parts=parts,
    table=table,
    draw=draw,
    measure=measure,
)
