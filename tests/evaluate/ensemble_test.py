"""Crops and networks averaged: against a plain loop, whatever the batch; what is refused."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.data import crops, views
from bn_jax.distributed import mesh
from bn_jax.errors import ConfigError, DataError
from bn_jax.evaluate import __main__ as evaluate
from bn_jax.evaluate import ensemble, predictions
from bn_jax.evaluate.members import load_member
from bn_jax.experiment import build
from bn_jax.experiment.evaluator import Evaluator
from tests.support.small_members import save_member


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdirs of two members."""
    folder = tmp_path_factory.mktemp("members")
    return [save_member(folder / f"member_{k}", seed=k) for k in (0, 1)]


@pytest.fixture(scope="module")
def members(runs):
    return [load(run) for run in runs]


def load(run, statistics="population"):
    return load_member(run, None, statistics, build.from_workdir(run))


@pytest.fixture(scope="module")
def ten(members):
    return ensemble.predict(ensemble.Networks(members, 256), 10)


def command(monkeypatch, capsys, *arguments) -> tuple[str, dict]:
    """What `python -m bn_jax.evaluate` prints, and its last line."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    evaluate.main()
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_multicrop_is_a_plain_loop_over_views(members, ten):
    data = members[0].exp.data
    images, labels = data.resident("evaluation")
    looks = crops.views(28, 28, 10, 28, False)
    rendered = [views.render(lambda r, i=i: i, looks, 28, 1) for i in images[:100]]
    by_view = np.stack(rendered, axis=1)  # [views, examples, 28, 28, 1]
    for member, found in zip(members, ten, strict=True):
        variables = {"params": member.params, "batch_stats": member.batch_stats}
        total = np.zeros((100, 10))
        for view in by_view:
            logits = np.asarray(member.exp.model.apply(variables, view, train=False), np.float64)
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            total += odds / odds.sum(axis=1, keepdims=True)
        assert found.probabilities.dtype == np.float32
        # float32 logits of one program against another's: measured 3e-7
        np.testing.assert_allclose(found.probabilities[:100], total / 5, atol=2e-6)
        np.testing.assert_array_equal(found.labels, labels)
        np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-5)


def test_one_crop_counts_what_the_trainer_counts(members):
    found = ensemble.predict(ensemble.Networks(members, 256), 1)
    for member, mine in zip(members, found, strict=True):
        theirs = Evaluator(member.exp).scores(member.params, member.batch_stats)
        scores = predictions.scores(mine)
        assert all(scores[key] == theirs[key] for key in ("top1", "top5", "examples"))
        # a float32 softmax's logarithm against the exact one
        assert scores["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-5)


def test_any_batch_size_gives_the_same_counts(members, ten):
    again = ensemble.predict(ensemble.Networks(members, 333), 10)  # rounded up to 336
    for a, b in zip(ten, again, strict=True):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-6)
        assert predictions.scores(a)["top1"] == predictions.scores(b)["top1"]


@pytest.mark.parametrize("number", [10, 144])
def test_where_all_crops_coincide_they_change_nothing(members, number):
    """Pictures of one grey have the same pixels in every crop."""
    greys = [np.full((28, 28, 1), level, np.uint8) for level in (0, 100, 200)]
    networks = ensemble.Networks(members, 64)

    def average(crops):
        made = [views.of_array(grey, crops, False) for grey in greys]
        rows = (
            {"image": i, "weight": w, "label": np.zeros((), np.int32), "example": np.asarray(k)}
            for k, (i, w) in enumerate(made)
        )
        weight = views.total_weight(crops, False)
        return networks.average(views.in_batches(rows, networks.size), 3, weight)[0]

    for many, one in zip(average(number), average(1), strict=True):
        np.testing.assert_allclose(many, one, atol=1e-6)  # a float32 mean of 72 equal numbers


def test_an_example_lost_or_seen_twice_is_an_error(members):
    networks = ensemble.Networks(members[:1], 64)
    batches = list(views.batches(members[0].exp.data, 10, networks.size))
    for spoilt in (batches[:-1], [*batches, batches[0]]):
        with pytest.raises(DataError, match="not evaluated under exactly 5 views"):
            networks.average(spoilt, 1000, 5)


def test_members_that_do_not_match_are_refused(members):
    def changed(**fields):
        config = members[1].exp.config.copy_and_resolve_references()
        config.update_from_flattened_dict(fields)
        return members[1]._replace(exp=members[1].exp._replace(config=config))

    class Eleven:
        def __init__(self, data):
            self.data = data

        def __getattr__(self, name):
            return getattr(self.data, name)

        class_names = tuple(map(str, range(11)))

    for other, message in (
        (changed(image_size=32), r"image_size differs \(28, 32\)"),
        (changed(**{"data.name": "mnist"}), r"data differs \(digits, mnist\)"),
        (changed(**{"data.holdout": 0.2}), "holdout differs"),
        (changed(**{"data.mirror": True}), "differs"),
        (
            members[1]._replace(exp=members[1].exp._replace(data=Eleven(members[1].exp.data))),
            r"classes differs \(10, 11\)",
        ),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            ensemble.Networks([members[0], other], 64)
        assert "member_0" in str(error.value) and "member_1" in str(error.value)


def test_the_command_reports_each_member_and_their_mean(runs, monkeypatch, capsys, tmp_path):
    files = [tmp_path / "a.npz", tmp_path / "b.csv", tmp_path / "both.npz"]
    alone = [
        command(monkeypatch, capsys, f"--workdir={run}", "--crops=10", f"--predictions={file}")
        for run, file in zip(runs, files, strict=False)
    ]
    names = ",".join(map(str, runs))
    out, both = command(
        monkeypatch, capsys, f"--workdir={names}", "--crops=10", f"--predictions={files[2]}"
    )
    assert "5 views" in out and "of 1,000 examples" in out and "gain in top-1: " in out
    assert "not comparable" in out  # the limits of the digits
    assert [s["top1"] for s in both["member_scores"]] == [line["top1"] for _, line in alone]
    # Later, from the saved files alone, in any grouping: the same bits.
    _, later = command(
        monkeypatch, capsys, f"--combine={files[0]},{files[1]}", f"--record={tmp_path}"
    )
    assert (later["top1"], later["cross_entropy"]) == (both["top1"], both["cross_entropy"])
    saved = predictions.load(files[2])
    assert predictions.scores(saved)["cross_entropy"] == both["cross_entropy"]
    for run in runs:
        lines = [json.loads(x) for x in (run / "evaluations.jsonl").read_text().splitlines()]
        assert [len(line["members"]) for line in lines] == [1, 2]
        assert lines[-1]["examples"] == 1000 and lines[-1]["views"] == 5
        assert lines[0]["members"][0]["running_gap"] > 0
    (recorded,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    combined = json.loads(recorded)
    assert combined["source"] == lines[-1]["source"] and combined["hardware"]["devices"] == 8


def test_running_statistics_are_another_result(runs, monkeypatch, capsys):
    _, population = command(monkeypatch, capsys, f"--workdir={runs[0]}")
    out, running = command(monkeypatch, capsys, f"--workdir={runs[0]}", "--statistics=running")
    assert "running statistics" in out
    assert running["cross_entropy"] != population["cross_entropy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either"),
        (["--workdir=a", "--combine=b.npz"], "give either"),
        (["--workdir=nowhere"], "nowhere is not a run directory"),
        (["--workdir=nowhere", "--crops=100"], "is not one of 1, 10, 144"),
        (["--workdir=nowhere", "--predictions=x.json"], "must end with"),
        (["--combine=nowhere.npz"], "not a file of predictions"),
    ],
)
def test_what_is_refused_is_one_line(arguments, message, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=message):
        command(monkeypatch, capsys, *arguments)


def test_a_run_on_synthetic_data_says_that_it_means_nothing(tmp_path, monkeypatch, capsys):
    run = save_member(tmp_path / "noise", seed=0, **{"data.name": "synthetic"})
    out, line = command(monkeypatch, capsys, f"--workdir={run}")
    assert "accuracies mean nothing" in out and "accuracies mean nothing" in line["description"]


def test_softmax_is_in_float32_whatever_the_logits(members):
    """bfloat16 would keep two digits of a probability."""

    class Model:
        def apply(self, variables, images, train):
            return jnp.asarray([[1.0, 1.01]], jnp.bfloat16)

    found = jax.jit(lambda: ensemble.probabilities({}, {}, jnp.zeros(1), model=Model()))()
    assert found.dtype == jnp.float32 and abs(float(found.sum()) - 1) < 1e-6
    assert mesh.make().size == 8  # these tests average over batches cut among devices
