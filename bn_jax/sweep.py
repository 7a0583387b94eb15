"""Many experiments with many seeds, as many processes: `python -m bn_jax.sweep --configs=A,B ...`.

Every member is the plain command, `python -m bn_jax.main`, in its own folder DIR/CONFIG/seed_K with
its output in member.log. The same sweep again skips members that are done or have diverged, and
resumes those that were stopped. A grid of values adds a folder: DIR/CONFIG/FIELD=VALUE/seed_K.
With --halving the best points of a grid are found on held-out examples.
"""

import argparse
import itertools
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bn_jax import errors
from bn_jax.distributed import cluster
from bn_jax.distributed.cpus import usable_cpus
from bn_jax.errors import ConfigError, DivergedError, Preempted, UserError
from bn_jax.experiment import tuning
from bn_jax.experiment.config import load, read, settled
from bn_jax.experiment.pool import Pool
from bn_jax.workdir import guard, reader

EXPECTED = (0, DivergedError.exit_code, Preempted.exit_code)  # exit codes of members
FINISHED = ("done", "diverged")  # a run that diverged is a result: it would diverge again


class SweepMember(NamedTuple):
    """One run of a sweep: the arguments of `bn_jax.main`, and what they mean."""

    name: str  # of its folder below the sweep's: bn_x5/seed_0
    workdir: pathlib.Path
    arguments: list[str]
    config: ConfigDict

    def command(self, python: str = "python") -> list[str]:
        """The command line that runs it."""
        return [python, "-m", "bn_jax.main", *self.arguments]


def members(
    configs: Sequence[str],
    scale: str,
    seeds: int,
    workdir: pathlib.Path,
    settings: Sequence[str] = (),
    grid: Mapping[str, Sequence[str]] | None = None,
) -> list[SweepMember]:
    """The runs of a sweep, seed by seed, so that all curves have one run before any has two.

    Args:
      configs: names of experiments.
      scale: for all of them; empty: each one's default.
      seeds: 0 .. seeds - 1, which are added to each config's own seed.
      workdir: the sweep's folder.
      settings: FIELD=VALUE for all.
      grid: {field: values}, every combination of which is run.

    Raises:
      ConfigError: an experiment, scale, field or value that main would refuse too.
    """
    grid = grid or {}
    found = []
    for seed in range(seeds):
        for config in configs:
            file = f"configs/{config}.py{':' if scale else ''}{scale}"
            own_seed = load(file).seed  # members of an ensemble differ in it
            for values in itertools.product(*grid.values()):
                points = [f"{f}={v}" for f, v in zip(grid, values, strict=True)]
                if any("/" in point for point in points):
                    raise ConfigError(f"--grid: a value with / cannot name a folder: {points}")
                name = "/".join([config, *points, f"seed_{seed}"])
                changes = [*settings, *points, f"seed={own_seed + seed}"]
                arguments = [f"--config={file}", *(f"--config.{change}" for change in changes)]
                arguments.append(f"--workdir={workdir / name}")
                found.append(SweepMember(name, workdir / name, arguments, read(file, changes)))
    return found


def status(member: SweepMember) -> str:
    """What run.json says: done, diverged, preempted, ...; 'new' if there is none.

    A run that is done with fewer steps than are wanted now is 'preempted': main resumes it.
    Raises ConfigError if the folder holds a run of another config.
    """
    run = reader.read_record(member.workdir)
    if run is None:
        return "new"
    config = guard.as_begun(member.config, member.workdir)
    config = settled(config, run["info"].get("data", {}).get("train_examples", 0))
    if config.batch_per_device:
        from bn_jax.experiment import build  # takes seconds; only scale `pod` needs it

        config = build.for_devices(config, run["hardware"]["devices"])
    guard.require_same_config(member.workdir, run["config"], config.to_dict())
    if run["status"] == "done" and run["config"]["total_steps"] < config.total_steps:
        return "preempted"
    return run["status"]


def finished_in(folder: pathlib.Path, found: Sequence[SweepMember]) -> list[SweepMember]:
    """The members, with those that `folder` has complete records of in their places there.

    Complete are run.json of a run of the same config that is done, with at least as many steps, and
    metrics.jsonl up to its last evaluation, or run.json of one that diverged. Checkpoints are not
    needed. Raises ConfigError for records of another config.
    """
    placed = []
    for member in found:
        there = member._replace(workdir=folder / member.name)
        placed.append(there if _complete(there) else member)
    return placed


def _complete(member: SweepMember) -> bool:
    """Whether the member's folder has complete records."""
    if not reader.is_run(member.workdir):
        return False
    said = status(member)
    if said != "done":
        return said == "diverged"
    run = reader.read_run(member.workdir)
    last = run.lines["eval"][-1:]
    return bool(last) and last[0]["step"] == run.config["total_steps"]


def threads(found: Sequence[SweepMember]) -> int | None:
    """CPU threads of the members that have run, which the others get, too; None if none has.

    Sums are split by thread, so networks that are compared need the same number. Raises ConfigError
    if members differ from each other, or from NPROC. BN_JAX_ANY_THREADS=1 allows it.
    """
    if os.environ.get(guard.ANY_THREADS) == "1":
        return None

    seen: dict[int, str] = {}
    for member in found:
        run = reader.read_record(member.workdir)
        hardware = {} if run is None else run.get("hardware", {})
        if hardware.get("platform") == "cpu":
            seen.setdefault(hardware["cpu_threads"], member.name)
    asked = os.environ.get("NPROC")
    if asked and seen:
        seen.setdefault(int(asked), "this process (NPROC)")

    if len(seen) > 1:
        each = ", ".join(f"{count} in {name}" for count, name in seen.items())
        raise ConfigError(
            f"the members have different numbers of CPU threads ({each}) and cannot be compared to "
            f"the last bit: use another --workdir, or set {guard.ANY_THREADS}=1"
        )
    return next(iter(seen), None)


def environment(member: SweepMember, slot: Mapping[str, str]) -> dict[str, str]:
    """The environment of a member in a slot; a run that is resumed keeps its number of threads."""
    found = {**os.environ, **slot}
    found["PYTHONUNBUFFERED"] = "1"
    run = reader.read_record(member.workdir)
    if run is not None and "NPROC" not in os.environ and run["hardware"]["platform"] == "cpu":
        found["NPROC"] = str(run["hardware"]["cpu_threads"])
    return found


def slots(jobs: int | None) -> list[dict[str, str]]:
    """Environment variables of the members that run side by side, one entry each.

    By default one member an NVIDIA GPU, one on any other accelerator, and on CPU one for every two
    cores, each of which gets its share of the cores.
    """
    gpus = _gpus()
    cores = usable_cpus()
    if jobs is None:
        tpu = any(pathlib.Path("/dev").glob("accel*")) or pathlib.Path("/dev/vfio/0").exists()
        jobs = len(gpus) or (1 if tpu else max(1, cores // 2))
    if gpus:
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / -(-jobs // len(gpus)):.2f}"}
        shared = memory if jobs > len(gpus) else {}
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)], **shared} for i in range(jobs)]
    # The number of threads is part of a CPU run's identity: it is set only where it must be.
    share = {"NPROC": str(max(1, cores // jobs))} if jobs > 1 and "NPROC" not in os.environ else {}
    return [dict(share) for _ in range(jobs)]


def _gpus() -> list[str]:
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(i) for i, _ in enumerate(pathlib.Path("/dev").glob("nvidia[0-9]*"))]


def run(found: Sequence[SweepMember], jobs: int | None, beside: Sequence[SweepMember] = ()) -> None:
    """Runs what is not finished and says how all ended.

    beside: more members, which are not run here and have as many threads.

    Raises:
      Preempted: a signal, or a member that was stopped by one; the same sweep resumes.
      UserError: members failed; the others have been run.
    """
    before = {member.name: status(member) for member in found}
    todo = [member for member in found if before[member.name] not in FINISHED]
    print(f"{len(found)} members: {len(found) - len(todo)} finished before, {len(todo)} to run")
    share = slots(jobs)
    count = threads([*found, *beside])
    if count is not None and "NPROC" not in os.environ:
        share = [{**slot, "NPROC": str(count)} for slot in share]
    pool = Pool(share, total=len(found))
    codes = pool.run(
        [(m.name, m.command(sys.executable), m.workdir / "member.log", _env(m)) for m in todo]
    )
    print(outcome(found))
    ended = (None, 128 + signal.SIGTERM, 128 + signal.SIGKILL) if pool.stopped else (None,)
    failed = {name: code for name, code in codes.items() if code not in (*EXPECTED, *ended)}
    for member in found:
        if member.name in failed:
            print(f"failed with exit code {failed[member.name]}: {member.workdir}/member.log")
    if pool.stopped:
        raise Preempted(
            "the sweep was stopped; the same command resumes its members from their saved steps"
        )
    if failed:
        raise UserError(f"{len(failed)} of {len(found)} members failed; their logs are named above")
    if Preempted.exit_code in codes.values():
        raise Preempted("members were stopped one by one; the same command resumes them")


def _env(member: SweepMember):
    return lambda slot: environment(member, slot)


def outcome(found: Sequence[SweepMember]) -> str:
    """A line a member: status, accuracy of its last evaluation if it is done; the data's limits."""
    lines = []
    data = ""
    for member in found:
        record: dict[str, Any]
        try:
            record = dict(reader.read_record(member.workdir) or {"status": "not run"})
        except ConfigError:
            record = {"status": "unreadable"}

        said = record["status"]
        data = record.get("info", {}).get("data", {}).get("description", data)
        if said == "done":
            said += f"  {_accuracy(record['results'])}"
            if "test" in record["results"]:
                said += f" held out, {_accuracy(record['results']['test'])} of the test split"
        elif said in ("diverged", "failed", "preempted"):
            said += f"  {record['results'].get('error', '').partition(': ')[2][:70]}"
        lines.append(f"  {member.name:40} {said}")

    if data:
        lines.append(f"data: {data}")
    return "\n".join(lines)


def halve(
    first: Sequence[SweepMember],
    full: Sequence[SweepMember],
    keep: int,
    workdir: pathlib.Path,
    jobs: int | None,
) -> None:
    """Tries all points of a grid in two rounds, and writes the table of them.

    Args:
      first: the points with the steps of the first round.
      full: the same points with all steps; those that are kept go on in the same folders.
      keep: how many points of each experiment have all steps.
      workdir: the sweep's folder, of the table, too.
      jobs: as `run`, which also says what is raised.
    """
    steps = first[0].config.total_steps, full[0].config.total_steps

    # A point that was kept before may be beyond the first round by now: it is not begun again.
    run([m for m in first if tuning.accuracy(m.workdir, steps[0]) is None], jobs, full)
    kept = tuning.best(_points(first, steps), keep)
    run([m for m in full if m.name in kept], jobs, full)

    points = list(_points(full, steps).values())
    origin = next(r for m in full if (r := reader.read_record(m.workdir)) is not None)
    commit = origin["source"].get("commit", "unknown")
    hardware = origin["hardware"]
    about = (
        f"{origin['info']['data']['description']}. Commit {commit}, {hardware['cpu_threads']} CPU "
        f"threads, {hardware['platform']}."
    )
    for path in tuning.write(workdir, points, steps, about):
        print(path)
    for experiment, point in tuning.winners(points).items():
        print(f"best of {experiment}: {point.values}")


def _points(found: Sequence[SweepMember], steps: tuple[int, int]) -> dict[str, tuning.Point]:
    """The members as points of the grid, by their names."""
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
    """Steps of the first round and how many points are kept. Raises ConfigError."""
    text = args.halving
    steps, comma, keep = text.partition(",")
    if not (comma and steps.isdecimal() and keep.isdecimal() and int(steps) and int(keep)):
        raise ConfigError(f"--halving={text}: write STEPS,N, two positive numbers such as 1000,3")
    if args.seeds != 1 or not grid:
        raise ConfigError(f"--halving={text}: needs --grid and one seed; leave out --seeds")
    if args.done is not None:
        raise ConfigError(f"--halving={text}: all points are trained here; leave out --done")
    return int(steps), int(keep)


def _check_halving(text: str, steps: int, found: Sequence[SweepMember]) -> None:
    """Raises ConfigError for members on which halving cannot be done."""
    for member in found:
        total = member.config.total_steps
        if steps >= total:
            raise ConfigError(f"--halving={text}: a whole run has {total:,} steps; choose fewer")
        if not member.config.data.holdout:
            limit = "data.holdout=0, and the test split must play no part in a choice"
            raise ConfigError(f"--halving={text}: {limit}; add --set=data.holdout=0.1")


def _accuracy(scores: Mapping[str, Any]) -> str:
    return f"{100 * scores['top1']:.2f}% of {scores['examples']:,}"


def main() -> None:
    """The command line."""
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
    args = parser.parse_args()
    cluster.require_one_process("bn_jax.sweep")
    configs = [name for name in args.configs.split(",") if name]
    for option, text in [("set", t) for t in args.set] + [("grid", t) for t in args.grid]:
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
    grid = {text.partition("=")[0]: text.partition("=")[2].split(",") for text in args.grid}
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
