"""Which learning rates train?

The network with BN and the plain one, from several kinds of initial weights, are trained at a grid
of rates. If a run's loss is no longer finite, the step is shown.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from ml_collections import ConfigDict

from bn_jax.figures.plotting import GREY, subplots
from bn_jax.studies.frame import (
    Part,
    Result,
    Results,
    Study,
    Table,
    arms,
    divergences,
    finals,
    percent,
)

TIMES = (0.2, 1.0, 6.0, 40.0, 200.0)  # the config's rate; for bn_x5 this gives up to 1.5


def parts(config: ConfigDict) -> list[Part]:
    """Makes a part for every rate: with BN and without, from each kind of weights."""
    networks = arms(config)
    if "init" in config.model:
        networks.append(Part("plain_he", ("norm=none", "model.init=he")))
        networks.append(Part("plain_glorot", ("norm=none", "model.init=glorot")))

    found = []
    for network in networks:
        for times in TIMES:
            rate = float(f"{config.learning_rate * times:.3g}")
            settings = (*network.settings, f"learning_rate={rate}")
            found.append(Part(_part(network.name, f"{rate:g}"), settings))
    return found


def _part(network: str, rate: str) -> str:
    return f"{network}/learning_rate={rate}"


def by_network(results: Results) -> tuple[list[str], list[str]]:
    """Lists the networks and rates of a study, as they are written in the names of its parts."""
    pairs = [part.split("/learning_rate=") for part in results]
    networks = dict.fromkeys(network for network, _ in pairs)
    rates = dict.fromkeys(rate for _, rate in pairs)
    return list(networks), list(rates)


def cell(seeds: Mapping[int, Result]) -> str:
    """Gives the accuracy of the seeds that were trained to the end, and where others diverged."""
    shares = finals(seeds)
    said = divergences(seeds)
    if shares:
        said.insert(0, percent(shares))
    return "; ".join(said)


def table(results: Results) -> Table:
    """Makes a table with a row for each network and a column for each rate."""
    networks, rates = by_network(results)
    rows = []
    for network in networks:
        cells = [cell(results[_part(network, rate)]) for rate in rates]
        rows.append([network, *cells])
    legend = "Accuracy of the last evaluation, with population statistics, by learning rate."
    return Table(["network", *rates], rows, legend)


def draw(results: Results) -> Figure:
    """Draws a map of accuracies with numbers; hatched cells have only diverged runs."""
    networks, rates = by_network(results)
    width = 1.6 * len(rates) + 2
    height = 0.8 * len(networks) + 1.6
    figure, axes = subplots(figsize=(width, height))

    values = np.full((len(networks), len(rates)), np.nan)
    for y, network in enumerate(networks):
        for x, rate in enumerate(rates):
            seeds = results[_part(network, rate)]
            shares = list(finals(seeds).values())
            lines = []
            if shares:
                values[y, x] = 100 * np.mean(shares)
                lines.append(f"{values[y, x]:.1f}%")
            else:
                corner = (x - 0.5, y - 0.5)
                square = Rectangle(corner, 1, 1, hatch="//", fill=False, edgecolor=GREY, alpha=0.5)
                axes.add_patch(square)

            where = divergences(seeds)
            if where:  # there is room for the first
                lines += where[0].split(" at ")
            axes.text(x, y, "\n".join(lines), ha="center", va="center", fontsize=8)

    image = axes.imshow(values, vmin=0, vmax=100, cmap="YlGnBu", aspect="auto", alpha=0.6)
    figure.colorbar(image, ax=axes, label="accuracy (%)")
    axes.set_xticks(range(len(rates)), rates)
    axes.set_yticks(range(len(networks)), networks)
    axes.set_xlabel("learning rate")
    return figure


STUDY = Study(
    name="rates",
    question="Which learning rates train?",
    follows="section 4.2.1; Bjorck et al. 2018 (arXiv:1806.02375)",
    minutes="5",
    config="bn_x5:digits",
    sizes={
        "mlp": ("total_steps=1000",),
        "inception": ("total_steps=200", "eval_every=200", "eval_early=0", "checkpoint_every=200"),
    },
    parts=parts,
    table=table,
    draw=draw,
)
