"""Makes Fig. 1, the MNIST study: numbers, a table and a picture."""

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

    steps: [T]. values: [T, 3, units], the {15, 50, 85}th percentiles.
    """

    layer: str
    steps: np.ndarray
    values: np.ndarray


def percentiles(run: Run, layer: str) -> Percentiles:
    """Reads the percentiles of `layer` (a path such as dense_2/input); ConfigError without them."""
    lines = [line for line in run.lines["activation"] if line["layer"] == layer]
    if not lines:
        known = sorted({line["layer"] for line in run.lines["activation"]})
        raise ConfigError(f"{run.workdir} did not record the activation `{layer}`; it has {known}")
    steps = np.array([line["step"] for line in lines])
    values = np.array([[line["p15"], line["p50"], line["p85"]] for line in lines], float)
    return Percentiles(layer, steps, values)


def ranges(curves: Percentiles) -> np.ndarray:
    """Returns how far each percentile wanders in training: its largest minus its smallest value.

    [3, units], in units of the input; 0 for a distribution that never moves.
    """
    return np.ptp(curves.values, axis=0)


def drift(curves: Percentiles) -> np.ndarray:
    """Returns `ranges` divided by the mean distance between p15 and p85, [3, units].

    A network without BN has wider distributions, relative to which the same range is smaller.
    """
    spread = np.mean(curves.values[:, 2] - curves.values[:, 0], axis=0)
    return ranges(curves) / np.maximum(spread, np.finfo(np.float32).tiny)


def typical_unit(curves: Percentiles) -> int:
    """Returns the unit whose drift of p50 is the median of its layer.

    Of an even number of units it is the lower of the middle two; ties go to the first unit.
    """
    of_median = drift(curves)[1]
    ascending = np.argsort(of_median, kind="stable")
    middle = (of_median.size - 1) // 2
    return int(ascending[middle])


def fig1_numbers(baseline: Run, with_bn: Run, layer: str = LAYER) -> dict[str, Any]:
    """Returns what Fig. 1 shows as numbers, for each of the two networks.

    They are `accuracy` (a share, of the last evaluation), `examples`, `steps`, `unit` (see
    `typical_unit`), `drift` of that unit's three percentiles, and `layer_drift`, the medians over
    all units of the layer. `range` and `layer_range` are the same without division by the spread.
    """
    numbers = {}
    for name, run in (("without BN", baseline), ("with BN", with_bn)):
        curves = percentiles(run, layer)
        unit = typical_unit(curves)
        drifts = drift(curves)
        moves = ranges(curves)
        last = [*run.lines["eval"], *run.lines["test"]][-1]
        numbers[name] = {
            "accuracy": last["top1"],
            "examples": last["examples"],
            "steps": last["step"],
            "unit": unit,
            "drift": _by_percentile(drifts[:, unit]),
            "layer_drift": _by_percentile(np.median(drifts, axis=1)),
            "range": _by_percentile(moves[:, unit]),
            "layer_range": _by_percentile(np.median(moves, axis=1)),
        }
    return numbers


def _by_percentile(values: np.ndarray) -> dict[str, float]:
    """Returns three values as {'15': ..., '50': ..., '85': ...}, rounded for JSON."""
    names = map(str, PERCENTILES)
    return dict(zip(names, values.round(4).tolist(), strict=True))


def fig1_table(numbers: dict[str, Any]) -> str:
    """Makes a Markdown table of the numbers of Fig. 1."""
    head = ["network", "steps", "test accuracy", "range of p15, p50, p85", "drift"]
    head += ["layer's median range", "layer's median drift"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, n in numbers.items():
        accuracy = f"{counted(n['accuracy'], n['examples'])} of {n['examples']:,}"
        wander = []
        for key in ("range", "drift", "layer_range", "layer_drift"):
            wander.append(", ".join(f"{value:.2f}" for value in n[key].values()))
        wander[0] += f" (unit {n['unit']})"

        cells = [name, f"{n['steps']:,}", accuracy, *wander]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + (
        "\n\nThe parentheses after an accuracy hold the 95% interval of its count. The range is "
        "that of the percentile over training, and the drift is the range / mean distance from p15 "
        "to p85. The typical unit is the one whose p50 drift is the median of its layer."
    )


def plot_percentiles(axes, curves: Percentiles, unit: int, colour: str) -> None:
    """Draws the three percentiles of one unit's input against steps, as lines around a band."""
    low, middle, high = curves.values[:, :, unit].T
    axes.fill_between(curves.steps, low, high, color=colour, alpha=0.15, linewidth=0)
    for line, width in ((low, 1.0), (middle, 2.0), (high, 1.0)):
        axes.plot(curves.steps, line, color=colour, linewidth=width)
    axes.set_xlabel("step")
    axes.set_ylabel(f"input of unit {unit}")


def wander_ratio(
    without: Sequence[Run], with_bn: Sequence[Run], measure: Callable[[Percentiles], np.ndarray]
) -> Effect:
    """Returns how many times less the percentiles wander with BN, for each seed that both have.

    measure: `drift` or `ranges`. Its median over the layer's units is taken, and then the mean over
    the three percentiles. Runs whose activations were not recorded, or not published, are left out.
    """
    more = _wandering(without, measure)
    less = _wandering(with_bn, measure)
    seeds = sorted(more.keys() & less.keys())
    ratios = tuple(more[seed] / less[seed] for seed in seeds)
    return Effect(ratios, ratios, ratios, ratio=True)


def _wandering(
    runs: Sequence[Run], measure: Callable[[Percentiles], np.ndarray]
) -> dict[int, float]:
    """Returns {seed: how far the percentiles of LAYER wander} for the runs that recorded them."""
    found = {}
    for run in runs:
        if any(line["layer"] == LAYER for line in run.lines["activation"]):
            of_units = measure(percentiles(run, LAYER))
            of_layer = np.median(of_units, axis=1)
            found[run.config["seed"]] = float(np.mean(of_layer))
    return found


def over_seeds(without: Sequence[Run], with_bn: Sequence[Run]) -> str:
    """Says what holds over all seeds: accuracy, drift and range."""
    ours = {run.config["seed"]: _final(run) for run in with_bn}
    theirs = {run.config["seed"]: _final(run) for run in without}
    accuracy = difference(ours, theirs)

    points = written(accuracy, ".2f", factor=100, unit=" points", sign=True)
    relative = written(wander_ratio(without, with_bn, drift), ".2f", unit="x")
    raw = written(wander_ratio(without, with_bn, ranges), ".2f", unit="x")
    return (
        f"Over {accuracy.n} seeds, paired, with 95% intervals: the final accuracy with BN minus "
        f"that without is {points}. The percentiles wander {relative} less relative to their "
        f"spread (drift), and {raw} less in units of the input (range); of a layer the median unit "
        "counts, and of the three percentiles the mean."
    )


def _final(run: Run) -> float:
    """Returns the accuracy on the test split; without one, that of the last evaluation."""
    return [*run.lines["eval"], *run.lines["test"]][-1]["top1"]


def accuracies(run: Run) -> list[float]:
    """Returns the accuracy of every evaluation, in percent."""
    return [100 * line["top1"] for line in run.lines["eval"]]


def lowest_shown(without: Sequence[float], with_bn: Sequence[float]) -> float:
    """Returns where the axis of accuracy begins, in percent.

    It is a little below BN's lowest evaluation and at most at 90, where the late differences can be
    read. If the other network ends below that, its curve would hardly be seen, and it is 0.
    """
    if without[-1] <= min(with_bn):
        return 0.0
    return max(0.0, min(min(with_bn) - 2, 90.0))


def draw_fig1(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Draws Fig. 1 from the runs `folder`/mnist and `folder`/mnist_bn, and prints its numbers."""
    baseline, with_bn = reader.read_pair(folder / "mnist", folder / "mnist_bn")
    return draw_pair([baseline], [with_bn], out)


def draw_pair(
    without: Sequence[Run], with_bn: Sequence[Run], out: pathlib.Path
) -> list[pathlib.Path]:
    """Draws Fig. 1 of both networks' first seed; the text says what holds over all seeds."""
    baseline = without[0]
    normalized = with_bn[0]
    numbers = fig1_numbers(baseline, normalized)
    figure, (a, b, c) = subplots(1, 3, figsize=(13, 3.8))

    plot_accuracy(a, baseline, GREY, "without BN")
    plot_accuracy(a, normalized, BLUE, "with BN")
    a.set_ylim(bottom=lowest_shown(accuracies(baseline), accuracies(normalized)))
    a.legend(loc="lower right")
    a.set_title(f"(a) {baseline.data['split']} accuracy")

    plot_percentiles(b, percentiles(baseline, LAYER), numbers["without BN"]["unit"], GREY)
    b.set_title("(b) without BN: {15, 50, 85}th percentiles")
    plot_percentiles(c, percentiles(normalized, LAYER), numbers["with BN"]["unit"], BLUE)
    c.set_title("(c) with BN: {15, 50, 85}th percentiles")

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
