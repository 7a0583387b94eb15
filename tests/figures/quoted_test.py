"""The numbers that the documents quote are those of the published runs."""

import functools
import pathlib
import re

import numpy as np
import pytest

from bn_jax import uncertainty
from bn_jax.figures import ablations, curves, fig1, fig3, fig4
from bn_jax.workdir import reader

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
BACK = ["bn_x1", "bn_x5_with_dropout", "bn_x5_unshuffled", "bn_x30_unshuffled", "bn_x5_full_l2"]
BACK += ["bn_x5_no_l2", "bn_x5_slow_decay", "bn_x5_with_lrn", "bn_x5_full_distortion"]


@functools.cache
def page(name: str) -> str:
    """A document with its lines joined, so that a sentence may be looked for."""
    return " ".join((ROOT / name).read_text().split())


def row(name: str) -> str:
    """The row of an experiment in docs/experiments.md."""
    (found,) = re.findall(rf"^\| `{name}` \|.*$", (ROOT / "docs/experiments.md").read_text(), re.M)
    return found


@functools.cache
def groups(folder: str):
    return reader.read_groups(RESULTS / folder)


def compared(name: str, reference: str, folder: str = "digits") -> curves.Comparison:
    found = {key: [curves.curve(run) for run in groups(folder)[key]] for key in (name, reference)}
    return curves.compare(name, found[name], found[reference])


def differences() -> dict[str, ablations.Ablation]:
    return {found.name: found for found in ablations.ablations(groups("digits"))}


@pytest.mark.parametrize(
    "name", ["inception", "bn_baseline", "bn_x5", "bn_x30", "bn_x5_sigmoid", "inception_x5"]
)
def test_single_networks(name):
    found = compared(name, "inception")
    final = 100 * np.array(found.final)
    text = f"{final.mean():.1f}% [{final.min():.1f} to {final.max():.1f}], "
    text += fig3.steps_cell(found.steps["95%"]).partition(" [")[0]
    assert text in row(name)


@pytest.mark.parametrize("name", BACK)
def test_ablations(name):
    effect = differences()[name].effect
    low, high = effect.interval
    value = f"{100 * effect.value:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")
    assert f"{value} ({100 * low:.1f} to {100 * high:.1f})" in row(name)


def times(effect: uncertainty.Effect, high: str = ".0f") -> str:
    low, top = effect.interval
    return f"{effect.value:.1f} times fewer ({low:.1f} to {top:{high}})"


def test_what_the_digits_say():
    text = page("docs/results.md")
    paper = compared("bn_baseline", "inception")
    assert times(paper.speed_up("95%")) in text
    low, high = paper.speed_up("100%").interval
    value = paper.speed_up("100%").value
    assert f"{value:.1f} times fewer ({low:.2f} to {high:.0f}) to all of it" in text
    control = compared("bn_baseline", "inception_best_rate")
    low, high = control.speed_up("100%").interval
    assert f"{control.speed_up('100%').value:.1f} ({low:.1f} to {high:.1f})" in text
    for found in (paper, control):
        low, high = found.accuracy.interval
        points = f"{100 * found.accuracy.value:+.1f} on the control ({100 * low:.1f}"
        if found is paper:
            points = f"{100 * found.accuracy.value:+.1f} points on plain Inception ({100 * low:.1f}"
        assert points in text
    fastest = compared("bn_x5", "inception").speed_up("95%")
    assert fastest.bound == "at least"
    low = fastest.interval.low
    assert f"at least {fastest.value:.1f} times fewer than plain Inception ({low:.1f} or" in text
    shuffled = differences()["bn_x30_unshuffled"].effect
    low, high = shuffled.interval
    lost = f"loses {-100 * shuffled.value:.1f} points ({-100 * high:.1f} to {-100 * low:.1f})"
    assert lost in text


def test_what_the_ablations_say():
    """All that put a modification back are undecided, after the correction for their number."""
    text = page("docs/results.md")
    found = differences()
    number = sum(row.adjusted_p is not None for row in found.values())
    assert f"holds after the correction for {number} comparisons" in text
    assert all(found[name].says.startswith("undecided") for name in BACK)


def test_what_natural_images_say():
    """README quotes the same numbers as results.md, in both cases those of five seeds."""
    found = compared("bn_x5", "bn_x5_without_bn", "tiny40")
    assert found.accuracy.n == 5
    sooner = uncertainty.written(found.speed_up("95%"), ".2f")
    same = uncertainty.written(found.speed_up("100%"), ".2f")
    points = uncertainty.written(found.accuracy, ".2f", factor=100)
    with_bn = fig3.accuracy_cell(found)
    other = compared("bn_x5_without_bn", "bn_x5_without_bn", "tiny40")
    without = fig3.accuracy_cell(other)

    text = page("docs/results.md")
    assert f"{sooner} times fewer steps, and all of it in {same} times fewer" in text
    assert f"at {with_bn} against {without}, which is {points} points more" in text

    told = row("bn_x5_without_bn")
    assert without.rstrip(")") in told and with_bn.rstrip(")") in told

    readme = page("README.md")
    assert f"{same} times fewer steps" in readme
    assert f"higher by {points} points" in readme


def test_fig1():
    text = page("docs/experiments.md")
    numbers = fig1.fig1_numbers(
        *reader.read_pair(RESULTS / "mnist" / "mnist", RESULTS / "mnist" / "mnist_bn")
    )
    for key, said in (("layer_drift", "spread instead of"), ("layer_range", "instead of")):
        less, more = (
            ", ".join(f"{value:.2f}" for value in numbers[name][key].values())
            for name in ("with BN", "without BN")
        )
        assert re.search(rf"{less} (of their )?{said} {more}", text)


def test_ensemble():
    (line,) = (
        found.lines[0]
        for found in fig4.rows(fig4.collect(RESULTS / "digits"))
        if (found.label, found.crops) == ("ensemble", 1)
    )
    text = uncertainty.counted(fig4.wrong(line, "top1"), 1000)
    assert text.replace(")", ", counted)") in page("docs/experiments.md")
    assert text in page("docs/ensemble.md")


def test_ensemble_on_natural_images():
    text = page("docs/ensemble.md")
    rows = fig4.rows(fig4.collect(RESULTS / "tiny40"))
    assert len(rows) == 4
    for row in rows:
        errors = [
            np.mean([fig4.wrong(line, name) for line in row.lines]) for name in ("top1", "top5")
        ]
        assert "| {:.2f}% | {:.2f}% |".format(*(100 * error for error in errors)) in text

    gains = {}
    for row in rows:
        if row.label != "single":
            points = {name: 100 * row.lines[0]["gain"][name] for name in ("top1", "low", "high")}
            gains[row.crops] = points
    one, many = gains[1], gains[144]
    assert f"gain {one['top1']:.2f} points ({one['low']:.2f} to {one['high']:.2f})" in text
    assert f"and {many['top1']:.2f} ({many['low']:.2f} to {many['high']:.2f}) with 144" in text

    single = {row.crops: row.lines for row in rows if row.label == "single"}
    top1 = {
        crops: {line["members"][0]["seed"]: line["top1"] for line in lines}
        for crops, lines in single.items()
    }
    found = uncertainty.single([top1[144][seed] - top1[1][seed] for seed in range(5)])
    points = uncertainty.written(found, ".2f", factor=100).replace(" (", " points (")
    assert f"144 crops gain {points} on one" in text


# Rules for the rate on many devices: the runs of results/scaling

NETWORKS = {"BN-Baseline": "bn_baseline", "BN-x30": "bn_x30"}
RULES = ("none", "sqrt", "linear")
PAIRS = (("sqrt", "none"), ("linear", "none"), ("linear", "sqrt"))
WHEN = (94, 188, 376, "test")  # steps, and the test split at the end


@functools.cache
def scaling_runs(config: str, rule: str) -> tuple[reader.Run, ...]:
    folder = RESULTS / "scaling" / ("none" if rule == "none" else "scaled") / config
    if rule != "none":
        folder /= f"learning_rate_scaling={rule}"
    return tuple(reader.read_run(folder / f"seed_{seed}") for seed in range(5))


def scaling_accuracy(config: str, rule: str, when: int | str) -> dict[int, float]:
    """Top-1 by seed."""
    found = {}
    for run in scaling_runs(config, rule):
        kind = "test" if when == "test" else "eval"
        step = 376 if when == "test" else when
        (line,) = (line for line in run.lines[kind] if line["step"] == step)
        assert line["examples"] == (1000 if when == "test" else 400)
        found[run.config["seed"]] = line["top1"]
    assert sorted(found) == [0, 1, 2, 3, 4]
    return found


def scaling_difference(config: str, a: str, b: str, when: int | str) -> uncertainty.Effect:
    return uncertainty.difference(
        scaling_accuracy(config, a, when), scaling_accuracy(config, b, when)
    )


def scaling_cells(effects: list[uncertainty.Effect], sign: bool) -> str:
    texts = [uncertainty.written(effect, ".1f", factor=100, sign=sign) for effect in effects]
    return " | ".join(texts)


@pytest.mark.parametrize("name", NETWORKS)
def test_table_of_the_rules_for_the_rate(name):
    text = (ROOT / "docs/experiments.md").read_text()
    config = NETWORKS[name]
    for rule in RULES:
        found = [scaling_accuracy(config, rule, when) for when in WHEN]
        effects = [uncertainty.single(list(values.values())) for values in found]
        assert f"| {name} | {rule} | {scaling_cells(effects, sign=False)} |" in text
    for a, b in PAIRS:
        effects = [scaling_difference(config, a, b, when) for when in WHEN]
        assert f"| {name} | {a} minus {b} | {scaling_cells(effects, sign=True)} |" in text


def test_what_the_rules_for_the_rate_say():
    text = page("docs/experiments.md")
    found = {
        (config, a, b, when): scaling_difference(config, a, b, when)
        for config in NETWORKS.values()
        for a, b in PAIRS
        for when in WHEN
    }

    def clear(config: str, a: str, b: str) -> list[int | str]:
        """When the interval of a - b does not have 0 in it."""
        return [when for when in WHEN if found[config, a, b, when].interval.low > 0]

    gains = [100 * found["bn_baseline", "linear", "none", when].value for when in WHEN]
    assert f"better than `none` by {min(gains):.1f} to {max(gains):.1f} points all along" in text
    assert clear("bn_baseline", "linear", "none") == list(WHEN)
    assert clear("bn_baseline", "linear", "sqrt") == [94, 188, "test"]

    largest = max(abs(100 * effect.value) for key, effect in found.items() if key[0] == "bn_x30")
    assert f"the rules are within {largest:.1f} points of each other" in text
    assert clear("bn_x30", "linear", "none") == [376, "test"]
    assert clear("bn_x30", "linear", "sqrt") == [94]
    at_first = 100 * found["bn_x30", "linear", "sqrt", 94].value
    assert f"but for a difference of {at_first:.1f} at 25%" in text

    adjusted = uncertainty.holm([effect.p_value(0) for effect in found.values()])
    established = [key for key, p in zip(found, adjusted, strict=True) if p < 0.05]
    ours = [key for key in established if key[0] == "bn_baseline"]
    assert f"for all {len(found)} comparisons (Holm), {len(ours)} of BN-Baseline's 12" in text
    assert [key for key in established if key[0] == "bn_x30"] == [("bn_x30", "linear", "none", 376)]
    assert all(effect.value > 0 for effect in found.values())  # in none is `linear` worse


def test_how_the_rules_for_the_rate_were_run():
    for config in NETWORKS.values():
        for rule in RULES:
            for run in scaling_runs(config, rule):
                assert run.status == "done"
                assert (run.config["name"], run.config["scale"]) == (config, "digits")
                assert (run.config["batch_size"], run.config["total_steps"]) == (256, 376)
                assert run.config["learning_rate_scaling"] == rule
                assert run.config["warmup_examples"] == (0 if rule == "none" else 18_000)
                assert run.data["train_examples"] * 5 == 18_000
                assert run.origin["hardware"]["devices"] == 8


def test_the_row_of_the_rules_for_the_rate():
    text = page("results/README.md")
    for name, config in NETWORKS.items():
        means = [np.mean([*scaling_accuracy(config, rule, "test").values()]) for rule in RULES]
        assert f"{name} {', '.join(f'{100 * mean:.1f}%' for mean in means)}" in text
