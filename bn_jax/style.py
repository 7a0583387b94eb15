"""How pictures look: colours that are safe for colour blindness, and how a picture is saved."""

import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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
