"""The training loop: batches in, steps out; records, evaluations and checkpoints every k steps.

The state after step k is a function of (config, k): what a step sees depends on (seed, step) only, so
a run that is stopped and started again ends with the same bits as one that never stopped.
"""

import functools
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bn_jax import evaluate, mesh as meshes, models, optim, preempt, validate
from bn_jax import step as steps
from bn_jax.checkpoint import Checkpoints
from bn_jax.data import pipeline
from bn_jax.errors import DivergedError, Preempted
from bn_jax.record import Recorder


class Experiment(NamedTuple):
    """What a run is made of, built once from the config."""

    config: ConfigDict
    mesh: Mesh
    data: Any
    model: nn.Module
    hyper: optim.Hyper
    key: jax.Array


def default_name(config: ConfigDict) -> str:
    """Folder name of a run: the experiment's, with the scale unless it is the default one."""
    default = {"inception": "imagenet", "mlp": "mnist"}[config.model.name]
    return config.name if config.scale == default else f"{config.name}_{config.scale}"


def check(config: ConfigDict) -> None:
    """Raises ConfigError for a config that cannot be trained, without touching a device or disk."""
    validate.check(config)


def for_devices(config: ConfigDict, devices: int) -> ConfigDict:
    """The config of a run on `devices` devices: scale `pod` gets its batch, others stay as they are.

    Differs from the paper: at scale `pod` one synchronous step of 32 x devices examples stands for
    as many asynchronous steps of 32, so that the number of examples seen stays the same.
    """
    if not config.batch_per_device:
        return config
    config = ConfigDict(config.to_dict())
    factor = config.batch_per_device * devices / config.batch_size
    config.batch_size = config.batch_per_device * devices
    for name in ("total_steps", "eval_every", "checkpoint_every", "log_every"):
        config[name] = max(1, round(config[name] / factor))
    config.record.activation_every = max(1, round(config.record.activation_every / factor))
    return config.lock()


def build(config: ConfigDict) -> Experiment:
    """Everything a run needs but its state. Raises ConfigError before anything is compiled."""
    check(config)
    mesh = meshes.make()
    config = for_devices(config, mesh.size)
    meshes.check_batch(config.batch_size, mesh.size)
    data = pipeline.open_data(config)
    hyper = optim.Hyper(
        learning_rate=np.float32(config.learning_rate),
        decay_rate=np.float32(config.decay_rate),
        decay_examples=np.float32(config.decay_examples),
        l2=np.float32(config.l2),
        momentum=np.float32(config.momentum),
    )
    model = models.build(config, data.num_classes)
    # Dropout has a stream of its own, apart from the initial weights'.
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return Experiment(config, mesh, data, model, hyper, key)


def steps_per_dispatch(config: ConfigDict) -> int:
    """Steps in one compiled program: every interval and the end must fall between two programs."""
    intervals = [config.eval_every, config.checkpoint_every, config.log_every, config.total_steps]
    if config.record.activations:
        intervals.append(config.record.activation_every)
    return math.gcd(config.steps_per_dispatch, *intervals) if config.steps_per_dispatch > 1 else 1


def compile_step(experiment: Experiment, dispatch: int):
    """The jitted training step; takes (state, *fed) and returns (state, metrics with axis [K])."""
    mesh, model = experiment.mesh, experiment.model
    everywhere = meshes.replicated(mesh)

    def one(state, batch, hyper, key):
        state, metrics = steps.train_step(state, batch, hyper, key, model=model)
        return state, jax.tree.map(lambda m: m[None], metrics)

    def many(state, images, labels, indices, hyper, key):
        return steps.train_steps(state, images, labels, indices, hyper, key, model=model)

    fed = (
        (meshes.along_batch(mesh),)
        if dispatch == 1
        else (everywhere, everywhere, meshes.along_batch(mesh, 1))
    )
    return jax.jit(
        one if dispatch == 1 else many,
        in_shardings=(everywhere, *fed, everywhere, everywhere),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def feed(experiment: Experiment, start: int, dispatch: int) -> Iterator[tuple]:
    """The arguments of each dispatch from step `start` on, already on the devices."""
    config, mesh, data = experiment.config, experiment.mesh, experiment.data
    rows = meshes.rows(mesh, config.batch_size)
    if dispatch == 1:
        batches = data.train(
            start, config.total_steps, config.batch_size, rows, seed=config.seed
        )
        for batch in batches:
            yield (meshes.put_batch(mesh, batch, config.batch_size),)
        return
    images, labels = meshes.put_replicated(mesh, data.resident())
    for first in range(start, config.total_steps, dispatch):
        order = [
            data.train_indices(step, config.batch_size, config.seed)
            for step in range(first, first + dispatch)
        ]
        yield images, labels, meshes.put_replicated(mesh, np.stack(order).astype(np.int32))
