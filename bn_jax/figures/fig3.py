"""Makes the table of Fig. 3 as Markdown and CSV; curves.py has the definitions."""

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bn_jax.figures.curves import (
    BASELINE,
    CONTROLS,
    HEADLINES,
    LEVELS,
    NOT_REACHED,
    PAPER,
    Comparison,
    Curve,
    Reached,
    compare,
    curve,
    levels,
)
from bn_jax.figures.origins import made_by
from bn_jax.uncertainty import Effect, counted, single, wilson, written
from bn_jax.workdir.reader import Run

Groups = Mapping[str, Sequence[Run]]


def steps_cell(values: Sequence[Reached | str]) -> str:
    """Gives geometric mean and range over seeds, and how many seeds did not reach the level."""
    found = [v for v in values if isinstance(v, Reached) and v.high < math.inf]
    words = Counter(v if isinstance(v, str) else NOT_REACHED for v in values if v not in found)
    if not found:
        return ", ".join(_all_or_some(words, len(values)))
    steps = [v.steps for v in found]
    mean = math.exp(sum(map(math.log, steps)) / len(steps))
    text = f"{mean:,.0f}"
    if min(steps) < max(steps):
        text += f" [{min(steps):,.0f} to {max(steps):,.0f}]"
    if any(v.low == 0 for v in found):
        text = f"at most {text}"
    return "; ".join([text, *(f"{word} {n} of {len(values)}" for word, n in words.items())])


def ratio_cell(row: Comparison, level: str) -> str:
    """Gives the speed-up with its interval, and how many seeds have none and why."""
    values = row.ratios[level]
    words = Counter([v for v in values if isinstance(v, str)])
    effect = row.speed_up(level)
    if not effect.n:
        return ", ".join(_all_or_some(words, len(values)))
    text = written(effect, ".2f", unit="x")
    return "; ".join([text, *(f"{word} {n} of {len(values)}" for word, n in words.items())])


def accuracy_cell(row: Comparison) -> str:
    """Gives the mean final accuracy with its interval over seeds; of one seed, of its count."""
    words = Counter([v for v in row.final if isinstance(v, str)])
    finished = [c for c in row.curves if c.final is not None]
    known = [v for v in row.final if not isinstance(v, str)]
    if not known:
        return ", ".join(_all_or_some(words, len(row.final)))
    if len(known) == 1:
        text = f"{counted(known[0], finished[0].final_examples)}, counted"
    else:
        effect = single(known)
        low, high = effect.interval or (0.0, 1.0)
        # Student's t has no limits, but an accuracy lies between 0 and 1.
        text = f"{100 * effect.value:.2f}% ({100 * max(low, 0):.2f} to {100 * min(high, 1):.2f})"
    return "; ".join([text, *(f"{word} {n} of {len(row.final)}" for word, n in words.items())])


def points_cell(effect: Effect) -> str:
    """Gives a difference of accuracies, in points, with its interval."""
    return written(effect, ".2f", factor=100, sign=True) if effect.n else "-"


def _all_or_some(words: Mapping[str, int], total: int) -> list[str]:
    return [word if n == total else f"{word} ({n})" for word, n in words.items()]


def notes(curves: Sequence[Curve]) -> str:
    """Remarks on the runs that are not done; '' if all are."""
    said = []
    for c in curves:
        if c.status == "diverged":
            where = "" if c.stopped_at is None else f" at step {c.stopped_at:,.0f}"
            said.append(f"seed {c.seed} diverged{where}")
        elif c.status != "done":
            said.append(f"seed {c.seed} partial: step {c.last:,.0f} of {c.total:,.0f}")
    return "; ".join(said)


def ordered(groups: Groups) -> list[str]:
    """Returns the experiments' names: the paper's in its order, the controls, then the others."""
    first = [BASELINE, *CONTROLS, *PAPER]
    return sorted(groups, key=lambda name: first.index(name) if name in first else len(first))


def control(groups: Groups) -> str:
    """Returns the strongest network without BN that has run; the first of CONTROLS if none has."""
    return next((name for name in CONTROLS if name in groups), CONTROLS[0])


def fig3(groups: Groups) -> str:
    """Makes the table of Fig. 3: headlines, comparisons with plain Inception, with the control."""
    curves = {name: [curve(run) for run in groups[name]] for name in ordered(groups)}
    strongest = control(groups)
    parts = [
        "# Steps to the accuracy of the network without BN (Fig. 3)",
        _setting(groups),
        made_by(run.origin for group in groups.values() for run in group),
        _headlines(curves),
        _against(BASELINE, "plain Inception at the paper's rate", curves, groups, paper=True),
        _against(strongest, f"the control `{strongest}`", curves, groups),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def _headlines(curves: Mapping[str, list[Curve]]) -> str:
    """Compares each network with BN with the strongest one without it, if both have run."""
    head = ["with BN", "without BN", "speed-up to 95%", "speed-up to 100%"]
    head += ["final accuracy, points", "seeds"]
    rows = []
    for ours, theirs in HEADLINES:
        cells = [f"`{ours}`", f"`{theirs}`"]
        if ours not in curves or theirs not in curves:
            missing = [f"`{name}`" for name in (ours, theirs) if name not in curves]
            rows.append([*cells, f"not run: {', '.join(missing)}", "-", "-", "0"])
            continue
        row = compare(ours, curves[ours], curves[theirs])
        cells += [ratio_cell(row, "95%"), ratio_cell(row, "100%"), points_cell(row.accuracy)]
        rows.append([*cells, str(row.accuracy.n)])
    return "## Against the strongest network without BN\n\n" + _table(head, rows)


def _against(
    reference: str, what: str, curves: Mapping[str, list[Curve]], groups: Groups, paper=False
) -> str:
    head = ["network", "rate", "seeds", *(f"steps to {name}" for name in LEVELS)]
    head += ["speed-up to 95%", "speed-up to 100%", "final accuracy", "difference, points"]
    if paper:
        head += ["paper: steps to 72.2%", "paper: speed-up", "paper: maximum", "remarks"]
    rows = []
    for name, mine in curves.items():
        row = compare(name, mine, curves.get(reference, []))
        cells = [f"`{name}`", f"{groups[name][0].config['learning_rate']:g}", str(len(mine))]
        cells += [steps_cell(row.steps[level]) for level in LEVELS]
        if name == reference:
            cells += ["1", "1", accuracy_cell(row), "-"]
        else:
            cells += [ratio_cell(row, "95%"), ratio_cell(row, "100%")]
            cells += [accuracy_cell(row), points_cell(row.accuracy)]
        if paper:
            cells += [*PAPER[name]] if name in PAPER else ["not in the paper", "-", "-"]
            cells += [notes(mine) or "-"]
        rows.append(cells)
    return f"## Against {what}\n\n{_levels(reference, curves)}\n\n{_table(head, rows)}"


def _levels(reference: str, curves: Mapping[str, list[Curve]]) -> str:
    """Says the levels of each seed, with the intervals of their counts, or why there are none."""
    if reference not in curves:
        return f"Steps and speed-ups cannot be given because `{reference}` has not been run."
    said = []
    for c in curves[reference]:
        found = levels(c)
        if found is None:
            why = notes([c])
            if c.at_chance and c.last_evaluation is not None:
                reached = f"{100 * c.last_evaluation:.1f}%"
                why = f"at chance ({reached} of {c.classes} classes) after all its steps"
            said.append(f"seed {c.seed}: none, {why}")
            continue
        accuracies = (f"{name} {100 * v:.1f}%" for name, v in found.items())
        low, high = wilson(round(found["100%"] * c.examples), c.examples)
        said.append(f"seed {c.seed}: {', '.join(accuracies)} ({100 * low:.1f} to {100 * high:.1f})")
    return (
        f"Levels of `{reference}` (90%, 95% and 100% of its last evaluation, with the 95% "
        f"interval of its count on {curves[reference][0].examples:,} examples): {'; '.join(said)}. "
        f"{_resolution(reference, curves)}"
    )


def _resolution(reference: str, curves: Mapping[str, list[Curve]]) -> str:
    """Says how many numbers of steps are known to 10%, and of which split the levels are."""
    found = []
    for name, mine in curves.items():
        row = compare(name, mine, curves[reference])
        found += [r for values in row.steps.values() for r in values if isinstance(r, Reached)]
    reached = [r for r in found if r.high < math.inf]
    fine = sum(r.resolved for r in reached)
    split = curves[reference][0].split
    text = ""
    if reached:
        text = f"{fine} of {len(reached)} numbers of steps are known to 10%"
        text += "." if fine == len(reached) else "; evaluations were too far apart for the others."
    if "held-out" not in split:
        text += f" The levels are of the {split} split: held-out training data were not evaluated."
    return text


def _setting(groups: Groups) -> str:
    run = next(iter(groups.values()))[0]
    config = run.config
    tested = run.lines["test"]
    final = "the last evaluation"
    if tested:
        final = f"one score on the {tested[-1]['examples']:,} test examples, at the end"
    width = f", width {config['model']['width']:g}" if "width" in config["model"] else ""
    return (
        "Steps are of 32 examples: the geometric mean over seeds, with the range in brackets. A "
        "level is reached between two evaluations, and steps are interpolated between them; 'at "
        "most' means that the first evaluation has the level already. Speed-ups are ratios to the "
        "reference's run with the same seed: the geometric mean, with its 95% interval over seeds "
        "in parentheses, which is wider where evaluations are far apart. Differences are paired by "
        "seed, too. 'At least' and 'at most' are bounds: a network reached the level at its first "
        "evaluation or never. The "
        f"evaluations are of the {run.data['split']} split with population statistics, every "
        f"{config['eval_every'] * config['batch_size'] / 32:,.0f} steps{_early(config)}; final "
        f"accuracy is {final}.\n\n"
        f"Ours: {run.data['description']}; {config['image_size']} px{width}, batch "
        f"{config['batch_size']}, levels from our own reference. The paper's columns: ImageNet, "
        "224 px, full width, asynchronous training, level 72.2% (Inception's maximum). The "
        "settings differ: compare the order of the networks, not the numbers."
    )


def _early(config: Mapping[str, Any]) -> str:
    if not config.get("eval_early"):
        return ""
    return f" (from step {config['eval_early']:,} on a tenth apart until then)"


def fig3_csv(groups: Groups) -> str:
    """Makes a CSV line for each run and reference: steps to the levels, with their bounds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["network", "seed", "rate", "status", "step", "total_steps", "examples", "final_top1"]
    head += ["max_top1", "reference"]
    for name in LEVELS:
        for column in ("steps_to", "speed_up"):
            head += [f"{column}_{name.removesuffix('%')}{end}" for end in ("_low", "", "_high")]
    writer.writerow(head)
    curves = {name: [curve(run) for run in groups[name]] for name in ordered(groups)}
    for reference in (BASELINE, control(groups)):
        for name, mine in curves.items():
            row = compare(name, mine, curves.get(reference, []))
            rate = groups[name][0].config["learning_rate"]
            for i, c in enumerate(mine):
                maximum = "" if c.maximum is None else c.maximum
                line = [name, c.seed, rate, c.status, c.last, c.total, c.examples, row.final[i]]
                line += [maximum, reference]
                for level in LEVELS:
                    for values in (row.steps[level], row.ratios[level]):
                        value = values[i]
                        line += [value] * 3 if isinstance(value, str) else value
                writer.writerow(line)
    return out.getvalue()
