"""Draws Fig. 2 of section 4.2: accuracy against steps."""

import csv
import io
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import ticker

from bn_jax.errors import ConfigError
from bn_jax.figures import fig3
from bn_jax.figures.curves import BASELINE, Curve, Reached, compare, curve, levels, mean_curve
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
from bn_jax.workdir.reader import Run

# The colour and line of each network, which are the same in every picture.
STYLES = {
    "inception": (BLACK, "--"),
    "inception_best": (GREY, "-"),
    "inception_best_rate": (GREY, "-"),
    "bn_x5_without_bn": (GREEN, ":"),
    "bn_best": (BLACK, "-"),
    "bn_baseline": (ORANGE, "-"),
    "bn_x5": (GREEN, "-"),
    "bn_x30": (BLUE, "-"),
    "bn_x5_sigmoid": (PURPLE, "-."),
    "inception_x5": (VERMILION, ":"),
    "inception_sigmoid": (SKY, ":"),
}
OTHERS = [(c, s) for s in ("-", "--", ":", "-.") for c in (BLUE, ORANGE, GREEN, PURPLE, SKY)]
ZOOM = 12.0  # points below the baseline's final accuracy at which the right panel begins


def draw_fig2(groups: Mapping[str, Sequence[Run]], out: pathlib.Path) -> list[pathlib.Path]:
    """Draws accuracy against steps of 32 examples, on a logarithmic axis; returns the files.

    A second panel shows the upper part, unless the baseline's final accuracy is too low for that.
    Lines and bands are mean and range over the seeds that are done. The other seeds are thin lines
    that end in a cross (diverged) or an arrow (partial). A diamond marks where a network reaches
    the baseline's final accuracy, as a geometric mean over seeds, if more than half of them do.

    Raises ConfigError if no run has an evaluation.
    """
    names = [name for name in fig3.ordered(groups) if name in STYLES]
    curves = {
        name: [c for run in groups[name] if (c := curve(run)).steps.size]
        for name in names or fig3.ordered(groups)
    }
    curves = {name: found for name, found in curves.items() if found}
    if not curves:
        raise ConfigError("no run has an evaluation yet: let one run to its first")
    baseline = curves.get(BASELINE, [])
    tops = [goals["100%"] for c in baseline if (goals := levels(c)) is not None]
    level = 100 * float(np.mean(tops)) if tops else None
    zoomed = level is not None and level > ZOOM
    # A page shows 8 inches at a width of about 700 pixels: text of 10 points is 12 pixels high.
    figure, panels = subplots(1, 2 if zoomed else 1, figsize=(8, 6), squeeze=False)
    for axes in panels[0]:
        if level is not None:
            text = f"inception's final accuracy, {level:.1f}%"
            axes.axhline(level, color=BLACK, linewidth=0.8, linestyle=":", zorder=1, label=text)
        styles = iter(OTHERS * (1 + len(curves) // len(OTHERS)))
        for name, found in curves.items():
            style = STYLES[name] if name in STYLES else next(styles)
            _plot(axes, name, found, style)
            steps = compare(name, found, baseline).steps["100%"]
            at = [s.steps for s in steps if isinstance(s, Reached) and s.high < math.inf]
            if level is not None and 2 * len(at) > len(found):
                diamond = {"markersize": 8, "markeredgecolor": "white", "zorder": 5}
                axes.plot([np.exp(np.mean(np.log(at)))], [level], "D", color=style[0], **diamond)
        _log_steps(axes)
        axes.grid(which="major", alpha=0.25)
    if level is not None and zoomed:
        highest = 100 * max(float(c.top1.max()) for found in curves.values() for c in found)
        panels[0, 1].set_ylim(level - ZOOM, min(100.5, highest + ZOOM / 4))
    run = groups[next(iter(curves))][0]
    panels[0, 0].set_ylabel(f"{run.data['split']} accuracy (%)")
    entries = panels[0, 0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        f"{run.config['scale']}: {run.data['eval_examples']:,} {run.data['split']} examples, mean "
        "and range over seeds"
        + ("" if level is None else "\ndiamond: reaches inception's final accuracy"),
        fontsize=10,
    )
    return save(figure, out, "fig2")


def _plot(axes, name: str, curves: Sequence[Curve], style: tuple[str, str]) -> None:
    colour, line = style
    done = [c for c in curves if c.status == "done"]
    label = f"{name} ({_count(curves)})"
    if done:
        steps, mean, low, high = mean_curve(done)
        axes.fill_between(steps, 100 * low, 100 * high, color=colour, alpha=0.18, linewidth=0)
        marker = "." if steps.size < 30 else None
        axes.plot(steps, 100 * mean, line, marker=marker, color=colour, label=label)
    for c in curves:
        if c.status != "done":
            axes.plot(c.steps, 100 * c.top1, line, color=colour, linewidth=0.9, label=label)
            end = "x" if c.status == "diverged" else ">"
            axes.plot(c.steps[-1], 100 * c.top1[-1], end, color=colour)
        label = "_" if done or c.status != "done" else label  # one entry in the legend


def _count(curves: Sequence[Curve]) -> str:
    """Says how many seeds there are, such as '3 seeds', and how many diverged or are partial."""
    text = f"{len(curves)} seed{'s' if len(curves) > 1 else ''}"
    diverged = sum(c.status == "diverged" for c in curves)
    partial = sum(c.status not in ("done", "diverged") for c in curves)
    text += f", {diverged} diverged" if diverged else ""
    return text + (f", {partial} partial" if partial else "")


def _log_steps(axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("steps of 32 examples")


def curves_csv(groups: Groups) -> str:
    """Lists all points of Fig. 2 as CSV: network, seed, step (of 32 examples), top1 (share)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["network", "seed", "step", "top1"])
    for name in ordered(groups):
        for c in map(curve, groups[name]):
            writer.writerows([name, c.seed, *point] for point in zip(c.steps, c.top1, strict=True))
    return out.getvalue()
