"""Draws measured activations: percentile bands (Fig. 1b, c), histograms over time, and a map.

Everything is drawn from what `bn_jax.activations.measure` has kept; no network is run.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from bn_jax.activations.measure import Measured
from bn_jax.figures.fig1 import Percentiles, drift, plot_percentiles, typical_unit
from bn_jax.figures.plotting import BLUE, GREY, evenly_spread, save, subplots
from bn_jax.tables import markdown_table

MOST = 12  # layers whose bands and histograms are drawn; the map shows all layers


class Shown(NamedTuple):
    """Measurements of one run.

    name: of its config. steps: step -> path -> Measured.
    """

    name: str
    workdir: pathlib.Path
    steps: dict[int, dict[str, Measured]]

    def paths(self) -> list[str]:
        """Returns the activations that all steps have, in the order of the network."""
        first, *others = self.steps.values()

        common = []
        for path in first:
            if all(path in found for found in others):
                common.append(path)
        return common

    def measured(self, path: str) -> list[Measured]:
        """Returns one activation at all measured steps."""
        return [found[path] for found in self.steps.values()]


def series(run: Shown, path: str) -> Percentiles:
    """Returns one activation's percentiles over the measured steps."""
    steps = list(run.steps)
    values = [m.percentiles for m in run.measured(path)]
    return Percentiles(
        layer=path,
        steps=np.array(steps),
        values=np.array(values, float),
    )


def spread(run: Shown, path: str) -> np.ndarray:
    """Returns the standard deviation of the layer's median unit, float64 [steps]."""
    of_median_unit = [np.median(m.std) for m in run.measured(path)]
    return np.array(of_median_unit, float)


def moved(run: Shown, path: str) -> np.ndarray:
    """Returns how far the median has moved since the first measured step, float64 [steps].

    The unit of a distance is the mean distance between the 15th and the 85th percentile over the
    steps; the value is that of the layer's median unit.
    """
    curves = series(run, path)
    low, middle, high = np.moveaxis(curves.values, 1, 0)

    width = np.mean(high - low, axis=0)
    smallest = np.finfo(np.float32).tiny  # a constant unit has no width

    start = middle[:1]
    distance = np.abs(middle - start)
    relative = distance / np.maximum(width, smallest)
    return np.median(relative, axis=1)


def _row(run: Shown, path: str) -> list[str]:
    """Makes one activation's cells of the table."""
    first = min(run.steps)
    last = max(run.steps)
    found = run.steps[last][path]

    spreads = spread(run, path)
    of_median = drift(series(run, path))[1]
    dead = 100 * float(found.dead)
    saturated = 100 * float(found.saturated)

    return [
        run.name,
        path,
        f"{first:,} to {last:,}",
        f"{spreads[0]:.3g} to {spreads[-1]:.3g}",
        f"{np.median(of_median):.2f}",
        f"{dead:.1f}%",
        f"{saturated:.1f}%",
    ]


def table(runs: Sequence[Shown]) -> str:
    """Makes a Markdown table of all runs' activations, from the first to the last measured step."""
    head = ["run", "activation", "steps", "spread", "drift", "dead", "saturated"]
    rows = []
    for run in runs:
        for path in run.paths():
            rows.append(_row(run, path))

    notes = (
        "Spread: standard deviation of the median unit. Drift: range of the 50th percentile over "
        "the steps / mean distance from the 15th to the 85th, of the median unit. Dead: units that "
        "are never above 0. Saturated: values beyond +-4. Both at the last step."
    )
    return f"{markdown_table(head, rows)}\n{notes}"


def draw_activations(runs: Sequence[Shown], out: pathlib.Path) -> list[pathlib.Path]:
    """Draws bands, histograms and the map of one run, or of two side by side; returns the files."""
    paths = _all_paths(runs)
    shown = evenly_spread(len(paths), MOST)
    few = [paths[k] for k in shown]

    figures = {
        "activations_bands": _bands(runs, few),
        "activations_histograms": _histograms(runs, few),
        "activations_map": draw_map(runs),
    }
    written = []
    for name, figure in figures.items():
        written += save(figure, out, name)
    return written


def _all_paths(runs: Sequence[Shown]) -> list[str]:
    found: set[str] = set()
    for run in runs:
        found.update(run.paths())
    return sorted(found)


def _grid(runs: Sequence[Shown], paths: Sequence[str]):
    """Makes a figure with a row of panels for each activation and a column for each run."""
    width = 5.2 * len(runs)  # inches
    height = 2.4 * len(paths)
    figure, panels = subplots(
        rows=len(paths),
        columns=len(runs),
        figsize=(width, height),
        squeeze=False,
    )

    for axes in panels.flat:
        axes.set_axis_off()  # until something is drawn
    return figure, panels


def _bands(runs: Sequence[Shown], paths: Sequence[str]):
    figure, panels = _grid(runs, paths)
    colours = (GREY, BLUE)

    for row, path in zip(panels, paths, strict=True):
        # There are at most two runs; one run alone is grey.
        for axes, run, colour in zip(row, runs, colours, strict=False):
            if path not in run.paths():
                continue

            axes.set_axis_on()
            curves = series(run, path)
            unit = typical_unit(curves)
            plot_percentiles(axes, curves, unit, colour)
            axes.set_title(f"{run.name}: {path}", fontsize=9)

    figure.suptitle("{15, 50, 85}th percentiles of a layer's typical unit", fontsize=10)
    return figure


def _histograms(runs: Sequence[Shown], paths: Sequence[str]):
    figure, panels = _grid(runs, paths)

    for row, path in zip(panels, paths, strict=True):
        for axes, run in zip(row, runs, strict=True):
            if path in run.paths():
                axes.set_axis_on()
                _histogram(axes, run, path)

    figure.suptitle("All values of a layer over training; darker is more frequent", fontsize=10)
    return figure


def _histogram(axes, run: Shown, path: str) -> None:
    """Draws a column of shades for each step; 0.1% of the values at both ends are left out."""
    found = run.measured(path)

    # All steps share one scale. Each step has bins of its own, so values between two edges are
    # taken to be evenly distributed.
    lowest = []
    highest = []
    for m in found:
        first, last = np.interp([0.001, 0.999], _shares(m), m.edges)
        lowest.append(first)
        highest.append(last)
    edges = np.linspace(min(lowest), max(highest), 101)

    columns = []
    for m in found:
        below = np.interp(
            edges,
            m.edges,
            _shares(m),
            left=0,
            right=1,
        )
        share = np.diff(below)
        most = max(share.max(), 1e-12)  # of a step without values on this scale it is 0
        columns.append(share / most)

    # A column reaches half a step to both sides of its own place.
    borders = np.arange(len(found) + 1) - 0.5
    shades = np.stack(columns, axis=1)
    axes.pcolormesh(
        borders,
        edges,
        shades,
        cmap="Greys",
        rasterized=True,
    )
    _label_steps(axes, run, 6)
    axes.set_title(f"{run.name}: {path}", fontsize=9)


def _shares(measured: Measured) -> np.ndarray:
    """Returns the share of values below each edge, [BINS + 1]."""
    counts = np.cumsum(measured.counts, dtype=float)
    shares = counts / counts[-1]
    return np.concatenate([[0.0], shares])


def draw_map(runs: Sequence[Shown]) -> Figure:
    """Draws maps of layers x steps: the spread, and how far the median moved.

    Maps of the same quantity share one scale.
    """
    paths = _all_paths(runs)
    width = 5 * len(runs) + 3  # inches
    height = 0.16 * len(paths) + 1.2
    figure, panels = subplots(
        columns=2 * len(runs),
        figsize=(width, max(2.5, height)),
    )

    # Each run has two panels: first the spread, then the distance.
    spreads = [_layers_by_steps(run, paths, _log_spread) for run in runs]
    _draw_maps(figure, panels[0::2], runs, spreads, "log10 of the spread")

    distances = [_layers_by_steps(run, paths, moved) for run in runs]
    _draw_maps(figure, panels[1::2], runs, distances, "distance that the median moved")

    panels[0].set_yticks(range(len(paths)), paths, fontsize=6)
    return figure


def _log_spread(run: Shown, path: str) -> np.ndarray:
    """Returns log10 of `spread`, [steps]."""
    positive = np.maximum(spread(run, path), 1e-8)
    return np.log10(positive)


def _layers_by_steps(
    run: Shown,
    paths: Sequence[str],
    measure: Callable[[Shown, str], np.ndarray],
) -> np.ndarray:
    """Returns a quantity of each path and step, [paths, steps]; NaN for paths of other runs."""
    nothing = np.full(len(run.steps), np.nan)
    own = run.paths()

    values = []
    for path in paths:
        if path in own:
            values.append(measure(run, path))
        else:
            values.append(nothing)
    return np.array(values)


def _draw_maps(
    figure: Figure,
    panels,
    runs: Sequence[Shown],
    maps: Sequence[np.ndarray],
    label: str,
) -> None:
    """Draws one map for each run, all on one scale."""
    low = min(map(np.nanmin, maps))
    high = max(map(np.nanmax, maps))

    for axes, run, values in zip(panels, runs, maps, strict=True):
        image = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            vmin=low,
            vmax=high,
        )
        figure.colorbar(image, ax=axes, label=label)
        axes.set_title(run.name, fontsize=9)
        axes.set_yticks([])
        _label_steps(axes, run, 5, fontsize=7)


def _label_steps(axes, run: Shown, most: int, **text: float) -> None:
    """Labels at most `most` of a run's steps, which lie at 0, 1, ... on the horizontal axis."""
    steps = list(run.steps)
    shown = evenly_spread(len(steps), most)
    labels = [f"{steps[k]:,}" for k in shown]
    axes.set_xticks(shown, labels, **text)
    axes.set_xlabel("step")
