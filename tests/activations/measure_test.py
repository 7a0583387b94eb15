"""bn_jax.activations: any activation of any kept checkpoint, measured afterwards."""

import json
import sys

import jax
import numpy as np
import pytest

from bn_jax import train
from bn_jax.activations import __main__ as command
from bn_jax.activations import activations, fixed_images, known_paths, measure
from bn_jax.errors import ConfigError
from bn_jax.experiment import build
from bn_jax.figures.activations import Shown, moved, spread, table
from bn_jax.workdir.checkpoint import Checkpoints
from configs import bn_x30
from tests.support.small_members import save_member
from tests.train_test import small

EXAMPLES = 128


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_member(tmp_path_factory.mktemp("activations") / "bn", seed=0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_member(tmp_path_factory.mktemp("activations") / "plain", seed=0, norm="none")


def type_in(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["activations", *map(str, arguments)])
    command.main()
    return capsys.readouterr().out


def test_what_is_measured_is_what_numpy_finds(run):
    exp = build.from_workdir(run)
    paths = known_paths(exp, EXAMPLES)
    assert paths == [f"dense_{k}/{end}" for k in range(3) for end in ("input", "pre_bn")]
    found, kept = measure.Observer(exp, run, paths, examples=EXAMPLES).at(10)
    assert not kept

    _, state = build.restore(exp, run, 10)
    images = fixed_images(exp, EXAMPLES)
    whole = jax.jit(lambda *a: activations(exp, *a))(state.params, state.batch_stats, images)
    for path in paths:
        values = np.float64(whole[path]).reshape(EXAMPLES, -1)
        got = found[path]
        # Float32 against float64: 128 values near 1 a unit.
        close = {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(got.percentiles, np.percentile(values, (15, 50, 85), 0), **close)
        np.testing.assert_allclose(got.mean, values.mean(0), **close)
        np.testing.assert_allclose(got.std, values.std(0), **close)
        counts, edges = np.histogram(values, measure.BINS)
        np.testing.assert_allclose(got.edges, edges, **close)
        assert got.counts.sum() == values.size
        assert np.abs(got.counts - counts).sum() <= 4  # a value on an edge may fall on either side
        assert got.dead == pytest.approx((values <= 0).all(0).mean())
        assert got.saturated == pytest.approx((np.abs(values) > 4).mean())


def test_a_constant_and_dead_units():
    x = np.zeros((6, 2, 4), np.float32)
    x[..., 1] = -5
    x[0, 0, 2] = 7
    found = measure.summary(x)
    assert found.dead == 0.75 and found.saturated == pytest.approx(13 / 48)
    assert measure.summary(np.full((3, 2), 2.5, np.float32)).counts.sum() == 6


def test_measurements_are_kept_and_those_of_another_network_made_again(run, tmp_path, capsys):
    exp = build.from_workdir(run)
    first = measure.Observer(exp, run, ["dense_0/input"], examples=EXAMPLES, out=tmp_path)
    more = measure.Observer(exp, run, ["dense_1/input"], examples=EXAMPLES, out=tmp_path)
    one, _ = first.at(0)
    two, _ = more.at(0)
    assert measure.read(tmp_path)[0].keys() == {"dense_0/input", "dense_1/input"}
    again, kept = measure.Observer(exp, run, [*one, *two], examples=EXAMPLES, out=tmp_path).at(0)
    assert kept
    for path, measured in (one | two).items():
        for a, b in zip(measured, again[path], strict=True):
            np.testing.assert_array_equal(a, b)

    few = measure.Observer(exp, run, list(one), examples=64, out=tmp_path)
    assert not few.at(0)[1]  # of other images
    (tmp_path / "0.npz").write_bytes(b"no zip")
    assert not measure.Observer(exp, run, list(one), examples=64, out=tmp_path).at(0)[1]
    assert "is made again" in capsys.readouterr().err


def test_only_chosen_activations_are_kept(tmp_path):
    """One layer of Inception takes less memory than all of them."""
    config = bn_x30.get_config("synthetic").unlock()
    config.image_size = 64
    config.model.width = 0.125
    exp = build.build(config.lock())
    paths = known_paths(exp, 32)
    assert len(paths) > 100

    def memory(chosen):
        observer = measure.Observer(exp, tmp_path, chosen, examples=32)
        observer._compile()
        return observer.memory

    assert memory(["conv1_7x7/input"]) < memory(paths)


def test_the_command_draws_two_networks_side_by_side(run, plain, monkeypatch, capsys, tmp_path):
    said = type_in(
        monkeypatch, capsys, f"--workdir={plain},{run}", "--layers=dense_2", f"--out={tmp_path}"
    )
    assert "| dense_2/pre_bn | 0 to 10 |" in said and said.count("| dense_2/input |") == 2
    for name in ("bands", "histograms", "map"):
        assert (tmp_path / f"activations_{name}.png").stat().st_size > 5000
    assert "MB besides the network" in said
    again = type_in(
        monkeypatch, capsys, f"--workdir={plain},{run}", "--layers=dense_2", f"--out={tmp_path}"
    )
    assert "read from" in again and "measured" not in again
    assert "steps 0, 10" in type_in(monkeypatch, capsys, f"--workdir={run}", "--list")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--layers=dense2", r"--layers=dense2 matches none of the 6 .* nearest are dense_2/input"),
        ("--steps=7", r"--steps=7: .* has no checkpoint of that step; it has 0, 10 \(keep_every"),
        ("--examples=7", "--examples=7 must be a number from 2 to the 4000 .* bn.group_size=32"),
        ("--examples=4032", "--examples=4032 must be a number from 2 to the 4000"),
    ],
)
def test_what_is_refused_is_one_line(run, options, said, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=said) as caught:
        type_in(monkeypatch, capsys, f"--workdir={run}", options)
    assert "\n" not in str(caught.value)


def test_different_networks_are_refused(run, tmp_path, monkeypatch, capsys):
    other = save_member(tmp_path / "other", seed=0)
    record = json.loads((other / "run.json").read_text())
    record["config"]["model"]["widths"] = [100, 100]
    (other / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="are different networks: they have 3 and 2 layers"):
        type_in(monkeypatch, capsys, f"--workdir={run},{other}")
    with pytest.raises(ConfigError, match="give one run, or two different ones"):
        type_in(monkeypatch, capsys, f"--workdir={run},{run}")


def test_spread_and_distance_are_of_the_median_unit(tmp_path):
    """Two units, of which one moves by one width, in three steps."""

    def at(shift):
        x = np.linspace(-1, 1, 101, dtype=np.float32)[:, None] * np.float32([1, 3, 3])
        return {"a/input": jax.device_get(measure.summary(x + np.float32([0, shift, shift])))}

    run = Shown("x", tmp_path, {0: at(0), 5: at(2.1), 9: at(4.2)})
    # From the 15th to the 85th percentile of unit 1: 1.4 * 3.
    np.testing.assert_allclose(moved(run, "a/input"), [0, 0.5, 1], rtol=1e-4)
    np.testing.assert_allclose(spread(run, "a/input"), [np.std(np.linspace(-3, 3, 101))] * 3, 1e-5)
    assert "| x | a/input | 0 to 9 |" in table([run])


def test_every_nth_checkpoint_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep_last=1, keep_best=0, keep_every=20) as checkpoints:
        for step in range(10, 60, 10):
            checkpoints.save(step, {"x": np.float32(step)})
        checkpoints.wait()
        assert checkpoints.steps() == [20, 40, 50]


def test_a_resumed_run_may_record_others(tmp_path):
    """The other lines are, byte for byte, those of a run that never changed what it records."""
    steps = {"total_steps": 40, "checkpoint_every": 20, "eval_every": 20}
    one = {"record.activation_every": 10, "record.activations": ("dense_0/input",)}
    two = {"record.activation_every": 20, "record.activations": ("dense_1/pre_bn",)}
    train.run(small(**steps | one), tmp_path / "whole")
    train.run(small(**steps | one | {"total_steps": 20}), tmp_path / "parts")
    train.run(small(**steps | two), tmp_path / "parts")

    def others(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [line for line in lines if '"kind": "activation"' not in line]

    assert others("parts") == others("whole") and len(others("parts")) >= 4
    found = (tmp_path / "parts" / "metrics.jsonl").read_text()
    assert found.count("dense_0/input") == 3 and found.count("dense_1/pre_bn") == 1
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert record["config"]["record"]["activations"] == ["dense_1/pre_bn"]
