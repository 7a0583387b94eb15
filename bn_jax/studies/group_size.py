"""How many examples should normalize together? One batch is cut into groups of several sizes.

In training a network uses the statistics of its groups, afterwards those of the population. The
smaller the groups, the more the two differ. Their noise regularizes, but it costs accuracy when the
population's statistics replace them.
"""

import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from bn_jax.experiment.build import Experiment, restore
from bn_jax.experiment.evaluator import Evaluator
from bn_jax.figures.plotting import BLUE, GREY, ORANGE, subplots
from bn_jax.step import TrainState, label_rank
from bn_jax.studies.frame import Part, Results, Study, Table, divergences, measurements, percent

EXAMPLES = 2048  # of training: for population statistics and for accuracy, at every size of group

# {what is measured, in the words of the table: how it is drawn}. Marks differ as well as colours.
CURVES = {
    "training, own group": (GREY, "s:"),
    "evaluation, own group": (ORANGE, "^--"),
    "evaluation, population": (BLUE, "o-"),
}


def parts(config: ConfigDict) -> list[Part]:
    """Makes a part for groups of 2, 4, 8, ... examples, up to the whole batch."""
    found = []
    size = 2
    while config.batch_size % size == 0:
        found.append(Part(f"group_size={size}", _settings(config, size)))
        size *= 2
    return found


def _settings(config: ConfigDict, size: int) -> tuple[str, ...]:
    return (
        "norm=batch_norm",
        f"bn.group_size={size}",
        f"statistics_batches={max(1, EXAMPLES // size)}",
        "record.activations=()",
        f"record.activation_examples={config.batch_size}",  # a multiple of every group
    )


def accuracy_in_groups(
    exp: Experiment,
    state: TrainState,
    batches: Iterable[dict[str, Any]],
) -> float:
    """Computes top-1 (a share) in training mode, where every group has its own statistics.

    batches: `image`, `label`, and `mask` if rows are missing. All have one size, which the group
    divides.
    """

    @jax.jit
    def count(variables, batch):
        outputs, _ = exp.model.apply(
            variables,
            batch["image"],
            train=True,
            mask=batch["mask"],
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        logits = outputs[0] if isinstance(outputs, tuple) else outputs  # without auxiliary heads
        right = batch["mask"] & (label_rank(logits, batch["label"]) < 1)
        return jnp.sum(right), jnp.sum(batch["mask"])

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    right = 0
    seen = 0
    for batch in batches:
        all_valid = np.ones(len(batch["label"]), bool)
        own_right, own_seen = count(variables, {"mask": all_valid, **batch})
        right += int(own_right)
        seen += int(own_seen)
    return right / seen


def evaluated(exp: Experiment) -> Iterator[dict[str, Any]]:
    """Yields batches of the evaluated examples in a random order; the last one has masked rows.

    A set may be stored class by class, and a group of one class would have other statistics.
    """
    held = exp.data.held
    size = exp.config.batch_size
    generator = np.random.Generator(np.random.PCG64(0))
    shuffled = generator.permutation(len(held))

    # Places beyond the end are masked rows.
    batches = math.ceil(len(held) / size)
    beyond = np.arange(len(held), batches * size)
    places = np.append(shuffled, beyond)
    for rows in places.reshape(batches, size):
        yield held.rows(rows, exp.data.augmentation)


def measure(exp: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures accuracies (shares) of the trained network, by CURVES."""
    _, state = restore(exp, workdir)
    evaluator = Evaluator(exp)
    population = evaluator.population(state.params, state.batch_stats)

    size = exp.config.batch_size
    number = max(1, EXAMPLES // size)
    trained = exp.data.statistics(number, size, slice(0, size), exp.config.seed)
    return {
        "training, own group": accuracy_in_groups(exp, state, trained),
        "evaluation, own group": accuracy_in_groups(exp, state, evaluated(exp)),
        "evaluation, population": evaluator.scores(state.params, population)["top1"],
    }


def table(results: Results) -> Table:
    """Makes a table of accuracies by size of group."""
    rows = []
    for part, seeds in results.items():
        measured = measurements(seeds)
        cells = [part.removeprefix("group_size=")]
        for name in CURVES:
            shares = {seed: own[name] for seed, own in measured.items()}
            cells.append(percent(shares))
        cells.append(", ".join(divergences(seeds)) or "-")
        rows.append(cells)

    legend = (
        f"Accuracy. Own group: the network in training mode, on {EXAMPLES:,} training examples and "
        "on the evaluated examples, shuffled. Population: with the statistics of Algorithm 2 from "
        f"{EXAMPLES:,} training examples, whatever the group."
    )
    return Table(["group", *CURVES, "diverged"], rows, legend)


def draw(results: Results) -> Figure:
    """Draws accuracy against the size of the group, with a point for every seed."""
    figure, axes = subplots(figsize=(6.4, 4.2))
    for name, (colour, style) in CURVES.items():
        sizes = []
        means = []
        for part, seeds in results.items():
            size = int(part.removeprefix("group_size="))
            percents = [100 * own[name] for own in measurements(seeds).values()]
            marker = style[0]
            x = [size] * len(percents)
            axes.plot(x, percents, marker, color=colour, alpha=0.4, markersize=4)
            if percents:
                sizes.append(size)
                means.append(np.mean(percents))
        axes.plot(sizes, means, style, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("examples that are normalized together")
    axes.set_ylabel("accuracy (%)")
    axes.legend(fontsize=8)
    return figure


STUDY = Study(
    name="group_size",
    question="How many examples should normalize together?",
    follows="Wu & Johnson 2021 (arXiv:2105.07576), Hoffer et al. 2017 (ghost batch norm)",
    minutes="1",
    config="mnist_bn:digits",
    sizes={
        "mlp": (
            "batch_size=256",
            "bn.group_size=None",
            "learning_rate=0.4",
            "total_steps=500",
            "steps_per_dispatch=50",
        ),
        "inception": (
            "batch_size=64",
            "bn.group_size=None",
            "total_steps=300",
            "eval_every=300",
            "eval_early=0",
        ),
    },
    parts=parts,
    table=table,
    draw=draw,
    measure=measure,
)
