"""Pictures and tables from recorded runs: `python -m bn_jax.figures --workdir=DIR --out=DIR`.

Reads only what runs have recorded (run.json, metrics.jsonl); nothing is trained or evaluated here.
DIR is one run, a folder with the runs `mnist` and `mnist_bn` (Fig. 1), or a folder of runs that
bn_jax.sweep has made (Fig. 2, the table of Fig. 3, ablations). If bn_jax.evaluate has recorded
evaluations there, the table of Fig. 4 is made, too. --html also writes report.html, one page with
interactive curves, the tables, the activations, the configs and how the runs were made.
"""

import pathlib

from bn_jax import errors
from bn_jax.distributed import cluster
from bn_jax.errors import ConfigError
from bn_jax.figures import report
from bn_jax.figures.draw import draw
from bn_jax.workdir import files


def main() -> None:
    """Draws what the folder holds."""
    parser = errors.Parser("python -m bn_jax.figures", description=__doc__)
    parser.add_argument(
        "--workdir", required=True, type=pathlib.Path, help="a run, or a folder of runs"
    )
    parser.add_argument("--out", type=pathlib.Path, help="where pictures go (WORKDIR/figures)")
    parser.add_argument(
        "--html", action="store_true", help="also write report.html, a page with all of it"
    )
    args = parser.parse_args()
    cluster.require_one_process("bn_jax.figures")
    out = args.out or args.workdir / "figures"
    if args.out and not files.existing_parent(out).is_dir():
        raise ConfigError(f"--out={out} is in a file's place; choose another folder")
    with files.reported(out, "cannot write pictures in"):
        paths = draw(args.workdir, out)
        if args.html:
            paths.append(report.write(args.workdir, out, paths))
    for path in paths:
        print(path)


if __name__ == "__main__":
    errors.run_command(main)
