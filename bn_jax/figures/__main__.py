"""Pictures and tables from recorded runs: `python -m bn_jax.figures --workdir=DIR --out=DIR`.

Reads only what runs have recorded (run.json, metrics.jsonl); nothing is trained or evaluated here.
DIR is one run, a folder with a baseline run `mnist` and its twin `mnist_bn` (Fig. 1), or a folder
of runs as bn_jax.sweep leaves it (Fig. 2, the table of Fig. 3, ablations). Where evaluations
were recorded (bn_jax.evaluate), the table of Fig. 4 is made of them.
"""

import argparse
import pathlib

from bn_jax import errors
from bn_jax.errors import ConfigError
from bn_jax.figures import ablations, fig2, fig3
from bn_jax.figures.fig1 import draw_fig1
from bn_jax.figures.fig4 import draw_fig4
from bn_jax.figures.run import draw_run
from bn_jax.workdir import files, reader


def draw_sweep(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Fig. 2, the table of Fig. 3 and the ablations from the runs in `folder`; prints the table.

    Raises ConfigError if there are none, or if they cannot be compared with each other.
    """
    groups = reader.read_groups(folder)
    texts = {
        "fig3.md": fig3.fig3(groups),
        "fig3.csv": fig3.fig3_csv(groups),
        "fig2.csv": fig2.curves_csv(groups),
    }
    if ablations.ablations(groups):
        texts["ablations.md"] = ablations.ablations_markdown(groups)
        texts["ablations.csv"] = ablations.ablations_csv(groups)
    paths = fig2.draw_fig2(groups, out) + ablations.draw_ablations(groups, out)
    for name, text in texts.items():
        files.write_atomic(out / name, text.encode())
    print(texts["fig3.md"])
    return [*paths, *(out / name for name in texts)]


def main() -> None:
    """Draws what the folder holds."""
    parser = argparse.ArgumentParser("python -m bn_jax.figures", description=__doc__)
    parser.add_argument(
        "--workdir", required=True, type=pathlib.Path, help="a run, or a folder of runs"
    )
    parser.add_argument("--out", type=pathlib.Path, help="where pictures go (WORKDIR/figures)")
    args = parser.parse_args()
    out = args.out or args.workdir / "figures"
    if args.out and not files.existing_parent(out).is_dir():
        raise ConfigError(f"--out={out} is in a file's place; choose another folder")
    with files.reported(out, "cannot write pictures in"):
        paths = draw(args.workdir, out)
    for path in paths:
        print(path)


def draw(workdir: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Whatever a folder of records makes: one run, Fig. 1's pair, a sweep; evaluations."""
    scored = reader.find_evaluations(workdir) if workdir.is_dir() else []
    paths = _draw_runs(workdir, out) if not scored or any(reader.find_runs(workdir)) else []
    return paths + (draw_fig4(workdir, out) if scored else [])


def _draw_runs(workdir: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    if all(reader.is_run(workdir / name) for name in ("mnist", "mnist_bn")):
        return draw_fig1(workdir, out)
    if reader.is_run(workdir) or next(reader.find_runs(workdir), None) is None:
        return draw_run(workdir, out)
    return draw_sweep(workdir, out)


if __name__ == "__main__":
    errors.run_command(main)
