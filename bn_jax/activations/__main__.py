"""Activations of a trained run: `python -m bn_jax.activations --workdir=A[,B] --layers=GLOB`.

Measures any activation of any kept checkpoint, whether or not it was recorded during training:
percentiles, mean, standard deviation, a histogram, and the shares of dead units and of saturated
values, on one fixed batch of training images. LAYER/pre_bn is the input of a layer's BN,
LAYER/input that of its nonlinearity. The measurements are kept in WORKDIR/activations and drawn in
WORKDIR/figures. Two workdirs, such as a network without BN and one with, are drawn side by side.
"""

import pathlib
from collections.abc import Sequence

from bn_jax import errors
from bn_jax.activations import known_paths, measure
from bn_jax.distributed import cluster, startup
from bn_jax.errors import ConfigError
from bn_jax.experiment import build
from bn_jax.figures import activations as figures
from bn_jax.workdir import files


def _parser() -> errors.Parser:
    parser = errors.Parser("python -m bn_jax.activations", description=__doc__)
    add = parser.add_argument
    add("--workdir", required=True, help="a run, or two with a comma")
    add(
        "--layers",
        default="*",
        metavar="GLOB[,GLOB...]",
        help="paths or layers, such as dense_2 or 'inception_5*/*/input' (all)",
    )
    add("--steps", default="all", help="all, newest, or kept steps with commas; 0: untrained (all)")
    add("--examples", type=int, help="images of the batch (record.activation_examples of the run)")
    add("--data_dir", metavar="DIR", help="where the data set lies now (data.dir of the run)")
    add("--out", type=pathlib.Path, help="folder of measurements and pictures (the first workdir)")
    add("--list", action="store_true", help="print the activations and the kept steps, and end")
    return parser


def main() -> None:
    """Measures the activations, prints a table and draws pictures."""
    args = _parser().parse_args()
    cluster.require_one_process("bn_jax.activations")

    workdirs = [pathlib.Path(name) for name in args.workdir.split(",")]
    if len(workdirs) > 2 or len({*workdirs}) < len(workdirs):
        raise ConfigError(f"--workdir={args.workdir}: give one run, or two different ones")
    startup.use_safe_sums()
    startup.use_compilation_cache()

    experiments = [build.from_workdir(workdir, args.data_dir) for workdir in workdirs]
    number = args.examples or experiments[0].config.record.activation_examples
    for exp in experiments:
        measure.check_examples(exp, number)
    if args.list:
        for workdir, exp in zip(workdirs, experiments, strict=True):
            print(*known_paths(exp, number), sep="\n")
            steps = map(str, measure.kept_steps(workdir))
            print(f"{workdir}: steps {', '.join(steps)}")
        return

    # All arguments are checked before anything is compiled.
    if len(workdirs) == 2:
        one, other = experiments
        measure.require_comparable(one, other, number)
    planned = []
    for workdir, exp in zip(workdirs, experiments, strict=True):
        out = None
        if args.out:
            out = args.out / measure.FOLDER / f"{exp.config.name}_{workdir.name}"
        paths = measure.choose_paths(exp, args.layers, number)
        observer = measure.Observer(exp, workdir, paths, examples=number, out=out)
        planned.append((observer, measure.choose_steps(workdir, args.steps)))

    shown = [_measured(observer, steps) for observer, steps in planned]
    print(figures.table(shown))
    out = args.out or workdirs[0] / "figures"
    with files.reported(out, "cannot write pictures in"):
        for path in figures.draw_activations(shown, out):
            print(path)


def _measured(observer: measure.Observer, steps: Sequence[int]) -> figures.Shown:
    """Measures the activations of a run at these steps, and says where they are kept."""
    shown = figures.Shown(observer.exp.config.name, observer.workdir, {})
    for step in steps:
        shown.steps[step], kept = observer.at(step)
        how = "read from" if kept else "measured, kept in"
        print(f"{observer.workdir}, step {step:,}: {how} {observer.folder / f'{step}.npz'}")
    if observer.memory:
        print(
            f"{len(observer.paths)} activations of {observer.examples} images took "
            f"{observer.memory / 1e6:,.0f} MB besides the network"
        )
    return shown


if __name__ == "__main__":
    errors.run_command(main)
