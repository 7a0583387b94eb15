"""Trained networks out of workdirs, as members of an ensemble."""

import functools
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


class Member(NamedTuple):
    """A trained network: its experiment, the statistics it is evaluated with and where they come
    from, and `about`, the plain values that tell it apart (workdir, step, checkpoint's digest)."""

    exp: Experiment
    params: Any
    batch_stats: Any
    statistics: str
    about: dict[str, Any]


def _field(config: Any, name: str) -> Any:
    return functools.reduce(lambda tree, key: tree[key], name.split("."), config)


def describe(member: Member, crops: int) -> dict[str, Any]:
    """`Predictions.about` of one network."""
    config, data = member.exp.config, member.exp.data
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


def about_member(run: pathlib.Path, exp: Experiment, step: int, checkpoint: str) -> dict[str, Any]:
    """What tells a trained network apart, as plain values."""
    config = exp.config
    return {
        "name": config.name,
        "scale": config.scale,
        "seed": config.seed,
        "workdir": str(run),
        "step": step,
        "total_steps": config.total_steps,
        "checkpoint": checkpoint,
    }


def load(
    run: pathlib.Path,
    at_step: int | None,
    statistics: str,
    exp: Experiment,
    say: Callable[[str], None] = print,
) -> Member:
    """A run's checkpoint with the statistics it is to be evaluated with; says what it found.

    `exp` may be without data (`experiment.without_data`): they are opened if the statistics have to
    be computed. Raises CheckpointError if there is no checkpoint.
    """
    found_step, state = build.restore(exp, run, at_step)
    stats, said = state.batch_stats, f"{run}: {exp.config.name}, step {found_step:,}"
    about = about_member(run, exp, found_step, population.checkpoint_digest(run, found_step))
    if stats and statistics == "population":
        began = time.monotonic()
        best, kept = population.cached(
            run,
            found_step,
            exp.config.to_dict(),
            stats,
            lambda: Evaluator(build.with_data(exp, run)).population(state.params, stats),
        )
        about["running_gap"] = running_gap(stats, best, exp.config.bn.epsilon)
        how = "kept from before" if kept else f"computed in {time.monotonic() - began:.1f} s"
        said += (
            f", population statistics {how}; the running means are up to "
            f"{about['running_gap']:.2f} standard deviations away"
        )
        stats = mesh.put_replicated(exp.mesh, best)
    elif stats:
        said += ", running statistics"
    say(said)
    return Member(exp, state.params, stats, statistics if stats else "none", about)


def workdirs(names: str) -> list[pathlib.Path]:
    """Workdirs from a list with commas; a folder of runs stands for all runs in it."""
    found = []
    for place in map(pathlib.Path, names.split(",")):
        inside = [] if (place / "run.json").is_file() else list(reader.find_runs(place))
        found += inside or [place]
    return found
