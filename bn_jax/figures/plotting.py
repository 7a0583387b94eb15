"""Pictures and tables from recorded runs: `python -m bn_jax.figures --workdir=DIR --out=DIR`.

Reads only what runs have recorded (run.json, metrics.jsonl); nothing is trained or evaluated here.
DIR is one run, a folder with a baseline run `mnist` and its twin `mnist_bn` (Fig. 1), or a folder
of runs as bn_jax.sweep leaves it (Fig. 2, the table of Fig. 3, ablations). Where evaluations
were recorded (bn_jax.evaluate), the table of Fig. 4 is made of them.
"""

import pathlib

import matplotlib
from matplotlib import pyplot as plt

from bn_jax.workdir.reader import Run


def plot_accuracy(axes, run: Run, colour: str, label: str) -> None:
    """Accuracy of every recorded evaluation against steps."""
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


# How pictures look: colours that are safe for colour blindness, and how a picture is saved.


matplotlib.use("Agg")

# Okabe & Ito, "Color Universal Design"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#777777"
VERMILION, SKY, PURPLE, BLACK = "#D55E00", "#56B4E9", "#CC79A7", "#000000"


def save(figure, out: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Writes OUT/NAME.png and .svg, and closes the figure."""
    out.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    paths = [out / f"{name}.png", out / f"{name}.svg"]
    for path in paths:
        figure.savefig(path, dpi=130)
    plt.close(figure)
    return paths
