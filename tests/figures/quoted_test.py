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
    text = page("docs/results.md")
    for name, form in (("inception", ", counted"), ("bn_baseline", ""), ("bn_x5", " counted")):
        (final,) = compared(name, "inception", "tiny40").final
        low, high = uncertainty.wilson(round(2000 * final), 2000)
        ends = f"{100 * low:.2f} to {100 * high:.2f}"
        assert re.search(rf"{100 * final:.2f}% ?\(?,? ?{ends}{form}", text) or (
            f"({100 * final:.2f}%, {ends}{form})" in text
        )
    for level in ("95%", "100%"):
        effect = compared("bn_baseline", "inception", "tiny40").speed_up(level)
        assert effect.bound == "at least" and f"{effect.value:.0f}" in "at least 9 and 15"
    assert "at least 9 and 15" in text


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
