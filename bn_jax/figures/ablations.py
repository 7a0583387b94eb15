"""Compares each experiment with the one that it changes (4.2.1), in tables and a picture."""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib import ticker

from bn_jax.figures.curves import PARENTS, changes, curve, finals
from bn_jax.figures.fig3 import Groups, notes, ordered, points_cell
from bn_jax.figures.origins import apart, made_by
from bn_jax.figures.plotting import BLUE, GREY, save, subplots
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
        parent = PARENTS[name]
        mine, theirs = ([curve(run) for run in groups[k]] for k in (name, parent))
        ours = finals(mine)
        parents = finals(theirs)
        effect = difference(ours, parents)
        counting = None
        if effect.n == 1:
            (seed,) = ours.keys() & parents.keys()
            counting = counted_difference(ours[seed], parents[seed], mine[0].final_examples)
        change = changes(flat(groups[name][0].config), flat(groups[parent][0].config))
        found.append(Ablation(name, parent, change, effect, counting))
    adjusted = holm([row.effect.p_value(0.0) for row in found])
    return [row._replace(adjusted_p=p) for row, p in zip(found, adjusted, strict=True)]


HEAD = ["experiment", "parent", "change", "difference", "seeds", "says", "remarks"]


def ablations_markdown(groups: Groups) -> str:
    """Makes the table; a difference is the experiment's final accuracy minus its parent's."""
    rows = ablations(groups)
    compared = sum(row.adjusted_p is not None for row in rows)
    lines = [
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
        f"| {' | '.join(HEAD)} |",
        "|---" * len(HEAD) + "|",
    ]
    for row in rows:
        curves = [curve(run) for run in groups[row.name]]
        cells = [f"`{row.name}`", f"`{row.parent}`", row.change, _difference(row)]
        differs = apart(
            (run.origin for run in groups[row.name]), (run.origin for run in groups[row.parent])
        )
        remarks = [notes(curves), f"made with different {differs}" if differs else ""]
        said = "; ".join(remark for remark in remarks if remark)
        cells += [str(row.effect.n), row.says, said or "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _difference(row: Ablation) -> str:
    if not row.effect.n:
        return "unknown: no seed is done in both"
    if row.counting is None:
        return points_cell(row.effect)
    low, high = row.counting
    return f"{100 * row.effect.value:+.2f} (counted: {100 * low:.2f} to {100 * high:.2f})"


def ablations_csv(groups: Groups) -> str:
    """Makes the table as CSV, with shares of 1."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["experiment", "parent", "change", "seeds", "difference", "low", "high"]
    writer.writerow([*head, "counted_low", "counted_high", "holm_p"])
    for row in ablations(groups):
        value = row.effect.value if row.effect.n else ""
        ends = row.effect.interval or ("", "")
        counting = row.counting or ("", "")
        p = "" if row.adjusted_p is None else row.adjusted_p
        writer.writerow(
            [row.name, row.parent, row.change, row.effect.n, value, *ends, *counting, p]
        )
    return out.getvalue()


def draw_ablations(groups: Mapping[str, Sequence[Run]], out: pathlib.Path) -> list[pathlib.Path]:
    """Draws the table as points with intervals; returns [] if no experiment has its parent."""
    rows = ablations(groups)
    if not rows:
        return []
    figure, axes = subplots(figsize=(9.5, 1.6 + 0.36 * len(rows)))
    axes.set_xscale("symlog", linthresh=2.0)  # chance is 80 points away, most others one or two
    axes.axvline(0, color=GREY, linewidth=0.8)
    labels = []
    for y, row in enumerate(rows):
        labels.append(f"{row.name} - {row.parent} (n = {row.effect.n})")
        text = "no seed is done in both"
        ends = row.effect.interval or row.counting
        if ends is not None:
            colour = GREY if row.counting else BLUE
            value = row.effect.value
            width = [[100 * (value - ends.low)], [100 * (ends.high - value)]]
            axes.errorbar(100 * value, y, xerr=width, fmt="o", color=colour, capsize=3)
            text = f"{100 * value:+.2f} ({100 * ends.low:.2f} to {100 * ends.high:.2f})"
        axes.annotate(
            text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%+g"))
    axes.set_xticks([x for x in _TICKS if axes.get_xlim()[0] <= x <= axes.get_xlim()[1]])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("difference of final accuracy, points (logarithmic beyond 2)")
    axes.set_title(
        "95% intervals; blue: over seeds, paired; grey: one seed, of counting images only",
        fontsize=9,
    )
    return save(figure, out, "ablations")


_TICKS = (-100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100)
