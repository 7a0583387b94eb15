"""The training loop: batches in, steps out; records, evaluations and checkpoints every k steps.

The state after step k is a function of (config, k): what a step sees depends on (seed, step) only, so
a run that is stopped and started again ends with the same bits as one that never stopped.
"""

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bn_jax import evaluate, experiment, preempt, record
from bn_jax import mesh as meshes
from bn_jax import step as steps
from bn_jax.checkpoint import Checkpoints
from bn_jax.errors import DivergedError, Preempted
from bn_jax.experiment import Experiment


def run(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains `config` in `workdir`, or goes on where an earlier run of it stopped.

    Returns the last evaluation's scores. Raises ConfigError before anything is compiled or written,
    DivergedError, Preempted and the other errors of `bn_jax.errors` as they come.
    """
    exp = experiment.build(config)
    with record.open_workdir(workdir, exp.config.to_dict()) as records:
        checkpoints = Checkpoints(
            workdir / "checkpoints", keep_last=exp.config.keep_last, keep_best=exp.config.keep_best
        )
        with checkpoints, preempt.Signals() as signals:
            return Loop(exp, records, checkpoints, signals).run()


def steps_per_dispatch(config: ConfigDict) -> int:
    """Steps in one compiled program: every interval and the end must fall between two programs."""
    intervals = [config.eval_every, config.checkpoint_every, config.total_steps]
    if config.record.activations:
        intervals.append(config.record.activation_every)
    return math.gcd(config.steps_per_dispatch, *intervals) if config.steps_per_dispatch > 1 else 1


def compile_step(exp: Experiment, dispatch: int):
    """The jitted training step: (state, *fed, hyper, key) -> (state, metrics with axis [K])."""
    model, everywhere = exp.model, meshes.replicated(exp.mesh)

    def one(state, batch, hyper, key):
        state, metrics = steps.train_step(state, batch, hyper, key, model=model)
        return state, jax.tree.map(lambda m: m[None], metrics)

    def many(state, images, labels, indices, hyper, key):
        return steps.train_steps(state, images, labels, indices, hyper, key, model=model)

    batch = meshes.along_batch(exp.mesh)
    resident = (everywhere, everywhere, meshes.along_batch(exp.mesh, axis=1))
    return jax.jit(
        one if dispatch == 1 else many,
        in_shardings=(everywhere, *((batch,) if dispatch == 1 else resident), everywhere, everywhere),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def feed(exp: Experiment, start: int, dispatch: int) -> Iterator[tuple]:
    """The arguments of each dispatch from step `start` on, already on the devices."""
    config, mesh, data = exp.config, exp.mesh, exp.data
    if dispatch == 1:
        rows = meshes.rows(mesh, config.batch_size)
        for batch in data.train(start, config.total_steps, config.batch_size, rows, seed=config.seed):
            yield (meshes.put_batch(mesh, batch, config.batch_size),)
        return
    images, labels = meshes.put_replicated(mesh, data.resident())
    for first in range(start, config.total_steps, dispatch):
        order = [
            data.train_indices(step, config.batch_size, seed=config.seed)
            for step in range(first, first + dispatch)
        ]
        yield images, labels, meshes.put_replicated(mesh, np.stack(order).astype(np.int32))


class Loop:
    """One attempt at a run: from the newest checkpoint, or the start, to the last step."""

    def __init__(self, exp: Experiment, records, checkpoints: Checkpoints, signals):
        self.exp, self.records = exp, records
        self.checkpoints, self.signals = checkpoints, signals
        self.evaluator = evaluate.Evaluator(exp)
        self.taps = activations.Taps(exp) if exp.config.record.activations else None
        self.scores: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the last evaluation's scores."""
        config = self.exp.config
        dispatch = steps_per_dispatch(config)
        with self.records.timed("startup"):
            step, state = self.start()
        train_step = compile_step(self.exp, dispatch)
        hyper, key = meshes.put_replicated(self.exp.mesh, self.exp.hyper), self.exp.key
        if step == 0:
            self.record_activations(step, state)
        pending = None  # metrics are read while the next step runs
        batches = feed(self.exp, step, dispatch)
        while step < config.total_steps:
            with self.records.timed("input"):
                fed = next(batches)
            with self.records.timed("step"):
                state, metrics = train_step(state, *fed, hyper, key)
                self.report(pending)
            step, pending = step + dispatch, (step, metrics)
            stopping = self.signals.stop_at(step)
            if stopping or self.due(step):
                self.report(pending)
                pending = None
                self.at_interval(step, state, stopping)
        self.checkpoints.wait()
        return self.scores

    def start(self) -> tuple[int, steps.TrainState]:
        """The state to go on from: the newest good checkpoint's, or a new one."""
        exp, everywhere = self.exp, meshes.replicated(self.exp.mesh)
        config = exp.config
        init = functools.partial(
            steps.init_state, exp.model, config.seed, exp.data.image_shape
        )
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
            jax.eval_shape(init),
        )
        found = self.checkpoints.restore(like)
        if found is None:
            self.records.begin(0)
            return 0, jax.jit(init, out_shardings=everywhere)()
        step, state, meta = found
        self.scores = meta["scores"]
        self.records.begin(step)
        return step, state
