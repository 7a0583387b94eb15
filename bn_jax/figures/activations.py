"""Pictures of measured activations: percentile bands (Fig. 1b, c), histograms over time, a map.

They are drawn from what `bn_jax.activations.measure` has kept; nothing is computed by a network.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from bn_jax.activations.measure import Measured
from bn_jax.figures.fig1 import Percentiles, drift, plot_percentiles, typical_unit
from bn_jax.figures.plotting import BLUE, GREY, save, subplots

MOST = 12  # layers whose bands and histograms are drawn; the map has all


class Shown(NamedTuple):
    """Measurements of one run: step -> path -> Measured. name: of its config."""

    name: str
    workdir: pathlib.Path
    steps: dict[int, dict[str, Measured]]

    def paths(self) -> list[str]:
        """The activations that all steps have, in the order of the network."""
        each = list(self.steps.values())
        return [path for path in each[0] if all(path in found for found in each)]


def series(run: Shown, path: str) -> Percentiles:
    """One activation's percentiles over the measured steps."""
    values = np.array([found[path].percentiles for found in run.steps.values()], float)
    return Percentiles(path, np.array(list(run.steps)), values)


def spread(run: Shown, path: str) -> np.ndarray:
    """[steps]: the standard deviation of the layer's median unit."""
    return np.array([np.median(found[path].std) for found in run.steps.values()], float)


def moved(run: Shown, path: str) -> np.ndarray:
    """[steps]: how far the median has moved since the first measured step.

    In units of the mean distance between the 15th and the 85th percentile, of the median unit.
    """
    values = series(run, path).values
    width = np.mean(values[:, 2] - values[:, 0], axis=0)
    distance = np.abs(values[:, 1] - values[:1, 1])
    return np.median(distance / np.maximum(width, np.finfo(np.float32).tiny), axis=1)


def _row(run: Shown, path: str) -> str:
    """One activation's line of the table."""
    first = min(run.steps)
    last = max(run.steps)
    found = run.steps[last][path]

    spreads = spread(run, path)
    of_median = drift(series(run, path))[1]
    dead = 100 * float(found.dead)
    saturated = 100 * float(found.saturated)

    return (
        f"| {run.name} | {path} | {first:,} to {last:,} "
        f"| {spreads[0]:.3g} to {spreads[-1]:.3g} "
        f"| {np.median(of_median):.2f} "
        f"| {dead:.1f}% | {saturated:.1f}% |"
    )


def table(runs: Sequence[Shown]) -> str:
    """The activations of all runs as Markdown, from the first to the last measured step."""
    rows = ["| run | activation | steps | spread | drift | dead | saturated |", "|" + "---|" * 7]
    for run in runs:
        rows += [_row(run, path) for path in run.paths()]
    return "\n".join(rows) + (
        "\nSpread: standard deviation of the median unit. Drift: range of the 50th percentile over "
        "the steps / mean distance from the 15th to the 85th, of the median unit. Dead: units that "
        "are never above 0. Saturated: values beyond +-4. Both at the last step."
    )


def draw_activations(runs: Sequence[Shown], out: pathlib.Path) -> list[pathlib.Path]:
    """Bands, histograms and the map of one run or of two side by side."""
    paths = _all_paths(runs)
    few = paths
    if len(paths) > MOST:
        few = [paths[k] for k in np.linspace(0, len(paths) - 1, MOST).round().astype(int)]
    written = save(_bands(runs, few), out, "activations_bands")
    written += save(_histograms(runs, few), out, "activations_histograms")
    return written + save(draw_map(runs), out, "activations_map")


def _all_paths(runs: Sequence[Shown]) -> list[str]:
    return sorted({path for run in runs for path in run.paths()})


def _grid(runs: Sequence[Shown], paths: Sequence[str]):
    """A row of panels for each activation, a column for each run."""
    figure, panels = subplots(
        len(paths), len(runs), figsize=(5.2 * len(runs), 2.4 * len(paths)), squeeze=False
    )
    for axes in panels.flat:
        axes.set_axis_off()  # until something is drawn
    return figure, panels


def _bands(runs: Sequence[Shown], paths: Sequence[str]):
    figure, panels = _grid(runs, paths)
    for row, path in zip(panels, paths, strict=True):
        for axes, run, colour in zip(row, runs, (GREY, BLUE), strict=False):
            if path not in run.paths():
                continue
            axes.set_axis_on()
            curves = series(run, path)
            plot_percentiles(axes, curves, typical_unit(curves), colour)
            axes.set_title(f"{run.name}: {path}", fontsize=9)
    figure.suptitle("{15, 50, 85}th percentiles of a layer's typical unit", fontsize=10)
    return figure


def _histograms(runs: Sequence[Shown], paths: Sequence[str]):
    figure, panels = _grid(runs, paths)
    for row, path in zip(panels, paths, strict=True):
        for axes, run in zip(row, runs, strict=False):
            if path in run.paths():
                axes.set_axis_on()
                _histogram(axes, run, path)
    figure.suptitle("All values of a layer over training; darker is more frequent", fontsize=10)
    return figure


def _histogram(axes, run: Shown, path: str) -> None:
    """One column a step, on one scale that leaves out the outermost 0.1% of the values."""
    found = [step[path] for step in run.steps.values()]
    ends = [np.interp([0.001, 0.999], _shares(m), m.edges) for m in found]
    low = min(end[0] for end in ends)
    high = max(end[1] for end in ends)
    edges = np.linspace(low, high, 101)
    columns = [np.diff(np.interp(edges, m.edges, _shares(m), left=0, right=1)) for m in found]
    columns = [column / max(column.max(), 1e-12) for column in columns]

    places = np.arange(len(found) + 1) - 0.5
    axes.pcolormesh(places, edges, np.array(columns).T, cmap="Greys", rasterized=True)
    shown = np.unique(np.linspace(0, len(found) - 1, 6).round().astype(int))
    axes.set_xticks(shown, [f"{list(run.steps)[k]:,}" for k in shown])
    axes.set_xlabel("step")
    axes.set_title(f"{run.name}: {path}", fontsize=9)


def _shares(measured: Measured) -> np.ndarray:
    """Share of values below each edge, [BINS + 1]."""
    counts = np.cumsum(measured.counts, dtype=float)
    return np.concatenate([[0.0], counts / counts[-1]])


def draw_map(runs: Sequence[Shown]) -> Figure:
    """A picture of layers x steps: the spread, and how far the median moved; one scale for all."""
    paths = _all_paths(runs)
    height = max(2.5, 0.16 * len(paths) + 1.2)
    figure, panels = subplots(1, 2 * len(runs), figsize=(5 * len(runs) + 3, height), squeeze=False)
    for place, what in enumerate((spread, moved)):
        tables = []
        for run in runs:
            nothing = np.full(len(run.steps), np.nan)
            own = run.paths()
            values = np.array([what(run, path) if path in own else nothing for path in paths])
            tables.append(np.log10(np.maximum(values, 1e-8)) if what is spread else values)
        ends = {"vmin": min(map(np.nanmin, tables)), "vmax": max(map(np.nanmax, tables))}
        label = "log10 of the spread" if what is spread else "distance that the median moved"
        for axes, run, values in zip(panels[0][place::2], runs, tables, strict=True):
            image = axes.imshow(values, aspect="auto", interpolation="nearest", **ends)
            figure.colorbar(image, ax=axes, label=label)
            _label_steps(axes, run)
    panels[0][0].set_yticks(range(len(paths)), paths, fontsize=6)
    return figure


def _label_steps(axes, run: Shown) -> None:
    """Names the run and a few of its steps under a map's panel."""
    axes.set_title(run.name, fontsize=9)
    axes.set_yticks([])
    axes.set_xlabel("step")
    shown = np.unique(np.linspace(0, len(run.steps) - 1, 5).round().astype(int))
    axes.set_xticks(shown, [f"{list(run.steps)[k]:,}" for k in shown], fontsize=7)
