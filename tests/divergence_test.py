"""Injected NaN and overflow: the run ends as diverged, and nothing that is not finite is saved.

Fault tests: no experiment of the paper has such rates or gradients.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from bn_jax import train
from bn_jax.errors import DivergedError
from bn_jax.experiment import build
from bn_jax.experiment.evaluator import Evaluator
from configs import bn_x30, inception, mnist_bn

# Inception compiles for a minute: in `make faults`.
MLP, FULL = pytest.param(mnist_bn, id="mlp"), pytest.mark.faults
TINY = {
    "total_steps": 6,
    "eval_every": 6,
    "checkpoint_every": 1,
    "log_every": 1,
    "statistics_batches": 1,
    "eval_batch_size": 1000,
    "keep_last": 9,
    "record.activations": (),
    "record.tensorboard": False,
}


def tiny(root, **changes) -> ConfigDict:
    config = root.get_config("digits")
    if config.model.name == "inception":  # bn_x30 as in kill_test: one program for both
        own = {"model.width": 0.0625, "dropout": 0.4}
    else:
        own = {"batch_size": 64, "bn.group_size": 32, "steps_per_dispatch": 1, "l2": 1e-4}
    config.update_from_flattened_dict(TINY | own | changes)
    return config


@pytest.fixture(autouse=True)
def compiled_quickly(monkeypatch, unoptimized):
    """One device, in a third of the time; no evaluation, before which all runs here have ended."""
    real = build.mesh.make
    monkeypatch.setattr(Evaluator, "compile", lambda self: None)
    monkeypatch.setattr(build.mesh, "make", lambda *_: real(jax.devices()[:1]))


def poison(monkeypatch, at: int) -> None:
    """The loss is NaN in step `at` (1 is the first), by the L2 coefficient, which is data."""
    real = train.compile_step

    def compile_step(*arguments):
        program = real(*arguments)

        def poisoned(state, *rest):
            *fed, hyper, seed = rest
            if int(state.step) == at - 1:
                hyper = hyper._replace(l2=hyper.l2 * jnp.nan)
            return program(state, *fed, hyper, seed)

        return poisoned

    monkeypatch.setattr(train, "compile_step", compile_step)


def check_records(workdir, step: int) -> None:
    """run.json, metrics and checkpoints of a run that diverged in `step`, saved at every step."""
    run = json.loads((workdir / "run.json").read_text())
    assert run["status"] == "diverged" and f"step {step:,}" in run["results"]["error"]
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["kind"] == "train"] == list(range(1, step))
    kept = sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))
    assert kept == list(range(1, step))  # checkpoint_every is 1: the step itself was due, too
    assert not list((workdir / "checkpoints").glob("tmp.*"))


@pytest.mark.parametrize("root", [MLP, pytest.param(bn_x30, id="inception", marks=FULL)])
def test_an_injected_nan_ends_the_run_in_its_step(tmp_path, monkeypatch, root, measured):
    poison(monkeypatch, at=3)
    config = tiny(root)
    with pytest.raises(DivergedError) as caught:
        train.run(config, tmp_path)
    line, names = str(caught.value), train.forward_order(build.build(config))
    assert line.startswith("diverged at step 3: loss nan, gradient not finite in ")
    # L2 reaches every kernel, so the first layer of the network is the first that is not finite.
    assert f"({next(name for name in names if name.endswith('kernel'))})" in line
    assert caught.value.exit_code == 4
    check_records(tmp_path, 3)
    measured(f"NaN injected into {config.name}", injected=1, detected=1, lost=0)


@pytest.mark.parametrize("root", [MLP, pytest.param(inception, id="inception", marks=FULL)])
def test_a_rate_that_overflows_ends_the_run(tmp_path, root, measured):
    # Parameters of 1e38 and more after one step; BN scales the MLP's layers to what it likes, but
    # the classifier and the L2 term have none.
    config = tiny(root, learning_rate=3e38, momentum=0.9, l2=0.1)
    with pytest.raises(DivergedError) as caught:
        train.run(config, tmp_path)
    assert caught.value.exit_code == 4
    check_records(tmp_path, 2)  # of the first step all is finite still, and saved
    _, state = build.restore(build.build(config), tmp_path, 1)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert max(np.abs(leaf).max() for leaf in leaves) > 1e37  # it was about to overflow
    measured(f"rate of {config.name} overflows", injected=1, detected=1, lost=0)


def test_the_first_layer_is_the_first_of_the_forward_pass():
    exp = build.build(tiny(bn_x30))
    forward = train.forward_order(exp)
    params = build.abstract_state(exp).params
    leaves = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    assert sorted(forward) == sorted(leaves) and forward != leaves
    assert forward[0].startswith("conv1_7x7") and leaves[0].startswith("classifier")
    assert forward[-1].startswith("classifier")
    squares = np.ones(len(leaves), np.float32)
    bad = ["classifier/kernel", forward[40], forward[90]]
    squares[[leaves.index(name) for name in bad]] = np.inf
    line = str(train.diverged_error(7, 1.5, squares, leaves, forward))
    assert line.startswith("diverged at step 7: loss 1.5, gradient not finite in 3 of ")
    assert f"first in {forward[40].rpartition('/')[0]} ({forward[40]})" in line
    squares[:] = 1
    assert "not finite in 0 of" in str(train.diverged_error(7, np.nan, squares, leaves, forward))
