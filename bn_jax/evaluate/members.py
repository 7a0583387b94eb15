"""Loads trained networks from workdirs, as members of an ensemble."""

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from bn_jax.data import views
from bn_jax.distributed import mesh
from bn_jax.evaluate import population
from bn_jax.experiment import build
from bn_jax.experiment.build import Experiment
from bn_jax.experiment.evaluator import Evaluator, running_gap
from bn_jax.workdir import reader
from bn_jax.workdir.checkpoint import Steps


class Member(NamedTuple):
    """A trained network, ready to be evaluated.

    exp: its experiment, which may be without data. params, batch_stats: the trees that are
    evaluated. statistics: where `batch_stats` come from (population, running, none). about: plain
    values that identify the network (see `identity`).
    """

    exp: Experiment
    params: Any
    batch_stats: Any
    statistics: str
    about: dict[str, Any]


def which_checkpoint(run: pathlib.Path, step: int) -> str:
    """Says what `step` is among the kept checkpoints: newest, best, newest and best, or kept.

    The best checkpoint has the highest accuracy in the evaluations during training; of equal ones
    it is the earlier. It is only called best if several checkpoints have an accuracy.
    """
    metrics = Steps(run / "checkpoints", read_only=True).metrics()
    scored = {s: metric for s, metric in metrics.items() if metric is not None}
    words = []
    if step == max(metrics, default=None):
        words.append("newest")
    if len(scored) > 1 and step == max(scored, key=lambda s: (scored[s], -s)):
        words.append("best")
    return " and ".join(words) or "kept"


def identity(run: pathlib.Path, exp: Experiment, step: int, checkpoint: str) -> dict[str, Any]:
    """Returns plain values that identify a trained network. checkpoint: the digest of it."""
    config = exp.config
    return {
        "name": config.name,
        "scale": config.scale,
        "seed": config.seed,
        "workdir": str(run),
        "step": step,
        "which": which_checkpoint(run, step),
        "total_steps": config.total_steps,
        "checkpoint": checkpoint,
    }


def describe(member: Member, crops: int) -> dict[str, Any]:
    """Returns `Predictions.about` of one network."""
    config = member.exp.config
    data = member.exp.data
    return {
        "data": config.data.name,
        "split": data.split,
        "description": data.description,
        "holdout": config.data.holdout,
        "image_size": config.image_size,
        "class_names": list(data.class_names),
        "examples": data.num_eval,
        "crops": crops,
        "views": views.total_weight(crops, config.data.mirror),
        "statistics": member.statistics,
        "members": [member.about],
    }


def load_member(
    run: pathlib.Path,
    at_step: int | None,
    statistics: str,
    exp: Experiment,
    say: Callable[[str], None] = print,
) -> Member:
    """Loads a run's checkpoint with the statistics with which it is evaluated.

    at_step: the checkpoint's step, or None for the newest. statistics: population or running. `exp`
    may be without data (`build.without_data`); they are opened if the statistics must be computed.
    `say` is called with a line about what was found. Raises CheckpointError if there is no
    checkpoint.
    """
    step, state = build.restore(exp, run, at_step)
    about = identity(run, exp, step, population.checkpoint_digest(run, step))
    line = f"{run}: {exp.config.name}, {about['which']} checkpoint, step {step:,}"

    batch_stats = state.batch_stats
    if not batch_stats:
        say(line)
        return Member(exp, state.params, batch_stats, "none", about)
    if statistics == "running":
        say(f"{line}, running statistics")
        return Member(exp, state.params, batch_stats, statistics, about)

    began = time.monotonic()
    exact, kept = population.cached(
        run,
        step,
        exp.config.to_dict(),
        batch_stats,
        lambda: Evaluator(build.with_data(exp, run)).population(state.params, batch_stats),
    )
    about["running_gap"] = running_gap(batch_stats, exact, exp.config.bn.epsilon)
    how = "read from the workdir" if kept else f"computed in {time.monotonic() - began:.1f} s"
    say(
        f"{line}, population statistics {how}; the running means are up to "
        f"{about['running_gap']:.2f} standard deviations away"
    )
    exact = mesh.put_replicated(exp.mesh, exact)
    return Member(exp, state.params, exact, statistics, about)


def add_place(parser: argparse.ArgumentParser, batches: bool = True) -> None:
    """Adds the options of a run that is used elsewhere than it was trained."""
    parser.add_argument(
        "--data_dir", metavar="DIR", help="where the data set lies now (data.dir of the run)"
    )
    if batches:
        parser.add_argument(
            "--batch_size",
            type=_positive,
            metavar="N",
            help="images that the devices take at once (eval_batch_size of the run)",
        )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _has_record(place: pathlib.Path) -> bool:
    try:
        return (place / reader.RUN).is_file()  # imported weights have no metrics
    except OSError:
        return False  # a long list of workdirs is too long for a path


def workdirs(names: str) -> list[pathlib.Path]:
    """Lists the workdirs in a text with commas; a folder of runs stands for all runs in it.

    A name that is itself a run is taken as one, even if it contains commas.
    """
    if _has_record(pathlib.Path(names)):
        return [pathlib.Path(names)]

    found = []
    for name in names.split(","):
        place = pathlib.Path(name)
        inside = [] if reader.is_run(place) else list(reader.find_runs(place))
        found += inside or [place]
    return found
