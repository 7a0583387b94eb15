"""Population statistics are computed once a checkpoint, and never taken from another one's file."""

import json

import jax
import numpy as np
import pytest

from bn_jax.errors import DiskError
from bn_jax.evaluate import members, population
from bn_jax.experiment import build, evaluator
from bn_jax.experiment.evaluator import Evaluator
from bn_jax.workdir import checkpoint
from bn_jax.workdir import files as disk
from tests.support.small_members import save_member

LIKE = {"a": {"bn": {"mean": np.zeros(300, np.float32), "count": np.float32(0)}}}
CONFIG = {"statistics_batches": 2, "total_steps": 10, "bn": {"epsilon": 0.001}}


class Compute:
    """Stands in for Algorithm 2; counts how often it is asked."""

    def __init__(self):
        self.calls = 0
        mean = np.random.default_rng(0).normal(size=300).astype(np.float32)
        self.tree = {"a": {"bn": {"mean": mean, "count": np.float32(7)}}}

    def __call__(self):
        self.calls += 1
        return self.tree


@pytest.fixture
def run(tmp_path):
    """A workdir whose step 10 has a manifest."""
    step = tmp_path / "checkpoints" / "10"
    step.mkdir(parents=True)
    (step / checkpoint.MANIFEST).write_bytes(checkpoint.seal({"step": 10}))
    return tmp_path


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_once_a_checkpoint_end_to_end(tmp_path, monkeypatch, capsys):
    run = save_member(tmp_path / "run", seed=0)
    files = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    first = members.load_member(run, None, "population", build.from_workdir(run))
    monkeypatch.setattr(Evaluator, "population", None)  # a second time would fail
    second = members.load_member(run, None, "population", build.from_workdir(run))
    assert bits(first.batch_stats) == bits(second.batch_stats)
    assert jax.tree.structure(first.batch_stats) == jax.tree.structure(second.batch_stats)
    said = capsys.readouterr().out.splitlines()
    assert "computed in" in said[0] and "read from the workdir" in said[1]
    assert all("standard deviations away" in line for line in said)
    assert first.about["running_gap"] == second.about["running_gap"] > 0
    running = members.load_member(run, None, "running", build.from_workdir(run))
    assert bits(running.batch_stats) != bits(first.batch_stats)
    # The checkpoint is as it was, and is still restored after all its digests are compared.
    assert files == {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    assert (run / population.FOLDER / "10.npz").is_file()


def test_kept_and_read_with_the_same_bits(run):
    compute = Compute()
    first, kept = population.cached(run, 10, CONFIG, LIKE, compute)
    again, kept_again = population.cached(run, 10, CONFIG, LIKE, compute)
    assert (kept, kept_again, compute.calls) == (False, True, 1)
    assert bits(first) == bits(again) == bits(compute.tree)


def test_a_damaged_file_is_not_used(run, capsys):
    compute = Compute()
    population.cached(run, 10, CONFIG, LIKE, compute)
    path = run / population.FOLDER / "10.npz"
    whole, noticed = path.read_bytes(), 0
    places = range(0, len(whole), 41)
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        found, kept = population.cached(run, 10, CONFIG, LIKE, compute)
        assert bits(found) == bits(compute.tree)
        noticed += not kept
    # Some bytes of a zip file mean nothing (a date, say); they change no number either.
    assert noticed > 0.8 * len(places)
    for cut in (0, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert not population.cached(run, 10, CONFIG, LIKE, compute)[1]
    assert "is not used" in capsys.readouterr().err


def test_an_altered_array_is_noticed_by_its_digest(run):
    compute = Compute()
    population.cached(run, 10, CONFIG, LIKE, compute)
    path = run / population.FOLDER / "10.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["a/bn/mean"] = arrays["a/bn/mean"] + 1
    np.savez(path, **arrays)  # a sound zip file with a sound header
    found, kept = population.cached(run, 10, CONFIG, LIKE, compute)
    assert not kept and bits(found) == bits(compute.tree)


def test_nothing_is_unpickled(run):
    path = run / population.FOLDER / "10.npz"
    path.parent.mkdir()
    np.savez(path, header=np.array([{}], dtype=object))
    assert not population.cached(run, 10, CONFIG, LIKE, Compute())[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: {"statistics_batches": 3}, "made from another config"),
        (lambda run: {"bn": {"epsilon": 0.01}}, "made from another config"),
        (
            lambda run: (
                (run / "checkpoints/10" / checkpoint.MANIFEST).write_bytes(b"another") and {}
            ),
            "made from another checkpoint",
        ),
    ],
)
def test_another_checkpoint_or_config_is_computed_anew(run, capsys, change, message):
    compute = Compute()
    population.cached(run, 10, CONFIG, LIKE, compute)
    changed = CONFIG | change(run)
    assert not population.cached(run, 10, changed, LIKE, compute)[1]
    assert message in capsys.readouterr().err
    assert population.cached(run, 10, changed | {"total_steps": 99}, LIKE, compute)[1]


def test_another_network_is_computed_anew(run):
    compute = Compute()
    population.cached(run, 10, CONFIG, LIKE, compute)
    other = {"b": LIKE["a"]}
    assert not population.cached(run, 10, CONFIG, other, lambda: {"b": compute.tree["a"]})[1]


def test_a_disk_that_cannot_be_written_is_no_error(run, monkeypatch, capsys):
    def refuse(*arguments):
        raise DiskError("no space")

    monkeypatch.setattr(disk, "write_atomic", refuse)
    assert bits(population.cached(run, 10, CONFIG, LIKE, Compute())[0]) == bits(Compute().tree)
    assert "not kept: no space" in capsys.readouterr().err


def test_the_gap_is_in_the_deviations_that_bn_divides_by():
    running = {"a": {"bn": {"mean": np.array([1.0, 5.0]), "var": np.ones(2)}}}
    exact = {"a": {"bn": {"mean": np.array([1.0, 2.0]), "var": np.array([1.0, 4.0])}}}
    assert evaluator.running_gap(running, exact, 0.0) == pytest.approx(1.5)
    assert evaluator.running_gap(running, exact, 5.0) == pytest.approx(1.0)
    dead = {"a": {"bn": {"mean": np.array([1.0, 2.0]), "var": np.zeros(2)}}}
    assert evaluator.running_gap(running, dead, 1e-3) == pytest.approx(3 / np.sqrt(1e-3))
    assert np.isnan(evaluator.running_gap({}, {}, 1e-3))
    assert json.dumps(evaluator.running_gap(running, exact, 0.0))  # a plain number


@pytest.mark.parametrize(("group", "decides"), [(None, False), (64, False), (32, True)])
def test_files_of_older_versions_count_where_a_training_batch_was_one_group(group, decides):
    """Older statistics were of whole training batches; they would be taken for those of groups."""
    fields = population._decisive({"batch_size": 64, "bn": {"group_size": group}})
    assert fields.get("mini_batch") == (group if decides else None)
