"""Section 4.2 as numbers (Fig. 2, Fig. 3, ablations), from recorded curves. Pure computations.

Definitions (docs/results.md has them in words). Steps are steps of 32 examples. An accuracy counts
at the step at which it was evaluated: the first evaluation that is at least a level reaches it,
nothing is interpolated. Levels are those of the reference's run *with the same seed*: 90% and 95%
of its final accuracy, and its maximum; a reference at chance has none. Final is the last evaluation
of a run that is done.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from bn_jax.workdir.reader import FREE, Run, standard_error

BASELINE = "inception"
CONTROL = "inception_best"
LEVELS = ("90%", "95%", "max")

NOT_REACHED = "not reached"
NOT_YET = "not yet"  # the run is not done
DIVERGED = "diverged"
NO_REFERENCE = "no reference"  # no run of the reference with this seed that is done
AT_CHANCE = "reference at chance"  # a level that any network reaches at once is not used

# {experiment: the one it changes}; what the change is stands in the recorded configs.
PARENTS = {
    "bn_baseline": "inception",
    "inception_best": "inception",
    "bn_best": "bn_baseline",
    "bn_x5_without_bn": "bn_x5",
    "inception_sigmoid_best": "inception_sigmoid",
    "inception_glorot": "inception",
    "inception_x5": "inception",
    "inception_sigmoid": "inception",
    "inception_strong_l2": "inception",
    "bn_x5": "bn_baseline",
    "bn_x1": "bn_x5",
    "bn_x30": "bn_x5",
    "bn_x5_sigmoid": "bn_x5",
    "bn_x5_with_dropout": "bn_x5",
    "bn_x5_with_lrn": "bn_x5",
    "bn_x5_full_l2": "bn_x5",
    "bn_x5_no_l2": "bn_x5",
    "bn_x5_slow_decay": "bn_x5",
    "bn_x5_unshuffled": "bn_x5",
    "bn_x5_full_distortion": "bn_x5",
    "bn_x30_unshuffled": "bn_x30",
    **{f"ensemble_{i}": "bn_x30" for i in range(1, 7)},
    "mnist_bn": "mnist",
}


class Published(NamedTuple):
    """What the paper says of a network on ImageNet (Fig. 3 and 4.2.2)."""

    steps: str
    speed_up: str
    maximum: str


PAPER = {
    "inception": Published("31.0e6", "1", "72.2%"),
    "bn_baseline": Published("13.3e6", "2.33", "72.7%"),
    "bn_x5": Published("2.1e6", "14.8", "73.0%"),
    "bn_x30": Published("2.7e6", "11.5", "74.8%"),
    "bn_x5_sigmoid": Published("not reached", "-", "69.8%"),
    "inception_x5": Published("diverged", "-", "-"),
    "inception_sigmoid": Published("not reached", "-", "0.1% (chance)"),
}


class Curve(NamedTuple):
    """One run: steps [T] (of 32 examples) and accuracies [T] (shares) of its evaluations.

    `last` and `total`: the last recorded step and the last one wanted; `stopped_at`: where it
    diverged, if the record says so. `examples`: in the evaluated split. `classes`: of the
    data, None in records from before they said so.
    """

    seed: int
    steps: np.ndarray
    top1: np.ndarray
    status: str
    last: float
    total: float
    examples: int
    stopped_at: float | None = None
    classes: int | None = None

    @property
    def final(self) -> float | None:
        """Accuracy of the last evaluation; None unless the run is done."""
        return float(self.top1[-1]) if self.status == "done" and self.top1.size else None

    @property
    def maximum(self) -> float | None:
        """The best accuracy so far; None without an evaluation."""
        return float(self.top1.max()) if self.top1.size else None

    @property
    def at_chance(self) -> bool:
        """Whether the final accuracy is within two standard errors of guessing, or below it."""
        if self.final is None or self.classes is None:
            return False
        chance = 1 / self.classes
        return self.final <= chance + 2 * standard_error(chance, self.examples)


def curve(run: Run) -> Curve:
    """A recorded run's curve."""
    scale = run.config["batch_size"] / 32
    evaluations = run.lines["eval"]
    recorded = (*run.lines["train"], *evaluations, *run.lines["activation"])
    steps = [line["step"] for line in recorded]
    where = re.search(r"diverged at step ([\d,]+)", run.error)
    return Curve(
        seed=run.config["seed"],
        steps=scale * np.array([line["step"] for line in evaluations], float),
        top1=np.array([line["top1"] for line in evaluations], float),
        status=run.status,
        last=scale * max(steps, default=0),
        total=scale * run.config["total_steps"],
        examples=run.data["eval_examples"],
        stopped_at=scale * int(where[1].replace(",", "")) if where else None,
        classes=run.data.get("classes"),
    )


def levels(reference: Curve) -> dict[str, float] | None:
    """The accuracies to be reached, by LEVELS; None unless the reference is done and learnt."""
    final = reference.final
    maximum = reference.maximum
    if final is None or maximum is None or reference.at_chance:
        return None
    return {"90%": 0.9 * final, "95%": 0.95 * final, "max": maximum}


def first_at(curve: Curve, level: float) -> float | str:
    """Steps of the first evaluation of at least `level`, or the word for why there is none."""
    reached = np.flatnonzero(curve.top1 >= level - 1e-9)  # 0.9 * 0.8 is a little above 0.72
    if reached.size:
        return float(curve.steps[reached[0]])
    if curve.status == "diverged":
        return DIVERGED
    return NOT_REACHED if curve.status == "done" else NOT_YET


class Comparison(NamedTuple):
    """An experiment against a reference; lists have an entry a seed, a number or a word.

    All by LEVELS. `around`: steps to the level minus and plus its binomial standard error;
    `speed_up`: the reference's steps over the experiment's.
    """

    label: str
    curves: Sequence[Curve]
    steps: dict[str, list[float | str]]
    around: dict[str, list[tuple[float | str, float | str]]]
    speed_up: dict[str, list[float | str]]

    @property
    def final(self) -> list[float | str]:
        """Final accuracy of each seed (share)."""
        word = {"diverged": DIVERGED}
        return [word.get(c.status, NOT_YET) if c.final is None else c.final for c in self.curves]

    @property
    def maximum(self) -> list[float | str]:
        """Highest accuracy of each seed so far (share)."""
        return [NOT_YET if c.maximum is None else c.maximum for c in self.curves]


def row(label: str, curves: Sequence[Curve], reference: Sequence[Curve]) -> Comparison:
    """Compares an experiment's seeds with the reference's runs of the same seeds."""
    by_seed = {c.seed: (c, levels(c)) for c in reference}
    steps: dict[str, list[float | str]] = {name: [] for name in LEVELS}
    speed_up: dict[str, list[float | str]] = {name: [] for name in LEVELS}
    around: dict[str, list[tuple[float | str, float | str]]] = {name: [] for name in LEVELS}
    for mine in curves:
        theirs, wanted = by_seed.get(mine.seed, (None, None))
        for name in LEVELS:
            if theirs is None or wanted is None:
                why = AT_CHANCE if theirs is not None and theirs.at_chance else NO_REFERENCE
                steps[name].append(why)
                around[name].append((why, why))
                speed_up[name].append(why)
                continue
            level = wanted[name]
            error = standard_error(level, theirs.examples)
            here = first_at(mine, level)
            there = first_at(theirs, level)
            steps[name].append(here)
            around[name].append((first_at(mine, level - error), first_at(mine, level + error)))
            # the reference is done, so that it has reached its own levels
            both = isinstance(here, float) and isinstance(there, float)
            speed_up[name].append(there / here if both else here)  # type: ignore[operator]
    return Comparison(label, curves, steps, around, speed_up)


class Difference(NamedTuple):
    """Mean over n seeds of (experiment - parent) with a 95% interval; None where it is unknown.

    `interval`: half its width. From one seed it is not known; `binomial` is the standard error of
    the difference that counting on the test split alone would give.
    """

    n: int
    mean: float | None
    interval: float | None
    binomial: float | None


def paired(ours: Mapping[int, float], parents: Mapping[int, float], examples: int) -> Difference:
    """Difference of accuracies {seed: share}, paired by seed; Student's t with n - 1 degrees."""
    seeds = sorted(ours.keys() & parents.keys())
    n = len(seeds)
    if not n:
        return Difference(0, None, None, None)
    differences = np.array([ours[s] - parents[s] for s in seeds])
    spread = float(np.std(differences, ddof=1)) / math.sqrt(n) if n > 1 else None
    interval = None if spread is None else float(special.stdtrit(n - 1, 0.975)) * spread
    counted = [standard_error(x[s], examples) ** 2 for x in (ours, parents) for s in seeds]
    return Difference(n, float(differences.mean()), interval, math.sqrt(sum(counted)) / n)


def finals(curves: Sequence[Curve]) -> dict[int, float]:
    """{seed: final accuracy} of the runs that are done."""
    return {c.seed: c.final for c in curves if c.final is not None}


def mean_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps [T] that all seeds have evaluated, and mean, lowest and highest accuracy [T] there."""
    common = sorted(set.intersection(*(set(c.steps.tolist()) for c in curves)))
    table = np.array(
        [[c.top1[np.flatnonzero(c.steps == s)[0]] for s in common] for c in curves]
    ).reshape(len(curves), len(common))
    return np.array(common), table.mean(0), table.min(0), table.max(0)


def changes(config: Mapping[str, object], parent: Mapping[str, object]) -> str:
    """The fields (flat) in which an experiment differs from its parent: 'dropout 0.0 -> 0.4'."""
    fields = [f for f in config if f not in ("name", *FREE) and config[f] != parent.get(f)]
    return ", ".join(f"{f} {_short(parent.get(f))} -> {_short(config[f])}" for f in fields)


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
