"""Runs a study: runs of one config that differ in some fields, measurements, a table and a picture.

The runs are members of a sweep (`experiment.members`): processes of `bn_jax.main`, each in its own
folder DIR/PART/seed_K. What is measured on a finished run is kept beside it in measured.json. A
study that is started again skips finished runs and measurements. Table and picture are made only
from these records.
"""

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from bn_jax.activations import measure
from bn_jax.errors import ConfigError
from bn_jax.experiment import build, members
from bn_jax.experiment.build import Experiment
from bn_jax.experiment.config import load, read
from bn_jax.experiment.members import SweepMember
from bn_jax.figures.origins import made_by
from bn_jax.figures.plotting import save
from bn_jax.step import TrainState
from bn_jax.uncertainty import single, written
from bn_jax.workdir import files, reader
from bn_jax.workdir.reader import Run

RECORD = "study.json"
MEASURED = "measured.json"
OVER_SEEDS = "A value is the mean over seeds; its 95% interval by Student's t is in parentheses."


class Part(NamedTuple):
    """One network of a study: the folder of its runs, and the fields (FIELD=VALUE) that it sets."""

    name: str
    settings: tuple[str, ...] = ()


class Result(NamedTuple):
    """A recorded run, and what was measured on it, which is empty if it diverged."""

    run: Run
    measured: dict[str, Any]


Results = Mapping[str, Mapping[int, Result]]  # part -> seed -> result


class Table(NamedTuple):
    """The cells of a table, and the sentences below it that explain them."""

    head: list[str]
    rows: list[list[str]]
    legend: str


class Study(NamedTuple):
    """A question, and how it is answered.

    Attributes:
      name: the word on the command line.
      question: what it asks.
      follows: the paper that it follows.
      minutes: of one seed at its default size on two cores, as text.
      config: the experiment that is changed, unless the command line names another.
      sizes: fields by `model.name`, which make the study as short as `minutes` says.
      parts: makes the networks from the config with these fields.
      table, draw: make table and picture from the results.
      measure: measures a finished run; returns JSON.
    """

    name: str
    question: str
    follows: str
    minutes: str
    config: str
    sizes: Mapping[str, Sequence[str]]
    parts: Callable[[ConfigDict], Sequence[Part]]
    table: Callable[[Results], Table]
    draw: Callable[[Results], Figure]
    measure: Callable[[Experiment, pathlib.Path], dict[str, Any]] | None = None


def run(
    study: Study,
    workdir: pathlib.Path,
    config: str = "",
    settings: Sequence[str] = (),
    seeds: int = 1,
    jobs: int | None = None,
) -> list[pathlib.Path]:
    """Trains and measures what is missing; writes and prints the table; returns all paths.

    Args:
      config: NAME[:SCALE] of the experiment; empty: the study's own.
      settings: FIELD=VALUE for all its runs.
      seeds: 0 .. seeds - 1, added to the config's own seed.
      jobs: the number of runs at the same time, as in `bn_jax.sweep`.

    Raises:
      ConfigError: a field or value that main would refuse, or `workdir` holds a study of another
        config.
      UserError: as in `members.run`.
    """
    file = config or study.config
    found = runs(study, workdir, file, settings, seeds)
    _begin(study, workdir, file, settings)
    members.run(found, jobs)

    results: dict[str, dict[int, Result]] = {}
    for number, member in enumerate(found, start=1):
        part, _, seed = member.name.rpartition("/seed_")
        recorded = reader.read_run(member.workdir)
        measured: dict[str, Any] = {}
        if study.measure is not None and recorded.status == "done":
            print(f"[{number}/{len(found)}] {member.name}: measured", flush=True)
            measured = _measured(study.measure, member.workdir)
        results.setdefault(part, {})[int(seed)] = Result(recorded, measured)
    return _write(study, workdir, results)


def runs(
    study: Study, workdir: pathlib.Path, file: str, settings: Sequence[str], seeds: int
) -> list[SweepMember]:
    """Lists the runs of a study, seed by seed. Raises ConfigError as `config.read` does."""
    own = load(file)
    fields = [*study.sizes.get(own.model.name, ()), *settings]
    parts = study.parts(read(file, fields))
    return [
        members.member(
            f"{part.name}/seed_{seed}",
            file,
            [*fields, *part.settings, f"seed={own.seed + seed}"],
            workdir,
        )
        for seed in range(seeds)
        for part in parts
    ]


def _begin(study: Study, workdir: pathlib.Path, file: str, settings: Sequence[str]) -> None:
    """Records what the folder holds. Raises ConfigError if that is another study."""
    path = workdir / RECORD
    wanted = {"study": study.name, "config": file, "settings": list(settings)}
    if path.exists():
        try:
            there = json.loads(path.read_bytes())
        except ValueError:
            there = "a damaged record"
        if there != wanted:
            raise ConfigError(
                f"{workdir} holds {json.dumps(there)}, not {json.dumps(wanted)}: give the same "
                "config and fields to resume it, or another --workdir"
            )
        return
    with files.reported(path, "cannot write"):
        workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, json.dumps(wanted, indent=1).encode() + b"\n")


def _measured(
    function: Callable[[Experiment, pathlib.Path], dict[str, Any]], workdir: pathlib.Path
) -> dict[str, Any]:
    """Returns what was measured on a run; measures it now if it was not measured before."""
    path = workdir / MEASURED
    if path.exists():
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            files.warn(f"{path} cannot be read ({error}); it is measured again")
    numbers = files.plain(function(build.from_workdir(workdir), workdir))
    files.write_atomic(path, json.dumps(numbers).encode() + b"\n")
    return numbers


def _write(study: Study, workdir: pathlib.Path, results: Results) -> list[pathlib.Path]:
    """Writes the table, which is also printed, and the picture; returns their paths."""
    table = study.table(results)
    lines = [f"| {' | '.join(cells)} |" for cells in (table.head, *table.rows)]
    lines.insert(1, "|---" * len(table.head) + "|")
    recorded = [result.run for seeds in results.values() for result in seeds.values()]
    text = [
        f"# {study.question}",
        f"Follows {study.follows}. {recorded[0].data['description']}.",
        "\n".join(lines),
        f"{table.legend} {OVER_SEEDS}",
        made_by(one.origin for one in recorded),
    ]
    path = workdir / f"{study.name}.md"
    files.write_atomic(path, ("\n\n".join(text) + "\n").encode())
    print(text[2])
    return [path, *save(study.draw(results), workdir, study.name)]


# What several studies need.


def arms(config: ConfigDict) -> list[Part]:
    """Makes two parts, the network with BN and without it, which are otherwise the same."""
    return [Part("bn", ("norm=batch_norm",)), Part("plain", ("norm=none",))]


def divergences(seeds: Mapping[int, Result]) -> list[str]:
    """Returns 'diverged at step 7' for each run that diverged."""
    errors = [r.run.error for r in seeds.values() if r.run.status == "diverged"]
    return [error[error.find("diverged") :].partition(":")[0] for error in errors]


def finals(seeds: Mapping[int, Result]) -> dict[int, float]:
    """Returns {seed: top-1 (a share) of the last evaluation} of the runs that are done."""
    runs = {seed: result.run for seed, result in seeds.items() if result.run.status == "done"}
    return {seed: run.lines["eval"][-1]["top1"] for seed, run in runs.items()}


def measurements(seeds: Mapping[int, Result]) -> dict[int, dict[str, Any]]:
    """Returns {seed: what was measured} of the runs that are done."""
    return {seed: result.measured for seed, result in seeds.items() if result.measured}


def kept_evenly(total: int, every: int) -> tuple[str, ...]:
    """Returns the fields of runs that are evaluated at the end and kept every so many steps."""
    return (
        *(f"total_steps={total}", f"eval_every={total}", "eval_early=0"),
        *(f"checkpoint_every={every}", f"keep_every={every}"),
    )


def states(exp: Experiment, workdir: pathlib.Path) -> Iterator[tuple[int, TrainState]]:
    """Yields (step, state) of the initial network and of every kept checkpoint."""
    for step in measure.kept_steps(workdir):
        yield step, build.state_at(exp, workdir, step)


def percent(shares: Mapping[int, float]) -> str:
    """Writes {seed: share of 1} for a table, '-' if there is none."""
    if not shares:
        return "-"
    return written(single(list(shares.values())), ".2f", factor=100, unit="%")
