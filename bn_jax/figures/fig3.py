"""The table of Fig. 3 and the ablations as Markdown and CSV; see curves.py for the definitions."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence

from bn_jax.figures import curves as summary
from bn_jax.figures.curves import (
    BASELINE,
    CONTROL,
    LEVELS,
    PAPER,
    Curve,
    curve,
    levels,
)
from bn_jax.workdir.reader import Run, standard_error

Groups = Mapping[str, Sequence[Run]]


def cell(values: Sequence[float | str], form: str, factor: float = 1, unit: str = "") -> str:
    """Mean and range over seeds; of seeds without a number, why and how many."""
    numbers = [factor * v for v in values if not isinstance(v, str)]
    words = Counter(v for v in values if isinstance(v, str))
    if not numbers:
        return ", ".join(word if n == len(values) else f"{word} ({n})" for word, n in words.items())
    text = f"{sum(numbers) / len(numbers):{form}}{unit}"
    low = f"{min(numbers):{form}}"
    high = f"{max(numbers):{form}}"
    if low != high:
        text += f" ({low} to {high})"
    return "; ".join([text, *(f"{word} {n} of {len(values)}" for word, n in words.items())])


def notes(curves: Sequence[Curve]) -> str:
    """Remarks on runs that are not done."""
    said = []
    for c in curves:
        if c.status == "diverged":
            where = "" if c.stopped_at is None else f" at step {c.stopped_at:,.0f}"
            said.append(f"seed {c.seed} diverged{where}")
        elif c.status != "done":
            said.append(f"seed {c.seed} partial: step {c.last:,.0f} of {c.total:,.0f}")
    return "; ".join(said)


def ordered(groups: Groups) -> list[str]:
    """The experiments' names: the paper's in its order, the control, then the others."""
    first = [BASELINE, CONTROL, *PAPER]
    return sorted(groups, key=lambda name: first.index(name) if name in first else len(first))


def fig3(groups: Groups) -> str:
    """The table of Fig. 3 as Markdown: against plain Inception, then against the control."""
    curves = {name: [curve(run) for run in groups[name]] for name in ordered(groups)}
    parts = [
        "# Steps to plain Inception's accuracy (Fig. 3)",
        _setting(groups),
        _against(BASELINE, "plain Inception at the paper's rate", curves, groups, paper=True),
        _against(CONTROL, "the control, plain Inception at its best rate", curves, groups),
    ]
    return "\n\n".join(parts) + "\n"


def _against(
    reference: str, what: str, curves: Mapping[str, list[Curve]], groups: Groups, paper=False
) -> str:
    head = ["network", "rate", "seeds", *(f"steps to {name}" for name in LEVELS)]
    head += ["speed-up to 95%", "speed-up to max"]
    if paper:
        head += ["final accuracy", "maximum", "paper: steps to 72.2%", "paper: speed-up"]
        head += ["paper: maximum", "remarks"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, mine in curves.items():
        row = summary.row(name, mine, curves.get(reference, []))
        cells = [f"`{name}`", f"{groups[name][0].config['learning_rate']:g}", str(len(mine))]
        cells += [cell(row.steps[level], ",.0f") for level in LEVELS]
        cells += [cell(row.speed_up[level], ".2f", unit="x") for level in LEVELS[1:]]
        if paper:
            cells += [cell(row.final, ".1f", 100, "%"), cell(row.maximum, ".1f", 100, "%")]
            cells += [*PAPER[name]] if name in PAPER else ["not in the paper", "-", "-"]
            cells += [notes(mine) or "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return f"## Against {what}\n\n{_levels(reference, curves)}\n\n" + "\n".join(lines)


def _levels(reference: str, curves: Mapping[str, list[Curve]]) -> str:
    """The levels of each seed with their binomial standard errors, or why there are none."""
    if reference not in curves:
        return f"There is no run of `{reference}` in this folder: steps and speed-ups are unknown."
    said = []
    for c in curves[reference]:
        found = levels(c)
        if found is None:
            why = notes([c])
            if c.at_chance and c.final is not None:
                final = f"{100 * c.final:.1f}%"
                why = f"at chance ({final} of {c.classes} classes) after all its steps"
            said.append(f"seed {c.seed}: none, {why}")
            continue
        accuracies = (
            f"{name} {100 * v:.1f} +- {100 * standard_error(v, c.examples):.1f}%"
            for name, v in found.items()
        )
        said.append(f"seed {c.seed}: {', '.join(accuracies)}")
    return (
        f"Levels of `{reference}` (90% and 95% of its final accuracy, its maximum; +- is the "
        f"binomial standard error of the {curves[reference][0].examples:,} examples): "
        f"{'; '.join(said)}."
    )


def _setting(groups: Groups) -> str:
    run = next(iter(groups.values()))[0]
    config = run.config
    width = f", width {config['model']['width']:g}" if "width" in config["model"] else ""
    origins = {
        f"commit {str(r.origin['source'].get('commit'))[:10]} on {r.origin['hardware']['devices']} "
        f"{r.origin['hardware']['device_kind']}"
        for group in groups.values()
        for r in group
    }
    return (
        "Mean (range) over seeds; speed-ups are ratios to the reference's run with the same seed. "
        "Steps are of 32 examples, counted at evaluations (every "
        f"{config['eval_every'] * config['batch_size'] / 32:,.0f}). Accuracy with population "
        f"statistics on the {run.data['split']} split.\n\n"
        f"Ours: {run.data['description']}; {config['image_size']} px{width}, batch "
        f"{config['batch_size']}, levels from our own reference. The paper's columns: ImageNet, "
        "224 px, full width, asynchronous training, level 72.2% (Inception's maximum). The "
        "settings differ: compare the order of the networks, not the numbers. "
        f"Made by {'; '.join(sorted(origins))}."
    )


def fig3_csv(groups: Groups) -> str:
    """One line for each run and reference, with steps to the levels -/+ a standard error."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["network", "seed", "rate", "status", "step", "total_steps", "examples", "final_top1"]
    head += ["max_top1", "reference"]
    for name in LEVELS:
        key = name.removesuffix("%")
        head += [f"steps_to_{key}", f"steps_to_{key}_minus_se", f"steps_to_{key}_plus_se"]
        head += [f"speed_up_{key}"]
    writer.writerow(head)
    curves = {name: [curve(run) for run in groups[name]] for name in ordered(groups)}
    for reference in (BASELINE, CONTROL):
        for name, mine in curves.items():
            row = summary.row(name, mine, curves.get(reference, []))
            rate = groups[name][0].config["learning_rate"]
            for i, c in enumerate(mine):
                line = [name, c.seed, rate, c.status, c.last, c.total, c.examples, row.final[i]]
                line += [row.maximum[i], reference]
                for level in LEVELS:
                    line += [row.steps[level][i], *row.around[level][i], row.speed_up[level][i]]
                writer.writerow(line)
    return out.getvalue()
