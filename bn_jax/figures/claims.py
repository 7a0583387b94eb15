"""Tests the claims of section 4 with the recorded runs, and makes the page docs/claims.md.

A claim is tested in comparison with the network that the paper describes and, if there is one, with
the strongest network without BN; the latter decides. If a run that a claim needs is missing, the
page names it. Every number comes from run.json and metrics.jsonl; none is typed in.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bn_jax import uncertainty
from bn_jax.figures import fig1, fig4
from bn_jax.figures.curves import Curve, compare, curve, finals, levels, ratio, reach
from bn_jax.figures.origins import apart, made_by
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
        if name not in self.used:
            place = self.folder / name
            found = reader.read_groups(place) if any(reader.find_runs(place)) else {}
            runs = [run for group in found.values() for run in group]
            others = [run for group in self.used.values() for run in group]
            reader.require_comparable([*others[:1], *runs])
            if not runs:
                return []
            self.used[name] = runs
        return self.used[name]

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
    effect = difference(finals(runs.curves(ours)), finals(runs.curves(theirs)))
    return Found(_points(effect), effect.n, effect)


def _points(effect: Effect) -> str:
    return written(effect, ".2f", factor=100, unit=" points", sign=True)


def speed(runs: Runs, ours: str, theirs: str) -> Found:
    """Finds how many times fewer steps we take to the other's final accuracy."""
    return _ratio(compare(ours, runs.curves(ours), runs.curves(theirs)).speed_up("100%"))


def slowness(runs: Runs, ours: str, theirs: str) -> Found:
    """Divides our steps to plain Inception's final accuracy by the other's."""
    wanted = {c.seed: levels(c) for c in runs.curves("inception")}
    others = {c.seed: c for c in runs.curves(theirs)}
    known = []
    for mine in runs.curves(ours):
        goals = wanted.get(mine.seed)
        if goals is None or mine.seed not in others:
            continue
        found = ratio(reach(mine, goals["100%"]), reach(others[mine.seed], goals["100%"]))
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
    ends = [float(runs.get(name)[0].lines["train"][-1]["learning_rate"]) for name in (ours, theirs)]
    found = accuracy(runs, ours, theirs)
    apart = abs(ends[1] / ends[0] - 1)
    if apart < 0.1:
        return found._replace(problem=f"at the end the rates differ by {100 * apart:.1f}%")
    return found


def drift(runs: Runs, ours: str, theirs: str) -> Found:
    """Finds how many times less the percentiles wander with BN, relative to the spread."""
    return _ratio(fig1.wander_ratio(runs.get(theirs), runs.get(ours), fig1.drift))


def raw_range(runs: Runs, ours: str, theirs: str) -> Found:
    """Finds how many times less the percentiles wander with BN, in units of the input."""
    return _ratio(fig1.wander_ratio(runs.get(theirs), runs.get(ours), fig1.ranges))


def failing(runs: Runs, ours: str, theirs: str) -> Found:
    """Counts the seeds that diverged or ended at chance."""
    return _count(runs, ours, "diverged or at chance", lambda c: c.at_chance)


def training(runs: Runs, ours: str, theirs: str) -> Found:
    """Counts the seeds that ended above chance."""
    return _count(runs, ours, "above chance", lambda c: not c.at_chance)


def _count(runs: Runs, ours: str, said: str, holds: Callable[[Curve], bool]) -> Found:
    ended = [c for c in runs.curves(ours) if c.status in ("done", "diverged")]
    diverged = said.startswith("diverged")
    number = sum(diverged if c.status == "diverged" else holds(c) for c in ended)
    if not ended:
        return Found("no seed is done", more=" (no seed is done)")
    if any(c.classes is None for c in ended):
        why = "the number of classes was not recorded"
        return Found(why, len(ended), more=f" ({why})")
    low, high = uncertainty.wilson(number, len(ended))
    text = f"{number} of {len(ended)} seeds {said} (share {low:.2f} to {high:.2f})"
    more = ""
    if number in (0, len(ended)):
        enough = next(n for n in range(1, 99) if uncertainty.wilson(n, n).low > 0.5)
        more = f" ({enough} equal seeds would decide)"
    return Found(text, len(ended), interval=Interval(low - 0.5, high - 0.5), more=more)


def multicrop(runs: Runs, ours: str, theirs: str) -> Found:
    """Finds what 144 crops gain over one, over the networks that were evaluated with both."""
    scores: dict[int, dict[str, float]] = {1: {}, 144: {}}
    for line in fig4.collect(runs.folder):
        if len(line["members"]) == 1 and line["crops"] in scores:
            (member,) = line["members"]
            scores[line["crops"]][f"{member['name']} {member['seed']}"] = line["top1"]
    both = sorted(scores[1].keys() & scores[144].keys())
    gains = [scores[144][name] - scores[1][name] for name in both]
    effect = uncertainty.single(gains)
    return Found(f"{_points(effect)}, over networks", effect.n, effect)


def ensemble(runs: Runs, ours: str, theirs: str) -> Found:
    """Finds what the mean of six different networks gains over them, with one crop."""
    return _ensemble(runs, "ensemble")


def equal_ensemble(runs: Runs, ours: str, theirs: str) -> Found:
    """Finds what the mean of six seeds of one network gains, as a control for `ensemble`."""
    return _ensemble(runs, fig4.CONTROL)


def _ensemble(runs: Runs, label: str) -> Found:
    found = [
        row.lines[0]
        for row in fig4.rows(fig4.collect(runs.folder))
        if (row.label, row.crops) == (label, 1) and len(row.lines[0]["members"]) == 6
    ]
    if not found:
        return Found(NOT_RUN)
    (line,) = found
    alone = sum(fig4.wrong(one, "top1") for one in line["member_scores"]) / 6
    text = f"{100 * (alone - fig4.wrong(line, 'top1')):+.2f} points"
    if "gain" not in line:
        return Found(text, 6, more=" (no interval was recorded)")
    ends = Interval(line["gain"]["low"], line["gain"]["high"])
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
    return Question(claim, what, "mnist_bn", "mnist", "", compared, threshold, sets=MNIST)


def _may_go(claim: int, ours: str, theirs: str, compared: Compare = accuracy) -> Question:
    """Asks whether what `theirs` has in addition to `ours` may be left out."""
    margin = -uncertainty.MARGIN_POINTS
    return Question(claim, FINAL, ours, theirs, "", compared, margin, harmless=True)


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
    found = (_row(question, folder.name, runs) for question in QUESTIONS)
    return [row for row in found if row is not None]


def _row(question: Question, data: str, runs: Runs) -> Row | None:
    if question.ours == EVALUATIONS:
        if not reader.find_evaluations(runs.folder):
            return None
        found = question.compare(runs, "", "")
        return Row(question, data, found, None, ()) if found.n else None

    if not runs.get(question.ours):
        return None
    named = [name for name in (question.baseline, question.control) if name]
    missing = tuple(name for name in named if not runs.get(name))

    def answer(name: str) -> Found | None:
        return None if name in missing else question.compare(runs, question.ours, name)

    control = answer(question.control) if question.control else None
    used = [runs.get(name) for name in (question.ours, *named)]
    origins = [run.origin for group in used for run in group]
    differs = apart(origins, ())
    return Row(question, data, answer(question.baseline), control, missing, differs)


def verdicts(found: Sequence[Row]) -> list[str]:
    """Gives a verdict for each row, corrected by Holm over all rows with an interval over seeds."""
    p_values = []
    for row in found:
        decides = row.decides
        effect = None if decides is None or decides.problem else decides.effect
        p_values.append(None if effect is None else effect.p_value(row.question.threshold))
    adjusted = holm(p_values)
    return [_verdict(row, p) for row, p in zip(found, adjusted, strict=True)]


def _verdict(row: Row, adjusted_p: float | None) -> str:
    decides = row.decides
    if decides is None:
        return f"{NOT_RUN}: {', '.join(f'`{name}`' for name in row.missing)}"
    if decides.problem:
        return f"{NOT_TESTABLE}: {decides.problem}"
    if decides.interval is not None and decides.interval.low > 0:
        return uncertainty.SUPPORTED
    if decides.interval is not None and decides.interval.high < 0:
        return uncertainty.CONTRADICTED
    if decides.effect is None:
        return f"{UNDECIDED}{decides.more}"
    return verdict(
        decides.effect, row.question.threshold, adjusted_p, harmless=row.question.harmless
    )


# ----------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------

HEAD = ["claim", "the paper's sentence", "tested: quantity, network, data"]
HEAD += ["against the paper's network", "against the strongest without BN", "n", "verdict", "runs"]

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
    deciding = [row.decides for row in found]
    compared = sum(d is not None and d.effect is not None and d.n > 1 for d in deciding)

    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for number, sentence in CLAIMS.items():
        cells = [
            cells
            for question in QUESTIONS
            if question.claim == number
            for cells in _lines(question, judged)
        ]
        if number in UNTESTED:
            cells = [["-", "-", "-", "0", f"{NOT_TESTABLE}: {UNTESTED[number]}", "-"]]
        for k, line in enumerate(cells):
            start = [str(number), sentence if k == 0 else ""]
            lines.append(f"| {' | '.join([*start, *line])} |")

    parts = ["\n".join(lines), *_origins(sets)]
    return INTRODUCTION.format(compared=compared) + "\n\n".join(parts) + "\n"


def _lines(question: Question, judged: dict[Row, str]) -> list[list[str]]:
    """Makes the cells of a question from the third column on, one line for each data set."""
    name = "" if question.ours == EVALUATIONS else f", `{question.ours}`"
    lines = [
        [f"{question.what}{name}, {row.data}", *_cells(row, said)]
        for row, said in judged.items()
        if row.question == question
    ]
    return lines or [[f"{question.what}{name}", "-", "-", "0", NOT_RUN, "-"]]


def _cells(row: Row, said: str) -> list[str]:
    question = row.question
    baseline = _against(question.baseline, row.baseline)
    control = _against(question.control, row.control) if question.control else "-"
    n = "0" if row.decides is None else str(row.decides.n)
    if question.ours == EVALUATIONS:
        return [baseline, control, n, said, f"[{row.data}](../results/{row.data})"]
    names = dict.fromkeys((question.ours, question.baseline, question.control))
    folders = [
        f"[{name}](../results/{row.data}/{name})"
        for name in names
        if name and name not in row.missing
    ]
    note = f" (made with different {row.differs})" if row.differs else ""
    return [baseline, control, n, said, ", ".join(folders) + note]


def _against(name: str, found: Found | None) -> str:
    if found is None:
        return f"`{name}`: {NOT_RUN}"
    return f"`{name}`: {found.text}" if name else found.text


def _origins(sets: dict[str, Runs]) -> list[str]:
    """Says for each data set what its runs were made with, and what they lack."""
    said = []
    for data, runs in sets.items():
        used = [run for group in runs.used.values() for run in group]
        if not used:
            continue
        split = used[0].data["split"]
        text = f"**{data}**: {used[0].data['description']}. {made_by(r.origin for r in used)}"
        if "held-out" not in split:
            text += f" Levels are of the {split} split: no training data were held out."
        weak = [
            f"`{name}`"
            for name, group in runs.used.items()
            if group[0].config["norm"] == "none"
            and group[0].config["model"].get("init") == "glorot"
            and name != "inception_glorot"
        ]
        if weak:
            text += (
                "\n\n**The networks without BN began with Glorot weights**, which carry hardly any "
                f"signal through them and flatter BN: {', '.join(weak)}."
            )
        said.append(text)
    return said
