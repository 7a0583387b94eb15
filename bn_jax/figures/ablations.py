"""The ablations of section 4.2.1, as tables and pictures."""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence

from matplotlib import ticker

from bn_jax.figures.curves import PARENTS, Difference, changes, curve, finals, paired
from bn_jax.figures.fig3 import Groups, notes, ordered
from bn_jax.figures.plotting import BLUE, GREY, save, subplots
from bn_jax.workdir.reader import Run, flat

ABLATION_HEAD = ["experiment", "parent", "change", "difference", "95% interval", "seeds"]
ABLATION_HEAD += ["counting error", "remarks"]


def ablations(groups: Groups) -> list[tuple[str, str, str, Difference]]:
    """(experiment, parent, the recorded change, difference of final accuracy) where both ran."""
    found = []
    for name in ordered(groups):
        if name not in PARENTS or PARENTS[name] not in groups:
            continue
        parent = PARENTS[name]
        mine, theirs = ([curve(run) for run in groups[k]] for k in (name, parent))
        difference = paired(finals(mine), finals(theirs), mine[0].examples)
        change = changes(flat(groups[name][0].config), flat(groups[parent][0].config))
        found.append((name, parent, change, difference))
    return found


def ablations_markdown(groups: Groups) -> str:
    """The ablation table; a difference is the experiment's final accuracy minus its parent's."""
    lines = [
        "# One change at a time (4.2.1)",
        "",
        "Difference of final accuracy to the parent, points, paired by seed; 95% interval by",
        "Student's t over seeds. Counting error: the binomial standard error of the difference.",
        "",
        f"| {' | '.join(ABLATION_HEAD)} |",
        "|---" * len(ABLATION_HEAD) + "|",
    ]
    for name, parent, change, d in ablations(groups):
        curves = [curve(run) for run in groups[name]]
        said = notes(curves) or "-"
        if d.mean is None or d.binomial is None:
            numbers = ["unknown: no seed is done in both", "-", "0", "-"]
        else:
            wide = "unknown (one seed)"
            if d.interval is not None:
                low = 100 * (d.mean - d.interval)
                high = 100 * (d.mean + d.interval)
                wide = f"{low:+.1f} to {high:+.1f}"
            numbers = [f"{100 * d.mean:+.2f}", wide, str(d.n), f"{100 * d.binomial:.2f}"]
        lines.append(f"| `{name}` | `{parent}` | {change} | {' | '.join(numbers)} | {said} |")
    return "\n".join(lines) + "\n"


def ablations_csv(groups: Groups) -> str:
    """The ablation table as shares of 1."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["experiment", "parent", "change", "seeds", "difference", "interval95", "binomial_se"]
    )
    for name, parent, change, d in ablations(groups):
        writer.writerow([name, parent, change, d.n, d.mean, d.interval, d.binomial])
    return out.getvalue()


def draw_ablations(groups: Mapping[str, Sequence[Run]], out: pathlib.Path) -> list[pathlib.Path]:
    """The ablation table as points with intervals; nothing if no experiment has its parent."""
    rows = ablations(groups)
    if not rows:
        return []
    figure, axes = subplots(figsize=(9.5, 1.6 + 0.36 * len(rows)))
    axes.set_xscale("symlog", linthresh=2.0)  # chance is 80 points away, most others one or two
    axes.axvline(0, color=GREY, linewidth=0.8)
    labels = []
    for y, (name, parent, _, d) in enumerate(rows):
        labels.append(f"{name} - {parent} (n = {d.n})")
        text = "no seed is done in both"
        if d.mean is not None and d.binomial is not None:
            width, colour = (d.binomial, GREY) if d.interval is None else (d.interval, BLUE)
            axes.errorbar(100 * d.mean, y, xerr=100 * width, fmt="o", color=colour, capsize=3)
            text = f"{100 * d.mean:+.2f} +- {100 * width:.2f}"
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
        "blue: 95% interval over seeds, paired; grey: one seed, counting error only", fontsize=9
    )
    return save(figure, out, "ablations")


_TICKS = (-100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100)
