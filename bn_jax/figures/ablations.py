"""Compares each experiment with the one that it changes (4.2.1), in tables and a picture."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib import ticker

from bn_jax.figures.curves import PARENTS, changes, curve, finals
from bn_jax.figures.fig3 import Groups, notes, ordered, points_cell
from bn_jax.figures.origins import differing, made_by
from bn_jax.figures.plotting import BLUE, GREY, save, subplots
from bn_jax.tables import csv_table, markdown_table
from bn_jax.uncertainty import (
    CONTRADICTED,
    SUPPORTED,
    Effect,
    Interval,
    counted_difference,
    difference,
    holm,
    verdict,
)
from bn_jax.workdir.reader import Run, flat


class Ablation(NamedTuple):
    """An experiment compared with its parent, the one that it changes.

    effect: difference of final accuracy (shares), experiment minus parent, paired by seed.
    counting: with one seed, the 95% interval that counting images alone would give.
    """

    name: str
    parent: str
    change: str
    effect: Effect
    counting: Interval | None
    adjusted_p: float | None = None

    @property
    def says(self) -> str:
        """What the difference says, corrected for the number of experiments in the table."""
        words = {SUPPORTED: "higher", CONTRADICTED: "lower"}
        said = verdict(self.effect, 0.0, self.adjusted_p)
        return words.get(said, said)


def ablations(groups: Groups) -> list[Ablation]:
    """Compares all experiments whose parents have run, too, with their parents."""
    found = []
    for name in ordered(groups):
        if name not in PARENTS or PARENTS[name] not in groups:
            continue
        found.append(_ablation(groups, name, PARENTS[name]))

    # Every comparison that is made counts in the correction.
    adjusted = holm([row.effect.p_value(0.0) for row in found])
    return [row._replace(adjusted_p=p) for row, p in zip(found, adjusted, strict=True)]


def _ablation(groups: Groups, name: str, parent: str) -> Ablation:
    """Compares an experiment with its parent."""
    runs = groups[name]
    parent_runs = groups[parent]
    change = changes(flat(runs[0].config), flat(parent_runs[0].config))

    curves = [curve(run) for run in runs]
    ours = finals(curves)
    parents = finals([curve(run) for run in parent_runs])
    effect = difference(ours, parents)

    counting = None
    if effect.n == 1:
        (seed,) = ours.keys() & parents.keys()
        examples = curves[0].final_examples
        counting = counted_difference(ours[seed], parents[seed], examples)
    return Ablation(name, parent, change, effect, counting)


HEAD = ["experiment", "parent", "change", "difference", "seeds", "says", "remarks"]


def ablations_markdown(groups: Groups) -> str:
    """Makes the table; a difference is the experiment's final accuracy minus its parent's."""
    rows = ablations(groups)
    compared = sum(row.adjusted_p is not None for row in rows)
    text = [
        "# One change at a time (4.2.1)",
        "",
        "A difference is the final accuracy minus the parent's, in points, paired by seed. The 95%",
        "interval in parentheses is by Student's t over seeds or, with one seed, that of counting",
        "images alone.",
        f"*Higher* and *lower* hold after Holm's correction for the {compared} differences that",
        "have an interval. *No effect*: the whole interval lies within 0.5 points, a margin that",
        "was fixed beforehand. The numbers of seeds that would decide assume the same mean and",
        "spread.",
        "",
        made_by(run.origin for group in groups.values() for run in group),
        "",
    ]

    cells = []
    for row in rows:
        cells.append(
            [
                f"`{row.name}`",
                f"`{row.parent}`",
                row.change,
                _difference(row),
                str(row.effect.n),
                row.says,
                _remarks(groups[row.name], groups[row.parent]),
            ]
        )
    text.append(markdown_table(HEAD, cells))
    return "\n".join(text) + "\n"


def _remarks(runs: Sequence[Run], parents: Sequence[Run]) -> str:
    """Says which runs are not done, and in what the two groups were made differently."""
    remarks = []
    unfinished = notes([curve(run) for run in runs])
    if unfinished:
        remarks.append(unfinished)

    differs = differing(run.origin for run in (*runs, *parents))
    if differs:
        remarks.append(f"made with different {differs}")
    return "; ".join(remarks) or "-"


def _difference(row: Ablation) -> str:
    if not row.effect.n:
        return "unknown: no seed is done in both"
    if row.counting is None:
        return points_cell(row.effect)
    low, high = row.counting
    return f"{100 * row.effect.value:+.2f} (counted: {100 * low:.2f} to {100 * high:.2f})"


def ablations_csv(groups: Groups) -> str:
    """Makes the table as CSV, with shares of 1."""
    rows = []
    for row in ablations(groups):
        low, high = row.effect.interval or (None, None)
        counted_low, counted_high = row.counting or (None, None)
        rows.append(
            {
                "experiment": row.name,
                "parent": row.parent,
                "change": row.change,
                "seeds": row.effect.n,
                "difference": row.effect.value if row.effect.n else None,
                "low": low,
                "high": high,
                "counted_low": counted_low,
                "counted_high": counted_high,
                "holm_p": row.adjusted_p,
            }
        )
    return csv_table(rows)


def draw_ablations(groups: Mapping[str, Sequence[Run]], out: pathlib.Path) -> list[pathlib.Path]:
    """Draws the table as points with intervals; returns [] if no experiment has its parent."""
    rows = ablations(groups)
    if not rows:
        return []
    figure, axes = subplots(figsize=(9.5, 1.6 + 0.36 * len(rows)))
    axes.set_xscale("symlog", linthresh=2.0)  # chance is 80 points away, most others one or two
    axes.axvline(0, color=GREY, linewidth=0.8)

    for y, row in enumerate(rows):
        _plot(axes, y, row)
    labels = [f"{row.name} - {row.parent} (n = {row.effect.n})" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)

    low, high = axes.get_xlim()
    axes.set_xticks([x for x in _TICKS if low <= x <= high])
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%+g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("difference of final accuracy, points (logarithmic beyond 2)")
    axes.set_title(
        "95% intervals; blue: over seeds, paired; grey: one seed, of counting images only",
        fontsize=9,
    )
    return save(figure, out, "ablations")


def _plot(axes, y: int, row: Ablation) -> None:
    """Draws a difference as a point with its interval at height y, and its numbers beside it."""
    text = "no seed is done in both"
    ends = row.effect.interval or row.counting
    if ends is not None:
        value = 100 * row.effect.value
        low = 100 * ends.low
        high = 100 * ends.high
        axes.errorbar(
            value,
            y,
            xerr=[[value - low], [high - value]],
            fmt="o",
            color=GREY if row.counting else BLUE,
            capsize=3,
        )
        text = f"{value:+.2f} ({low:.2f} to {high:.2f})"
    axes.annotate(
        text,
        (1.01, y),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=8,
    )


_TICKS = (-100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100)
