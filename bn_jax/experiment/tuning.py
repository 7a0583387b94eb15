"""Finds the best points of a grid on held-out examples, and makes a table of all points.

This is successive halving in two rounds (Jamieson and Talwalkar 2016, arXiv:1502.07943): every
point is trained for a first number of steps, and the best few of each experiment to the end.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bn_jax.tables import csv_table, markdown_table
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
    run = reader.read_run(workdir)
    for line in run.lines["eval"]:
        if line["step"] == step:
            return line["top1"]
    return None


def best(points: Mapping[str, Point], keep: int) -> list[str]:
    """Returns the names of each experiment's `keep` best points after the first round, best first.

    Of equal points the earlier in the grid comes first. Points that diverged are left out.
    """
    scores: dict[str, dict[str, float]] = {}  # experiment -> name -> top-1
    for name, point in points.items():
        own = scores.setdefault(point.experiment, {})
        if point.first is not None:
            own[name] = point.first

    chosen = []
    for own in scores.values():
        # sorted keeps the order of equal points, with reverse, too.
        best_first = sorted(own, key=own.__getitem__, reverse=True)
        chosen += best_first[:keep]
    return chosen


def winners(points: Sequence[Point]) -> dict[str, Point]:
    """Returns each experiment's point with the highest accuracy at the end; of equals the first."""
    found: dict[str, Point] = {}
    highest: dict[str, float] = {}
    for point in points:
        if point.last is None:
            continue
        if point.last > highest.get(point.experiment, -1.0):
            highest[point.experiment] = point.last
            found[point.experiment] = point
    return found


def write(
    folder: pathlib.Path,
    points: Sequence[Point],
    steps: tuple[int, int],
    about: str,
) -> list[pathlib.Path]:
    """Writes the table of all points as Markdown and CSV; returns both paths. Raises DiskError.

    steps: of the first round and of a whole run. about: a line on data, commit and hardware.
    """
    first, last = steps
    legend = (
        f"Top-1 in percent on the held-out examples. Every point has {first:,} steps and one seed; "
        f"the best of each experiment have {last:,}. **Bold**: the best at the end."
    )
    text = ["# All points that were tried", f"{about}\n{legend}"]
    records: list[dict[str, Any]] = []
    chosen = winners(points)

    for experiment, own in _by_experiment(points).items():
        fields = list(own[0].values)
        head = [*fields, "status", f"{first:,} steps", f"{last:,} steps"]
        rows = []
        for point in own:
            final = _percent(point.last)
            if point is chosen.get(experiment):
                final = f"**{final}**"
            values = point.values.values()
            rows.append([*values, point.status, _percent(point.first), final])
            records.append(_record(point, steps, chosen))
        text.append(f"## `{experiment}`: {len(own)} points")
        text.append(markdown_table(head, rows))

    contents = {
        folder / f"{TABLE}.md": "\n\n".join(text) + "\n",
        folder / f"{TABLE}.csv": csv_table(records),
    }
    for path, content in contents.items():
        files.write_atomic(path, content.encode())
    return list(contents)


def _by_experiment(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Groups points by experiment, each group with its best points first."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.experiment, []).append(point)

    def score(point: Point) -> tuple[float, float]:
        return point.last or 0.0, point.first or 0.0

    for own in found.values():
        own.sort(key=score, reverse=True)
    return found


def _record(
    point: Point,
    steps: tuple[int, int],
    chosen: Mapping[str, Point],
) -> dict[str, Any]:
    """Returns a point's row of the CSV; a score that was not measured is empty."""
    first, last = steps
    values = [f"{field}={value}" for field, value in point.values.items()]
    return {
        "experiment": point.experiment,
        "values": " ".join(values),
        "status": point.status,
        f"top1_{first}": point.first,
        f"top1_{last}": point.last,
        "chosen": int(point is chosen.get(point.experiment)),
    }


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.2f}"
