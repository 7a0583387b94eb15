"""Fig. 1: the MNIST study, as numbers, a table and a picture."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_jax.errors import ConfigError
from bn_jax.figures.origins import made_by
from bn_jax.figures.plotting import BLUE, GREY, plot_accuracy, save, subplots
from bn_jax.uncertainty import Effect, counted, difference, written
from bn_jax.workdir import files, reader
from bn_jax.workdir.lines import PERCENTILES
from bn_jax.workdir.reader import Run

LAYER = "dense_2/input"  # the last hidden layer of the MNIST network


class Percentiles(NamedTuple):
    """Percentiles of the inputs of one layer's units over training, on one fixed batch.

    steps [T]; values [T, 3, units] for the {15, 50, 85}th percentiles.
    """

    layer: str
    steps: np.ndarray
    values: np.ndarray


def percentiles(run: Run, layer: str) -> Percentiles:
    """The recorded percentiles of `layer` (a path such as dense_2/input)."""
    lines = [line for line in run.lines["activation"] if line["layer"] == layer]
    if not lines:
        known = sorted({line["layer"] for line in run.lines["activation"]})
        raise ConfigError(f"{run.workdir} did not record the activation `{layer}`; it has {known}")
    steps = np.array([line["step"] for line in lines])
    values = np.array([[line["p15"], line["p50"], line["p85"]] for line in lines], float)
    return Percentiles(layer, steps, values)


def ranges(curves: Percentiles) -> np.ndarray:
    """How far each percentile wanders over training: its largest minus its smallest value.

    [3, units], in units of the input. 0 is a distribution that never moves.
    """
    return np.ptp(curves.values, axis=0)


def drift(curves: Percentiles) -> np.ndarray:
    """The same relative to the spread: `ranges` by the mean distance from p15 to p85. [3, units].

    A network without BN has wider distributions, by which a wide range looks smaller.
    """
    spread = np.mean(curves.values[:, 2] - curves.values[:, 0], axis=0)
    return ranges(curves) / np.maximum(spread, np.finfo(np.float32).tiny)


def typical_unit(curves: Percentiles) -> int:
    """The typical unit of its layer: the one whose drift of the median is the layer's median.

    With an even number of units the lower of the two; ties go to the first unit.
    """
    of_median = drift(curves)[1]
    return int(np.argsort(of_median, kind="stable")[(of_median.size - 1) // 2])


def fig1_numbers(baseline: Run, with_bn: Run, layer: str = LAYER) -> dict[str, Any]:
    """What Fig. 1 shows, as numbers, for each of the two networks.

    `accuracy` (share, last evaluation), `examples`, `unit` (see `typical_unit`), `drift` of the
    three percentiles for that unit, `layer_drift` their medians over all units of the layer;
    `range` and `layer_range` likewise, not divided by the spread.
    """
    numbers = {}
    for name, run in (("without BN", baseline), ("with BN", with_bn)):
        curves = percentiles(run, layer)
        unit = typical_unit(curves)
        drifts = drift(curves)
        wandered = ranges(curves)
        last = [*run.lines["eval"], *run.lines["test"]][-1]
        numbers[name] = {
            "accuracy": last["top1"],
            "examples": last["examples"],
            "steps": last["step"],
            "unit": unit,
            "drift": _by_percentile(drifts[:, unit]),
            "layer_drift": _by_percentile(np.median(drifts, axis=1)),
            "range": _by_percentile(wandered[:, unit]),
            "layer_range": _by_percentile(np.median(wandered, axis=1)),
        }
    return numbers


def _by_percentile(values: np.ndarray) -> dict[str, float]:
    return dict(zip(map(str, PERCENTILES), values.round(4).tolist(), strict=True))


def fig1_table(numbers: dict[str, Any]) -> str:
    """The numbers of Fig. 1 as Markdown."""
    head = ["network", "steps", "test accuracy", "range of p15, p50, p85", "drift"]
    head += ["layer's median range", "layer's median drift"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, n in numbers.items():
        cells = [name, f"{n['steps']:,}"]
        cells.append(f"{counted(n['accuracy'], n['examples'])} of {n['examples']:,}")
        for key in ("range", "drift", "layer_range", "layer_drift"):
            cells.append(", ".join(f"{value:.2f}" for value in n[key].values()))
        cells[3] += f" (unit {n['unit']})"
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + (
        "\n\nIn () after an accuracy: the 95% interval of its count. Range: of the percentile over "
        "training. Drift: the range / mean distance from p15 to p85. Typical unit: the one whose "
        "p50 drift is the median of its layer."
    )


def plot_percentiles(axes, curves: Percentiles, unit: int, colour: str) -> None:
    """Lines of the three percentiles of one unit's input against steps."""
    low, middle, high = curves.values[:, :, unit].T
    axes.fill_between(curves.steps, low, high, color=colour, alpha=0.15, linewidth=0)
    for line, width in ((low, 1.0), (middle, 2.0), (high, 1.0)):
        axes.plot(curves.steps, line, color=colour, linewidth=width)
    axes.set_xlabel("step")
    axes.set_ylabel(f"input of unit {unit}")


def wander_ratio(
    without: Sequence[Run], with_bn: Sequence[Run], measure: Callable[[Percentiles], np.ndarray]
) -> Effect:
    """How many times less the percentiles wander with BN: a ratio for each seed that both have.

    measure: `drift` or `ranges`. Of it the median over the layer's units is taken, and then the
    mean of the three percentiles. Runs whose activations were not recorded, or not published, are
    left out.
    """
    by_seed = []
    for runs in (without, with_bn):
        found = {}
        for run in runs:
            if any(line["layer"] == LAYER for line in run.lines["activation"]):
                of_layer = np.median(measure(percentiles(run, LAYER)), axis=1)
                found[run.config["seed"]] = float(np.mean(of_layer))
        by_seed.append(found)

    more, less = by_seed
    ratios = tuple(more[seed] / less[seed] for seed in sorted(more.keys() & less.keys()))
    return Effect(ratios, ratios, ratios, ratio=True)


def over_seeds(without: Sequence[Run], with_bn: Sequence[Run]) -> str:
    """What holds over all seeds, in a sentence: accuracy, drift and range."""
    ours = {run.config["seed"]: _final(run) for run in with_bn}
    theirs = {run.config["seed"]: _final(run) for run in without}
    accuracy = difference(ours, theirs)
    points = written(accuracy, ".2f", factor=100, unit=" points", sign=True)
    relative, raw = (
        written(wander_ratio(without, with_bn, measure), ".2f", unit="x")
        for measure in (drift, ranges)
    )
    return (
        f"Over {accuracy.n} seeds, paired, with 95% intervals: the final accuracy with BN minus "
        f"that without is {points}. The percentiles wander {relative} less relative to their "
        f"spread (drift), and {raw} less in units of the input (range); of a layer the median unit "
        "counts, and of the three percentiles the mean."
    )


def _final(run: Run) -> float:
    """The accuracy on the test split, or of the last evaluation where that is the test split."""
    return [*run.lines["eval"], *run.lines["test"]][-1]["top1"]


def draw_fig1(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Fig. 1 from the runs `folder`/mnist and `folder`/mnist_bn; prints the numbers behind it."""
    baseline, with_bn = reader.read_pair(folder / "mnist", folder / "mnist_bn")
    return draw_pair([baseline], [with_bn], out)


def draw_pair(
    without: Sequence[Run], with_bn: Sequence[Run], out: pathlib.Path
) -> list[pathlib.Path]:
    """Fig. 1 of the first seed of both networks, and what holds over all of them."""
    baseline = without[0]
    normalized = with_bn[0]
    numbers = fig1_numbers(baseline, normalized)
    figure, (a, b, c) = subplots(1, 3, figsize=(13, 3.8))
    plot_accuracy(a, baseline, GREY, "without BN")
    plot_accuracy(a, normalized, BLUE, "with BN")
    low = min(line["top1"] for line in normalized.lines["eval"])
    a.set_ylim(bottom=max(0, min(100 * low - 2, 90)))
    a.legend(loc="lower right")
    a.set_title(f"(a) {baseline.data['split']} accuracy")
    for axes, run, name, letter, colour in (
        (b, baseline, "without BN", "b", GREY),
        (c, normalized, "with BN", "c", BLUE),
    ):
        plot_percentiles(axes, percentiles(run, LAYER), numbers[name]["unit"], colour)
        axes.set_title(f"({letter}) {name}: {{15, 50, 85}}th percentiles")
    figure.suptitle(f"MNIST study (section 4.1), {baseline.data['name']}", fontsize=10)
    paths = save(figure, out, "fig1")

    parts = [fig1_table(numbers), f"Data: {baseline.data['description']}."]
    if len(without) > 1 and len(with_bn) > 1:
        parts.append(over_seeds(without, with_bn))
    parts.append(made_by(run.origin for run in (*without, *with_bn)))
    text = "\n\n".join(parts) + "\n"
    files.write_atomic(out / "fig1.json", (json.dumps(numbers, indent=2) + "\n").encode())
    files.write_atomic(out / "fig1.md", text.encode())
    print(text)
    return [*paths, out / "fig1.json", out / "fig1.md"]
