"""Computes section 4.2 (Fig. 2, Fig. 3, ablations) from recorded curves; reads and writes no files.

Definitions (docs/results.md has them in words): Steps are steps of 32 examples. A level is reached
between the last evaluation below it and the first that is at least as high; between these two,
steps are interpolated linearly in accuracy. If the first evaluation already has the level, its step
is an upper bound. If no evaluation has it, the run's total steps are a lower bound. Levels are 90%,
95% and 100% of the last evaluation of the reference's run *with the same seed*; a reference at
chance has no levels. They refer to the evaluated split. Runs that score the test split once, at the
end, evaluate held-out training examples, and that one score is their final accuracy; of other runs
it is the last evaluation. The maximum of all evaluations is not used as a level, because it grows
with their number.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bn_jax.uncertainty import Effect, bounded, difference, wilson
from bn_jax.workdir.reader import FREE, Run

BASELINE = "inception"  # as the paper describes it
CONTROLS = ("inception_best", "inception_best_rate")  # the best without BN; the first that has run
LEVELS = {"90%": 0.9, "95%": 0.95, "100%": 1.0}  # of the reference's last evaluation
RESOLUTION = 0.1  # relative; steps that are known to this count as resolved

CLASSES = {"digits": 10, "mnist": 10}  # for older records, which do not have this number

# The comparisons that the claim rests on: each with the strongest network without BN.
HEADLINES = (("bn_best", "inception_best"), ("bn_x5", "bn_x5_without_bn"))

NOT_REACHED = "not reached"
NOT_YET = "not yet"  # the run is not done
DIVERGED = "diverged"
NO_REFERENCE = "no reference"  # no run of the reference with this seed that is done
AT_CHANCE = "reference at chance"  # any network would reach its levels at once

# {experiment: the one that it changes}; the recorded configs show what the change is.
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
    """The paper's numbers of a network on ImageNet (Fig. 3 and 4.2.2)."""

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
    """The evaluations of one run. All steps are steps of 32 examples.

    Attributes:
      steps, top1: [T], the step and the accuracy (share) of each evaluation.
      last, total: the last recorded step, and the last one of the whole run.
      examples: the number of evaluated examples; `split` is the name of their split.
      stopped_at: the step at which the run diverged, if the record says so.
      classes: of the data; None if neither the record nor CLASSES gives the number.
      test: accuracy on the test split's `test_examples`, scored once at the end; None if the
        evaluated split is the test split.
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
    split: str = "test"
    test: float | None = None
    test_examples: int = 0

    @property
    def last_evaluation(self) -> float | None:
        """The accuracy of the last evaluation; None unless the run is done."""
        if self.status != "done" or not self.top1.size:
            return None
        return float(self.top1[-1])

    @property
    def final(self) -> float | None:
        """The final accuracy, None unless the run is done: of the test split if that was scored."""
        return self.last_evaluation if self.test is None else self.test

    @property
    def final_examples(self) -> int:
        """The number of examples that `final` was counted on."""
        return self.examples if self.test is None else self.test_examples

    @property
    def maximum(self) -> float | None:
        """The best accuracy so far; None without an evaluation."""
        if not self.top1.size:
            return None
        return float(self.top1.max())

    @property
    def at_chance(self) -> bool:
        """Whether the last evaluation is at chance: its 95% interval reaches down to 1/classes."""
        if self.last_evaluation is None or self.classes is None:
            return False
        count = round(self.last_evaluation * self.examples)
        return wilson(count, self.examples).low <= 1 / self.classes


def curve(run: Run) -> Curve:
    """Makes a Curve of a recorded run."""
    # Runs are paired by the number in the folder's name. It is the seed, except for the members of
    # the ensemble, which have seeds of their own (100, 200, ...).
    number = re.fullmatch(r"seed_(\d+)", run.workdir.name)
    seed = int(number[1]) if number else run.config["seed"]

    evaluations = run.lines["eval"]
    evaluated = np.array([line["step"] for line in evaluations], float)
    top1 = np.array([line["top1"] for line in evaluations], float)
    recorded = [*run.lines["train"], *evaluations, *run.lines["activation"]]
    last = max([line["step"] for line in recorded], default=0)

    scale = run.config["batch_size"] / 32
    stopped_at = None
    where = re.search(r"diverged at step ([\d,]+)", run.error)
    if where:
        stopped_at = scale * int(where[1].replace(",", ""))

    test = None
    test_examples = 0
    if run.lines["test"] and run.status == "done":
        score = run.lines["test"][-1]
        test = score["top1"]
        test_examples = score["examples"]

    return Curve(
        seed=seed,
        steps=scale * evaluated,
        top1=top1,
        status=run.status,
        last=scale * last,
        total=scale * run.config["total_steps"],
        examples=run.data["eval_examples"],
        stopped_at=stopped_at,
        classes=run.data.get("classes", CLASSES.get(run.data["name"])),
        split=run.data["split"],
        test=test,
        test_examples=test_examples,
    )


def levels(reference: Curve) -> dict[str, float] | None:
    """Returns the accuracies to reach, by LEVELS; None if the reference has no levels."""
    accuracy = reference.last_evaluation
    if accuracy is None or reference.at_chance:
        return None
    return {name: share * accuracy for name, share in LEVELS.items()}


class Reached(NamedTuple):
    """When a curve reaches a level: after more than `low` steps, and after at most `high` steps.

    `steps` is interpolated between the two. If the first evaluation already has the level, `low` is
    0; if none has it, `high` is infinite. `steps` is then the bound that is known.
    """

    low: float
    steps: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether the steps are known to RESOLUTION, or to one step."""
        return self.low > 0 and self.high <= self.low * (1 + RESOLUTION) + 1


def reach(curve: Curve, level: float) -> Reached | str:
    """Finds when a curve first reaches a level; NOT_YET if it has not and its run is not done."""
    found = np.flatnonzero(curve.top1 >= level - 1e-9)  # 0.9 * 0.8 is a little above 0.72
    if not found.size:
        if curve.status not in ("done", "diverged"):
            return NOT_YET
        # A run that diverged counts as one that took all its steps without reaching the level.
        return Reached(curve.total, curve.total, math.inf)

    first = int(found[0])
    high = float(curve.steps[first])
    if first == 0:
        return Reached(0.0, high, high)

    low = float(curve.steps[first - 1])
    below = float(curve.top1[first - 1])
    above = float(curve.top1[first])
    share = min(1.0, (level - below) / (above - below))
    return Reached(low, low + share * (high - low), high)


def reached(values: Sequence[Reached | str]) -> list[Reached]:
    """Returns the results of the seeds that reach the level."""
    found = []
    for value in values:
        if isinstance(value, Reached) and value.high < math.inf:
            found.append(value)
    return found


Ratio = tuple[float, float, float]  # of steps: lowest, estimate, highest


class Comparison(NamedTuple):
    """An experiment compared with a reference. Lists have a result, or a word, for each seed.

    Attributes:
      steps: by LEVELS, when the experiment reaches the level.
      ratios: by LEVELS, the reference's steps / the experiment's.
      accuracy: final accuracy minus the reference's, of the seeds that both have finished.
    """

    label: str
    curves: Sequence[Curve]
    steps: dict[str, list[Reached | str]]
    ratios: dict[str, list[Ratio | str]]
    accuracy: Effect

    @property
    def final(self) -> list[float | str]:
        """Final accuracy of each seed (share)."""
        found: list[float | str] = []
        for run in self.curves:
            if run.final is not None:
                found.append(run.final)
            elif run.status == "diverged":
                found.append(DIVERGED)
            else:
                found.append(NOT_YET)
        return found

    def speed_up(self, level: str) -> Effect:
        """Returns how many times fewer steps than the reference it takes to a level, over seeds."""
        known = [ratio for ratio in self.ratios[level] if not isinstance(ratio, str)]
        return bounded(known)


def compare(label: str, curves: Sequence[Curve], reference: Sequence[Curve]) -> Comparison:
    """Compares an experiment's seeds with the reference's runs of the same seeds."""
    by_seed = {run.seed: run for run in reference}
    steps: dict[str, list[Reached | str]] = {}
    ratios: dict[str, list[Ratio | str]] = {}
    for level in LEVELS:
        steps[level] = []
        ratios[level] = []
        for mine in curves:
            here, times = _compare_seed(mine, by_seed.get(mine.seed), level)
            steps[level].append(here)
            ratios[level].append(times)

    accuracy = difference(finals(curves), finals(reference))
    return Comparison(label, curves, steps, ratios, accuracy)


def _compare_seed(
    mine: Curve,
    theirs: Curve | None,
    level: str,
) -> tuple[Reached | str, Ratio | str]:
    """Returns when a run reaches a level of the reference, and the ratio of their steps."""
    if theirs is None:
        return NO_REFERENCE, NO_REFERENCE
    wanted = levels(theirs)
    if wanted is None:
        why = AT_CHANCE if theirs.at_chance else NO_REFERENCE
        return why, why

    here = reach(mine, wanted[level])
    there = reach(theirs, wanted[level])
    return here, ratio(there, here)


def ratio(there: Reached | str, here: Reached | str) -> Ratio | str:
    """Returns the reference's steps / ours, or why there is none."""
    if isinstance(here, str):
        return here
    if isinstance(there, str):
        return there
    low = 0.0 if here.high == math.inf else there.low / here.high
    high = math.inf if here.low == 0 else there.high / here.low
    return low, there.steps / here.steps, high


def finals(curves: Sequence[Curve]) -> dict[int, float]:
    """Returns {seed: final accuracy} of the runs that are done."""
    return {c.seed: c.final for c in curves if c.final is not None}


def mean_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the steps [T] that all seeds evaluated; mean, lowest, highest accuracy [T] there."""
    common = curves[0].steps
    for run in curves[1:]:
        common = np.intersect1d(common, run.steps)

    # The places of the common steps in each run; steps increase, so none is twice.
    top1 = np.stack([run.top1[np.isin(run.steps, common)] for run in curves])
    return common, top1.mean(0), top1.min(0), top1.max(0)


def changes(config: Mapping[str, object], parent: Mapping[str, object]) -> str:
    """Says in which (flat) fields an experiment differs from its parent: 'dropout 0.0 -> 0.4'."""
    found = []
    for field, value in config.items():
        before = parent.get(field)
        if field not in ("name", *FREE) and value != before:
            found.append(f"{field} {_short(before)} -> {_short(value)}")
    return ", ".join(found)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
