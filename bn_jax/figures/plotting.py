"""How pictures look: colours that are safe for colour blindness, and how a picture is saved.

Pictures are made without pyplot, so that a program or notebook that imports this package keeps
its own matplotlib backend.
"""

import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bn_jax.workdir.reader import Run

# Okabe & Ito, "Color Universal Design"
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
VERMILION = "#D55E00"
SKY = "#56B4E9"
PURPLE = "#CC79A7"
BLACK = "#000000"
GREY = "#777777"


def subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], squeeze: bool = True
) -> tuple[Figure, Any]:
    """Makes a figure (size in inches) and its axes, as `matplotlib.pyplot.subplots` does."""
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=squeeze)


def evenly_spread(number: int, most: int) -> list[int]:
    """Returns at most `most` of the places 0 to number - 1, evenly spread, with both ends."""
    if number <= most:
        return list(range(number))
    places = np.linspace(0, number - 1, most)
    return places.round().astype(int).tolist()


def plot_accuracy(axes, run: Run, colour: str, label: str) -> None:
    """Draws the accuracy of every recorded evaluation against steps."""
    lines = run.lines["eval"]
    axes.plot(
        [line["step"] for line in lines],
        [100 * line["top1"] for line in lines],
        color=colour,
        label=label,
        marker="o" if len(lines) < 30 else None,
        markersize=3,
    )
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy (%)")


def save(figure: Figure, out: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Writes OUT/NAME.png and .svg and returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.png", out / f"{name}.svg"]
    for path in paths:
        figure.savefig(path, dpi=130)
    return paths
