"""Evaluates exactly: `python -m bn_jax.evaluate --workdir=A[,B,...] [--crops=1|10|144]`.

Every example of the split counts once, for any batch size and number of devices: batches are padded
and masked, sums are added up, and the number of examples is checked. Several workdirs form an
ensemble, whose prediction is the mean of their class probabilities. Each evaluation is recorded in
its workdirs (evaluations.jsonl), or in the folder --out=DIR; bn_jax.figures makes the table of
Fig. 4 from it. A run may have been moved to another machine, and its data to --data_dir=DIR. If it
is started as several processes, like training, it divides the examples among them, and process 0
prints and records.
"""

import json
import pathlib

from bn_jax import errors
from bn_jax.data import views
from bn_jax.distributed import cluster, startup
from bn_jax.distributed.watchdog import Watchdog
from bn_jax.errors import ConfigError
from bn_jax.evaluate import members, predictions
from bn_jax.evaluate.ensemble import evaluate
from bn_jax.workdir import files, provenance, reader


def main() -> None:
    """Scores the newest checkpoints of runs, or saved predictions."""
    parser = errors.Parser("python -m bn_jax.evaluate", description=__doc__)
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
        "--out",
        "--record",
        type=pathlib.Path,
        help="folder of evaluations.jsonl (the workdirs; of --combine nowhere)",
    )
    members.add_place(parser)
    args = parser.parse_args()
    if (args.workdir is None) == (args.combine is None):
        raise ConfigError("give either --workdir=A[,B,...] or --combine=FILE,FILE[,...]")
    views.check_crops(args.crops)
    if args.predictions is not None:
        predictions.check_path(args.predictions)
    if args.out is not None:
        with files.reported(args.out, "cannot make"):
            args.out.mkdir(parents=True, exist_ok=True)
    if args.combine is not None:
        cluster.require_one_process("bn_jax.evaluate --combine")
        parts = [predictions.load(pathlib.Path(name)) for name in args.combine.split(",")]
        line = predictions.show(parts)
        if args.out is not None:
            line |= provenance.origin()
            reader.append_evaluation(args.out, line)
    else:
        startup.use_safe_sums()
        startup.use_compilation_cache()
        with Watchdog():
            startup.initialize()
            found = evaluate(args)
        if found is None:
            return
        line, parts = found
    if args.predictions is not None:
        predictions.save(args.predictions, predictions.mean(parts))
        print(args.predictions)
    print(json.dumps(files.plain(line)))


if __name__ == "__main__":
    errors.run_command(main)
