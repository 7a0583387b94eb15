"""Finds the best points of a grid on held-out examples, and makes a table of all points.

This is successive halving in two rounds (Jamieson and Talwalkar 2016, arXiv:1502.07943): every
point is trained for a first number of steps, and the best few of each experiment to the end.
"""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bn_jax.workdir import files, reader

TABLE = "tuning"  # name of the two files, .md and .csv


class Point(NamedTuple):
    """One run of a grid.

    experiment: its config. values: {field: value} as on the command line. first, last: top-1
    (share) on the held-out examples after the first round's steps and at the end; None if the
    run was not evaluated there. status: as in run.json, "new" without one.
    """

    experiment: str
    values: dict[str, str]
    first: float | None
    last: float | None
    status: str


def accuracy(workdir: pathlib.Path, step: int) -> float | None:
    """Returns a run's top-1 (share) in its evaluation after `step`; None if there was none."""
    if not reader.is_run(workdir):
        return None
    evaluations = reader.read_run(workdir).lines["eval"]
    return next((line["top1"] for line in evaluations if line["step"] == step), None)


def best(points: Mapping[str, Point], keep: int) -> list[str]:
    """Returns the names of each experiment's `keep` best points after the first round, best first.

    Of equal points the earlier in the grid comes first. Points that diverged are left out.
    """
    chosen = []
    for experiment in dict.fromkeys(point.experiment for point in points.values()):
        scored = {
            name: point.first
            for name, point in points.items()
            if point.experiment == experiment and point.first is not None
        }
        chosen += sorted(scored, key=lambda name: -scored[name])[:keep]
    return chosen


def winners(points: Sequence[Point]) -> dict[str, Point]:
    """Returns each experiment's point with the highest accuracy at the end; of equals the first."""
    found: dict[str, Point] = {}
    for point in points:
        before = found.get(point.experiment)
        if point.last is not None and (before is None or point.last > (before.last or 0.0)):
            found[point.experiment] = point
    return found


def write(
    folder: pathlib.Path, points: Sequence[Point], steps: tuple[int, int], about: str
) -> list[pathlib.Path]:
    """Writes the table of all points as Markdown and CSV; returns both paths. Raises DiskError.

    steps: of the first round and of a whole run. about: a line on data, commit and hardware.
    """
    first, last = steps
    chosen = winners(points)
    legend = (
        f"Top-1 in percent on the held-out examples. Every point has {first:,} steps and one seed; "
        f"the best of each experiment have {last:,}. **Bold**: the best at the end."
    )
    text = ["# All points that were tried", "", about, legend]
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(["experiment", "values", "status", f"top1_{first}", f"top1_{last}", "chosen"])

    for experiment in dict.fromkeys(point.experiment for point in points):
        own = [point for point in points if point.experiment == experiment]
        own.sort(key=lambda point: (-(point.last or 0.0), -(point.first or 0.0)))
        head = [*own[0].values, "status", f"{first:,} steps", f"{last:,} steps"]
        text += ["", f"## `{experiment}`: {len(own)} points", ""]
        text += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for point in own:
            best_one = chosen.get(experiment) is point
            cells = [*point.values.values(), point.status, _percent(point.first)]
            final = _percent(point.last)
            cells.append(f"**{final}**" if best_one else final)
            text.append(f"| {' | '.join(cells)} |")

            values = " ".join(f"{field}={value}" for field, value in point.values.items())
            shares = ["" if share is None else share for share in (point.first, point.last)]
            lines.writerow([experiment, values, point.status, *shares, int(best_one)])

    paths = [folder / f"{TABLE}.md", folder / f"{TABLE}.csv"]
    files.write_atomic(paths[0], ("\n".join(text) + "\n").encode())
    files.write_atomic(paths[1], table.getvalue().encode())
    return paths


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
