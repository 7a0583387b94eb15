"""Lists and runs the members of a sweep or study: runs of the plain command, each in its folder.

A member that is done or has diverged is not run again, and one that was stopped is resumed.
"""

import functools
import itertools
import math
import os
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bn_jax.distributed.cpus import pool_size, usable_cpus
from bn_jax.errors import ConfigError, DivergedError, Preempted, UserError
from bn_jax.experiment.config import load, read, settled
from bn_jax.experiment.pool import Pool
from bn_jax.workdir import guard, reader

EXPECTED = (0, DivergedError.exit_code, Preempted.exit_code)  # exit codes of members
FINISHED = ("done", "diverged")  # a run that diverged is a result: it would diverge again


class SweepMember(NamedTuple):
    """One run of a sweep: the arguments of `bn_jax.main`, and the config that they give."""

    name: str  # of its folder below the sweep's: bn_x5/seed_0
    workdir: pathlib.Path
    arguments: list[str]
    config: ConfigDict

    def command(self, python: str = "python") -> list[str]:
        """Returns the command line that runs it."""
        return [python, "-m", "bn_jax.main", *self.arguments]


def members(
    configs: Sequence[str],
    scale: str,
    seeds: int,
    workdir: pathlib.Path,
    settings: Sequence[str] = (),
    grid: Mapping[str, Sequence[str]] | None = None,
) -> list[SweepMember]:
    """Lists the runs of a sweep, seed by seed, so that all have one run before any has two.

    Args:
      configs: names of experiments.
      scale: of all experiments; empty for the default of each.
      seeds: their number; 0 .. seeds - 1 are added to each config's own seed.
      workdir: the sweep's folder.
      settings: FIELD=VALUE for all.
      grid: {field: values}; every combination is run.

    Raises:
      ConfigError: an experiment, scale, field or value that main would refuse too.
    """
    points = _points(grid or {})
    found = []
    for seed in range(seeds):
        for config in configs:
            file = f"configs/{config}.py"
            if scale:
                file += f":{scale}"
            own_seed = load(file).seed  # members of an ensemble differ in it
            for point in points:
                name = "/".join([config, *point, f"seed_{seed}"])
                changes = [*settings, *point, f"seed={own_seed + seed}"]
                found.append(member(name, file, changes, workdir))
    return found


def _points(grid: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Lists the points of a grid, each as its FIELD=VALUE; without a grid, one empty point."""
    choices = []
    for field, values in grid.items():
        choices.append([f"{field}={value}" for value in values])

    points = [list(point) for point in itertools.product(*choices)]
    for point in points:
        if any("/" in setting for setting in point):
            raise ConfigError(f"--grid: a value with / cannot name a folder: {point}")
    return points


def member(name: str, file: str, changes: Sequence[str], workdir: pathlib.Path) -> SweepMember:
    """Makes the run of a config with changed fields (FIELD=VALUE), in `workdir`/`name`."""
    own_workdir = workdir / name
    arguments = [
        f"--config={file}",
        *[f"--config.{change}" for change in changes],
        f"--workdir={own_workdir}",
    ]
    return SweepMember(name, own_workdir, arguments, read(file, changes))


def status(member: SweepMember) -> str:
    """Returns the status in run.json: done, diverged, preempted, ...; 'new' without run.json.

    A run that is done with fewer steps than are wanted now is 'preempted': main resumes it.
    Raises ConfigError if the folder holds a run of another config.
    """
    run = reader.read_record(member.workdir)
    if run is None:
        return "new"

    config = guard.as_begun(member.config, member.workdir)
    data = run["info"].get("data", {})
    config = settled(config, data.get("train_examples", 0))
    if config.batch_per_device:
        from bn_jax.experiment import build  # takes seconds; only scale `pod` needs it

        config = build.for_devices(config, run["hardware"]["devices"])
    guard.require_same_config(member.workdir, run["config"], config.to_dict())

    said = run["status"]
    if said == "done" and run["config"]["total_steps"] < config.total_steps:
        return "preempted"
    return said


def finished_in(folder: pathlib.Path, found: Sequence[SweepMember]) -> list[SweepMember]:
    """Returns the members; those with complete records in `folder` get their workdirs there.

    Records are complete if run.json says that a run of the same config is done, with at least as
    many steps, and metrics.jsonl has its last evaluation, or if run.json says that it diverged.
    Checkpoints are not needed. Raises ConfigError for records of another config.
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
    evaluations = run.lines["eval"]
    if not evaluations:
        return False
    return evaluations[-1]["step"] == run.config["total_steps"]


def threads(found: Sequence[SweepMember]) -> int | None:
    """Returns the CPU threads of the members that have run, or None; the others get as many.

    Sums are split by thread, so networks that are compared need the same number. Raises ConfigError
    if members differ from each other, or if NPROC would give another number to a member that is
    resumed, unless BN_JAX_ANY_THREADS=1 allows that.
    """
    if os.environ.get(guard.ANY_THREADS) == "1":
        return None

    seen: dict[int, str] = {}
    for member in found:
        run = reader.read_record(member.workdir)
        hardware = {} if run is None else run.get("hardware", {})
        if hardware.get("platform") != "cpu":
            continue
        seen.setdefault(hardware["cpu_threads"], member.name)
        if "NPROC" in os.environ:
            own_devices = hardware.get("devices", 1) // hardware.get("processes", 1)
            seen.setdefault(pool_size(own_devices), "this process (NPROC)")

    if len(seen) > 1:
        each = ", ".join(f"{count} in {name}" for count, name in seen.items())
        raise ConfigError(
            f"the members have different numbers of CPU threads ({each}) and cannot be compared to "
            f"the last bit: use another --workdir, or set {guard.ANY_THREADS}=1"
        )
    return next(iter(seen), None)


def environment(member: SweepMember, slot: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a member in a slot; a resumed run keeps its number of threads."""
    found = {**os.environ, **slot, "PYTHONUNBUFFERED": "1"}
    run = reader.read_record(member.workdir)
    if run is None or "NPROC" in os.environ:
        return found

    hardware = run["hardware"]
    if hardware["platform"] == "cpu":
        found["NPROC"] = str(hardware["cpu_threads"])
    return found


def slots(jobs: int | None) -> list[dict[str, str]]:
    """Returns the environment variables of each member that runs at the same time.

    By default one member runs on each NVIDIA GPU, a single one on any other accelerator, and on CPU
    one for every two cores. On CPU members share the cores evenly.
    """
    gpus = _gpus()
    cores = usable_cpus()
    if jobs is None:
        if gpus:
            jobs = len(gpus)
        elif _has_tpu():
            jobs = 1
        else:
            jobs = max(1, cores // 2)

    if gpus:
        return _gpu_slots(gpus, jobs)

    slot = {}
    # The number of threads is part of a CPU run's identity, so it is only set if it must be.
    if jobs > 1 and "NPROC" not in os.environ:
        slot["NPROC"] = str(max(1, cores // jobs))
    return [dict(slot) for _ in range(jobs)]


def _gpu_slots(gpus: Sequence[str], jobs: int) -> list[dict[str, str]]:
    """Places the jobs on the GPUs in turn; those on the same GPU share 90% of its memory."""
    found = []
    for i in range(jobs):
        found.append({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]})

    if jobs > len(gpus):
        on_each = math.ceil(jobs / len(gpus))
        for slot in found:
            slot["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / on_each:.2f}"
    return found


def _gpus() -> list[str]:
    """Lists the NVIDIA GPUs that members may use, as CUDA_VISIBLE_DEVICES names them."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms.split(",")[0] == "cpu":
        return []

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    devices = list(pathlib.Path("/dev").glob("nvidia[0-9]*"))
    return [str(i) for i in range(len(devices))]


def _has_tpu() -> bool:
    devices = pathlib.Path("/dev")
    return any(devices.glob("accel*")) or (devices / "vfio/0").exists()


def run(
    found: Sequence[SweepMember],
    jobs: int | None,
    beside: Sequence[SweepMember] = (),
) -> None:
    """Runs the members that are not finished, and prints how all of them ended.

    beside: further members, which are not run here but must have as many threads.

    Raises:
      Preempted: a signal stopped this process or a member; the same sweep resumes.
      UserError: members failed; the others were run.
    """
    todo = [member for member in found if status(member) not in FINISHED]
    print(f"{len(found)} members: {len(found) - len(todo)} finished before, {len(todo)} to run")

    places = slots(jobs)
    count = threads([*found, *beside])
    if count is not None and "NPROC" not in os.environ:
        for slot in places:
            slot["NPROC"] = str(count)

    processes = []
    for member in todo:
        command = member.command(sys.executable)
        log = member.workdir / "member.log"
        processes.append((member.name, command, log, functools.partial(environment, member)))
    pool = Pool(places, total=len(found))
    codes = pool.run(processes)
    print(outcome(found))

    allowed = [*EXPECTED, None]  # None: it was not begun
    if pool.stopped:
        allowed += [128 + signal.SIGTERM, 128 + signal.SIGKILL]
    failed = [member for member in todo if codes[member.name] not in allowed]
    for member in failed:
        print(f"failed with exit code {codes[member.name]}: {member.workdir}/member.log")

    if pool.stopped:
        raise Preempted(
            "the sweep was stopped; the same command resumes its members from their saved steps"
        )
    if failed:
        raise UserError(f"{len(failed)} of {len(found)} members failed; their logs are named above")
    if Preempted.exit_code in codes.values():
        raise Preempted("members were stopped one by one; the same command resumes them")


def outcome(found: Sequence[SweepMember]) -> str:
    """Describes each member in a line (status, accuracy if it is done), and then the data."""
    lines = []
    data = ""
    for member in found:
        said = "not run"
        try:
            record = reader.read_record(member.workdir)
        except ConfigError:
            record = None
            said = "unreadable"

        if record is not None:
            said = _ended(record)
            about = record["info"].get("data", {})
            data = about.get("description", data)
        lines.append(f"  {member.name:40} {said}")

    if data:
        lines.append(f"data: {data}")
    return "\n".join(lines)


def _ended(record: Mapping[str, Any]) -> str:
    """Says how a run ended: its status with its accuracy, or with the error."""
    said = record["status"]
    results = record.get("results", {})
    if said == "done":
        said += f"  {_accuracy(results)}"
        if "test" in results:
            said += f" held out, {_accuracy(results['test'])} of the test split"
    elif said in ("diverged", "failed", "preempted"):
        _, _, error = results.get("error", "").partition(": ")
        said += f"  {error[:70]}"
    return said


def _accuracy(scores: Mapping[str, Any]) -> str:
    return f"{100 * scores['top1']:.2f}% of {scores['examples']:,}"
