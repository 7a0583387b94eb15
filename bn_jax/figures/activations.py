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
from bn_jax.figures.plotting import BLUE, GREY, save, subplots

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
        each = list(self.steps.values())
        return [path for path in each[0] if all(path in found for found in each)]

    def measured(self, path: str) -> list[Measured]:
        """Returns one activation at all measured steps."""
        return [found[path] for found in self.steps.values()]


def series(run: Shown, path: str) -> Percentiles:
    """Returns one activation's percentiles over the measured steps."""
    steps = np.array(list(run.steps))
    values = np.array([m.percentiles for m in run.measured(path)], float)
    return Percentiles(path, steps, values)


def spread(run: Shown, path: str) -> np.ndarray:
    """Returns the standard deviation of the layer's median unit, float64 [steps]."""
    return np.array([np.median(m.std) for m in run.measured(path)], float)


def moved(run: Shown, path: str) -> np.ndarray:
    """Returns how far the median has moved since the first measured step, float64 [steps].

    The unit of a distance is the mean distance between the 15th and the 85th percentile over the
    steps; the value is that of the layer's median unit.
    """
    low, middle, high = np.moveaxis(series(run, path).values, 1, 0)
    width = np.mean(high - low, axis=0)
    smallest = np.finfo(np.float32).tiny  # a constant unit has no width

    distance = np.abs(middle - middle[:1])
    relative = distance / np.maximum(width, smallest)
    return np.median(relative, axis=1)


def _row(run: Shown, path: str) -> str:
    """Makes one activation's line of the table."""
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
    """Makes a Markdown table of all runs' activations, from the first to the last measured step."""
    rows = ["| run | activation | steps | spread | drift | dead | saturated |", "|" + "---|" * 7]
    for run in runs:
        rows += [_row(run, path) for path in run.paths()]
    return "\n".join(rows) + (
        "\nSpread: standard deviation of the median unit. Drift: range of the 50th percentile over "
        "the steps / mean distance from the 15th to the 85th, of the median unit. Dead: units that "
        "are never above 0. Saturated: values beyond +-4. Both at the last step."
    )


def draw_activations(runs: Sequence[Shown], out: pathlib.Path) -> list[pathlib.Path]:
    """Draws bands, histograms and the map of one run, or of two side by side; returns the files."""
    paths = _all_paths(runs)
    few = [paths[k] for k in _spread_out(len(paths), MOST)]

    written = save(_bands(runs, few), out, "activations_bands")
    written += save(_histograms(runs, few), out, "activations_histograms")
    written += save(draw_map(runs), out, "activations_map")
    return written


def _all_paths(runs: Sequence[Shown]) -> list[str]:
    return sorted({path for run in runs for path in run.paths()})


def _spread_out(number: int, most: int) -> list[int]:
    """Returns at most `most` of the places 0 to number - 1, evenly spread."""
    if number <= most:
        return list(range(number))
    return np.linspace(0, number - 1, most).round().astype(int).tolist()


def _grid(runs: Sequence[Shown], paths: Sequence[str]):
    """Makes a figure with a row of panels for each activation and a column for each run."""
    size = (5.2 * len(runs), 2.4 * len(paths))
    figure, panels = subplots(len(paths), len(runs), figsize=size, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()  # until something is drawn
    return figure, panels


def _bands(runs: Sequence[Shown], paths: Sequence[str]):
    figure, panels = _grid(runs, paths)
    colours = (GREY, BLUE)
    for row, path in zip(panels, paths, strict=True):
        for axes, run, colour in zip(row, runs, colours, strict=False):
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
    """Draws a column of shades for each step; 0.1% of the values at both ends are left out."""
    found = run.measured(path)

    # All steps share one scale. Each step has bins of its own, so values between two edges are
    # taken to be evenly distributed.
    ends = [np.interp([0.001, 0.999], _shares(m), m.edges) for m in found]
    low = min(end[0] for end in ends)
    high = max(end[1] for end in ends)
    edges = np.linspace(low, high, 101)

    columns = []
    for m in found:
        below = np.interp(edges, m.edges, _shares(m), left=0, right=1)
        share = np.diff(below)
        columns.append(share / max(share.max(), 1e-12))

    places = np.arange(len(found) + 1) - 0.5
    axes.pcolormesh(places, edges, np.array(columns).T, cmap="Greys", rasterized=True)
    _label_steps(axes, run, 6)
    axes.set_title(f"{run.name}: {path}", fontsize=9)


def _shares(measured: Measured) -> np.ndarray:
    """Returns the share of values below each edge, [BINS + 1]."""
    counts = np.cumsum(measured.counts, dtype=float)
    return np.concatenate([[0.0], counts / counts[-1]])


def draw_map(runs: Sequence[Shown]) -> Figure:
    """Draws maps of layers x steps: the spread, and how far the median moved.

    Maps of the same quantity share one scale.
    """
    paths = _all_paths(runs)
    size = (5 * len(runs) + 3, max(2.5, 0.16 * len(paths) + 1.2))
    figure, panels = subplots(1, 2 * len(runs), figsize=size, squeeze=False)

    spreads = [_layers_by_steps(run, paths, _log_spread) for run in runs]
    distances = [_layers_by_steps(run, paths, moved) for run in runs]
    _draw_maps(figure, panels[0][0::2], runs, spreads, "log10 of the spread")
    _draw_maps(figure, panels[0][1::2], runs, distances, "distance that the median moved")

    panels[0][0].set_yticks(range(len(paths)), paths, fontsize=6)
    return figure


def _log_spread(run: Shown, path: str) -> np.ndarray:
    """Returns log10 of `spread`, [steps]."""
    return np.log10(np.maximum(spread(run, path), 1e-8))


def _layers_by_steps(
    run: Shown, paths: Sequence[str], measure: Callable[[Shown, str], np.ndarray]
) -> np.ndarray:
    """Returns a quantity of each path and step, [paths, steps]; NaN for paths of other runs."""
    nothing = np.full(len(run.steps), np.nan)
    own = run.paths()
    return np.array([measure(run, path) if path in own else nothing for path in paths])


def _draw_maps(
    figure: Figure, panels, runs: Sequence[Shown], maps: Sequence[np.ndarray], label: str
) -> None:
    """Draws one map for each run, all on one scale."""
    low = min(map(np.nanmin, maps))
    high = max(map(np.nanmax, maps))
    for axes, run, values in zip(panels, runs, maps, strict=True):
        image = axes.imshow(values, aspect="auto", interpolation="nearest", vmin=low, vmax=high)
        figure.colorbar(image, ax=axes, label=label)
        axes.set_title(run.name, fontsize=9)
        axes.set_yticks([])
        _label_steps(axes, run, 5, fontsize=7)


def _label_steps(axes, run: Shown, most: int, **text: float) -> None:
    """Labels at most `most` of a run's steps, which lie at 0, 1, ... on the horizontal axis."""
    steps = list(run.steps)
    shown = _spread_out(len(steps), most)
    axes.set_xticks(shown, [f"{steps[k]:,}" for k in shown], **text)
    axes.set_xlabel("step")
