"""Runs many experiments with many seeds: `python -m bn_jax.sweep --configs=A,B ...`.

Every member is a process `python -m bn_jax.main` in its own folder DIR/CONFIG/seed_K, with its
output in member.log. The same sweep again skips members that are done or have diverged, and resumes
those that were stopped. A grid of values adds a folder: DIR/CONFIG/FIELD=VALUE/seed_K. With
--halving the best points of a grid are found on held-out examples.
"""

import argparse
import pathlib
import shlex
from collections.abc import Mapping, Sequence

from bn_jax import errors
from bn_jax.distributed import cluster
from bn_jax.errors import ConfigError
from bn_jax.experiment import tuning
from bn_jax.experiment.members import FINISHED, SweepMember, finished_in, members, run, status
from bn_jax.workdir import reader


def halve(
    first: Sequence[SweepMember],
    full: Sequence[SweepMember],
    keep: int,
    workdir: pathlib.Path,
    jobs: int | None,
) -> None:
    """Tries all points of a grid in two rounds, and writes a table of them.

    Args:
      first: the points with the steps of the first round.
      full: the same points with all steps; those that are kept continue in the same folders.
      keep: how many points of each experiment get all steps.
      workdir: the sweep's folder, in which the table is written, too.
      jobs: as in `run`, which also says what is raised.
    """
    first_steps = first[0].config.total_steps
    full_steps = full[0].config.total_steps
    steps = (first_steps, full_steps)

    # In a resumed sweep a kept point may be beyond the first round; it is not begun again.
    todo = [member for member in first if tuning.accuracy(member.workdir, first_steps) is None]
    run(todo, jobs, full)

    kept = tuning.best(_points(first, steps), keep)
    run([member for member in full if member.name in kept], jobs, full)

    points = list(_points(full, steps).values())
    for path in tuning.write(workdir, points, steps, _origin(full)):
        print(path)
    for experiment, point in tuning.winners(points).items():
        print(f"best of {experiment}: {point.values}")


def _origin(found: Sequence[SweepMember]) -> str:
    """Says in a line with which data, commit and hardware the first recorded member was made."""
    records = [reader.read_record(member.workdir) for member in found]
    record = next(record for record in records if record is not None)

    data = record["info"]["data"]
    commit = record["source"].get("commit", "unknown")
    hardware = record["hardware"]
    return (
        f"{data['description']}. Commit {commit}, {hardware['cpu_threads']} CPU threads, "
        f"{hardware['platform']}."
    )


def _points(found: Sequence[SweepMember], steps: tuple[int, int]) -> dict[str, tuning.Point]:
    """Turns members into points of the grid, by their names."""
    points = {}
    for member in found:
        experiment, *values, _ = member.name.split("/")
        record = reader.read_record(member.workdir)
        points[member.name] = tuning.Point(
            experiment=experiment,
            values=dict(value.split("=", 1) for value in values),
            first=tuning.accuracy(member.workdir, steps[0]),
            last=tuning.accuracy(member.workdir, steps[1]),
            status="new" if record is None else record["status"],
        )
    return points


def _halving(args: argparse.Namespace, grid: Mapping[str, Sequence[str]]) -> tuple[int, int]:
    """Parses --halving: the steps of the first round, and how many points are kept."""
    text = args.halving
    numbers = text.split(",")
    positive = [number for number in numbers if number.isdecimal() and int(number) > 0]
    if len(numbers) != 2 or len(positive) != 2:
        raise ConfigError(f"--halving={text}: write STEPS,N, two positive numbers such as 1000,3")
    if args.seeds != 1 or not grid:
        raise ConfigError(f"--halving={text} needs --grid and one seed; leave out --seeds")
    if args.done is not None:
        raise ConfigError(f"--halving={text}: all points are trained here; leave out --done")
    steps, keep = map(int, numbers)
    return steps, keep


def _check_halving(text: str, steps: int, found: Sequence[SweepMember]) -> None:
    """Raises ConfigError for members to which halving cannot be applied."""
    for member in found:
        total = member.config.total_steps
        if steps >= total:
            raise ConfigError(f"--halving={text}: a whole run has {total:,} steps; choose fewer")
        if not member.config.data.holdout:
            raise ConfigError(
                f"--halving={text}: data.holdout=0, and the test split must play no part in a "
                "choice; add --set=data.holdout=0.1"
            )


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser("python -m bn_jax.sweep", description=__doc__)
    add = parser.add_argument
    add("--configs", required=True, help="of bn_jax.main --list, with commas: inception,bn_x5")
    add("--scale", default="", help="digits, imagenet, ... (default: each experiment's own)")
    add("--seeds", type=int, default=1, help="number of seeds: 0, 1, ... (default: 1)")
    add("--workdir", required=True, type=pathlib.Path, help="folder of the sweep")
    add("--jobs", type=int, help="members side by side (default: one a GPU, or for 2 CPU cores)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="for all; repeatable")
    add("--grid", action="append", default=[], metavar="FIELD=V1,V2,...", help="try all values")
    add(
        "--halving",
        metavar="STEPS,N",
        help="all points of --grid for so many steps, then the best N of each experiment in full, "
        "by their accuracy on data.holdout; writes DIR/tuning.md and tuning.csv",
    )
    add(
        "--done",
        type=pathlib.Path,
        metavar="DIR",
        help="folder of records; the members that it holds complete, as DIR/CONFIG/seed_K, count "
        "as done",
    )
    add("--dry_run", action="store_true", help="print the unfinished members' commands, and end")
    return parser


def _check(args: argparse.Namespace, configs: Sequence[str]) -> None:
    """Raises ConfigError for options that make no sweep."""
    for option in ("set", "grid"):
        for text in getattr(args, option):
            if "=" not in text.strip("="):
                raise ConfigError(f"--{option}={text}: write FIELD=VALUE")
            if text.startswith(("seed=", "name=")):
                raise ConfigError(f"--{option}={text}: the sweep sets it; --seeds=N, --configs=...")

    if not configs or len(set(configs)) < len(configs):
        raise ConfigError(f"--configs={args.configs}: must name experiments, each of them once")
    if args.seeds < 1:
        raise ConfigError(f"--seeds={args.seeds} must be at least 1")
    if args.jobs is not None and args.jobs < 1:
        raise ConfigError(f"--jobs={args.jobs} must be at least 1")


def main() -> None:
    """Reads the command line and runs the sweep."""
    args = _parser().parse_args()
    cluster.require_one_process("bn_jax.sweep")
    configs = [name for name in args.configs.split(",") if name]
    _check(args, configs)

    grid = {}
    for text in args.grid:
        field, _, values = text.partition("=")
        grid[field] = values.split(",")
    if args.halving is not None:
        steps, keep = _halving(args, grid)
        args.set.append("eval_test=False")  # the test split plays no part in a choice

    found = members(configs, args.scale, args.seeds, args.workdir, args.set, grid)
    first = found
    if args.done is not None:
        first = found = finished_in(args.done, found)
    if args.halving is not None:
        _check_halving(args.halving, steps, found)
        shorter = [*args.set, f"total_steps={steps}"]
        first = members(configs, args.scale, args.seeds, args.workdir, shorter, grid)

    if args.dry_run:
        for member in first:
            if status(member) not in FINISHED:
                print(shlex.join(member.command()))
    elif args.halving is not None:
        halve(first, found, keep, args.workdir, args.jobs)
    else:
        run(found, args.jobs)


if __name__ == "__main__":
    errors.run_command(main)
