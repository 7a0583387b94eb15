"""Makes Fig. 1, the MNIST study: numbers, a table and a picture."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_jax.errors import ConfigError
from bn_jax.figures.origins import made_by
from bn_jax.figures.plotting import BLUE, GREY, plot_accuracy, save, subplots
from bn_jax.tables import markdown_table
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
    recorded = run.lines["activation"]
    lines = [line for line in recorded if line["layer"] == layer]
    if not lines:
        known = sorted({line["layer"] for line in recorded})
        raise ConfigError(f"{run.workdir} did not record the activation `{layer}`; it has {known}")

    steps = []
    values = []
    for line in lines:
        steps.append(line["step"])
        values.append([line["p15"], line["p50"], line["p85"]])
    return Percentiles(
        layer=layer,
        steps=np.array(steps),
        values=np.array(values, float),
    )


def ranges(curves: Percentiles) -> np.ndarray:
    """Returns how far each percentile wanders in training: its largest minus its smallest value.

    [3, units], in units of the input; 0 for a distribution that never moves.
    """
    return np.ptp(curves.values, axis=0)


def drift(curves: Percentiles) -> np.ndarray:
    """Returns `ranges` divided by the mean distance between p15 and p85, [3, units].

    A network without BN has wider distributions, relative to which the same range is smaller.
    """
    p15 = curves.values[:, 0]
    p85 = curves.values[:, 2]
    spread = np.mean(p85 - p15, axis=0)

    smallest = np.finfo(np.float32).tiny  # a constant input has no spread
    return ranges(curves) / np.maximum(spread, smallest)


def typical_unit(curves: Percentiles) -> int:
    """Returns the unit whose drift of p50 is the median of its layer.

    Of an even number of units it is the lower of the middle two; ties go to the first unit.
    """
    of_median = drift(curves)[1]
    ascending = np.argsort(of_median, kind="stable")
    middle = (of_median.size - 1) // 2
    return int(ascending[middle])


def fig1_numbers(
    baseline: Run,
    with_bn: Run,
    layer: str = LAYER,
) -> dict[str, Any]:
    """Returns what Fig. 1 shows as numbers, for each of the two networks.

    They are `accuracy` (a share, of the last evaluation), `examples`, `steps`, `unit` (see
    `typical_unit`), `drift` of that unit's three percentiles, and `layer_drift`, the medians over
    all units of the layer. `range` and `layer_range` are the same without division by the spread.
    """
    networks = {"without BN": baseline, "with BN": with_bn}

    numbers = {}
    for name, run in networks.items():
        curves = percentiles(run, layer)
        unit = typical_unit(curves)
        drifts = drift(curves)
        moves = ranges(curves)

        last = _last_evaluation(run)
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
    rounded = values.round(4).tolist()
    return dict(zip(names, rounded, strict=True))


def fig1_table(numbers: dict[str, Any]) -> str:
    """Makes a Markdown table of the numbers of Fig. 1."""
    head = [
        "network",
        "steps",
        "test accuracy",
        "range of p15, p50, p85",
        "drift",
        "layer's median range",
        "layer's median drift",
    ]
    rows = []
    for name, n in numbers.items():
        accuracy = counted(n["accuracy"], n["examples"])
        cells = [
            name,
            f"{n['steps']:,}",
            f"{accuracy} of {n['examples']:,}",
            f"{_three(n['range'])} (unit {n['unit']})",
            _three(n["drift"]),
            _three(n["layer_range"]),
            _three(n["layer_drift"]),
        ]
        rows.append(cells)

    notes = (
        "The parentheses after an accuracy hold the 95% interval of its count. The range is "
        "that of the percentile over training, and the drift is the range / mean distance from p15 "
        "to p85. The typical unit is the one whose p50 drift is the median of its layer."
    )
    return f"{markdown_table(head, rows)}\n\n{notes}"


def _three(by_percentile: Mapping[str, float]) -> str:
    """Writes the values of the three percentiles with two decimals."""
    return ", ".join(f"{value:.2f}" for value in by_percentile.values())


def plot_percentiles(axes, curves: Percentiles, unit: int, colour: str) -> None:
    """Draws the three percentiles of one unit's input against steps, as lines around a band."""
    steps = curves.steps
    low, middle, high = curves.values[:, :, unit].T

    axes.fill_between(
        steps,
        low,
        high,
        color=colour,
        alpha=0.15,
        linewidth=0,
    )
    axes.plot(steps, low, color=colour, linewidth=1)
    axes.plot(steps, middle, color=colour, linewidth=2)
    axes.plot(steps, high, color=colour, linewidth=1)

    axes.set_xlabel("step")
    axes.set_ylabel(f"input of unit {unit}")


def wander_ratio(
    without: Sequence[Run],
    with_bn: Sequence[Run],
    measure: Callable[[Percentiles], np.ndarray],
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
    runs: Sequence[Run],
    measure: Callable[[Percentiles], np.ndarray],
) -> dict[int, float]:
    """Returns {seed: how far the percentiles of LAYER wander} for the runs that recorded them."""
    found = {}
    for run in runs:
        recorded = run.lines["activation"]
        if not any(line["layer"] == LAYER for line in recorded):
            continue

        of_units = measure(percentiles(run, LAYER))
        of_layer = np.median(of_units, axis=1)
        seed = run.config["seed"]
        found[seed] = float(np.mean(of_layer))
    return found


def over_seeds(without: Sequence[Run], with_bn: Sequence[Run]) -> str:
    """Says what holds over all seeds: accuracy, drift and range."""
    accuracy = difference(_final_by_seed(with_bn), _final_by_seed(without))
    points = written(
        accuracy,
        ".2f",
        factor=100,
        unit=" points",
        sign=True,
    )

    less_drift = wander_ratio(without, with_bn, drift)
    relative = written(less_drift, ".2f", unit="x")
    less_range = wander_ratio(without, with_bn, ranges)
    raw = written(less_range, ".2f", unit="x")

    return (
        f"Over {accuracy.n} seeds, paired, with 95% intervals: the final accuracy with BN minus "
        f"that without is {points}. The percentiles wander {relative} less relative to their "
        f"spread (drift), and {raw} less in units of the input (range); of a layer the median unit "
        "counts, and of the three percentiles the mean."
    )


def _final_by_seed(runs: Sequence[Run]) -> dict[int, float]:
    """Returns {seed: accuracy of the last evaluation}, as shares."""
    return {run.config["seed"]: _last_evaluation(run)["top1"] for run in runs}


def _last_evaluation(run: Run) -> Mapping[str, Any]:
    """Returns the evaluation on the test split; without one, the last evaluation in training."""
    recorded = [*run.lines["eval"], *run.lines["test"]]
    return recorded[-1]


def accuracies(run: Run) -> list[float]:
    """Returns the accuracy of every evaluation, in percent."""
    return [100 * line["top1"] for line in run.lines["eval"]]


def lowest_shown(without: Sequence[float], with_bn: Sequence[float]) -> float:
    """Returns where the axis of accuracy begins, in percent.

    It is a little below BN's lowest evaluation and at most at 90, where the late differences can be
    read. If the other network ends below that, its curve would hardly be seen, and it is 0.
    """
    lowest = min(with_bn)
    if without[-1] <= lowest:
        return 0.0

    below = min(lowest - 2, 90.0)
    return max(0.0, below)


def draw_fig1(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Draws Fig. 1 from the runs `folder`/mnist and `folder`/mnist_bn, and prints its numbers."""
    baseline, with_bn = reader.read_pair(folder / "mnist", folder / "mnist_bn")
    return draw_pair([baseline], [with_bn], out)


def draw_pair(
    without: Sequence[Run],
    with_bn: Sequence[Run],
    out: pathlib.Path,
) -> list[pathlib.Path]:
    """Draws Fig. 1 of both networks' first seed; the text says what holds over all seeds."""
    baseline = without[0]
    normalized = with_bn[0]
    numbers = fig1_numbers(baseline, normalized)
    figure, (a, b, c) = subplots(1, 3, figsize=(13, 3.8))

    plot_accuracy(a, baseline, GREY, "without BN")
    plot_accuracy(a, normalized, BLUE, "with BN")
    bottom = lowest_shown(accuracies(baseline), accuracies(normalized))
    a.set_ylim(bottom=bottom)
    a.legend(loc="lower right")
    a.set_title(f"(a) {baseline.data['split']} accuracy")

    curves = percentiles(baseline, LAYER)
    plot_percentiles(b, curves, typical_unit(curves), GREY)
    b.set_title("(b) without BN: {15, 50, 85}th percentiles")

    curves = percentiles(normalized, LAYER)
    plot_percentiles(c, curves, typical_unit(curves), BLUE)
    c.set_title("(c) with BN: {15, 50, 85}th percentiles")

    figure.suptitle(f"MNIST study (section 4.1), {baseline.data['name']}", fontsize=10)
    pictures = save(figure, out, "fig1")

    parts = [fig1_table(numbers), f"Data: {baseline.data['description']}."]
    if len(without) > 1 and len(with_bn) > 1:
        parts.append(over_seeds(without, with_bn))
    runs = (*without, *with_bn)
    parts.append(made_by(run.origin for run in runs))
    text = "\n\n".join(parts) + "\n"

    as_json = json.dumps(numbers, indent=2) + "\n"
    files.write_atomic(out / "fig1.json", as_json.encode())
    files.write_atomic(out / "fig1.md", text.encode())

    print(text)
    return [*pictures, out / "fig1.json", out / "fig1.md"]
