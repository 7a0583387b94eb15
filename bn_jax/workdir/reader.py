"""May this workdir be used for this config? Asked before anything is compiled or written."""

import datetime
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bn_jax.errors import ConfigError, DiskError
from bn_jax.workdir import files

# Fields that older records lack, each with the value that stands for what runs did then.
ADDED = {
    "reproducible": False,
    "checkpoint_wait": 0.0,
    "learning_rate_scaling": "none",
    "warmup_examples": 0.0,
    "record.wandb": False,
    "precision": "default",
}


def read_record(workdir: pathlib.Path) -> dict[str, Any] | None:
    """WORKDIR/run.json; None if there is none. Raises ConfigError if it is not one."""
    path = workdir / "run.json"
    try:
        run = json.loads(path.read_bytes())
        if {"config", "attempts"} <= run.keys():
            return run
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError):
        pass
    raise ConfigError(f"{path} cannot be read as a run's record; move it away or choose another")


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded config with the fields that were ADDED since."""
    found = dict(config)
    for field, value in ADDED.items():
        section, _, name = field.rpartition(".")
        if section and name not in found.get(section, {}):
            found[section] = {**found.get(section, {}), name: value}
        elif not section:
            found.setdefault(name, value)
    return found


# What runs, finished or not, have recorded: run.json and metrics.jsonl, nothing else.


# Runs that are compared must agree in these; what experiments change (rate, BN, ...) is not here.
SETTING = (
    "scale",
    "image_size",
    "batch_size",
    "eval_every",
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
    "keep_last",
    "keep_best",
)


class Run(NamedTuple):
    """One recorded run: its config, what run.json says of its data, metrics.jsonl by kind.

    `status` as in run.json (done, running, preempted, diverged, failed), `error` the line that
    ended it, `origin` its commit and hardware.
    """

    workdir: pathlib.Path
    config: dict[str, Any]
    data: dict[str, Any]
    lines: dict[str, list[dict[str, Any]]]
    status: str
    error: str
    origin: dict[str, Any]


def read_run(workdir: pathlib.Path) -> Run:
    """Reads a run's records. Raises ConfigError if there are none, or if they are damaged."""
    if not is_run(workdir):
        raise ConfigError(
            f"{workdir} holds no recorded run (run.json and metrics.jsonl): "
            "train one with `python -m bn_jax.main --config=... --workdir=...`"
        )
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "eval": [], "activation": []}
    text = (workdir / "metrics.jsonl").read_text()
    try:
        # A run at work, or a killed one, may have half a line at the end.
        for line in map(json.loads, text[: text.rfind("\n") + 1].splitlines()):
            lines.setdefault(line["kind"], []).append(line)
        info = json.loads((workdir / "run.json").read_text())
        error = str(info["results"].get("error", ""))
        origin = {"source": info["source"], "hardware": info["hardware"]}
        data, status = info["info"]["data"], info["status"]
        config = completed(info["config"])
        return Run(workdir, config, data, lines, status, error, origin)
    except (ValueError, KeyError, TypeError, AttributeError) as damage:
        raise ConfigError(
            f"the records in {workdir} are damaged: {damage!r}; move it away"
        ) from None


def is_run(folder: pathlib.Path) -> bool:
    """Whether a run has recorded something in `folder`."""
    return (folder / "run.json").is_file() and (folder / "metrics.jsonl").is_file()


def find_runs(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The workdirs in `folder`, at any depth, in the order of their names."""
    if is_run(folder):
        yield folder
        return
    if folder.is_dir():
        for child in sorted(child for child in folder.iterdir() if child.is_dir()):
            yield from find_runs(child)


def read_groups(folder: pathlib.Path) -> dict[str, list[Run]]:
    """The runs in `folder` as {experiment: its seeds}, comparable with each other.

    The experiment is the path of the run's folder below `folder`, without a last part `seed_K`.

    Raises:
      ConfigError: no runs; runs of different scales or data; an experiment whose seeds differ in
        more than the seed, or has one twice.
    """
    groups: dict[str, list[Run]] = {}
    for workdir in find_runs(folder):
        parts = workdir.relative_to(folder).parts
        label = "/".join(parts[:-1] if parts and parts[-1].startswith("seed_") else parts)
        groups.setdefault(label or workdir.resolve().parent.name, []).append(read_run(workdir))
    if not groups:
        raise ConfigError(f"{folder} holds no recorded run: train some with bn_jax.sweep")
    runs = [run for group in groups.values() for run in group]
    for run in runs[1:]:
        _require_same(runs[0], run, SETTING, "cannot be compared")
    for label, group in groups.items():
        seeds = [run.config["seed"] for run in group]
        if len(set(seeds)) < len(seeds):
            raise ConfigError(
                f"{folder}: {label} has a seed twice ({sorted(seeds)}); move one away"
            )
        for run in group[1:]:
            fields = sorted((flat(group[0].config).keys() | flat(run.config).keys()) - set(FREE))
            fields = [field for field in fields if not field.startswith("record.")]
            _require_same(group[0], run, fields, "are no seeds of one experiment")
        group.sort(key=lambda run: run.config["seed"])
    return groups


def read_pair(one: pathlib.Path, other: pathlib.Path) -> tuple[Run, Run]:
    """Two runs of one seed on the same data, as Fig. 1 compares them; ConfigError otherwise."""
    a, b = read_run(one), read_run(other)
    _require_same(a, b, (*SETTING, "seed", "total_steps"), "make no pair")
    return a, b


def _require_same(a: Run, b: Run, fields, why: str) -> None:
    one, two = flat(a.config), flat(b.config)
    differs = [f for f in fields if one.get(f, "absent") != two.get(f, "absent")]
    if a.data.get("eval_examples") != b.data.get("eval_examples"):
        differs.append("number of evaluated examples")
    if a.data["description"] != b.data["description"]:
        differs.append("data.description")
    if differs:
        shown = ", ".join(f"{f} ({one.get(f, '?')}, {two.get(f, '?')})" for f in differs[:4])
        raise ConfigError(
            f"{a.workdir} and {b.workdir} {why}: they differ in {shown}; separate them"
        )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'data': {'name': 1}} -> {'data.name': 1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


# What evaluations were made of a run: WORKDIR/evaluations.jsonl, a JSON object a line.
#
# Separate from metrics.jsonl, whose lines come from training alone and are the same at every
# resume.


EVALUATIONS = "evaluations.jsonl"
FIELDS = frozenset(
    (
        "time",
        "members",
        "member_scores",
        "crops",
        "views",
        "statistics",
        "top1",
        "top5",
        "cross_entropy",
        "examples",
        "data",
        "description",
        "split",
        "holdout",
        "image_size",
    )
)


def append_evaluation(folder: pathlib.Path, line: Mapping[str, Any]) -> None:
    """Adds a line and its `time` (UTC); where the disk cannot be written, stderr says so."""
    path = folder / EVALUATIONS
    now = datetime.datetime.now(datetime.UTC).isoformat()
    data = json.dumps(files.plain({"time": now, **line})).encode() + b"\n"
    try:
        with files.reported(path, "cannot write"), path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read() != b"\n":  # a line that was cut off stays apart, and is skipped
                    data = b"\n" + data
            file.write(data)
    except DiskError as error:
        files.warn(f"evaluation not recorded: {error}")


def read_evaluations(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The lines of one folder; damaged ones are skipped and said."""
    path = folder / EVALUATIONS
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
            whole = line.keys() >= FIELDS
        except (ValueError, AttributeError):
            whole = False
        if whole:
            yield line
        elif text:
            files.warn(f"{path}: line {number} is damaged and skipped")


def find_evaluations(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders below `folder`, itself included, that hold evaluations."""
    return sorted(path.parent for path in folder.rglob(EVALUATIONS))
