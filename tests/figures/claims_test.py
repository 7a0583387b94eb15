"""The table of claims: what hand-made runs decide, and that the published page is up to date."""

import json
import pathlib
import re

import pytest

from bn_jax.figures import claims
from bn_jax.workdir import reader
from configs import (
    bn_baseline,
    bn_best,
    bn_x5,
    bn_x5_slow_decay,
    bn_x5_with_dropout,
    bn_x5_without_bn,
    inception,
    inception_best,
    inception_sigmoid,
    inception_sigmoid_best,
    inception_x5,
)
from tests.figures.fig4_test import line
from tests.figures.figures_test import write_curve

ROOT = pathlib.Path(__file__).resolve().parents[2]


def write(results, root, *curves, **options) -> None:
    for seed, top1 in enumerate(curves):
        write_curve(results / "digits", root, top1, seed=seed, **options)


def table(results, claim: int) -> list[list[str]]:
    """The cells of a claim's lines, from the third column on."""
    lines = [re.split(r" \| ", x.strip("| ")) for x in claims.page(results).splitlines()]
    return [line[2:] for line in lines if line[0] == str(claim)]


def test_every_claim_has_a_line_and_without_runs_says_so(tmp_path):
    page = claims.page(tmp_path)
    numbers = [int(n) for n in re.findall(r"^\| (\d+) \| \w", page, re.M)]
    assert numbers == list(range(1, 18))
    for number in range(1, 17):
        assert {cells[-2] for cells in table(tmp_path, number)} == {"not run"}
    assert table(tmp_path, 17)[0][-2].startswith("not testable here: ")


def test_the_control_decides_and_not_the_papers_baseline(tmp_path):
    """BN-Baseline needs 2.67 times fewer steps than plain Inception, and as many as the control."""
    write(tmp_path, inception, *([0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 0.8],) * 3)
    write(tmp_path, bn_baseline, *([0.1, 0.7, 0.8],) * 3)
    (first, _) = table(tmp_path, 3)
    assert first[1] == "`inception`: 2.67x (2.33 to 4.00)"  # of 1,750 to 2,000 by 500 to 750
    assert first[2] == "`inception_best`: not run" and first[4] == "not run: `inception_best`"

    write(tmp_path, inception_best, *([0.1, 0.7, 0.8],) * 3)
    (first, _) = table(tmp_path, 3)
    assert first[2:5] == ["`inception_best`: 1.00x (0.67 to 1.50)", "3", "contradicted"]
    assert "[inception_best](../results/digits/inception_best)" in first[5]


def test_the_tuned_pair_is_judged_too(tmp_path):
    for seed in range(5):
        late = [0.1] * 39 + [0.7, 0.8]
        write_curve(tmp_path / "digits", inception_best, late, seed=seed)
        write_curve(tmp_path / "digits", bn_best, [0.1, 0.5, 0.8], seed=seed)
    (_, tuned) = table(tmp_path, 3)
    assert tuned[1] == "`inception`: not run" and tuned[4] == "supported"


def test_what_can_go_must_cost_no_more_than_the_margin(tmp_path):
    write(tmp_path, bn_x5, [0.9], [0.91], [0.92])
    write(tmp_path, bn_x5_with_dropout, [0.901], [0.911], [0.92])
    (cells,) = table(tmp_path, 8)
    assert cells[1] == "`bn_x5_with_dropout`: -0.07 points (-0.21 to 0.08)"
    assert cells[3:5] == ["3", "supported"]


@pytest.mark.parametrize(("rate", "said"), [(0.0075, "differ by 0.0%"), (0.006, None)])
def test_a_decay_that_hardly_acts_is_not_tested(tmp_path, rate, said):
    for root, last in ((bn_x5, rate), (bn_x5_slow_decay, 0.0075)):
        for seed in range(2):
            workdir = write_curve(tmp_path / "digits", root, [0.9], seed=seed)
            with (workdir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 250, "kind": "train", "learning_rate": last}) + "\n")
    (cells,) = table(tmp_path, 10)
    assert (
        ("not testable here" in cells[4] and said in cells[4])
        if said
        else cells[4] == ("supported")
    )


def test_counts_of_seeds(tmp_path):
    write(tmp_path, inception_sigmoid, *([0.1, 0.1],) * 4)
    write(tmp_path, inception_sigmoid_best, *([0.1, 0.5],) * 4)
    write(tmp_path, inception_x5, [0.2], status="diverged", error="diverged at step 300")
    (_, plain, tuned) = table(tmp_path, 14)
    assert plain[1] == "4 of 4 seeds diverged or at chance (share 0.51 to 1.00)"
    assert plain[4] == "supported" and tuned[4] == "contradicted"
    (diverged,) = table(tmp_path, 6)
    assert diverged[1].startswith("1 of 1 seeds diverged or at chance")
    assert diverged[4] == "undecided (4 equal seeds would decide)"


def test_without_the_number_of_classes_chance_is_not_known(tmp_path):
    workdir = write_curve(tmp_path / "digits", inception_x5, [0.1])
    run = json.loads((workdir / "run.json").read_text())
    run["info"]["data"] |= {"classes": None, "name": "folder"}
    (workdir / "run.json").write_text(json.dumps(run))
    (cells,) = table(tmp_path, 6)
    assert cells[4] == "undecided (the number of classes was not recorded)"


def test_the_gain_of_six_networks_has_the_interval_that_was_recorded(tmp_path):
    (tmp_path / "digits").mkdir()
    gain = {"top1": 0.01, "low": 0.004, "high": 0.016, "draws": 10_000, "seed": 0}
    names = [f"ensemble_{k}" for k in range(1, 7)]
    reader.append_evaluation(tmp_path / "digits", line(names, 1, 20, [30] * 6, gain=gain))
    (members, control) = table(tmp_path, 16)
    assert members[1] == "+1.00 points (0.40 to 1.60)" and members[4] == "supported"
    assert control[4] == "not run"
    (multicrop,) = table(tmp_path, 15)
    assert multicrop[4] == "not run"


def test_weak_initial_weights_are_said(tmp_path):
    write(tmp_path, inception_x5, [0.5], **{"model.init": "glorot"})
    assert "began with Glorot weights" in claims.page(tmp_path)
    write(tmp_path, bn_x5_without_bn, [0.5])
    assert "`inception_x5`." in claims.page(tmp_path)


def test_the_published_page_is_up_to_date():
    page = (ROOT / "docs" / "claims.md").read_text()
    assert page == claims.page(ROOT / "results"), "run: python docs/claims.py --write"
