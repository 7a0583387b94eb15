"""Reads what runs have recorded, and decides which runs may be compared.

Only this module interprets run.json, metrics.jsonl and evaluations.jsonl.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from bn_jax.errors import ConfigError, DiskError
from bn_jax.workdir import files
from bn_jax.workdir.lines import EvaluationLine, MetricLines, RunRecord

RUN = "run.json"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"

# Fields that older records lack, each with the value that describes what runs did then.
ADDED = {
    "keep_every": 0,
    "bn.noise": 0.0,
    "bn.freeze_after": 0,
    "model.init": "glorot",
    "eval_early": 0,
    "eval_test": False,
    "decay_epochs": 0.0,  # decay_examples was given, and the same for every data set
    "reproducible": False,
    "checkpoint_wait": 0.0,
    "learning_rate_scaling": "none",
    "warmup_examples": 0.0,
    "record.wandb": False,
    "precision": "default",
    "deterministic": False,
    "write_seconds": 0.0,
}


# One run


def read_record(workdir: pathlib.Path) -> RunRecord | None:
    """Reads WORKDIR/run.json and completes its config; returns None if there is no such file.

    Raises:
      ConfigError: the file is there but is not the record of a run, or cannot be read.
    """
    path = workdir / RUN
    try:
        run = json.loads(path.read_bytes())
        if isinstance(run["info"], dict):
            run["config"] = completed(run["config"])
            return cast(RunRecord, run)
        reason = "its info is not an object"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = error.strerror or str(error)
    except KeyError as error:
        reason = f"it has no {error}"
    except (ValueError, TypeError, AttributeError) as error:
        reason = f"it is damaged: {error}"
    raise ConfigError(
        f"{path} cannot be read as the record of a run ({reason}): restore it, or use another "
        "workdir"
    )


def require_record(workdir: pathlib.Path) -> RunRecord:
    """Reads as `read_record` does, but raises ConfigError if `workdir` does not hold a run."""
    run = read_record(workdir)
    if run is None:
        raise ConfigError(
            f"{workdir} is not a run directory: it has no {RUN}. Give the --workdir of a trained "
            "run"
        )
    return run


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Completes a recorded config with the fields that were ADDED since."""
    found = dict(config)
    mlp = config.get("model", {}).get("name") == "mlp"
    for field, value in ADDED.items():
        if mlp and field == "model.init":  # only Inception has it
            continue
        section, _, name = field.rpartition(".")
        if not section:
            found.setdefault(name, value)
        elif name not in found.get(section, {}):
            found[section] = {**found.get(section, {}), name: value}
    return found


def added_since(workdir: pathlib.Path) -> set[str]:
    """Returns the fields of ADDED that are not in WORKDIR/run.json, which exists and is whole."""
    config = json.loads((workdir / RUN).read_bytes())["config"]
    return ADDED.keys() - flat(config).keys()


class Run(NamedTuple):
    """One recorded run.

    Attributes:
      config: as recorded, completed.
      data: what run.json says of its data.
      lines: of metrics.jsonl, by kind.
      status: as in run.json (done, running, preempted, diverged, failed).
      error: the line that ended it, or ''.
      origin: its source (version, commit), versions and hardware.
    """

    workdir: pathlib.Path
    config: dict[str, Any]
    data: dict[str, Any]
    lines: MetricLines
    status: str
    error: str
    origin: dict[str, Any]


def read_run(workdir: pathlib.Path) -> Run:
    """Reads a run's records. Raises ConfigError if there are none, or if they are damaged."""
    if not is_run(workdir):
        raise ConfigError(
            f"{workdir} holds no recorded run ({RUN} and {METRICS}): "
            "train one with `python -m bn_jax.main --config=... --workdir=...`"
        )
    run = require_record(workdir)
    try:
        with files.readable(workdir / METRICS):
            lines = _read_metrics(workdir)
        return Run(
            workdir=workdir,
            config=run["config"],
            data=run["info"]["data"],
            lines=lines,
            status=run["status"],
            error=str(run["results"].get("error", "")),
            origin={
                "source": run["source"],
                "versions": run.get("versions", {}),
                "hardware": run["hardware"],
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError) as damage:
        raise ConfigError(
            f"the records in {workdir} are damaged ({damage!r}): restore them, or move the folder "
            "away"
        ) from None


def _read_metrics(workdir: pathlib.Path) -> MetricLines:
    text = (workdir / METRICS).read_text(encoding="utf-8-sig")  # an editor may have marked it

    # A run that is still training, or was killed, may have half a line at the end.
    whole = text[: text.rfind("\n") + 1]

    by_kind: dict[str, list[Any]] = {"train": [], "eval": [], "test": [], "activation": []}
    for line in map(json.loads, whole.splitlines()):
        by_kind.setdefault(line["kind"], []).append(line)
    return {
        "train": by_kind["train"],
        "eval": by_kind["eval"],
        "test": by_kind["test"],
        "activation": by_kind["activation"],
    }


def is_run(folder: pathlib.Path) -> bool:
    """Whether a run has recorded something in `folder`. Raises ConfigError if it is unreadable."""
    with files.readable(folder):
        return (folder / RUN).is_file() and (folder / METRICS).is_file()


def find_runs(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the workdirs in `folder`, at any depth, in the order of their names.

    Hidden folders are left out, and links to what is found anyway (such as `latest`), so that a run
    counts once.

    Raises:
      ConfigError: this user may not read one of the folders.
    """
    yield from _find_runs(folder, (folder.resolve(),))


def _find_runs(folder: pathlib.Path, above: tuple[pathlib.Path, ...]) -> Iterator[pathlib.Path]:
    """Searches one folder. `above`: where the search began, and where links have led since."""
    if is_run(folder):
        yield folder
        return

    with files.readable(folder):
        children = sorted(folder.iterdir()) if folder.is_dir() else []
    for child in children:
        if child.name.startswith(".") or not child.is_dir():
            continue
        if not child.is_symlink():
            yield from _find_runs(child, above)
            continue
        target = child.resolve()
        if not any(target.is_relative_to(place) or place.is_relative_to(target) for place in above):
            yield from _find_runs(child, (*above, target))


# Several runs: which ones may be compared


# Runs that are compared must agree in these. Fields that experiments change are not listed.
SETTING = (
    "scale",
    "image_size",
    "batch_size",
    "eval_every",
    "eval_early",
    "eval_test",
    "model.name",
    "model.variant",
    "model.width",
    "data.name",
    "data.holdout",
)

# What may differ between the seeds of one experiment: it does not change what is computed.
FREE = (
    "seed",
    "data.dir",
    "log_every",
    "checkpoint_every",
    "checkpoint_wait",
    "write_seconds",
    "keep_last",
    "keep_best",
    "keep_every",
)


def read_groups(folder: pathlib.Path) -> dict[str, list[Run]]:
    """Reads the runs in `folder` as {experiment: its seeds}, and checks that they are comparable.

    The experiment is the path of the run's folder below `folder`, without a last part `seed_K`.

    Raises:
      ConfigError: the folder contains no runs, its runs differ in scale or data, or runs of one
        experiment have the same seed or differ in more than the seed.
    """
    groups: dict[str, list[Run]] = {}
    for workdir in find_runs(folder):
        parts = workdir.relative_to(folder).parts
        if parts and parts[-1].startswith("seed_"):
            parts = parts[:-1]
        label = "/".join(parts) or workdir.resolve().parent.name
        groups.setdefault(label, []).append(read_run(workdir))
    if not groups:
        raise ConfigError(f"{folder} holds no recorded run: train some with bn_jax.sweep")

    require_comparable([run for group in groups.values() for run in group])
    for label, group in groups.items():
        _require_one_experiment(folder, label, group)
        group.sort(key=lambda run: run.config["seed"])
    return groups


def require_comparable(runs: Sequence[Run]) -> None:
    """Raises ConfigError for runs of different scales or data; see SETTING."""
    for run in runs[1:]:
        _require_same(runs[0], run, SETTING, "cannot be compared")


def _require_one_experiment(folder: pathlib.Path, label: str, group: Sequence[Run]) -> None:
    seeds = [run.config["seed"] for run in group]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"{folder}: {label} has a seed twice ({sorted(seeds)}); move one of them away"
        )

    first = group[0]
    for run in group[1:]:
        fields = flat(first.config).keys() | flat(run.config).keys()
        decisive = sorted(f for f in fields if f not in FREE and not f.startswith("record."))
        _require_same(first, run, decisive, "are not seeds of one experiment")


def read_pair(one: pathlib.Path, other: pathlib.Path) -> tuple[Run, Run]:
    """Reads two runs for Fig. 1. Raises ConfigError unless they share seed, steps and data."""
    a = read_run(one)
    b = read_run(other)
    _require_same(a, b, (*SETTING, "seed", "total_steps"), "cannot be compared as a pair")
    return a, b


def _require_same(a: Run, b: Run, fields: Iterable[str], why: str) -> None:
    one = flat(a.config)
    two = flat(b.config)
    differs = [
        f"{field} ({one.get(field, 'absent')}, {two.get(field, 'absent')})"
        for field in fields
        if one.get(field, "absent") != two.get(field, "absent")
    ]
    for name, label in (
        ("eval_examples", "number of evaluated examples"),
        ("description", "data.description"),
    ):
        if a.data.get(name) != b.data.get(name):
            differs.append(f"{label} ({a.data.get(name, '?')}, {b.data.get(name, '?')})")

    if differs:
        shown = ", ".join(differs[:4])
        raise ConfigError(
            f"{a.workdir} and {b.workdir} {why}: they differ in {shown}. Keep them in separate "
            "folders"
        )


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens nested fields: {'data': {'name': 1}} becomes {'data.name': 1}."""
    # Imported here, since flax imports jax, which the figures of a single run do not need.
    from flax import traverse_util

    return traverse_util.flatten_dict(dict(tree), sep=".")


# evaluations.jsonl. It is separate from metrics.jsonl, whose lines come from training alone and are
# the same after every resume.


def append_evaluation(folder: pathlib.Path, line: Mapping[str, Any]) -> None:
    """Appends a line, with its `time`; if the disk cannot be written, stderr says so."""
    path = folder / EVALUATIONS
    data = json.dumps(files.plain({"time": files.now(), **line})).encode() + b"\n"
    try:
        with files.reported(path, "cannot write"), path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read() != b"\n":
                    # The last line was cut off. It stays on a line of its own, and is skipped.
                    data = b"\n" + data
            file.write(data)
    except DiskError as error:
        files.warn(f"the evaluation was not recorded (--out=DIR records it elsewhere): {error}")


def read_evaluations(folder: pathlib.Path) -> Iterator[EvaluationLine]:
    """Yields the lines of one folder; damaged ones are skipped, and stderr names them."""
    path = folder / EVALUATIONS
    with files.readable(path):
        texts = path.read_text(errors="replace").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            whole = line.keys() >= EvaluationLine.__required_keys__
        except (ValueError, AttributeError):
            whole = False

        if whole:
            yield line
        elif text:
            files.warn(f"{path}: line {number} is damaged and skipped")


def find_evaluations(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders below `folder`, itself included, that hold evaluations."""
    return sorted(path.parent for path in folder.rglob(EVALUATIONS))
