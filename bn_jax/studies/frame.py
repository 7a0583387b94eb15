"""Runs a study: runs of one config that differ in some fields, measurements, a table and a picture.

The runs are members of a sweep (`experiment.members`): processes of `bn_jax.main`, each in its own
folder DIR/PART/seed_K. What is measured on a finished run is kept beside it in measured.json. A
study that is started again skips finished runs and measurements. Table and picture are made only
from these records.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from bn_jax import step
from bn_jax.activations import measure
from bn_jax.errors import ConfigError
from bn_jax.experiment import build, members
from bn_jax.experiment.build import Experiment
from bn_jax.experiment.config import load, read
from bn_jax.experiment.members import SweepMember
from bn_jax.figures.origins import made_by
from bn_jax.figures.plotting import save
from bn_jax.step import TrainState
from bn_jax.tables import markdown_table
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


Measure = Callable[[Experiment, pathlib.Path], dict[str, Any]]  # of a finished run's workdir


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
    measure: Measure | None = None


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
        recorded = reader.read_run(member.workdir)
        measured: dict[str, Any] = {}
        if study.measure is not None and recorded.status == "done":
            print(f"[{number}/{len(found)}] {member.name}: measured", flush=True)
            measured = _measured(study.measure, member.workdir)

        part, _, seed = member.name.rpartition("/seed_")
        seeds_of_part = results.setdefault(part, {})
        seeds_of_part[int(seed)] = Result(recorded, measured)
    return _write(study, workdir, results)


def runs(
    study: Study,
    workdir: pathlib.Path,
    file: str,
    settings: Sequence[str],
    seeds: int,
) -> list[SweepMember]:
    """Lists the runs of a study, seed by seed. Raises ConfigError as `config.read` does."""
    own = load(file)
    size = study.sizes.get(own.model.name, ())
    fields = [*size, *settings]
    parts = study.parts(read(file, fields))

    found = []
    for seed in range(seeds):
        for part in parts:
            name = f"{part.name}/seed_{seed}"
            changes = [*fields, *part.settings, f"seed={own.seed + seed}"]
            found.append(members.member(name, file, changes, workdir))
    return found


def _begin(study: Study, workdir: pathlib.Path, file: str, settings: Sequence[str]) -> None:
    """Records what the folder holds. Raises ConfigError if that is another study."""
    path = workdir / RECORD
    wanted = {
        "study": study.name,
        "config": file,
        "settings": list(settings),
    }
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
    function: Measure,
    workdir: pathlib.Path,
) -> dict[str, Any]:
    """Returns what was measured on a run; measures it now if it was not measured before."""
    path = workdir / MEASURED
    if path.exists():
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            files.warn(f"{path} cannot be read ({error}); it is measured again")

    experiment = build.from_workdir(workdir)
    numbers = files.plain(function(experiment, workdir))
    files.write_atomic(path, json.dumps(numbers).encode() + b"\n")
    return numbers


def _write(study: Study, workdir: pathlib.Path, results: Results) -> list[pathlib.Path]:
    """Writes the table, which is also printed, and the picture; returns their paths."""
    table = study.table(results)
    cells = markdown_table(table.head, table.rows)
    recorded = [result.run for seeds in results.values() for result in seeds.values()]
    parts = [
        f"# {study.question}",
        f"Follows {study.follows}. {recorded[0].data['description']}.",
        cells,
        f"{table.legend} {OVER_SEEDS}",
        made_by(one.origin for one in recorded),
    ]
    text = "\n\n".join(parts) + "\n"

    path = workdir / f"{study.name}.md"
    files.write_atomic(path, text.encode())
    print(cells)

    figure = study.draw(results)
    return [path, *save(figure, workdir, study.name)]


# What several studies need.


def arms(config: ConfigDict) -> list[Part]:
    """Makes two parts, the network with BN and without it, which are otherwise the same."""
    bn = Part("bn", ("norm=batch_norm",))
    plain = Part("plain", ("norm=none",))
    return [bn, plain]


def divergences(seeds: Mapping[int, Result]) -> list[str]:
    """Returns 'diverged at step 7' for each run that diverged."""
    said = []
    for run, _ in seeds.values():
        if run.status == "diverged":
            # The whole line is such as 'DivergedError: diverged at step 7: loss nan, ...'.
            start = run.error.find("diverged")
            where, _, _ = run.error[start:].partition(":")
            said.append(where)
    return said


def finals(seeds: Mapping[int, Result]) -> dict[int, float]:
    """Returns {seed: top-1 (a share) of the last evaluation} of the runs that are done."""
    found = {}
    for seed, (run, _) in seeds.items():
        if run.status == "done":
            last = run.lines["eval"][-1]
            found[seed] = last["top1"]
    return found


def measurements(seeds: Mapping[int, Result]) -> dict[int, dict[str, Any]]:
    """Returns {seed: what was measured} of the runs that are done."""
    return {seed: result.measured for seed, result in seeds.items() if result.measured}


def kept_evenly(total: int, every: int) -> tuple[str, ...]:
    """Returns the fields of runs that are evaluated at the end and kept every so many steps."""
    return (
        f"total_steps={total}",
        f"eval_every={total}",
        "eval_early=0",
        f"checkpoint_every={every}",
        f"keep_every={every}",
    )


def states(exp: Experiment, workdir: pathlib.Path) -> Iterator[tuple[int, TrainState]]:
    """Yields (step, state) of the initial network and of every kept checkpoint."""
    for number in measure.kept_steps(workdir):
        yield number, build.state_at(exp, workdir, number)


class KeptLoss(NamedTuple):
    """The loss at a kept step of a training.

    step, state: after so many steps. batch: of the step that follows. value_and_grad: maps
    parameters to the loss on that batch, without L2, and its gradient.
    """

    step: int
    state: TrainState
    batch: dict[str, Any]
    value_and_grad: Callable[[Any], tuple[Any, Any]]


def losses(exp: Experiment, workdir: pathlib.Path) -> Iterator[KeptLoss]:
    """Yields the loss of the initial network and of every kept checkpoint."""
    seed = exp.config.seed
    size = exp.config.batch_size
    gradients = jax.jit(functools.partial(step.gradients, model=exp.model))

    for number, state in states(exp, workdir):
        batch = exp.data.train_batch(number, size, slice(0, size), seed)
        dropout = step.dropout_key(seed, number)

        def value_and_grad(params, stats=state.batch_stats, batch=batch, dropout=dropout):
            grads, means, _ = gradients(params, stats, batch, dropout)
            return means["loss"], grads

        yield KeptLoss(number, state, batch, value_and_grad)


def mean_cell(values: Mapping[int, float]) -> str:
    """Writes the mean of {seed: value} for a table; without a value, all seeds diverged."""
    if not values:
        return "diverged"
    return f"{np.mean(list(values.values())):.3g}"


def percent(shares: Mapping[int, float]) -> str:
    """Writes {seed: share of 1} for a table, '-' if there is none."""
    if not shares:
        return "-"
    mean = single(list(shares.values()))
    return written(mean, ".2f", factor=100, unit="%")
