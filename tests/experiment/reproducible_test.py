"""The reproducible step: the same bits on 1, 2, 4, 8 devices and on two processes."""

import functools
import json
import os
import pathlib
import socket
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax import ops, optim
from bn_jax import train as train_
from bn_jax.distributed import mesh, preempt
from bn_jax.distributed.mesh import put_batch, put_replicated
from bn_jax.errors import ConfigError, Preempted
from bn_jax.experiment import build, reproducible
from bn_jax.layers import BatchNorm, ConvBN
from bn_jax.step import init_state, train_step
from configs import bn_x30, mnist_bn
from tests.support import processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
GROUP, BATCH = 4, 32
HYPER = optim.Hyper(*map(np.float32, (0.05, 0.96, 1000, 1e-3, 0.9)))


class Net(nn.Module):
    """What Inception is made of, in four layers."""

    dropout: float = 0.4

    @nn.compact
    def __call__(self, images, *, train, mask=None):
        norm = functools.partial(BatchNorm, momentum=0.9, epsilon=1e-3, group_size=GROUP)
        conv = functools.partial(ConvBN, norm=norm)
        x = conv(6, (3, 3), name="a")(images / 127.5 - 1, train=train, mask=mask)
        x = conv(8, (1, 1), name="b")(ops.max_pool(x, 2), train=train, mask=mask)
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        return nn.Dense(5, name="classifier")(x)


def batches(count, holes=(5, 8, 9, 10)):
    """Batches in which some rows are invalid: one group of four has a single valid one."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "image": rng.integers(0, 256, (BATCH, 10, 10, 1), np.uint8),
            "label": rng.integers(0, 5, BATCH).astype(np.int32),
            "mask": ~np.isin(np.arange(BATCH), holes),
        }


def trained(exp, fed, state, cls=reproducible.Step):
    """The state and the metrics of the last of some steps, on the host."""
    hyper, seed = put_replicated(exp.mesh, (HYPER, np.uint32(3)))
    state = put_replicated(exp.mesh, state)
    fed = [put_batch(exp.mesh, batch, exp.config.batch_size) for batch in fed]
    step = cls(exp).lower(state, fed[0], hyper, seed).compile()
    for batch in fed:
        state, metrics = step(state, batch, hyper, seed)
    return jax.device_get((state, metrics))


def on(devices, model, **changes):
    config = SimpleNamespace(batch_size=BATCH, bn=SimpleNamespace(group_size=GROUP))
    some = mesh.make(jax.devices()[:devices])
    return SimpleNamespace(mesh=some, model=model, config=config, **changes)


def assert_same_bits(a, b):
    leaves = jax.tree_util.tree_leaves_with_path(a)
    assert len(leaves) == len(jax.tree.leaves(b)) > 10
    for (path, x), y in zip(leaves, jax.tree.leaves(b), strict=True):
        same = x.dtype == y.dtype and x.tobytes() == y.tobytes()
        assert same, f"{jax.tree_util.keystr(path)} differs by {np.max(np.abs(x - y))}"


def test_the_state_has_the_same_bits_on_1_2_4_and_8_devices():
    model, fed = Net(), list(batches(2))
    state = jax.device_get(init_state(model, 0, (10, 10, 1)))
    one = trained(on(1, model), fed, state)
    assert np.any(one[0].params["a"]["conv"]["kernel"] != state.params["a"]["conv"]["kernel"])
    for devices in (2, 4, 8):
        assert_same_bits(one, trained(on(devices, model), fed, state))


def test_it_is_the_ordinary_step_but_for_rounding():
    model, fed = Net(dropout=0.0), list(batches(1))
    state = jax.device_get(init_state(model, 0, (10, 10, 1)))
    ours, metrics = trained(on(1, model), fed, state)
    ordinary = jax.jit(functools.partial(train_step, model=model))
    theirs, expected = jax.device_get(ordinary(state, fed[0], HYPER, np.uint32(3)))
    # float32 sums in another order: 1e-6 of the largest value, and what BN's 1/std makes of it
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)
    jax.tree.map(close, ours, theirs)
    jax.tree.map(lambda a, b: close(a[0], b), metrics, expected)
    assert metrics.keys() == expected.keys() and int(ours.step) == 1


def test_an_empty_batch_changes_no_statistics():
    model, fed = Net(dropout=0.0), list(batches(1, holes=range(BATCH)))
    state = jax.device_get(init_state(model, 0, (10, 10, 1)))
    ours, metrics = trained(on(1, model), fed, state)
    assert_same_bits(ours.batch_stats | {"x": ours.params}, state.batch_stats | {"x": ours.params})
    assert np.isfinite(metrics["loss"]).all()


def small(**changes):
    """The MNIST network with BN on digits: batches of 8 groups of 8."""
    settings = {
        "reproducible": True,
        "batch_size": 64,
        "bn.group_size": 8,
        "total_steps": 6,
        "eval_every": 6,
        "checkpoint_every": 3,
        "log_every": 1,
        "steps_per_dispatch": 1,
        "statistics_batches": 1,
        "record.activations": (),
        "record.tensorboard": False,
    }
    config = mnist_bn.get_config("digits")
    config.update_from_flattened_dict(settings | changes)
    return config


def test_the_run_refuses_devices_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="on 8 devices: batch_size=32 .* at most 4 devices"):
        train_.run(small(batch_size=32), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_run_that_goes_on_with_other_devices_ends_with_the_same_bits(tmp_path, monkeypatch):
    make = mesh.make

    def run(name, devices, stop=None):
        monkeypatch.setattr(mesh, "make", lambda *_: make(jax.devices()[:devices]))
        monkeypatch.setattr(preempt.Signals, "stop_at", lambda self, step: step == stop)
        train_.run(small(), tmp_path / name)

    run("whole", 4)
    with pytest.raises(Preempted):
        run("parts", 2, stop=3)
    run("parts", 1)
    states, curves = [], []
    for name in ("whole", "parts"):
        _, state = build.restore(build.build(small()), tmp_path / name)
        states.append(jax.device_get(state))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curves.append([line for line in lines if json.loads(line)["kind"] == "train"])
    assert_same_bits(*states)
    assert curves[0] == curves[1] and len(curves[0]) == 6


@pytest.mark.slow
def test_the_digits_network_has_the_same_bits_on_1_2_4_and_8_devices():
    config = bn_x30.get_config("digits")
    config.update_from_flattened_dict({"batch_size": 256, "dropout": 0.4})
    exp = build.build(config)
    fed = [exp.data.train_batch(k, 256, slice(0, 256), 0) for k in range(2)]
    state = jax.device_get(jax.jit(functools.partial(build.initial_state, exp))())
    ends = {
        n: trained(exp._replace(mesh=mesh.make(jax.devices()[:n])), fed, state)
        for n in (1, 2, 4, 8)
    }
    for n in (2, 4, 8):
        assert_same_bits(ends[1], ends[n])


@pytest.mark.slow
def test_two_processes_end_with_the_bits_of_one(tmp_path):
    def start(name, **env):
        settings = small().to_dict() | {"batch_size": 64, "record.activation_examples": 64}
        fields = ("reproducible", "batch_size", "total_steps", "eval_every", "checkpoint_every")
        fields += ("log_every", "steps_per_dispatch", "record.activation_examples")
        command = [sys.executable, "-m", "bn_jax.main", "--config=configs/mnist_bn.py:digits"]
        command += [f"--config.{field}={settings[field]}" for field in fields]
        command += ["--config.bn.group_size=32", "--config.record.tensorboard=False"]
        command.append(f"--workdir={tmp_path / name}")
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        keep |= {"JAX_PLATFORMS": "cpu", "NPROC": "2", **env}
        return processes.start(command, cwd=ROOT, env=keep)

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    assert start("one").wait(300) == 0
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    both = [start("two", JAX_PROCESS_ID=str(i), **shared) for i in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    states = []
    for name in ("one", "two"):
        exp = build.from_workdir(tmp_path / name)
        states.append(jax.device_get(build.restore(exp, tmp_path / name)[1]))
    assert_same_bits(*states)
    assert json.loads((tmp_path / "two/run.json").read_text())["info"]["mesh"]["processes"] == 2
