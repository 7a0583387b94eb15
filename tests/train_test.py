"""The trainer in one process: records, exact resume, divergence, what a dispatch is."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from bn_jax import activations, train
from bn_jax.distributed import preempt
from bn_jax.errors import ConfigError, DivergedError, Preempted
from bn_jax.experiment import build
from bn_jax.workdir.lines import ActivationLine, EvalLine, FinalLine, TrainLine
from configs import bn_x30, mnist, mnist_bn
from tests.support import small_sets


def small(root=mnist_bn, **changes) -> ConfigDict:
    """The MNIST network with BN on the digits, 40 steps of 64, for seconds of work."""
    config = root.get_config("digits")
    settings = {
        "batch_size": 64,
        "bn.group_size": 32,
        "total_steps": 40,
        "eval_every": 20,
        "checkpoint_every": 10,
        "log_every": 5,
        "steps_per_dispatch": 5,
        "statistics_batches": 2,
        "record.activation_every": 20,
        "record.activation_examples": 64,
        "record.tensorboard": False,
    }
    config.update_from_flattened_dict({**settings, **changes})
    return config


def arrays(workdir, config) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint by path."""
    _, state = build.restore(build.build(config), workdir)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def lines(workdir, kind):
    """The lines of metrics.jsonl of one kind."""
    text = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train.run(small(), workdir)


def test_a_run_records_what_it_did(whole):
    workdir, scores = whole
    assert [line["step"] for line in lines(workdir, "train")] == list(range(5, 41, 5))
    assert [line["step"] for line in lines(workdir, "eval")] == [20, 40]
    assert [line["step"] for line in lines(workdir, "activation")] == [0, 20, 40]
    last = lines(workdir, "eval")[-1]
    assert last["examples"] == 1000 == scores["examples"] and last["top1"] == scores["top1"]
    assert last["top1"] > 0.5  # 40 steps teach this network most digits; chance is 0.1
    assert lines(workdir, "train")[0]["learning_rate"] == pytest.approx(0.1)
    activation = lines(workdir, "activation")[0]
    assert activation["layer"] == "dense_2/input" and len(activation["p50"]) == 100
    info = json.loads((workdir / "run.json").read_text())
    assert info["status"] == "done" and info["results"]["examples"] == 1000
    assert info["info"]["data"]["split"] == "test" and info["info"]["mesh"]["devices"] == 8


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("train", TrainLine), ("eval", EvalLine), ("activation", ActivationLine)],
)
def test_every_line_has_the_fields_of_its_kind(whole, kind, fields):
    for line in lines(whole[0], kind):
        assert line.keys() == fields.__annotations__.keys()


@pytest.mark.parametrize("stop", [10, 35])
def test_a_stopped_run_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(preempt.Signals, "stop_at", lambda self, step: step == stop)
    with pytest.raises(Preempted, match=f"step {stop}, which is saved"):
        train.run(small(), tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "preempted"
    monkeypatch.undo()
    assert train.run(small(), tmp_path) == whole[1]
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()
    once, twice = arrays(whole[0], small()), arrays(tmp_path, small())
    assert once.keys() == twice.keys() and len(once) > 20
    for path, array in once.items():
        np.testing.assert_array_equal(array, twice[path], err_msg=path)


def test_a_checkpoint_has_the_accuracy_of_its_own_step_or_none(whole):
    """Saved every 10 steps, evaluated every 20."""
    workdir, scores = whole
    kept = {int(p.parent.name): p for p in (workdir / "checkpoints").glob("*/manifest.json")}
    assert {30, 40} <= kept.keys()
    metrics = {step: json.loads(kept[step].read_text())["body"]["metric"] for step in (30, 40)}
    assert metrics == {30: None, 40: scores["top1"]}


def test_early_evaluations_are_a_tenth_apart():
    assert train.early_evaluations(0, 250) == frozenset()
    steps = sorted(train.early_evaluations(50, 250))
    assert steps[:3] == [50, 55, 60] and 2250 < steps[-1] < 2500
    gaps = np.diff([*steps, 2500])
    assert np.all(gaps <= 0.1 * np.array(steps)) and np.all(gaps <= 250)
    assert sorted(train.early_evaluations(1, 2)) == [*range(1, 20)]
    assert sorted(train.early_evaluations(12, 10, dispatch=5))[:4] == [15, 20, 25, 30]


def test_curves_are_on_held_out_examples_and_the_test_split_is_scored_once(tmp_path):
    held = {"data.holdout": 0.2, "steps_per_dispatch": 1, "eval_early": 20, "eval_every": 10}
    scores = train.run(small(**held), tmp_path)
    evaluations = lines(tmp_path, "eval")
    assert [line["step"] for line in evaluations] == [10, 20, 22, 24, 26, 28, 30, 33, 36, 39, 40]
    assert {line["examples"] for line in evaluations} == {800}
    (test,) = lines(tmp_path, "test")
    assert test.keys() == FinalLine.__annotations__.keys()
    assert (test["step"], test["examples"]) == (40, 1000)

    # Both are in run.json, the best checkpoint is that of the held-out examples.
    results = json.loads((tmp_path / "run.json").read_text())["results"]
    assert results["top1"] == evaluations[-1]["top1"] == scores["top1"]
    assert results["test"]["top1"] == test["top1"]
    kept = json.loads((tmp_path / "checkpoints/40/manifest.json").read_text())
    assert kept["body"]["metric"] == scores["top1"]

    # What is evaluated later is the test split, too.
    exp = build.from_workdir(tmp_path)
    assert (exp.data.split, exp.data.num_eval) == ("test", 1000)

    longer = train.run(small(**held, total_steps=50, eval_test=False), tmp_path)
    assert "test" not in longer and len(lines(tmp_path, "test")) == 1
    assert build.from_workdir(tmp_path).data.num_eval == 800


def test_a_finished_run_is_not_trained_again(whole, monkeypatch):
    monkeypatch.setattr(train, "compile_step", lambda *args: pytest.fail("trained again"))
    before = (whole[0] / "metrics.jsonl").read_bytes()
    assert train.run(small(), whole[0]) == whole[1]
    assert (whole[0] / "metrics.jsonl").read_bytes() == before


def test_a_longer_run_goes_on_in_steps_that_fit(tmp_path):
    """40 steps in dispatches of 10, then 45 more: from step 40 on, 5 at a time, to step 85."""
    train.run(small(steps_per_dispatch=10), tmp_path)
    scores = train.run(
        small(steps_per_dispatch=10, total_steps=85, eval_every=85, checkpoint_every=85), tmp_path
    )
    assert scores["step"] == 85 == lines(tmp_path, "train")[-1]["step"]
    assert int(build.restore(build.build(small()), tmp_path)[0]) == 85


def test_a_run_cannot_end_before_where_it_is(whole):
    before = (whole[0] / "run.json").read_bytes()
    with pytest.raises(ConfigError, match="total_steps=20, but .* is already at step 40"):
        train.run(small(total_steps=20), whole[0])
    assert (whole[0] / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 6016}, "batch_size=6016 exceeds the 4000 training examples"),
        ({"record.activation_examples": 4032}, "activation_examples=4032 exceeds the 4000"),
        ({"data.shift": 2}, "steps_per_dispatch=5: needs undistorted data"),
        ({"dtype": "float64"}, "JAX_ENABLE_X64=1"),
        ({"reproducible": True}, "steps_per_dispatch=5: reproducible=True takes single steps"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        train.run(small(**changes), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_workdir_of_another_config_is_refused(whole):
    before = (whole[0] / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"learning_rate \(0.1 there, 0.2 here\)"):
        train.run(small(learning_rate=0.2), whole[0])
    assert (whole[0] / "run.json").read_bytes() == before


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    # A fault test: no experiment has such a rate. Without BN the logits overflow at once.
    config = small(mnist, learning_rate=1e38, momentum=0.9, log_every=1)
    with pytest.raises(DivergedError, match=r"diverged at step \d+: loss") as error:
        train.run(config, tmp_path)
    assert error.value.exit_code == 4
    info = json.loads((tmp_path / "run.json").read_text())
    assert info["status"] == "diverged"
    for step in (tmp_path / "checkpoints").glob("[0-9]*"):  # none, or one from before
        assert all(np.isfinite(a).all() for a in arrays(tmp_path, config).values()), step


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 5),
        ({"steps_per_dispatch": 1}, 1),
        ({"steps_per_dispatch": 8}, 2),
        ({"eval_every": 3}, 1),
    ],
)
def test_no_dispatch_steps_over_an_interval(changes, expected):
    config = small(**changes)
    assert train.steps_per_dispatch(config) == expected
    assert train.steps_per_dispatch(config, start=37) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 5), ({"steps_per_dispatch": 10}, 5), ({"steps_per_dispatch": 8}, 2)],
)
def test_several_processes_take_few_steps_at_a_time(monkeypatch, changes, expected):
    monkeypatch.setattr(train.jax, "process_count", lambda: 2)
    assert train.steps_per_dispatch(small(**changes)) == expected


def test_streamed_and_resident_batches_train_alike(whole, tmp_path):
    train.run(small(steps_per_dispatch=1), tmp_path)
    streamed = [line["loss"] for line in lines(tmp_path, "train")]
    resident = [line["loss"] for line in lines(whole[0], "train")]
    # the same examples in two programs: 40 steps of float32 rounding, 2e-6 measured
    np.testing.assert_allclose(streamed, resident, rtol=1e-4)


def test_unknown_activation_is_refused_with_the_closest():
    with pytest.raises(ConfigError, match="dense_3/input.*closest.*'dense_2/input'"):
        train.run(small(**{"record.activations": ("dense_3/input",)}), "unused")


def test_scale_pod_keeps_the_number_of_examples():
    config = build.for_devices(bn_x30.get_config("pod"), 8)
    paper = bn_x30.get_config()
    assert config.batch_size == 256
    assert config.total_steps * 256 == paper.total_steps * 32
    assert config.decay_epochs == paper.decay_epochs and config.bn.group_size == 32


def photographs(folder):
    """Two classes of pictures in the folders that `data.name=folder` reads: 8 and 4 of each."""
    for split, count in (("train", 8), ("val", 4)):
        for k in range(2 * count):
            place = folder / split / f"class_{k % 2}"
            place.mkdir(parents=True, exist_ok=True)
            picture = small_sets.encode(small_sets.photo(32, 32, seed=k % 2), "PNG")
            (place / f"{k}.png").write_bytes(picture)
    return folder


def test_pictures_rest_on_the_device_where_a_dispatch_has_several_steps(tmp_path):
    folder = photographs(tmp_path / "data")
    settings = {
        "data.name": "folder", "data.dir": str(folder), "image_size": 16, "batch_size": 8,
        "bn.group_size": 4, "eval_batch_size": 8, "record.activation_examples": 8,
        "total_steps": 10, "eval_every": 10, "checkpoint_every": 10, "log_every": 1,
    }  # fmt: skip
    train.run(small(**settings, steps_per_dispatch=1), tmp_path / "fed")
    train.run(small(**settings), tmp_path / "resident")
    fed, resident = (lines(tmp_path / name, "train") for name in ("fed", "resident"))
    assert [line["step"] for line in fed] == [line["step"] for line in resident]
    # float32, in two programs, the first of which has a mask
    for a, b in zip(fed, resident, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)


def test_percentiles_are_kept_to_six_digits():
    assert activations._rounded(np.array([1 / 3, 123456.78, -2e-9])) == [0.333333, 123457, -2e-9]
