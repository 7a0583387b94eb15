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
    return Evaluator(exp._replace(config=config)).population(state.params, state.batch_stats)


def measure(exp: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures accuracies (shares) of every kept checkpoint, and of the last one by EXAMPLES."""
    evaluator = Evaluator(exp)
    kept = []
    for number, state in states(exp, workdir):
        if not number:
            continue  # there is no moving average yet
        population = evaluator.population(state.params, state.batch_stats)
        kept.append(
            {
                "step": number,
                "moving": evaluator.scores(state.params, state.batch_stats)["top1"],
                "population": evaluator.scores(state.params, population)["top1"],
                "gap": running_gap(state.batch_stats, population, exp.config.bn.epsilon),
            }
        )

    sizes = []
    for examples in EXAMPLES:
        count = mini_batches(examples, mini_batch(exp.config))
        scores = evaluator.scores(state.params, from_examples(exp, state, count))
        sizes.append({"examples": count * mini_batch(exp.config), "top1": scores["top1"]})
    return {"steps": kept, "sizes": sizes}


def _at(results: Results, key: str, place: int, name: str) -> dict[int, float]:
    """Returns {seed: value} of one measured number."""
    found = measurements(results["bn"])
    return {seed: float(m[key][place][name]) for seed, m in found.items()}


def _numbers(results: Results, key: str, name: str) -> list[int]:
    """Lists the steps, or the numbers of examples, that were measured."""
    first = next(iter(measurements(results["bn"]).values()), {key: ()})
    return [one[name] for one in first[key]]


def table(results: Results) -> Table:
    """Makes a table with a row for every kept step, then for every number of examples."""
    rows = []
    for k, number in enumerate(_numbers(results, "steps", "step")):
        moving = _at(results, "steps", k, "moving")
        population = _at(results, "steps", k, "population")
        gain = difference(population, moving)
        gap = single(list(_at(results, "steps", k, "gap").values()))
        cells = [percent(moving), percent(population)]
        cells += [written(gain, ".2f", factor=100, sign=True), written(gap, ".2f")]
        rows.append([f"step {number:,}", *cells])
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
        for name, colour, style in (("moving", ORANGE, "s--"), ("population", BLUE, "o-")):
            shares = [100 * one[name] for one in kept]
            label = {"moving": "moving average", "population": "population"}[name]
            left.plot(numbers, shares, style, color=colour, label=None if seed else label)
        sizes = measured["sizes"]
        errors = [100 * (1 - one["top1"]) for one in sizes]
        right.plot([one["examples"] for one in sizes], errors, "o-", color=BLUE)
        moving = 100 * (1 - kept[-1]["moving"])
        right.axhline(moving, color=ORANGE, linestyle="--")
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
