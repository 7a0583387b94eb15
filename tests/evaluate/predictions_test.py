"""Predictions: the mean over networks, files that read back the same, damage, what is refused."""

import json

import numpy as np
import pytest

from bn_jax.errors import ConfigError, DataError
from bn_jax.evaluate import predictions
from bn_jax.evaluate.predictions import Predictions


def make(seed: int, examples: int = 40, classes: int = 7, **about) -> Predictions:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(classes, 0.1), examples).astype(np.float32)
    labels = np.arange(examples, dtype=np.int32) % classes
    member = {"workdir": f"runs/m{seed}", "checkpoint": f"digest{seed}", "name": "m", "step": 9}
    described = {
        "data": "digits",
        "split": "test",
        "description": "few",
        "holdout": 0.0,
        "image_size": 28,
        "examples": examples,
        "class_names": [str(k) for k in range(classes)],
        "crops": 1,
        "views": 1,
        "statistics": "population",
        "members": [member],
    }
    return Predictions(p, labels, described | about)


def test_the_mean_is_arithmetic_and_counts_networks():
    a, b, c = make(0), make(1), make(2)
    whole = predictions.mean([a, b, c])
    expected = np.mean([x.probabilities.astype(np.float64) for x in (a, b, c)], axis=0)
    assert whole.probabilities.dtype == np.float32 and len(whole.about["members"]) == 3
    np.testing.assert_allclose(whole.probabilities, expected, atol=2e-7)  # float32 sums of three
    grouped = predictions.mean([predictions.mean([a, b]), c])  # not the mean of means
    np.testing.assert_allclose(grouped.probabilities, expected, atol=2e-7)


def test_scores_are_counts_and_ties_go_to_the_lower_class():
    p = np.zeros((4, 6), np.float32)
    p[:, :3] = [[0.5, 0.5, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5], [np.nan, 0.5, 0.5]]
    found = predictions.scores(Predictions(p, np.array([0, 1, 2, 1], np.int32), {}))
    assert found["top1"] == 0.5 and found["top5"] == 0.75 and found["examples"] == 4
    p = np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)
    found = predictions.scores(Predictions(p, np.array([1, 0], np.int32), {}))
    assert found["cross_entropy"] == pytest.approx(-np.log([0.75, 0.5]).mean())


def test_the_gain_is_paired_by_image(capsys):
    """Two networks that each err on one of four images, on another one, and their mean on none."""
    sure, wrong, right = [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]
    labels = np.ones(4, np.int32)
    a = make(0, 4, 2)._replace(
        probabilities=np.array([wrong, sure, right, right], np.float32), labels=labels
    )
    b = make(1, 4, 2)._replace(
        probabilities=np.array([sure, wrong, right, right], np.float32), labels=labels
    )
    line = predictions.show([a, b])
    assert line["top1"] == 1.0
    gain = line["gain"]
    # The gains of the images are 1/2, 1/2, 0, 0: 25 points on the members' mean.
    assert gain["top1"] == pytest.approx(0.25)
    assert 0 <= gain["low"] < 0.25 < gain["high"] <= 0.5
    assert "+25.00 points on the members' mean (95%: +0.00 to +50.00" in capsys.readouterr().out
    assert predictions.gain(predictions.mean([a, b]), [a, b]) == gain  # seeded
    assert "gain" not in predictions.show([a])


@pytest.mark.parametrize("suffix", ["npz", "csv"])
def test_files_read_back_the_same_bits(tmp_path, suffix):
    found = make(3)
    found.probabilities[0, :3] = [1e-38, 0.1, 1 / 3]
    path = tmp_path / f"p.{suffix}"
    predictions.save(path, found)
    again = predictions.load(path)
    assert again.probabilities.tobytes() == found.probabilities.tobytes()
    assert again.probabilities.dtype == np.float32
    np.testing.assert_array_equal(again.labels, found.labels)
    assert again.about == found.about


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make(1, data="mnist"), r"data differs \(digits, mnist\)"),
        (make(1, split="validation"), "split differs"),
        (make(1, classes=8), r"classes differs \(7, 8\)"),
        (make(1, crops=10, views=5), r"crops differs \(1, 10\)"),
        (make(1, statistics="running"), "statistics differs"),
        (make(1, class_names=list("abcdefg")), "class_names differs"),
        (make(1)._replace(labels=np.zeros(40, np.int32)), "true labels differ"),
        (make(0), "are the same network"),
    ],
)
def test_what_makes_no_ensemble_is_refused(other, message):
    with pytest.raises(ConfigError, match=message):
        predictions.mean([make(0), other])


def spoil_npz(path, name, value):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, name: value})


def test_damaged_files_are_one_line(tmp_path):
    npz, text = tmp_path / "p.npz", tmp_path / "p.csv"

    def refused(path, damage, message="damaged"):
        predictions.save(path, make(0))
        damage(path)
        with pytest.raises(DataError, match=message) as error:
            predictions.load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    refused(npz, lambda p: p.write_bytes(p.read_bytes()[:-40]))
    refused(npz, lambda p: p.write_bytes(b""))
    refused(npz, lambda p: spoil_npz(p, "labels", np.full(40, 7, np.int32)), "out of range")
    refused(npz, lambda p: spoil_npz(p, "probabilities", np.zeros((39, 7), np.float32)))
    refused(npz, lambda p: spoil_npz(p, "probabilities", np.zeros((40, 7))), "types")
    # An object array would be a pickle: nothing is unpickled.
    refused(npz, lambda p: spoil_npz(p, "labels", np.array([{}] * 40, dtype=object)), "pickle")
    refused(text, lambda p: p.write_text(p.read_text().replace("\n5,5,", "\n", 1)))
    refused(text, lambda p: p.write_text("".join(p.read_text().splitlines(True)[:-1])), "39 rows")
    refused(text, lambda p: p.write_text(p.read_text().partition("\n")[2]))


def test_names_are_checked_before_anything_is_evaluated(tmp_path):
    with pytest.raises(ConfigError, match="must end with"):
        predictions.check_path(tmp_path / "p.txt")
    with pytest.raises(ConfigError, match="does not exist"):
        predictions.check_path(tmp_path / "absent" / "p.npz")
    with pytest.raises(ConfigError, match="not a file of predictions"):
        predictions.load(tmp_path / "p.npz")
    assert json.dumps(make(0).about)  # plain JSON


def test_errors_in_words():
    found = predictions.errors({"examples": 40, "top1": 0.5, "top5": 0.9})
    assert found == (
        "top-1 error 50.00% (35.20 to 64.80), 20; top-5 error 10.00% (3.96 to 23.05), 4 of 40 "
        "examples"
    )


def test_the_gain_of_an_ensemble_is_on_the_mean_and_on_the_best(capsys):
    """Four examples: one network is right twice, one three times, both together always."""
    labels = np.zeros(4, np.int32)
    parts = []
    for seed, first in ((0, [0.9, 0.9, 0.4, 0.4]), (1, [0.9, 0.3, 0.9, 0.9])):
        about = make(seed, examples=4, classes=2).about
        about["members"][0]["step"] = 900
        p = np.array([[x, 1 - x] for x in first], np.float32)
        parts.append(Predictions(p, labels, about))
    line = predictions.show(parts)
    assert line["top1"] == 1 and [s["top1"] for s in line["member_scores"]] == [0.5, 0.75]
    said = capsys.readouterr().out
    assert "gain in top-1: +37.50 points on the members' mean (95%: " in said
    assert ", +25.00 on the best of them" in said
