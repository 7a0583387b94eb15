"""The training loop: batches in, steps out; records, evaluations and checkpoints every k steps.

The state after step k is a function of (config, k): what a step sees depends on (seed, step) only,
so a run that is stopped and started again ends with the same bits as one that never stopped.
"""

import contextvars
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from bn_jax import step
from bn_jax.activations import Taps
from bn_jax.distributed import preempt, watchdog
from bn_jax.distributed.mesh import along_batch, put, put_batch, put_replicated, replicated, rows
from bn_jax.distributed.watchdog import Watchdog
from bn_jax.errors import ConfigError, DivergedError, Preempted
from bn_jax.experiment import build, evaluator, programs, reproducible
from bn_jax.experiment.build import Experiment, abstract_state
from bn_jax.experiment.evaluator import running_gap
from bn_jax.step import TrainState
from bn_jax.workdir import checkpoint, recorder
from bn_jax.workdir.checkpoint import Checkpoints
from bn_jax.workdir.reader import read_record


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    watch: Watchdog | None = None,
    draw: Callable[[pathlib.Path], Any] | None = None,
) -> dict[str, Any]:
    """Trains `config` in `workdir`, or goes on where an earlier run of it stopped.

    watch: over the other processes, entered. draw: called with `workdir` at the end, on process 0.
    Threads compile: jax's context managers around this call (`jax.enable_x64(True)`, ...) do not
    reach them, jax.config and the environment do.

    Returns the last evaluation's scores. Raises ConfigError before anything is compiled or written,
    DivergedError, Preempted and the other errors of `bn_jax.errors` as they come.
    """
    exp = build.build(config)
    check_devices(exp)
    config, taps = exp.config, Taps(exp)
    watch = watch or Watchdog()  # not entered, it does nothing
    info = build.describe(exp)
    info["data"]["digest"] = exp.data.digest()
    records = recorder.open_workdir(workdir, config.to_dict(), **info)
    keep = {"keep_last": config.keep_last, "keep_best": config.keep_best}
    with records, Checkpoints(workdir / "checkpoints", **keep) as checkpoints, watch.blaming():
        loop = Loop(exp, taps, records, checkpoints)
        watch.follow(loop.place, loop.abandon)
        step, state = loop.start()
        with preempt.Signals(loop.dispatch) as signals:
            try:
                scores = loop.run(step, state, signals)
            finally:
                loop.evaluator.cancel()
        if draw is not None and jax.process_index() == 0:
            with records.timed("figures"):
                draw(workdir)
        records.finish("done", **scores)
    return scores


class Loop:
    """One attempt at a run: from the newest checkpoint, or the start, to the last step."""

    def __init__(
        self,
        exp: Experiment,
        taps: Taps,
        records: recorder.Recorder,
        checkpoints: Checkpoints,
    ):
        self.exp, self.taps, self.records = exp, taps, records
        self.checkpoints = checkpoints
        self.evaluator = evaluator.Evaluator(exp)
        self.dispatch, self.saved = 1, 0.0  # steps, see `start`; seconds trained before a save
        self.begun, self.taken = -1, watchdog.Dispatches()  # last step begun; how long steps take
        self.prepared: Prepared  # see `prepare`
        self.scores: dict[str, Any] = {}

    def run(self, step: int, state: TrainState, signals: preempt.Signals) -> dict[str, Any]:
        """Trains from `step` to the end and returns the last evaluation's scores."""
        exp, records = self.exp, self.records
        if step < exp.config.total_steps:
            self.train(step, state, signals)
        with records.timed("save"):
            self.checkpoints.wait()
        self.records.say(f"done: {evaluator.sentence(exp, self.scores)}; {exp.data.description}")
        return self.scores

    def place(self) -> tuple[int, str, float | None]:
        """Where the loop is, for `Watchdog.follow`."""
        return self.begun, self.records.at()[0], self.taken.slowest()

    def abandon(self, error: BaseException) -> None:
        """Leaves whole records, and a save under way if it is quick, when the loop is stuck."""
        self.checkpoints.settle(3.0)
        self.records.fail(error)

    def start(self) -> tuple[int, TrainState]:
        """The state to go on from: the newest good checkpoint's, or a new one."""
        exp = self.exp
        with self.records.timed("startup"):
            found = self.checkpoints.restore(build.abstract_state(exp))
            if found is not None:
                step, state, meta = found
                self.resume(step, meta["scores"])
                return step, state
        self.dispatch = steps_per_dispatch(exp.config)
        self.records.begin(0)
        self.prepare(0)
        with self.records.timed("compile"):
            state = build.create_state(exp)
        return 0, state

    def resume(self, step: int, scores: dict[str, Any]) -> None:
        """Goes on after `step`. Raises ConfigError if the run is to be shorter than that."""
        total, workdir = self.exp.config.total_steps, self.records.workdir
        if step > total:
            raise ConfigError(
                f"total_steps={total}, but {workdir} has gone to step {step}: "
                "choose at least that, or another --workdir"
            )
        self.scores = scores
        self.dispatch = steps_per_dispatch(self.exp.config, step)
        before = read_record(workdir)
        if step == total and before is not None and before["status"] == "done":
            return  # nothing to add: the record stays as it is
        self.records.begin(step)
        self.records.say(f"resumed from step {step:,}")
        if step < total:
            self.prepare(step)

    def prepare(self, step: int) -> None:
        """Begins to compile what the dispatch after `step` needs; a new state is made meanwhile."""
        exp, data = self.exp, self.exp.data
        size = sum(leaf.size for leaf in jax.tree.leaves(build.abstract_state(exp).params))
        self.records.say(
            f"{exp.config.name}: {size:,} parameters, {data.num_train:,} training examples, "
            f"{exp.mesh.size} x {exp.mesh.devices.flat[0].device_kind}; compiling ..."
        )
        with self.records.timed("input"):
            self.prepared = Prepared(exp, step, self.dispatch, self.taps.compile)

    def train(self, step: int, state: TrainState, signals: preempt.Signals) -> None:
        """Takes the steps from `step` to the last one."""
        exp, records = self.exp, self.records
        total, dispatch = exp.config.total_steps, self.dispatch
        with records.timed("compile"):
            train_step, pending = self.prepared.program(), None
        if step == 0:
            self.record_activations(0, state)
        with records.timed("compile"):
            self.evaluator.begin()
        batches = self.prepared.batches()
        while step < total:
            with records.timed("input"):
                fed = next(batches)
            self.begun = step + dispatch
            with records.timed("step"):
                state, metrics = train_step(state, *fed, *self.prepared.rest)
                self.report(pending)  # while the next step runs
            # What failed meanwhile, a disk or a compilation: now, not at the next interval.
            self.checkpoints.check()
            self.evaluator.check()
            step += dispatch
            pending = (step, metrics)
            stopping = signals.stop_at(step)
            if stopping or self.due(step):
                with records.timed("step"):
                    self.report(pending)
                pending = None
                self.at_interval(step, state, stopping, signals.reason)
        assert step == total

    def due(self, step: int) -> bool:
        """Whether something but a training line is to be written after `step`."""
        config = self.exp.config
        intervals = (config.eval_every, config.checkpoint_every, config.record.activation_every)
        return step == config.total_steps or any(step % every == 0 for every in intervals)

    def at_interval(self, step: int, state: TrainState, stopping: bool, reason: str) -> None:
        """Activations, evaluation and checkpoint, in this order: a checkpoint of step k vouches for
        all lines of step k. Raises Preempted if the run is to stop here."""
        config, last = self.exp.config, step == self.exp.config.total_steps
        if last or step % config.record.activation_every == 0:
            self.record_activations(step, state)
        if last or step % config.eval_every == 0:
            self.evaluate(step, state)
        with self.records.timed("save"):
            if last or stopping or step % config.checkpoint_every == 0:
                self.records.sync()
                metric = self.scores["top1"] if self.scores.get("step") == step else None
                self.checkpoints.save(step, state, metric=metric, meta={"scores": self.scores})
                # On disk before the next step, if it is quick: a kill then costs one interval.
                before, self.saved = self.saved, self.records.at()[1]
                self.checkpoints.settle(config.checkpoint_wait * (self.saved - before))
            self.checkpoints.wait() if stopping else self.checkpoints.check()
        if stopping and not last:
            raise Preempted(
                f"stopped by {reason or 'another process'} after step {step:,}, "
                "which is saved: the same command goes on from there"
            )

    def report(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Writes the metrics of a finished dispatch. Raises DivergedError if one is not finite."""
        if pending is None:
            return
        last, metrics = pending[0], jax.device_get(pending[1])
        self.taken.through(self.records.at()[1])
        squares = metrics.pop("gradient_square")
        metrics["gradient_norm"] = np.sqrt(np.sum(squares, axis=-1))
        for i in range(self.dispatch):
            step = last - self.dispatch + 1 + i
            line = {name: float(values[i]) for name, values in metrics.items()}
            if not (np.isfinite(line["loss"]) and np.all(np.isfinite(squares[i]))):
                leaves, forward = leaf_names(self.exp), forward_order(self.exp)
                raise diverged_error(step, line["loss"], squares[i], leaves, forward)
            if step % self.exp.config.log_every == 0 or step == self.exp.config.total_steps:
                self.records.write("train", step, **line)
        examples = self.dispatch * self.exp.config.batch_size
        self.records.progress(last, float(metrics["loss"][-1]), examples)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Scores the state with population statistics, and says so."""
        with self.records.timed("compile"):
            self.evaluator.check(wait=True)
        with self.records.timed("evaluate"):
            population = self.evaluator.population(state.params, state.batch_stats)
            scores = self.evaluator.scores(state.params, population)
        line, stats, epsilon = dict(scores), state.batch_stats, self.exp.config.bn.epsilon
        if stats:
            line["running_gap"] = running_gap(stats, population, epsilon)
        self.scores = {"step": step, **scores}
        self.records.write("eval", step, **line)
        self.records.say(f"step {step:,}: {evaluator.sentence(self.exp, scores)}")

    def record_activations(self, step: int, state: TrainState) -> None:
        """Writes the percentiles of the chosen activations."""
        if self.taps.paths:
            with self.records.timed("evaluate"):
                for layer, values in self.taps.record(state).items():
                    self.records.write("activation", step, layer=layer, **values)


# What one call of the device does: one step on a batch that is fed, or many on resident data.


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
    model, everywhere = exp.model, replicated(exp.mesh)

    def one(state, batch, hyper, seed):
        state, metrics = step.train_step(state, batch, hyper, seed, model=model)
        return state, jax.tree.map(lambda m: m[None], metrics)

    def many(state, images, labels, indices, hyper, seed):
        return step.train_steps(state, images, labels, indices, hyper, seed, model=model)

    batch = along_batch(exp.mesh)
    resident = (everywhere, everywhere, along_batch(exp.mesh, axis=1))
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
        self.rest = tuple(put_replicated(exp.mesh, tree) for tree in rest)
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
        for batch in data.train(start, total, size, rows(mesh, size), seed=seed):
            yield (put_batch(mesh, batch, size),)
        return
    images, labels = put_replicated(mesh, data.resident())
    for first in range(start, total, dispatch):
        order = [data.train_indices(k, size, seed=seed) for k in range(first, first + dispatch)]
        yield images, labels, put(along_batch(mesh, axis=1), np.stack(order))


# A loss or gradient that is not finite: at which step, and where in the network it begins.


def forward_order(exp: Experiment) -> list[str]:
    """Paths of the parameters, 'inception_3a/1x1/conv/kernel', as the forward pass meets them."""
    names: list[str] = []

    def initial():
        # Before jax sorts the keys, parameters stand in the order in which they were made.
        state = build.initial_state(exp)
        names.extend(traverse_util.flatten_dict(state.params, sep="/"))
        return state

    jax.eval_shape(initial)
    return names


def leaf_names(exp: Experiment) -> list[str]:
    """Paths of the parameters in the order of the tree, as a step's `gradient_square` has them."""
    return checkpoint.flatten_arrays(build.abstract_state(exp).params)[0]


def diverged_error(
    step: int, loss: float, squares: np.ndarray, leaves: Sequence[str], forward: Sequence[str]
) -> DivergedError:
    """The error that ends the run.

    squares: sums of squares of the gradients [parameters], in the order of `leaves` (the tree's);
    forward: the same paths in the order of the forward pass, whose first one is named.
    """
    pairs = zip(leaves, squares, strict=True)
    bad = {name for name, square in pairs if not np.isfinite(square)}
    first = next((name for name in forward if name in bad), "")
    where = f": first in {first.rpartition('/')[0] or first} ({first})" if first else ""
    return DivergedError(
        f"diverged at step {step:,}: loss {loss}, gradient not finite in {len(bad)} of "
        f"{len(leaves)} parameters{where}; the records and the last finite checkpoint are kept"
    )
