"""Tests the claims of section 4 with the recorded runs, and makes the page docs/claims.md.

A claim is tested in comparison with the network that the paper describes and, if there is one, with
the strongest network without BN; the latter decides. If a run that a claim needs is missing, the
page names it. Every result comes from the records of runs and evaluations; none is typed in.
"""

import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bn_jax import uncertainty
from bn_jax.figures import fig1, fig4
from bn_jax.figures.curves import Curve, compare, curve, finals, levels, ratio, reach
from bn_jax.figures.origins import differing, made_by
from bn_jax.tables import markdown_table
from bn_jax.uncertainty import (
    NOT_RUN,
    NOT_TESTABLE,
    UNDECIDED,
    Effect,
    Interval,
    bounded,
    difference,
    holm,
    verdict,
    written,
)
from bn_jax.workdir import reader
from bn_jax.workdir.reader import Run

# Natural images come first; the digits are what anyone can rerun in minutes.
SETS = ("tiny40", "digits")
MNIST = ("mnist",)
EVALUATIONS = "evaluations"  # in place of an experiment: what bn_jax.evaluate has recorded

CLAIMS = {
    1: "MNIST: with BN the test accuracy is higher, and higher sooner (Fig. 1a)",
    2: "The distribution of a sigmoid's input is more stable with BN (Fig. 1b, c)",
    3: "BN-Baseline reaches Inception's accuracy in less than half the steps",
    4: "BN-x5 reaches it in a fourteenth of the steps",
    5: "BN-x30 trains somewhat slower at first and ends higher",
    6: "Inception without BN fails at five times the rate",
    7: "With BN, five and thirty times the rate train",
    8: "Dropout can go",
    9: "L2 five times weaker is better (the brief: removing it does not help further; without BN "
    "stronger L2 can be used)",
    10: "The rate can decay six times faster",
    11: "Local response normalization can go",
    12: "Within-shard shuffling gains about 1%",
    13: "Less photometric distortion is better",
    14: "Sigmoid trains with BN and stays at chance without",
    15: "Multicrop gains (25.2 to 21.99% top-1 error)",
    16: "An ensemble of six gains (to 20.1%), by the arithmetic mean of probabilities",
    17: "Batch statistics regularize (the brief: BN generalizes better, and needs less of the "
    "other regularizers)",
}


class Runs:
    """The recorded runs of one data set, by experiment; they are read when they are asked for."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.used: dict[str, list[Run]] = {}

    def get(self, name: str) -> list[Run]:
        """Returns the seeds of an experiment; [] if it has not run.

        Raises ConfigError if it cannot be compared with the experiments that were read before.
        """
        if name in self.used:
            return self.used[name]

        place = self.folder / name
        if not any(reader.find_runs(place)):
            return []

        groups = reader.read_groups(place)
        runs = [run for group in groups.values() for run in group]
        reader.require_comparable([*self.all()[:1], *runs])
        self.used[name] = runs
        return runs

    def all(self) -> list[Run]:
        """Returns all runs that were read."""
        return [run for group in self.used.values() for run in group]

    def curves(self, name: str) -> list[Curve]:
        """Returns the curves of an experiment's seeds."""
        return [curve(run) for run in self.get(name)]


class Found(NamedTuple):
    """The result of a comparison: its text, the number n of seeds, and what a verdict needs.

    `effect` has the sign of the claim. A result that is not an effect over seeds (a count, the gain
    of an ensemble) has an `interval` instead.
    """

    text: str
    n: int = 0
    effect: Effect | None = None
    interval: Interval | None = None
    problem: str = ""  # why the claim cannot be tested by these runs
    more: str = ""  # why the claim is undecided, if there is no effect


Compare = Callable[[Runs, str, str], Found]


class Question(NamedTuple):
    """One part of a claim, which runs can answer.

    Attributes:
      claim: its number.
      what: the quantity, in words.
      ours: the experiment that the claim is about.
      baseline: the one that the paper compares it with, or '' if there is none.
      control: the strongest network without BN, or '' if the baseline is the only comparison.
      compare: makes a Found from the runs and the names of two experiments.
      threshold: the claim says that the effect is above this.
      harmless: whether the claim is that something may be left out; see `uncertainty.verdict`.
      sets: folders below results/.
    """

    claim: int
    what: str
    ours: str
    baseline: str
    control: str
    compare: Compare
    threshold: float = 0.0
    harmless: bool = False
    sets: tuple[str, ...] = SETS


# ----------------------------------------------------------------------------------------------
# Comparisons
# ----------------------------------------------------------------------------------------------


def accuracy(runs: Runs, ours: str, theirs: str) -> Found:
    """Compares final accuracies: ours minus theirs, in points."""
    mine = finals(runs.curves(ours))
    others = finals(runs.curves(theirs))
    effect = difference(mine, others)
    return Found(_points(effect), effect.n, effect)


def _points(effect: Effect) -> str:
    return written(effect, ".2f", factor=100, unit=" points", sign=True)


def speed(runs: Runs, ours: str, theirs: str) -> Found:
    """Finds how many times fewer steps we take to the other's final accuracy."""
    comparison = compare(ours, runs.curves(ours), runs.curves(theirs))
    return _ratio(comparison.speed_up("100%"))


def slowness(runs: Runs, ours: str, theirs: str) -> Found:
    """Divides our steps to plain Inception's final accuracy by the other's."""
    wanted = {c.seed: levels(c) for c in runs.curves("inception")}
    others = {c.seed: c for c in runs.curves(theirs)}
    known = []
    for mine in runs.curves(ours):
        goals = wanted.get(mine.seed)
        if goals is None or mine.seed not in others:
            continue

        level = goals["100%"]
        here = reach(mine, level)
        there = reach(others[mine.seed], level)
        found = ratio(here, there)
        if not isinstance(found, str):
            known.append(found)
    return _ratio(bounded(known))


def _ratio(effect: Effect) -> Found:
    if not effect.n:
        why = "no level: the other is at chance or not done"
        return Found(why, more=f" ({why})")
    return Found(written(effect, ".2f", unit="x"), effect.n, effect)


def slower_decay(runs: Runs, ours: str, theirs: str) -> Found:
    """Compares final accuracies, unless the rates of the two hardly differ at the end."""
    found = accuracy(runs, ours, theirs)
    apart = abs(_last_rate(runs, theirs) / _last_rate(runs, ours) - 1)
    if apart < 0.1:
        return found._replace(problem=f"at the end the rates differ by {100 * apart:.1f}%")
    return found


def _last_rate(runs: Runs, name: str) -> float:
    """Returns the learning rate at the end of an experiment's first run."""
    run = runs.get(name)[0]
    last = run.lines["train"][-1]
    return float(last["learning_rate"])


def drift(runs: Runs, ours: str, theirs: str) -> Found:
    """Finds how many times less the percentiles wander with BN, relative to the spread."""
    return _ratio(fig1.wander_ratio(runs.get(theirs), runs.get(ours), fig1.drift))


def raw_range(runs: Runs, ours: str, theirs: str) -> Found:
    """Finds how many times less the percentiles wander with BN, in units of the input."""
    return _ratio(fig1.wander_ratio(runs.get(theirs), runs.get(ours), fig1.ranges))


def failing(runs: Runs, ours: str, theirs: str) -> Found:
    """Counts the seeds that diverged or ended at chance."""
    return _count(runs, ours, "diverged or at chance", _failed)


def training(runs: Runs, ours: str, theirs: str) -> Found:
    """Counts the seeds that ended above chance."""
    return _count(runs, ours, "above chance", lambda run: not _failed(run))


def _failed(run: Curve) -> bool:
    return run.status == "diverged" or run.at_chance


def _count(runs: Runs, ours: str, said: str, holds: Callable[[Curve], bool]) -> Found:
    """Counts the seeds of which something holds; the claim is that it holds for most seeds."""
    ended = [run for run in runs.curves(ours) if run.status in ("done", "diverged")]
    n = len(ended)
    if not ended:
        why = "no seed is done"
        return Found(why, more=f" ({why})")
    if any(run.classes is None for run in ended):
        why = "the number of classes was not recorded"
        return Found(why, n, more=f" ({why})")

    number = sum(holds(run) for run in ended)
    low, high = uncertainty.wilson(number, n)
    text = f"{number} of {n} seeds {said} (share {low:.2f} to {high:.2f})"

    more = ""
    if number in (0, n):
        more = f" ({_equal_seeds_to_decide()} equal seeds would decide)"
    above_half = Interval(low - 0.5, high - 0.5)
    return Found(text, n, interval=above_half, more=more)


def _equal_seeds_to_decide() -> int:
    """Returns how many seeds are enough if something holds for all of them."""
    return next(n for n in itertools.count(1) if uncertainty.wilson(n, n).low > 0.5)


def multicrop(runs: Runs, ours: str, theirs: str) -> Found:
    """Finds what 144 crops gain over one, over the networks that were evaluated with both."""
    single: dict[str, float] = {}  # network -> top-1
    many: dict[str, float] = {}
    for line in fig4.collect(runs.folder):
        if len(line["members"]) > 1:
            continue
        (member,) = line["members"]
        network = f"{member['name']} {member['seed']}"
        if line["crops"] == 1:
            single[network] = line["top1"]
        elif line["crops"] == 144:
            many[network] = line["top1"]

    both = sorted(single.keys() & many.keys())
    gains = [many[network] - single[network] for network in both]
    effect = uncertainty.single(gains)
    return Found(f"{_points(effect)}, over networks", effect.n, effect)


def ensemble(runs: Runs, ours: str, theirs: str) -> Found:
    """Finds what the mean of six different networks gains over them, with one crop."""
    return _ensemble(runs, "ensemble")


def equal_ensemble(runs: Runs, ours: str, theirs: str) -> Found:
    """Finds what the mean of six seeds of one network gains, as a control for `ensemble`."""
    return _ensemble(runs, fig4.CONTROL)


def _ensemble(runs: Runs, label: str) -> Found:
    found = []
    for row in fig4.rows(fig4.collect(runs.folder)):
        if row.label == label and row.crops == 1:
            found += [line for line in row.lines if len(line["members"]) == 6]
    if not found:
        return Found(NOT_RUN)

    (line,) = found
    gain, ends = fig4.gain(line)
    text = f"{100 * gain:+.2f} points"
    if ends is None:
        return Found(text, 6, more=" (no interval was recorded)")

    text += f" ({100 * ends.low:.2f} to {100 * ends.high:.2f})"
    return Found(text, 6, interval=ends)


# ----------------------------------------------------------------------------------------------
# The questions of each claim
# ----------------------------------------------------------------------------------------------

FINAL = "final accuracy"
STEPS = "steps to the other's final accuracy"
FAIL = "seeds that fail"
TRAIN = "seeds that train"


def _on_mnist(claim: int, what: str, compared: Compare, threshold: float) -> Question:
    return Question(
        claim,
        what,
        ours="mnist_bn",
        baseline="mnist",
        control="",
        compare=compared,
        threshold=threshold,
        sets=MNIST,
    )


def _may_go(claim: int, ours: str, theirs: str, compared: Compare = accuracy) -> Question:
    """Asks whether what `theirs` has in addition to `ours` may be left out."""
    return Question(
        claim,
        FINAL,
        ours,
        baseline=theirs,
        control="",
        compare=compared,
        threshold=-uncertainty.MARGIN_POINTS,
        harmless=True,
    )


QUESTIONS = (
    _on_mnist(1, FINAL, accuracy, 0.0),
    _on_mnist(1, STEPS, speed, 1.0),
    _on_mnist(2, "drift", drift, 1.0),
    _on_mnist(2, "raw range", raw_range, 1.0),
    Question(3, STEPS, "bn_baseline", "inception", "inception_best", speed, 2.0),
    Question(3, STEPS, "bn_best", "inception", "inception_best", speed, 2.0),
    Question(4, STEPS, "bn_x5", "inception", "bn_x5_without_bn", speed, 14.0),
    Question(5, "steps to Inception's accuracy", "bn_x30", "bn_x5", "", slowness, 1.0),
    Question(5, FINAL, "bn_x30", "bn_x5", "", accuracy, 0.0),
    Question(6, FAIL, "inception_x5", "", "", failing),
    Question(7, TRAIN, "bn_x5", "", "", training),
    Question(7, TRAIN, "bn_x30", "", "", training),
    _may_go(8, "bn_x5", "bn_x5_with_dropout"),
    Question(9, FINAL, "bn_x5", "bn_x5_full_l2", "", accuracy),
    _may_go(9, "bn_x5", "bn_x5_no_l2"),
    _may_go(9, "inception_strong_l2", "inception"),
    _may_go(10, "bn_x5", "bn_x5_slow_decay", slower_decay),
    _may_go(11, "bn_x5", "bn_x5_with_lrn"),
    Question(12, FINAL, "bn_x5", "bn_x5_unshuffled", "", accuracy),
    Question(12, FINAL, "bn_x30", "bn_x30_unshuffled", "", accuracy),
    Question(13, FINAL, "bn_x5", "bn_x5_full_distortion", "", accuracy),
    Question(14, TRAIN, "bn_x5_sigmoid", "", "", training),
    Question(14, FAIL, "inception_sigmoid", "", "", failing),
    Question(14, FAIL, "inception_sigmoid_best", "", "", failing),
    Question(15, "gain of 144 crops", EVALUATIONS, "", "", multicrop),
    Question(16, "gain on the members' mean", EVALUATIONS, "", "", ensemble),
    Question(16, "the same of six seeds of one network", EVALUATIONS, "", "", equal_ensemble),
)

UNTESTED = {
    17: "no two runs differ in a regularizer alone, once with and once without BN; 8 and 9 are "
    "parts of it",
}


class Row(NamedTuple):
    """A question on one data set, compared with the baseline and with the control."""

    question: Question
    data: str
    baseline: Found | None
    control: Found | None
    missing: tuple[str, ...]
    differs: str = ""  # what differs in how the compared runs were made

    @property
    def decides(self) -> Found | None:
        """The comparison that the verdict rests on: the control, where there is one."""
        return self.control if self.question.control else self.baseline


def rows(results: pathlib.Path, sets: dict[str, Runs] | None = None) -> list[Row]:
    """Answers the questions about experiments that have run.

    `sets` is filled with the runs of each data set. Raises ConfigError for runs whose settings
    differ.
    """
    sets = {} if sets is None else sets
    found = []
    for question in QUESTIONS:
        for data in question.sets:
            runs = sets.setdefault(data, Runs(results / data))
            row = _row(question, data, runs)
            if row is not None:
                found.append(row)
    return found


def answered(folder: pathlib.Path) -> list[Row]:
    """Returns a row for each question that the runs in `folder` answer, for any data set.

    Raises ConfigError if the runs cannot be read or compared.
    """
    runs = Runs(folder)
    rows = [_row(question, folder.name, runs) for question in QUESTIONS]
    return [row for row in rows if row is not None]


def _row(question: Question, data: str, runs: Runs) -> Row | None:
    if question.ours == EVALUATIONS:
        if not reader.find_evaluations(runs.folder):
            return None
        found = question.compare(runs, "", "")
        if not found.n:
            return None
        return Row(question, data, baseline=found, control=None, missing=())

    ours = runs.get(question.ours)
    if not ours:
        return None

    others = [name for name in (question.baseline, question.control) if name]
    missing = tuple(name for name in others if not runs.get(name))
    origins = [run.origin for run in ours]
    for name in others:
        origins += [run.origin for run in runs.get(name)]

    def answer(name: str) -> Found | None:
        if name in missing:
            return None
        return question.compare(runs, question.ours, name)

    return Row(
        question,
        data,
        baseline=answer(question.baseline),
        control=answer(question.control) if question.control else None,
        missing=missing,
        differs=differing(origins),
    )


def verdicts(found: Sequence[Row]) -> list[str]:
    """Gives a verdict for each row, corrected by Holm over all rows with an interval over seeds."""
    adjusted = holm([_p_value(row) for row in found])
    return [_verdict(row, p) for row, p in zip(found, adjusted, strict=True)]


def _p_value(row: Row) -> float | None:
    decides = row.decides
    if decides is None or decides.problem or decides.effect is None:
        return None
    return decides.effect.p_value(row.question.threshold)


def _verdict(row: Row, adjusted_p: float | None) -> str:
    question = row.question
    decides = row.decides
    if decides is None:
        missing = [f"`{name}`" for name in row.missing]
        return f"{NOT_RUN}: {', '.join(missing)}"
    if decides.problem:
        return f"{NOT_TESTABLE}: {decides.problem}"

    interval = decides.interval
    if interval is not None and interval.low > 0:
        return uncertainty.SUPPORTED
    if interval is not None and interval.high < 0:
        return uncertainty.CONTRADICTED
    if decides.effect is None:
        return f"{UNDECIDED}{decides.more}"
    return verdict(
        decides.effect,
        question.threshold,
        adjusted_p,
        harmless=question.harmless,
    )


# ----------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------

HEAD = [
    "claim",
    "the paper's sentence",
    "tested: quantity, network, data",
    "against the paper's network",
    "against the strongest without BN",
    "n",
    "verdict",
    "runs",
]

INTRODUCTION = """\
# The claims of section 4, and what our runs say

This page is made by `python docs/claims.py --write` from the records under `results/`. The terms
are those of [results.md](results.md#definitions).

* An effect has the sign of the claim: it is above 0 points, or above 1x, if it agrees with the
  paper. Its 95% interval over n seeds, paired by seed, is in parentheses. A count of seeds has
  Wilson's interval, and the gain of an ensemble that of a paired bootstrap of the images.
* The **verdict** is that of the comparison with the strongest network without BN, where the claim
  compares networks with and without BN. Elsewhere it is that of the column before.
  *Supported* and *contradicted*: the whole interval is on one side of what the claim says, and for
  seeds also after Holm's correction for all {compared} comparisons with an interval over seeds.
  *No effect*: the whole interval is within 0.5 points, or 10% of the steps. This margin was fixed
  beforehand. *Undecided*: anything else, with the number of seeds that would decide if mean and
  spread stayed the same. "Can go" means that leaving it out costs no more than the margin.
* The maximum of all evaluations supports no claim.

"""


def page(results: pathlib.Path) -> str:
    """Makes the page: the table of all claims, and what its runs were made with."""
    sets: dict[str, Runs] = {}
    found = rows(results, sets)
    judged = dict(zip(found, verdicts(found), strict=True))

    compared = 0
    for row in found:
        decides = row.decides
        if decides is not None and decides.effect is not None and decides.n > 1:
            compared += 1

    table = []
    for number, sentence in CLAIMS.items():
        for cells in _lines(number, judged):
            table.append([str(number), sentence, *cells])
            sentence = ""  # it stands only in the first line of a claim

    parts = [markdown_table(HEAD, table), *_origins(sets)]
    return INTRODUCTION.format(compared=compared) + "\n\n".join(parts) + "\n"


def _lines(claim: int, judged: dict[Row, str]) -> list[list[str]]:
    """Makes a claim's cells from the third column on: a line for each question and data set."""
    if claim in UNTESTED:
        return [["-", "-", "-", "0", f"{NOT_TESTABLE}: {UNTESTED[claim]}", "-"]]

    lines = []
    for question in QUESTIONS:
        if question.claim != claim:
            continue
        what = question.what
        if question.ours != EVALUATIONS:
            what += f", `{question.ours}`"

        rows = [row for row in judged if row.question == question]
        for row in rows:
            lines.append([f"{what}, {row.data}", *_cells(row, judged[row])])
        if not rows:
            lines.append([what, "-", "-", "0", NOT_RUN, "-"])
    return lines


def _cells(row: Row, said: str) -> list[str]:
    """Makes a row's cells from the fourth column on; `said` is its verdict."""
    question = row.question
    decides = row.decides
    return [
        _against(question.baseline, row.baseline),
        _against(question.control, row.control) if question.control else "-",
        "0" if decides is None else str(decides.n),
        said,
        _folders(row),
    ]


def _folders(row: Row) -> str:
    """Links the folders of the runs behind a row, and says what differs in how they were made."""
    question = row.question
    if question.ours == EVALUATIONS:
        return f"[{row.data}](../results/{row.data})"

    links = []
    for name in dict.fromkeys((question.ours, question.baseline, question.control)):
        if name and name not in row.missing:
            links.append(f"[{name}](../results/{row.data}/{name})")
    text = ", ".join(links)
    if row.differs:
        text += f" (made with different {row.differs})"
    return text


def _against(name: str, found: Found | None) -> str:
    """Writes the result of a comparison with `name`; a count or a gain is compared with ''."""
    text = NOT_RUN if found is None else found.text
    if not name:
        return text
    return f"`{name}`: {text}"


def _origins(sets: dict[str, Runs]) -> list[str]:
    """Says for each data set what its runs were made with, and what they lack."""
    said = []
    for data, runs in sets.items():
        used = runs.all()
        if not used:
            continue

        about = used[0].data
        origins = made_by(run.origin for run in used)
        text = f"**{data}**: {about['description']}. {origins}"

        split = about["split"]
        if "held-out" not in split:
            text += f" Levels are of the {split} split: no training data were held out."

        weak = [f"`{name}`" for name, group in runs.used.items() if _began_weak(name, group[0])]
        if weak:
            text += (
                "\n\n**The networks without BN began with Glorot weights**, which carry hardly any "
                f"signal through them and flatter BN: {', '.join(weak)}."
            )
        said.append(text)
    return said


def _began_weak(name: str, run: Run) -> bool:
    """Whether a network without BN had Glorot weights, in an experiment not meant to test them."""
    config = run.config
    glorot = config["model"].get("init") == "glorot"
    return glorot and config["norm"] == "none" and name != "inception_glorot"
