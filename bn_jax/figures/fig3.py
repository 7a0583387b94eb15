"""Makes the table of Fig. 3 as Markdown and CSV; curves.py has the definitions."""

import math
import statistics
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
    reached,
)
from bn_jax.figures.origins import made_by
from bn_jax.tables import csv_table, markdown_table
from bn_jax.uncertainty import Effect, counted, single, wilson, written
from bn_jax.workdir.reader import Run

Groups = Mapping[str, Sequence[Run]]


def steps_cell(values: Sequence[Reached | str]) -> str:
    """Gives geometric mean and range over seeds, and how many seeds did not reach the level."""
    words = []
    for value in values:
        if isinstance(value, str):
            words.append(value)
        elif value.high == math.inf:
            words.append(NOT_REACHED)
    known = reached(values)
    if not known:
        return _only_words(words)

    steps = [value.steps for value in known]
    text = f"{statistics.geometric_mean(steps):,.0f}"

    fewest = min(steps)
    most = max(steps)
    if fewest < most:
        text += f" [{fewest:,.0f} to {most:,.0f}]"
    if any(value.low == 0 for value in known):
        text = f"at most {text}"
    return _with_words(text, words, len(values))


def ratio_cell(row: Comparison, level: str) -> str:
    """Gives the speed-up with its interval, and how many seeds have none and why."""
    values = row.ratios[level]
    words = [value for value in values if isinstance(value, str)]
    effect = row.speed_up(level)
    if not effect.n:
        return _only_words(words)

    text = written(effect, ".2f", unit="x")
    return _with_words(text, words, len(values))


def accuracy_cell(row: Comparison) -> str:
    """Gives the mean final accuracy with its interval over seeds; of one seed, of its count."""
    words = [value for value in row.final if isinstance(value, str)]
    known = [value for value in row.final if not isinstance(value, str)]
    if not known:
        return _only_words(words)

    if len(known) == 1:
        (finished,) = [run for run in row.curves if run.final is not None]
        text = f"{counted(known[0], finished.final_examples)}, counted"
    else:
        effect = single(known)
        low, high = effect.interval or (0.0, 1.0)
        # Student's t has no limits, but an accuracy lies between 0 and 1.
        low = max(low, 0)
        high = min(high, 1)
        text = f"{100 * effect.value:.2f}% ({100 * low:.2f} to {100 * high:.2f})"
    return _with_words(text, words, len(row.final))


def points_cell(effect: Effect) -> str:
    """Gives a difference of accuracies, in points, with its interval."""
    if not effect.n:
        return "-"
    return written(effect, ".2f", factor=100, sign=True)


def _only_words(words: Sequence[str]) -> str:
    """Lists why no seed has a number; a word for all seeds is not counted."""
    counts = Counter(words)
    if len(counts) == 1:
        return words[0]
    return ", ".join(f"{word} ({n})" for word, n in counts.items())


def _with_words(text: str, words: Sequence[str], seeds: int) -> str:
    """Adds to a number why some of the seeds have none."""
    counts = Counter(words)
    said = [f"{word} {n} of {seeds}" for word, n in counts.items()]
    return "; ".join([text, *said])


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
    order = [BASELINE, *CONTROLS, *PAPER]
    first = [name for name in dict.fromkeys(order) if name in groups]
    others = [name for name in groups if name not in order]
    return first + others


def control(groups: Groups) -> str:
    """Returns the strongest network without BN that has run; the first of CONTROLS if none has."""
    for name in CONTROLS:
        if name in groups:
            return name
    return CONTROLS[0]


def fig3(groups: Groups) -> str:
    """Makes the table of Fig. 3: headlines, comparisons with plain Inception, with the control."""
    curves = _curves(groups)
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


def _curves(groups: Groups) -> dict[str, list[Curve]]:
    """Returns the curves of each experiment's seeds, in the order of the table."""
    return {name: [curve(run) for run in groups[name]] for name in ordered(groups)}


def _headlines(curves: Mapping[str, list[Curve]]) -> str:
    """Compares each network with BN with the strongest one without it, if both have run."""
    head = [
        "with BN",
        "without BN",
        "speed-up to 95%",
        "speed-up to 100%",
        "final accuracy, points",
        "seeds",
    ]
    rows = []
    for ours, theirs in HEADLINES:
        missing = [f"`{name}`" for name in (ours, theirs) if name not in curves]
        if missing:
            found = [f"not run: {', '.join(missing)}", "-", "-", "0"]
        else:
            row = compare(ours, curves[ours], curves[theirs])
            found = [
                ratio_cell(row, "95%"),
                ratio_cell(row, "100%"),
                points_cell(row.accuracy),
                str(row.accuracy.n),
            ]
        rows.append([f"`{ours}`", f"`{theirs}`", *found])

    table = markdown_table(head, rows)
    return f"## Against the strongest network without BN\n\n{table}"


def _against(
    reference: str,
    what: str,
    curves: Mapping[str, list[Curve]],
    groups: Groups,
    paper: bool = False,
) -> str:
    """Compares every network with one of them; `paper` adds the paper's columns and remarks."""
    head = ["network", "rate", "seeds"]
    head += [f"steps to {name}" for name in LEVELS]
    head += ["speed-up to 95%", "speed-up to 100%", "final accuracy", "difference, points"]
    if paper:
        head += ["paper: steps to 72.2%", "paper: speed-up", "paper: maximum", "remarks"]

    rows = []
    for name, mine in curves.items():
        config = groups[name][0].config
        row = compare(name, mine, curves.get(reference, []))
        cells = [f"`{name}`", f"{config['learning_rate']:g}", str(len(mine))]
        cells += [steps_cell(row.steps[level]) for level in LEVELS]

        if name == reference:
            cells += ["1", "1", accuracy_cell(row), "-"]
        else:
            cells += [
                ratio_cell(row, "95%"),
                ratio_cell(row, "100%"),
                accuracy_cell(row),
                points_cell(row.accuracy),
            ]
        if paper:
            published = PAPER.get(name, ("not in the paper", "-", "-"))
            remarks = notes(mine) or "-"
            cells += [*published, remarks]
        rows.append(cells)

    table = markdown_table(head, rows)
    return f"## Against {what}\n\n{_levels(reference, curves)}\n\n{table}"


def _levels(reference: str, curves: Mapping[str, list[Curve]]) -> str:
    """Says the levels of each seed, with the intervals of their counts, or why there are none."""
    if reference not in curves:
        return f"Steps and speed-ups cannot be given because `{reference}` has not been run."
    runs = curves[reference]
    said = [f"seed {run.seed}: {_levels_of(run)}" for run in runs]
    return (
        f"Levels of `{reference}` (90%, 95% and 100% of its last evaluation, with the 95% "
        f"interval of its count on {runs[0].examples:,} examples): {'; '.join(said)}. "
        f"{_resolution(reference, curves)}"
    )


def _levels_of(run: Curve) -> str:
    """Lists the levels of one seed, or says why it has none."""
    found = levels(run)
    if found is not None:
        accuracies = [f"{name} {100 * accuracy:.1f}%" for name, accuracy in found.items()]
        right = round(found["100%"] * run.examples)
        low, high = wilson(right, run.examples)
        return f"{', '.join(accuracies)} ({100 * low:.1f} to {100 * high:.1f})"

    if run.at_chance and run.last_evaluation is not None:
        accuracy = f"{100 * run.last_evaluation:.1f}%"
        return f"none, at chance ({accuracy} of {run.classes} classes) after all its steps"
    return f"none, {notes([run])}"


def _resolution(reference: str, curves: Mapping[str, list[Curve]]) -> str:
    """Says how many numbers of steps are known to 10%, and of which split the levels are."""
    known = []
    for name, mine in curves.items():
        row = compare(name, mine, curves[reference])
        for values in row.steps.values():
            known += reached(values)

    text = ""
    if known:
        fine = sum(value.resolved for value in known)
        text = f"{fine} of {len(known)} numbers of steps are known to 10%"
        if fine < len(known):
            text += "; evaluations were too far apart for the others"
        text += "."

    split = curves[reference][0].split
    if "held-out" not in split:
        text += f" The levels are of the {split} split: held-out training data were not evaluated."
    return text


def _setting(groups: Groups) -> str:
    """Says how the table is made and what the runs have in common, from the first run."""
    first = next(iter(groups.values()))
    run = first[0]
    config = run.config
    model = config["model"]
    every = config["eval_every"] * config["batch_size"] / 32

    early = ""
    if config.get("eval_early"):
        early = f" (from step {config['eval_early']:,} on a tenth apart until then)"
    final = "the last evaluation"
    if run.lines["test"]:
        examples = run.lines["test"][-1]["examples"]
        final = f"one score on the {examples:,} test examples, at the end"
    width = ""
    if "width" in model:
        width = f", width {model['width']:g}"

    return (
        "Steps are of 32 examples: the geometric mean over seeds, with the range in brackets. A "
        "level is reached between two evaluations, and steps are interpolated between them; 'at "
        "most' means that the first evaluation has the level already. Speed-ups are ratios to the "
        "reference's run with the same seed: the geometric mean, with its 95% interval over seeds "
        "in parentheses, which is wider where evaluations are far apart. Differences are paired by "
        "seed, too. 'At least' and 'at most' are bounds: a network reached the level at its first "
        "evaluation or never. The "
        f"evaluations are of the {run.data['split']} split with population statistics, every "
        f"{every:,.0f} steps{early}; final accuracy is {final}.\n\n"
        f"Ours: {run.data['description']}; {config['image_size']} px{width}, batch "
        f"{config['batch_size']}, levels from our own reference. The paper's columns: ImageNet, "
        "224 px, full width, asynchronous training, level 72.2% (Inception's maximum). The "
        "settings differ: compare the order of the networks, not the numbers."
    )


def fig3_csv(groups: Groups) -> str:
    """Makes a CSV line for each run and reference: steps to the levels, with their bounds."""
    curves = _curves(groups)
    rows = []
    for reference in (BASELINE, control(groups)):
        for name, mine in curves.items():
            rate = groups[name][0].config["learning_rate"]
            row = compare(name, mine, curves.get(reference, []))
            for i in range(len(mine)):
                rows.append(_csv_row(row, i, rate, reference))
    return csv_table(rows)


def _csv_row(row: Comparison, i: int, rate: float, reference: str) -> dict[str, Any]:
    """Returns the columns of the i-th seed of a comparison."""
    run = row.curves[i]
    columns = {
        "network": row.label,
        "seed": run.seed,
        "rate": rate,
        "status": run.status,
        "step": run.last,
        "total_steps": run.total,
        "examples": run.examples,
        "final_top1": row.final[i],
        "max_top1": run.maximum,
        "reference": reference,
    }
    for level in LEVELS:
        number = level.removesuffix("%")
        columns |= _csv_bounds(f"steps_to_{number}", row.steps[level][i])
        columns |= _csv_bounds(f"speed_up_{number}", row.ratios[level][i])
    return columns


def _csv_bounds(column: str, value: tuple[float, float, float] | str) -> dict[str, Any]:
    """Returns the columns of a value and its bounds, or a word for each of them."""
    bounds: tuple[Any, Any, Any] = (value,) * 3 if isinstance(value, str) else value
    low, estimate, high = bounds
    return {
        f"{column}_low": low,
        column: estimate,
        f"{column}_high": high,
    }
