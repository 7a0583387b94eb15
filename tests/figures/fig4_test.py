"""The table of Fig. 4 holds what evaluations recorded, beside what the paper printed."""

import csv
import io
import json

import pytest

from bn_jax import uncertainty
from bn_jax.errors import ConfigError
from bn_jax.figures import fig4
from bn_jax.figures.draw import draw
from bn_jax.workdir import reader

NAMES = [f"ensemble_{k}" for k in range(1, 7)]


def member(name: str) -> dict:
    about = {"name": name, "seed": 0, "step": 900, "total_steps": 1000, "checkpoint": name}
    return {**about, "workdir": f"runs/{name}/seed_0", "scale": "digits"}


def line(names, crops, wrong, member_wrong=(), **changes) -> dict:
    scores = [
        {"top1": 1 - w / 1000, "top5": 1.0, "cross_entropy": 1.0, "examples": 1000}
        for w in (wrong, *member_wrong)
    ]
    return {
        "kind": "evaluation", **scores[0], "data": "digits", "split": "test",
        "description": "digits: a small set", "holdout": 0.0, "image_size": 28,
        "crops": crops, "views": max(1, crops // 2), "statistics": "population",
        "members": [member(name) for name in names], "member_scores": scores[1:],
    } | changes  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
    return tmp_path


def cells(text: str, start: str) -> list[str]:
    (row,) = (row for row in text.splitlines() if row.startswith(f"| {start} "))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_papers_numbers_are_those_of_fig_4(folder):
    reader.append_evaluation(folder, line(NAMES[:1], 1, 30))
    text = fig4.markdown(folder)
    for start, printed in (
        ("GoogLeNet ensemble", ["224", "144", "7", "-", "6.67%"]),
        ("Deep Image high-res", ["512", "-", "1", "24.88%", "7.42%"]),
        ("BN-Inception single crop", ["224", "1", "1", "25.2%", "7.82%"]),
        ("BN-Inception multicrop", ["224", "144", "1", "21.99%", "5.82%"]),
        ("BN-Inception ensemble", ["224", "144", "6", "20.1%", "4.9% (test server 4.82%)"]),
    ):
        assert cells(text, start)[1:6] == printed
    assert cells(text, "BN-Inception single crop")[6:] == [
        "1", "1", "3.00% (2.11 to 4.25)", "0.00% (0.00 to 0.38)"
    ]  # fmt: skip
    assert cells(text, "BN-Inception ensemble")[6:] == ["not yet run"] * 4  # nothing is made up
    assert "digits: a small set" in text and "1,000 examples" in text


def test_one_evaluation_of_six_fills_single_networks_and_ensemble(folder):
    wrong = [30, 32, 34, 28, 26, 36]
    for crops, less in ((1, 0), (144, 4)):
        scored = line(NAMES, crops, 20 - less, [w - less for w in wrong])
        for name in NAMES:  # as bn_jax.evaluate records it: in every member's workdir
            reader.append_evaluation(folder / name, scored)
    reader.append_evaluation(folder / NAMES[0], line(NAMES[:2], 144, 25, [30, 32]))  # a smaller one
    reader.append_evaluation(folder, line(["bn_x30"], 1, 99))  # a network that is no member
    reader.append_evaluation(folder, line(NAMES[:1], 1, 500, statistics="running"))
    text = fig4.markdown(folder)
    assert cells(text, "BN-Inception single crop")[6:9] == [
        "1 (mean of 6 networks)", "1", "3.10% [2.60 to 3.60]"
    ]  # fmt: skip
    multicrop = cells(text, "BN-Inception multicrop")
    # The smaller ensemble's members were scored again, later, at 3.0 and 3.2%: these count.
    assert multicrop[7:9] == ["72 of 144, not mirrored", "2.83% [2.20 to 3.20]"]
    assert cells(text, "BN-Inception ensemble")[6:9] == [
        "6, averaged", "72 of 144, not mirrored", "1.60% (0.99 to 2.58)"
    ]  # fmt: skip
    extra = "ensemble, single crop, not in the paper"
    assert cells(text, extra)[6:9] == ["6, averaged", "1", "2.00% (1.30 to 3.07)"]
    table = list(csv.DictReader(io.StringIO(fig4.as_csv(folder))))
    assert len(table) == 2 * 6 + 1 + 3  # members at both crops, bn_x30, three ensembles
    assert [row["top1_error"] for row in table if row["networks"] == "6"] == ["0.02", "0.016"]


def test_the_latest_of_equal_evaluations_counts(folder):
    for wrong in (30, 40):
        reader.append_evaluation(folder / NAMES[0], line(NAMES[:1], 1, wrong))
    assert cells(fig4.markdown(folder), "BN-Inception single crop")[8] == "4.00% (2.95 to 5.40)"


@pytest.mark.parametrize("field", ["data", "split", "image_size", "examples", "holdout"])
def test_what_cannot_be_compared_is_refused(folder, field):
    reader.append_evaluation(folder / NAMES[0], line(NAMES[:1], 1, 30))
    reader.append_evaluation(folder / NAMES[1], line(NAMES[1:2], 1, 30, **{field: 7}))
    with pytest.raises(ConfigError, match=f"{field} is"):
        fig4.markdown(folder)


def test_a_folder_without_evaluations_is_refused(folder):
    with pytest.raises(ConfigError, match="holds no evaluation"):
        fig4.markdown(folder)


def test_a_line_that_was_cut_off_is_skipped_and_the_next_is_whole(folder, capsys):
    reader.append_evaluation(folder, line(NAMES[:1], 1, 30))
    path = folder / reader.EVALUATIONS
    path.write_bytes(path.read_bytes() + b'{"kind": "evalu')
    reader.append_evaluation(folder, line(NAMES[:1], 10, 20))
    assert [found["crops"] for found in reader.read_evaluations(folder)] == [1, 10]
    assert "line 2 is damaged" in capsys.readouterr().err
    assert json.loads(path.read_text().splitlines()[2])["crops"] == 10


def test_figures_draws_it_beside_what_else_there_is(folder, capsys):
    reader.append_evaluation(folder, line(NAMES[:1], 1, 30))
    paths = draw(folder, folder / "figures")
    assert [path.name for path in paths] == ["fig4.md", "fig4.csv"]
    assert "| BN-Inception single crop |" in capsys.readouterr().out
    assert (folder / "figures" / "fig4.md").read_text() == fig4.markdown(folder)


def test_a_folder_that_cannot_be_written_is_said(tmp_path, capsys):
    reader.append_evaluation(tmp_path / "absent", line(NAMES[:1], 1, 30))
    assert "not recorded" in capsys.readouterr().err


def test_the_csv_has_intervals_as_shares(folder):
    reader.append_evaluation(folder, line(NAMES[:1], 1, 30, top5=0.99))
    (row,) = csv.DictReader(io.StringIO(fig4.as_csv(folder)))
    assert float(row["top1_error"]) == pytest.approx(0.03)
    ends = [float(row[f"top1_{end}"]) for end in ("low", "high")]
    assert ends == pytest.approx(uncertainty.wilson(30, 1000))
    ends = [float(row[f"top5_{end}"]) for end in ("low", "high")]
    assert ends == pytest.approx(uncertainty.wilson(10, 1000))
    assert row["gain"] == ""


def test_the_gain_of_an_ensemble_has_the_interval_that_was_recorded(folder):
    recorded = {"top1": 0.0115, "low": 0.004, "high": 0.019, "draws": 10_000, "seed": 0}
    reader.append_evaluation(folder, line(NAMES[:2], 1, 20, [30, 33], gain=recorded))
    reader.append_evaluation(folder, line(NAMES[:2], 144, 20, [30, 34]))  # by an older version
    text = fig4.markdown(folder)
    assert "| ensemble: 2, averaged | 1 | +1.15 (+0.40 to +1.90) |" in text
    assert "| ensemble: 2, averaged | 144 | +1.20 (no interval: evaluate it again) |" in text
    rows = {
        (r["networks"], r["crops"]): r for r in csv.DictReader(io.StringIO(fig4.as_csv(folder)))
    }
    assert [rows["2", "1"][key] for key in ("gain", "gain_low")] == ["0.0115", "0.004"]
    assert rows["1", "1"]["gain"] == ""  # a member alone gains nothing


def test_the_control_of_an_ensemble_is_one_of_seeds(folder):
    """Six seeds of BN-x30 beside the six members, which remain the single networks."""
    reader.append_evaluation(folder, line(NAMES, 1, 20, [30] * 6))
    control = line(["bn_x30"] * 6, 1, 22, [29] * 6)
    for seed, network in enumerate(control["members"]):
        network |= {"seed": seed, "workdir": f"runs/bn_x30/seed_{seed}"}
    reader.append_evaluation(folder, control)
    text = fig4.markdown(folder)
    start = "ensemble of equal networks, single crop, not in the paper"
    assert cells(text, start)[6:9] == ["6, averaged", "1", "2.20% (1.46 to 3.31)"]
    assert cells(text, "BN-Inception single crop")[8] == "3.00% [3.00 to 3.00]"
    assert "| ensemble of equal networks: 6, averaged | 1 | +0.70 (no interval" in text


def test_evaluations_made_by_different_commits_are_said(folder):
    origin = {"hardware": {"devices": 1, "device_kind": "cpu", "platform": "cpu"}}
    for k, commit in enumerate(("a" * 40, "b" * 40)):
        source = {"source": {"commit": commit}, "versions": {"jax": "0.10.2"}}
        reader.append_evaluation(folder, line([NAMES[k]], 1, 30, **source, **origin))
    text = fig4.markdown(folder)
    assert "All 2 evaluations were made by: python not recorded, jax 0.10.2" in text
    assert "**The evaluations differ**" in text
    assert f"commit: {'a' * 10} (1), {'b' * 10} (1)." in text


def test_errors_are_counted_and_not_cut_off(folder):
    """0.29 * 100 is 28.999999999999996."""
    assert fig4.wrong({"top1": 0.29, "examples": 100}, "top1") == 0.71
    reader.append_evaluation(folder, line(NAMES[:1], 1, 30))
    (row,) = csv.DictReader(io.StringIO(fig4.as_csv(folder)))
    assert (row["names"], row["seeds"], row["steps"]) == ("ensemble_1", "0", "900")
