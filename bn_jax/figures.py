"""Pictures and tables from recorded runs: `python -m bn_jax.figures --workdir=DIR --out=DIR`.

Reads only what runs have recorded (run.json, metrics.jsonl); nothing is trained or evaluated here.
DIR is one run, a folder with a baseline run `mnist` and its twin `mnist_bn` (Fig. 1), or a folder
of runs as bn_jax.sweep leaves it (Fig. 2, the table of Fig. 3, ablations). Where evaluations
were recorded (bn_jax.evaluate), the table of Fig. 4 is made of them.
"""

import argparse
import json
import pathlib

from bn_jax import command, comparison, disk, evaluations, fig4, recorded, tables
from bn_jax.drift import Percentiles, fig1_numbers, fig1_table, percentiles, typical_unit
from bn_jax.errors import ConfigError
from bn_jax.recorded import Run, read_run
from bn_jax.style import BLUE, GREY, ORANGE, plt, save


def plot_percentiles(axes, curves: Percentiles, unit: int, colour: str) -> None:
    """Lines of the three percentiles of one unit's input against steps."""
    low, middle, high = curves.values[:, :, unit].T
    axes.fill_between(curves.steps, low, high, color=colour, alpha=0.15, linewidth=0)
    for line, width in ((low, 1.0), (middle, 2.0), (high, 1.0)):
        axes.plot(curves.steps, line, color=colour, linewidth=width)
    axes.set_xlabel("step")
    axes.set_ylabel(f"input of unit {unit}")


def plot_accuracy(axes, run: Run, colour: str, label: str) -> None:
    """Accuracy of every recorded evaluation against steps."""
    lines = run.lines["eval"]
    axes.plot(
        [line["step"] for line in lines],
        [100 * line["top1"] for line in lines],
        color=colour,
        label=label,
        marker="o" if len(lines) < 30 else None,
        markersize=3,
    )
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy (%)")


def draw_run(workdir: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """One run's accuracy curve and, if recorded, the percentiles of one activation's input."""
    run = read_run(workdir)
    layers = list(dict.fromkeys(line["layer"] for line in run.lines["activation"]))
    inputs = [layer for layer in layers if layer.endswith("/input")] or layers
    panels = bool(run.lines["eval"]) + bool(inputs)
    if not panels:
        raise ConfigError(f"{workdir} has no evaluation yet: let it run to its first one")
    figure, all_axes = plt.subplots(1, panels, figsize=(5.2 * panels, 3.6), squeeze=False)
    axes = iter(all_axes[0])
    if run.lines["eval"]:
        panel = next(axes)
        plot_accuracy(panel, run, BLUE, run.config["name"])
        last = run.lines["eval"][-1]
        panel.set_title(f"{run.data['split']}: {100 * last['top1']:.1f}% of {last['examples']:,}")
    if inputs:
        panel, curves = next(axes), percentiles(run, inputs[-1])
        plot_percentiles(panel, curves, typical_unit(curves), ORANGE)
        panel.set_title(f"{{15, 50, 85}}th percentiles, {curves.layer}", fontsize=9)
    figure.suptitle(f"{run.config['name']} on {run.data['name']}", fontsize=10)
    return save(figure, out, "run")


def draw_fig1(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Fig. 1 from the runs `folder`/mnist and `folder`/mnist_bn; prints the numbers behind it."""
    baseline, with_bn = recorded.read_pair(folder / "mnist", folder / "mnist_bn")
    numbers = fig1_numbers(baseline, with_bn)
    figure, (a, b, c) = plt.subplots(1, 3, figsize=(13, 3.8))
    plot_accuracy(a, baseline, GREY, "without BN")
    plot_accuracy(a, with_bn, BLUE, "with BN")
    low = min(line["top1"] for line in with_bn.lines["eval"])
    a.set_ylim(bottom=max(0, min(100 * low - 2, 90)))
    a.legend(loc="lower right")
    a.set_title("(a) test accuracy")
    layer = "dense_2/input"
    for axes, run, name, letter, colour in (
        (b, baseline, "without BN", "b", GREY),
        (c, with_bn, "with BN", "c", BLUE),
    ):
        plot_percentiles(axes, percentiles(run, layer), numbers[name]["unit"], colour)
        axes.set_title(f"({letter}) {name}: {{15, 50, 85}}th percentiles")
    figure.suptitle(f"MNIST study (section 4.1), {baseline.data['name']}", fontsize=10)
    paths = save(figure, out, "fig1")
    (out / "fig1.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"{fig1_table(numbers)}\nData: {baseline.data['description']}.")
    return [*paths, out / "fig1.json"]


def draw_sweep(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Fig. 2, the table of Fig. 3 and the ablations from the runs in `folder`; prints the table.

    Raises ConfigError if there are none, or if they cannot be compared with each other.
    """
    groups = recorded.read_groups(folder)
    texts = {
        "fig3.md": tables.fig3(groups),
        "fig3.csv": tables.fig3_csv(groups),
        "fig2.csv": tables.curves_csv(groups),
    }
    if tables.ablations(groups):
        texts["ablations.md"] = tables.ablations_markdown(groups)
        texts["ablations.csv"] = tables.ablations_csv(groups)
    paths = comparison.draw_fig2(groups, out) + comparison.draw_ablations(groups, out)
    for name, text in texts.items():
        disk.write_atomic(out / name, text.encode())
    print(texts["fig3.md"])
    return [*paths, *(out / name for name in texts)]


def draw_fig4(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """The table of Fig. 4 from the evaluations recorded below `folder`; prints it.

    Raises ConfigError if they cannot be compared with each other.
    """
    texts = {"fig4.md": fig4.markdown(folder), "fig4.csv": fig4.as_csv(folder)}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        disk.write_atomic(out / name, text.encode())
    print(texts["fig4.md"])
    return [out / name for name in texts]


def main() -> None:
    """Draws what the folder holds."""
    parser = argparse.ArgumentParser("python -m bn_jax.figures", description=__doc__)
    parser.add_argument(
        "--workdir", required=True, type=pathlib.Path, help="a run, or a folder of runs"
    )
    parser.add_argument("--out", type=pathlib.Path, help="where pictures go (WORKDIR/figures)")
    args = parser.parse_args()
    out = args.out or args.workdir / "figures"
    if args.out and not disk.existing_parent(out).is_dir():
        raise ConfigError(f"--out={out} is in a file's place; choose another folder")
    with disk.reported(out, "cannot write pictures in"):
        paths = draw(args.workdir, out)
    for path in paths:
        print(path)


def draw(workdir: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Whatever a folder of records makes: one run, Fig. 1's pair, a sweep; evaluations."""
    scored = evaluations.find(workdir) if workdir.is_dir() else []
    paths = _draw_runs(workdir, out) if not scored or any(recorded.find(workdir)) else []
    return paths + (draw_fig4(workdir, out) if scored else [])


def _draw_runs(workdir: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    if all(recorded.is_run(workdir / name) for name in ("mnist", "mnist_bn")):
        return draw_fig1(workdir, out)
    if recorded.is_run(workdir) or next(recorded.find(workdir), None) is None:
        return draw_run(workdir, out)
    return draw_sweep(workdir, out)


if __name__ == "__main__":
    command.run(main)
