"""Evaluation by several processes is that of one; other commands refuse to be several."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bn_jax.data import views
from bn_jax.evaluate import predictions
from tests.support import processes
from tests.support.small_members import save_member

COMMANDS = (
    "bn_jax.predict --workdir=x y",
    "bn_jax.export --workdir=x --format=flax",
    "bn_jax.import_weights --from=x --variant=caffe --workdir=y",
    "bn_jax.sweep --configs=mnist --workdir=x",
    "bn_jax.study population --workdir=x",
    "bn_jax.figures --workdir=x",
    "bn_jax.prepare check x",
    "bn_jax.evaluate --combine=x.npz,y.npz",
)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return [save_member(folder / f"seed_{seed}", seed) for seed in (0, 1)]


def evaluated(members, folder, count, *options):
    """The records of an evaluation by `count` processes, its predictions, and what each said."""
    folder.mkdir()
    names = ",".join(map(str, members))
    command = ["-m", "bn_jax.evaluate", f"--workdir={names}", f"--out={folder / 'out'}"]
    command += [f"--predictions={folder / 'p.npz'}", *options]
    children = processes.spawn(command, folder / "log", count)
    said = []
    for index, child in enumerate(children):
        code = child.wait(timeout=240)
        said.append((folder / f"log.{index}").read_text())
        assert code == 0, said[-1]
    lines = (folder / "out" / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], predictions.load(folder / "p.npz"), said


@pytest.mark.parametrize(("count", "crops"), [(2, 10), (4, 1)])
def test_several_processes_divide_the_examples(members, tmp_path, count, crops):
    options = (f"--crops={crops}", "--batch_size=96")
    [one], alone, _ = evaluated(members, tmp_path / "1", 1, *options)
    [line], found, said = evaluated(members, tmp_path / str(count), count, *options)
    assert line["examples"] == one["examples"] == 1000
    # The same programs on other batches: float32 sums in another order at most.
    np.testing.assert_allclose(found.probabilities, alone.probabilities, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found.labels, alone.labels)
    assert [m["top1"] for m in line["member_scores"]] == [m["top1"] for m in one["member_scores"]]
    assert "mean of 2 networks" in said[0]
    for other in said[1:]:  # process 0 alone speaks
        assert "error" not in other and "networks" not in other


def test_a_checkpoint_that_is_not_there_ends_all(members, tmp_path):
    command = ["-m", "bn_jax.evaluate", f"--workdir={members[0]}", "--step=11"]
    children = processes.spawn(command, tmp_path / "log", 2)
    assert [child.wait(timeout=120) for child in children] == [5, 5]
    assert "step 11" in (tmp_path / "log.0").read_text()


@pytest.mark.parametrize("number", [1, 10])
def test_every_example_has_one_process(number):
    for count in (1, 2, 3, 7):
        shares = [views.share(50, number, 8, k, count) for k in range(count)]
        np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(50))


@pytest.mark.parametrize("command", COMMANDS)
def test_other_commands_refuse_to_be_several(command, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    name = command.partition(" --workdir")[0].partition(" --from")[0].partition(" check")[0]
    assert "runs in one process, but this job has several" in done.stderr
    assert name.split()[0] in done.stderr
