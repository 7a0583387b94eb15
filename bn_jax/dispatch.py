"""What one call of the device does: one step on a batch that is fed, or many on resident data."""

import contextvars
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bn_jax import mesh as meshes
from bn_jax import programs, reproducible
from bn_jax import step as steps
from bn_jax.experiment import Experiment, abstract_state

FEW = 5  # steps in a program of several processes: over a slow network 0.16 s each


def steps_per_dispatch(config: ConfigDict, start: int = 0) -> int:
    """Steps in one compiled program of a run that begins, or goes on, after step `start`.

    Every interval and the end must fall between two programs. Several processes take few steps at a
    time: a request to stop waits for two programs, and each step waits for the network.
    """
    intervals = [config.eval_every, config.checkpoint_every, config.total_steps, start]
    if config.record.activations:
        intervals.append(config.record.activation_every)
    fits = math.gcd(config.steps_per_dispatch, *intervals) if config.steps_per_dispatch > 1 else 1
    most = fits if jax.process_count() == 1 else FEW
    return max(k for k in range(1, min(fits, most) + 1) if fits % k == 0)


def check_devices(exp: Experiment) -> None:
    """Raises ConfigError for a number of devices that the config cannot be trained on."""
    if exp.config.reproducible:
        reproducible.check_devices(exp.config, exp.mesh.size)


def training_step(exp: Experiment, dispatch: int) -> tuple[Callable, dict[str, Any]]:
    """The training step: (state, *fed, hyper, seed) -> (state, metrics with axis [K]), and its
    shardings as `jax.jit` takes them."""
    model, everywhere = exp.model, meshes.replicated(exp.mesh)

    def one(state, batch, hyper, seed):
        state, metrics = steps.train_step(state, batch, hyper, seed, model=model)
        return state, jax.tree.map(lambda m: m[None], metrics)

    def many(state, images, labels, indices, hyper, seed):
        return steps.train_steps(state, images, labels, indices, hyper, seed, model=model)

    batch = meshes.along_batch(exp.mesh)
    resident = (everywhere, everywhere, meshes.along_batch(exp.mesh, axis=1))
    fed = (batch,) if dispatch == 1 else resident
    shardings = {
        "in_shardings": (everywhere, *fed, everywhere, everywhere),
        "out_shardings": everywhere,
    }
    return one if dispatch == 1 else many, shardings


def compile_step(exp: Experiment, dispatch: int, *arguments: Any) -> Any:
    """The training step, compiled for these arguments; the state that it is called with is donated.

    Not only jax's cache of what is compiled is used: see `programs`.
    """
    if exp.config.reproducible:
        return reproducible.Step(exp).lower(*arguments).compile()
    function, shardings = training_step(exp, dispatch)
    config = exp.config.to_dict()
    return programs.compiled("train", function, arguments, config, donate_argnums=(0,), **shardings)


class Prepared:
    """What the first dispatch of a run from step `start` on needs, begun in other threads.

    rest: the dispatch's last arguments, hyper-parameters and seed. beside: also called in a thread.
    """

    def __init__(self, exp: Experiment, start: int, dispatch: int, beside: Callable[[], None]):
        self._feed = feed(exp, start, dispatch)
        self._first: Any = next(self._feed)
        rest = (exp.hyper, np.uint32(exp.config.seed))
        self.rest = tuple(meshes.put_replicated(exp.mesh, tree) for tree in rest)
        arguments = (exp, dispatch, abstract_state(exp), *self._first, *self.rest)
        alone = jax.default_backend() == "gpu"  # there XLA times kernels as it compiles
        threads, copy = ThreadPoolExecutor(1 if alone else 2), contextvars.copy_context  # ops.plain
        self._program = threads.submit(copy().run, compile_step, *arguments)
        self._beside = threads.submit(copy().run, beside)
        threads.shutdown(wait=False)
        if alone:
            self._program.result()

    def program(self) -> Any:
        """The compiled training step, when all that was begun is ready; or the error it met."""
        self._beside.result()
        return self._program.result()

    def batches(self) -> Iterator[tuple]:
        """As `feed` gives them."""
        first, self._first = self._first, None
        yield first
        yield from self._feed


def feed(exp: Experiment, start: int, dispatch: int) -> Iterator[tuple]:
    """The arguments of each dispatch from step `start` on, already on the devices."""
    mesh, data, seed = exp.mesh, exp.data, exp.config.seed
    size, total = exp.config.batch_size, exp.config.total_steps
    if dispatch == 1:
        for batch in data.train(start, total, size, meshes.rows(mesh, size), seed=seed):
            yield (meshes.put_batch(mesh, batch, size),)
        return
    images, labels = meshes.put_replicated(mesh, data.resident())
    for first in range(start, total, dispatch):
        order = [data.train_indices(k, size, seed=seed) for k in range(first, first + dispatch)]
        yield images, labels, meshes.put(meshes.along_batch(mesh, axis=1), np.stack(order))
