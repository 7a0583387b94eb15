"""Draws Fig. 2 of section 4.2: accuracy against steps."""

import itertools
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from matplotlib import ticker

from bn_jax.errors import ConfigError
from bn_jax.figures.curves import BASELINE, Curve, compare, curve, levels, mean_curve, reached
from bn_jax.figures.fig3 import Groups, ordered
from bn_jax.figures.plotting import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    save,
    subplots,
)
from bn_jax.tables import csv_table
from bn_jax.workdir.reader import Run

# The colour and line of each network, which are the same in every picture.
STYLES = {
    "inception": (BLACK, "--"),
    "inception_best": (GREY, "-"),
    "inception_best_rate": (GREY, "-"),
    "bn_x5_without_bn": (VERMILION, "--"),
    "bn_best": (BLACK, "-"),
    "bn_baseline": (ORANGE, "-"),
    "bn_x5": (GREEN, "-"),
    "bn_x30": (BLUE, "-"),
    "bn_x5_sigmoid": (PURPLE, "-."),
    "inception_x5": (VERMILION, ":"),
    "inception_sigmoid": (SKY, ":"),
}
OTHER_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
OTHER_LINES = ("-", "--", ":", "-.")
OTHERS = [(colour, line) for line in OTHER_LINES for colour in OTHER_COLOURS]
ZOOM = 12.0  # points below the baseline's final accuracy at which the right panel begins


def draw_fig2(groups: Mapping[str, Sequence[Run]], out: pathlib.Path) -> list[pathlib.Path]:
    """Draws accuracy against steps of 32 examples, on a logarithmic axis; returns the files.

    A second panel shows the upper part, unless the baseline's final accuracy is too low for that.
    Lines and bands are mean and range over the seeds that are done. The other seeds are thin lines
    that end in a cross (diverged) or an arrow (partial). A diamond marks where a network reaches
    the baseline's final accuracy, as a geometric mean over seeds, if more than half of them do.

    Raises ConfigError if no run has an evaluation.
    """
    curves = _curves(groups)
    if not curves:
        raise ConfigError("no run has an evaluation yet: let one run to its first")
    level = _final_level(curves.get(BASELINE, []))
    zoomed = level is not None and level > ZOOM

    # A page shows 8 inches at a width of about 700 pixels: text of 10 points is 12 pixels high.
    columns = 2 if zoomed else 1
    figure, panels = subplots(1, columns, figsize=(8, 6), squeeze=False)
    for axes in panels[0]:
        _plot_panel(axes, curves, level)
    if level is not None and zoomed:
        highest = 100 * max(run.top1.max() for found in curves.values() for run in found)
        panels[0, 1].set_ylim(level - ZOOM, min(100.5, highest + ZOOM / 4))

    first_name = next(iter(curves))
    run = groups[first_name][0]
    split = run.data["split"]
    panels[0, 0].set_ylabel(f"{split} accuracy (%)")
    entries = panels[0, 0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=2, frameon=False)

    title = (
        f"{run.config['scale']}: {run.data['eval_examples']:,} {split} examples, mean and range "
        "over seeds"
    )
    if level is not None:
        title += "\ndiamond: reaches inception's final accuracy"
    figure.suptitle(title, fontsize=10)
    return save(figure, out, "fig2")


def _curves(groups: Groups) -> dict[str, list[Curve]]:
    """Returns the curves that are drawn: of the paper's networks or, if none has run, of all."""
    names = ordered(groups)
    styled = [name for name in names if name in STYLES]

    found = {}
    for name in styled or names:
        curves = [curve(run) for run in groups[name]]
        evaluated = [one for one in curves if one.steps.size]
        if evaluated:
            found[name] = evaluated
    return found


def _final_level(baseline: Sequence[Curve]) -> float | None:
    """Returns the baseline's final accuracy in percent, the mean over seeds that have levels."""
    finals = []
    for run in baseline:
        goals = levels(run)
        if goals is not None:
            finals.append(goals["100%"])
    if not finals:
        return None
    return 100 * statistics.fmean(finals)


def _plot_panel(axes, curves: Mapping[str, Sequence[Curve]], level: float | None) -> None:
    """Draws all networks, the level, and a diamond where a network reaches it."""
    if level is not None:
        axes.axhline(
            level,
            color=BLACK,
            linewidth=0.8,
            linestyle=":",
            zorder=1,
            label=f"inception's final accuracy, {level:.1f}%",
        )

    others = itertools.cycle(OTHERS)
    for name, found in curves.items():
        style = STYLES[name] if name in STYLES else next(others)
        _plot(axes, name, found, style)

        comparison = compare(name, found, curves.get(BASELINE, []))
        steps = [value.steps for value in reached(comparison.steps["100%"])]
        if level is not None and 2 * len(steps) > len(found):
            mean = statistics.geometric_mean(steps)
            axes.plot(
                [mean],
                [level],
                "D",
                color=style[0],
                markersize=8,
                markeredgecolor="white",
                zorder=5,
            )

    _log_steps(axes)
    axes.grid(which="major", alpha=0.25)


def _plot(axes, name: str, curves: Sequence[Curve], style: tuple[str, str]) -> None:
    """Draws a network: mean and range of the seeds that are done, a thin line for each other."""
    colour, line = style
    done = [run for run in curves if run.status == "done"]
    others = [run for run in curves if run.status != "done"]
    label = f"{name} ({_count(curves)})"

    if done:
        steps, mean, low, high = mean_curve(done)
        axes.fill_between(steps, 100 * low, 100 * high, color=colour, alpha=0.18, linewidth=0)
        marker = "." if steps.size < 30 else None
        axes.plot(steps, 100 * mean, line, marker=marker, color=colour, label=label)
        label = "_"  # one entry in the legend

    for run in others:
        percent = 100 * run.top1
        axes.plot(run.steps, percent, line, color=colour, linewidth=0.9, label=label)
        end = "x" if run.status == "diverged" else ">"
        axes.plot(run.steps[-1], percent[-1], end, color=colour)
        label = "_"


def _count(curves: Sequence[Curve]) -> str:
    """Says how many seeds there are, such as '3 seeds', and how many diverged or are partial."""
    plural = "s" if len(curves) > 1 else ""
    parts = [f"{len(curves)} seed{plural}"]

    diverged = sum(run.status == "diverged" for run in curves)
    if diverged:
        parts.append(f"{diverged} diverged")
    partial = sum(run.status not in ("done", "diverged") for run in curves)
    if partial:
        parts.append(f"{partial} partial")
    return ", ".join(parts)


def _log_steps(axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("steps of 32 examples")


def curves_csv(groups: Groups) -> str:
    """Lists all points of Fig. 2 as CSV: network, seed, step (of 32 examples), top1 (share)."""
    rows = []
    for name in ordered(groups):
        for run in groups[name]:
            found = curve(run)
            for step, top1 in zip(found.steps, found.top1, strict=True):
                rows.append(
                    {
                        "network": name,
                        "seed": found.seed,
                        "step": step,
                        "top1": top1,
                    }
                )
    return csv_table(rows)
