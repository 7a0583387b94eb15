"""Exact evaluation: `python -m bn_jax.evaluate --workdir=A[,B,...] [--crops=1|10|144]`.

Every example of the split counts once, whatever the batch size and the number of devices: batches
are padded and masked, sums are added up, and the number of examples is asserted. Several workdirs
are an ensemble: the mean of their class probabilities. Each evaluation is recorded in its workdirs
(evaluations.jsonl), from which bn_jax.figures makes the table of Fig. 4.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from bn_jax import (
    command,
    ensemble,
    evaluations,
    experiment,
    jsonl,
    population,
    predictions,
    provenance,
    recorded,
    report,
)
from bn_jax import mesh as meshes
from bn_jax.data import views
from bn_jax.data.build import Progress
from bn_jax.ensemble import Member
from bn_jax.errors import ConfigError
from bn_jax.evaluator import Evaluator
from bn_jax.experiment import Experiment
from bn_jax.population import running_gap
from bn_jax.predictions import Predictions


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
    found_step, state = experiment.restore(exp, run, at_step)
    stats, said = state.batch_stats, f"{run}: {exp.config.name}, step {found_step:,}"
    about = ensemble.about(run, exp, found_step, population.checkpoint_digest(run, found_step))
    if stats and statistics == "population":
        began = time.monotonic()
        best, kept = population.cached(
            run,
            found_step,
            exp.config.to_dict(),
            stats,
            lambda: Evaluator(experiment.with_data(exp, run)).population(state.params, stats),
        )
        about["running_gap"] = running_gap(stats, best, exp.config.bn.epsilon)
        how = "kept from before" if kept else f"computed in {time.monotonic() - began:.1f} s"
        said += (
            f", population statistics {how}; the running means are up to "
            f"{about['running_gap']:.2f} standard deviations away"
        )
        stats = meshes.put_replicated(exp.mesh, best)
    elif stats:
        said += ", running statistics"
    say(said)
    return Member(exp, state.params, stats, statistics if stats else "none", about)


def workdirs(names: str) -> list[pathlib.Path]:
    """Workdirs from a list with commas; a folder of runs stands for all runs in it."""
    found = []
    for place in map(pathlib.Path, names.split(",")):
        inside = [] if (place / "run.json").is_file() else list(recorded.find(place))
        found += inside or [place]
    return found


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], list[Predictions]]:
    """Networks scored on the evaluation split: what is recorded, and each one's predictions."""
    runs = workdirs(args.workdir)
    experiments = [experiment.from_workdir(run) for run in runs]  # refused before any compiling
    members = [
        load(run, args.step, args.statistics, exp)
        for run, exp in zip(runs, experiments, strict=True)
    ]
    networks = ensemble.Networks(members, members[0].exp.config.eval_batch_size)
    began = time.monotonic()
    progress = Progress(members[0].exp.data.num_eval)
    parts = ensemble.predict(networks, args.crops, progress.add)
    seconds = time.monotonic() - began
    line = report.show(parts)
    line["images_per_second"] = line["examples"] / seconds
    line["source"], line["hardware"] = provenance.source(), provenance.hardware()
    for folder in runs if args.record is None else [args.record]:
        evaluations.append(folder, line)
    return line, parts


def main() -> None:
    """Scores the newest checkpoints of runs, or saved predictions."""
    parser = argparse.ArgumentParser("python -m bn_jax.evaluate", description=__doc__)
    parser.add_argument(
        "--workdir", help="a run; several, with commas or as their folder, are an ensemble"
    )
    parser.add_argument("--step", type=int, help="checkpoint to score (the newest)")
    parser.add_argument(
        "--crops", type=int, default=1, help="1, 10 or 144 crops of each image, averaged (1)"
    )
    parser.add_argument(
        "--statistics",
        choices=("population", "running"),
        default="population",
        help="statistics of BN: Algorithm 2 over fixed training batches, or the moving average",
    )
    parser.add_argument(
        "--predictions", type=pathlib.Path, help="save the probabilities as FILE.npz or FILE.csv"
    )
    parser.add_argument(
        "--combine", help="saved predictions, with commas, instead of workdirs: their mean"
    )
    parser.add_argument(
        "--record",
        type=pathlib.Path,
        help="folder of evaluations.jsonl (the workdirs; of --combine nowhere)",
    )
    args = parser.parse_args()
    if (args.workdir is None) == (args.combine is None):
        raise ConfigError("give either --workdir=A[,B,...] or --combine=FILE,FILE[,...]")
    views.check_crops(args.crops)
    if args.predictions is not None:
        predictions.check_path(args.predictions)
    if args.combine is not None:
        parts = [predictions.load(pathlib.Path(name)) for name in args.combine.split(",")]
        line = report.show(parts)
        if args.record is not None:
            evaluations.append(args.record, line)
    else:
        meshes.use_compilation_cache()
        line, parts = evaluate(args)
    if args.predictions is not None:
        predictions.save(args.predictions, predictions.mean(parts))
        print(args.predictions)
    print(json.dumps(jsonl.plain(line)))


if __name__ == "__main__":
    command.run(main)
