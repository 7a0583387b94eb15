"""The training loop: it takes steps, and records, evaluates and saves every so many of them.

The state after step k is a function of (config, k), because the data of a step depend only on
(seed, step). So a run that is stopped and resumed ends with the same bits as one that never
stopped: on CPU always, on GPUs with `deterministic`.
"""

import contextvars
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from bn_jax.activations import RecordedActivations
from bn_jax.distributed import accelerators, preempt, watchdog
from bn_jax.distributed.mesh import (
    along_batch,
    put,
    put_batch,
    put_replicated,
    replicated,
    rows,
    wait_for_all,
)
from bn_jax.distributed.watchdog import Watchdog
from bn_jax.errors import ConfigError, DivergedError, Preempted
from bn_jax.experiment import build, evaluator, programs, reproducible
from bn_jax.experiment.build import Experiment, abstract_state
from bn_jax.experiment.evaluator import running_gap
from bn_jax.step import TrainState, as_words, train_step, train_steps
from bn_jax.workdir import guard, recorder
from bn_jax.workdir.checkpoint import Checkpoints
from bn_jax.workdir.reader import read_record


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    watch: Watchdog | None = None,
    draw: Callable[[pathlib.Path], Any] | None = None,
) -> dict[str, Any]:
    """Trains `config` in `workdir`, or resumes an earlier run of it there.

    Programs are compiled in other threads. Context managers of jax around this call, such as
    `jax.enable_x64(True)`, have no effect there; jax.config and the environment have.

    Args:
      watch: watches the loop and the other processes; the caller has entered it. By default nothing
        is watched.
      draw: called with `workdir` at the end, on process 0.

    Returns:
      The last evaluation's scores `top1`, `top5` (shares), `cross_entropy` (nats) and `examples`.

    Raises:
      ConfigError: the config, the data or the workdir cannot be used; nothing is compiled or
        written then.
      UserError: another error of `bn_jax.errors`, such as DivergedError or Preempted.
    """
    begun = guard.as_begun(config, workdir)
    older = begun.to_dict() != config.to_dict()
    exp = build.build(begun)
    config = exp.config
    recorded = RecordedActivations(exp)
    watch = watch or Watchdog()  # does nothing, because it is not entered

    info = build.describe(exp)
    if jax.process_index() == 0:
        print(accelerators.sentence(info["mesh"]), flush=True)
    info["data"]["digest"] = exp.data.digest()
    records = recorder.open_workdir(workdir, config.to_dict(), **info)
    saved = Checkpoints(
        workdir / "checkpoints",
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        keep_every=config.keep_every,
    )
    with records, saved as checkpoints, watchdog.reporting_lost_processes():
        if older:
            records.say(
                f"{workdir} was begun with an older version: its initial weights and the decay of "
                "its rate stay as they were"
            )
        loop = Loop(exp, recorded, records, checkpoints)
        watch.follow(loop.place, loop.abandon)
        step, state = loop.start()
        with preempt.Signals(step, loop.dispatch) as signals:
            try:
                scores = loop.run(step, state, signals)
            finally:
                loop.evaluator.cancel()
        if draw is not None and jax.process_index() == 0:
            with records.timed("figures"):
                draw(workdir)
        records.finish("done", **scores)
    return scores


# After so many dispatches `Loop.say_days` reports how fast a CPU is; the first one is not timed.
FIRST_DISPATCHES = 3


class Loop:
    """One attempt at a run: from the newest checkpoint, or from the start, to the last step.

    Attributes:
      dispatch: the number of steps in one call of the device (`steps_per_dispatch`).
      begun: the last step of the latest dispatch that has begun.
      scores: the last evaluation's scores, with its `step`.
    """

    def __init__(
        self,
        exp: Experiment,
        recorded: RecordedActivations,
        records: recorder.Recorder,
        checkpoints: Checkpoints,
    ):
        self.exp = exp
        self.recorded = recorded
        self.records = records
        self.checkpoints = checkpoints
        self.evaluator = evaluator.Evaluator(exp)

        self.dispatch = 1  # known once `start` has found the first step
        self.begun = -1
        self.dispatches = watchdog.Dispatches()
        self.stopping = False  # whether a signal stops the run after the present dispatch
        self.saved_at = 0.0  # seconds of training before the last save
        self.saved_clock = -math.inf  # time.monotonic() at the last save
        self.scores: dict[str, Any] = {}
        self.prepared: Prepared  # made by `prepare`

        # (every how many steps, what follows such a step). The order matters: in metrics.jsonl the
        # activations of a step come before its evaluation, and the checkpoint comes last, because a
        # checkpoint of step k promises that all lines of step k are written.
        every = exp.config
        self.events: list[tuple[int, Callable[[int, TrainState], None]]] = [
            (every.record.activation_every, self.record_activations),
            (every.eval_every, self.evaluate),
            (every.checkpoint_every, self.save),
        ]
        dispatch = steps_per_dispatch(exp.config)
        self.early = early_evaluations(every.eval_early, every.eval_every, dispatch)
        self.scores_test = every.eval_test and exp.data.test is not None

    def start(self) -> tuple[int, TrainState]:
        """Returns the step and state to train from: of the newest good checkpoint, or new ones."""
        with self.records.timed("startup"):
            found = self.checkpoints.restore(build.abstract_state(self.exp))
            if found is not None:
                step, state, meta = found
                self.resume(step, meta["scores"])
                return step, state

        self.dispatch = steps_per_dispatch(self.exp.config)
        self.records.begin(0)
        self.prepare(0)
        with self.records.timed("compile"):
            return 0, build.create_state(self.exp)

    def resume(self, step: int, scores: dict[str, Any]) -> None:
        """Resumes after `step`. Raises ConfigError if the run is to be shorter than that."""
        total = self.exp.config.total_steps
        workdir = self.records.workdir
        if step > total:
            raise ConfigError(
                f"total_steps={total}, but {workdir} is already at step {step}: "
                "choose at least that, or another --workdir"
            )

        self.scores = scores
        self.dispatch = steps_per_dispatch(self.exp.config, step)
        before = read_record(workdir)
        if step == total and before is not None and before["status"] == "done":
            self.records.keep_place()
            return  # nothing is left to do, and the other records stay as they are

        self.records.begin(step)
        self.records.say(f"resumed from step {step:,}")
        if step < total:
            self.prepare(step)

    def prepare(self, step: int) -> None:
        """Starts compiling what the dispatch after `step` needs, in other threads."""
        exp = self.exp
        data = self.exp.data
        leaves = jax.tree.leaves(build.abstract_state(exp).params)
        size = sum(leaf.size for leaf in leaves)
        self.records.say(
            f"{exp.config.name}: {size:,} parameters, {data.num_train:,} training examples; "
            "compiling ..."
        )
        with self.records.timed("input"):
            self.prepared = Prepared(exp, step, self.dispatch, self.recorded.compile)

    def run(self, step: int, state: TrainState, signals: preempt.Signals) -> dict[str, Any]:
        """Trains from `step` to the end and returns the last evaluation's scores."""
        if step < self.exp.config.total_steps:
            self.train(step, state, signals)
        with self.records.timed("save"):
            self.checkpoints.wait()

        data = self.exp.data
        accuracy = evaluator.sentence(data.split, self.scores)
        if "test" in self.scores:
            tested = evaluator.sentence(data.test_split, self.scores["test"])
            accuracy = f"{tested}; {accuracy}"
        self.records.say(f"done: {accuracy}; {data.description}")
        return self.scores

    def train(self, start: int, state: TrainState, signals: preempt.Signals) -> None:
        """Takes the steps after `start`. Raises Preempted if a signal stops the run."""
        records = self.records
        size = self.dispatch
        total = self.exp.config.total_steps

        with records.timed("compile"):
            take_step = self.prepared.program()
        if start == 0:
            self.record_activations(0, state)
        with records.timed("compile"):
            self.evaluator.begin()  # its programs are compiled during the first steps
            # Otherwise a process would wait in its first step for another that still compiles, and
            # the watchdog would take that for a stall.
            wait_for_all("compiled")

        batches = self.prepared.batches()
        pending = None  # the last dispatch, until its metrics are reported
        for step in range(start + size, total + 1, size):  # the last step of each dispatch
            with records.timed("input"):
                fed = next(batches)
            self.begun = step
            with records.timed("step"):
                state, metrics = take_step(state, *fed, *self.prepared.rest)
                # Metrics are fetched one dispatch late, while the device works on the next one.
                self.report(pending)
            pending = step, metrics

            # If a save or a compilation in another thread has failed, the run ends now.
            self.checkpoints.check()
            self.evaluator.check()

            self.stopping = signals.stop_at(step)
            due = self.due(step)
            if due:
                with records.timed("step"):
                    self.report(pending)  # the lines of this step come before those of its events
                pending = None
            for event in due:
                event(step, state)
            if self.stopping and step < total:
                self.stop(step, signals.reason)
            if due:
                # Only process 0 writes. The others wait for it here and not in their next step.
                with records.timed("save"):
                    wait_for_all("saved")

    def due(self, step: int) -> list[Callable[[int, TrainState], None]]:
        """Returns the events that follow `step`, in order; after the last step they are all."""
        last = step == self.exp.config.total_steps
        due = []
        for every, event in self.events:
            early = event == self.evaluate and step in self.early
            if last or early or step % every == 0:
                due.append(event)
        if self.stopping and self.save not in due:
            due.append(self.save)
        return due

    def report(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Writes the metrics of a finished dispatch. Raises DivergedError if one is not finite."""
        if pending is None:
            return
        config = self.exp.config
        last, on_device = pending
        metrics = jax.device_get(on_device)
        _, seconds = self.records.at()
        self.dispatches.finished(seconds)

        squares = metrics.pop("gradient_square")
        metrics["gradient_norm"] = np.sqrt(np.sum(squares, axis=-1))
        first = last - self.dispatch + 1
        for i, step in enumerate(range(first, last + 1)):
            line = {name: float(values[i]) for name, values in metrics.items()}
            if not (np.isfinite(line["loss"]) and np.all(np.isfinite(squares[i]))):
                leaves = leaf_names(self.exp)
                forward = forward_order(self.exp)
                raise diverged_error(step, line["loss"], squares[i], leaves, forward)
            if step % config.log_every == 0 or step == config.total_steps:
                self.records.write("train", step, **line)

        examples = self.dispatch * config.batch_size
        self.records.progress(last, float(metrics["loss"][-1]), examples)
        if self.dispatches.count == FIRST_DISPATCHES:
            self.say_days(last)

    def say_days(self, step: int) -> None:
        """Says, if a network of the paper's size runs on a CPU, how long the rest will take."""
        config = self.exp.config
        platform = jax.default_backend()
        seconds = self.dispatches.mean() / self.dispatch
        text = accelerators.days_on_cpu(config, platform, config.total_steps - step, seconds)
        if text:
            self.records.say(text)

    # The events.

    def record_activations(self, step: int, state: TrainState) -> None:
        """Writes the percentiles of the chosen activations."""
        if not self.recorded.paths:
            return
        with self.records.timed("evaluate"):
            for layer, values in self.recorded.percentiles(state).items():
                self.records.write("activation", step, layer=layer, **values)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Scores the state with population statistics."""
        with self.records.timed("compile"):
            self.evaluator.check(wait=True)
        with self.records.timed("evaluate"):
            population = self.evaluator.population(state.params, state.batch_stats)
            scores = self.evaluator.scores(state.params, population)

        line = dict(scores)
        if state.batch_stats:
            epsilon = self.exp.config.bn.epsilon
            line["running_gap"] = running_gap(state.batch_stats, population, epsilon)
        self.scores = {"step": step, **scores}
        self.records.write("eval", step, **line)
        self.records.say(f"step {step:,}: {evaluator.sentence(self.exp.data.split, scores)}")
        if step == self.exp.config.total_steps and self.scores_test:
            self.score_test(step, state, population)

    def score_test(self, step: int, state: TrainState, population: Any) -> None:
        """Scores the test split once, at the end; until then it is not used."""
        with self.records.timed("evaluate"):
            scores = self.evaluator.scores(state.params, population, self.exp.data.tested())
        self.scores["test"] = scores
        self.records.write("test", step, **scores)

    def save(self, step: int, state: TrainState) -> None:
        """Saves a checkpoint; if that takes long, the next steps run meanwhile."""
        if self.too_soon(step):
            return
        self.saved_clock = time.monotonic()
        with self.records.timed("save"):
            self.records.sync()
            metric = self.scores["top1"] if self.scores.get("step") == step else None
            self.checkpoints.save(step, state, metric=metric, meta={"scores": self.scores})

            # A quick save is waited for, so that a kill costs no more than one interval. It is
            # quick if it takes at most this share of the training time since the previous save.
            before = self.saved_at
            _, self.saved_at = self.records.at()
            share = self.exp.config.checkpoint_wait
            self.checkpoints.settle(share * (self.saved_at - before))
            self.checkpoints.check()

    def too_soon(self, step: int) -> bool:
        """Whether to leave out a save: `write_seconds` have not passed, and `step` may go unsaved.

        Each process decides by its own clock, since only process 0 writes, and none waits here.
        """
        config = self.exp.config
        kept = config.keep_every and step % config.keep_every == 0
        if self.stopping or kept or step == config.total_steps:
            return False
        return time.monotonic() - self.saved_clock < config.write_seconds

    def stop(self, step: int, reason: str) -> None:
        """Raises Preempted, which ends a run that was asked to stop, once its save is on disk."""
        with self.records.timed("save"):
            self.checkpoints.wait()
        raise Preempted(
            f"stopped by {reason} after step {step:,}, "
            "which is saved: the same command resumes there"
        )

    # For the watchdog.

    def place(self) -> watchdog.Place:
        """Returns where the loop is, for `Watchdog.follow`."""
        phase, _ = self.records.at()
        return watchdog.Place(self.begun, phase, self.dispatches.slowest())

    def abandon(self, error: BaseException) -> None:
        """Completes the records when the loop is stuck, and a save under way if it is quick."""
        self.checkpoints.settle(3.0)
        self.records.fail(error)


# One call of the device: a single step on a batch that is fed, or many on data that stay on it.


FEW = 5  # steps in a program of several processes, which take 0.16 s each over a slow network


def steps_per_dispatch(config: ConfigDict, start: int = 0) -> int:
    """Returns the number of steps in one program of a run that begins, or resumes, after `start`.

    Every interval, and the last step, must end with a program. Several processes take few steps at
    a time, because a request to stop waits for two programs, and each step waits for the network.
    """
    if config.steps_per_dispatch == 1:
        return 1

    intervals = [config.eval_every, config.checkpoint_every, config.total_steps, start]
    if config.record.activations:
        intervals.append(config.record.activation_every)
    fits = math.gcd(config.steps_per_dispatch, *intervals)
    most = fits if jax.process_count() == 1 else min(fits, FEW)
    divisors = [steps for steps in range(1, most + 1) if fits % steps == 0]
    return max(divisors)


def training_step(exp: Experiment, dispatch: int) -> tuple[Callable, Callable]:
    """Returns the training step, and `jax.jit` with its shardings.

    The step maps (state, *fed, hyper, seed) to (state, metrics [dispatch, ...]). The state and all
    numbers are replicated, and batches are split over the devices. The state that is passed in is
    donated: its memory is used again.
    """
    everywhere = replicated(exp.mesh)
    batch = along_batch(exp.mesh)

    def one(state, batch, hyper, seed):
        state, metrics = train_step(state, batch, hyper, seed, model=exp.model)
        return state, jax.tree.map(lambda metric: metric[None], metrics)

    def many(state, images, labels, indices, hyper, seed):
        return train_steps(
            state,
            images,
            labels,
            indices,
            hyper,
            seed,
            model=exp.model,
            image_shape=exp.data.image_shape,
        )

    if dispatch == 1:
        function: Callable = one
        fed: tuple[Any, ...] = (batch,)
    else:
        function = many
        fed = (everywhere, everywhere, along_batch(exp.mesh, axis=1))
    jit = functools.partial(
        jax.jit,
        in_shardings=(everywhere, *fed, everywhere, everywhere),
        out_shardings=everywhere,
        donate_argnums=0,
    )
    return function, jit


def compile_step(exp: Experiment, dispatch: int, *arguments: Any) -> Callable:
    """Compiles the training step for these arguments, or for their shapes."""
    if exp.config.reproducible:
        return reproducible.Step(exp).lower(*arguments).compile()
    function, jit = training_step(exp, dispatch)
    return programs.compiled(
        "train",
        function,
        arguments,
        exp.config.to_dict(),
        jit=jit,
        made_from=exp.data.image_shape,
    )


class Prepared:
    """What a run's first dispatch after step `start` needs; other threads prepare it.

    rest: the last arguments of every dispatch, which are the optimizer's numbers and the seed.
    beside: also called in a thread.
    """

    def __init__(self, exp: Experiment, start: int, dispatch: int, beside: Callable[[], None]):
        self._feed = feed(exp, start, dispatch)
        self._first: Any = next(self._feed)
        self.rest = put_replicated(exp.mesh, (exp.hyper, np.uint32(exp.config.seed)))

        arguments = (exp, dispatch, abstract_state(exp), *self._first, *self.rest)
        alone = jax.default_backend() == "gpu"  # XLA times kernels there while it compiles
        threads = ThreadPoolExecutor(1 if alone else 2)
        copy = contextvars.copy_context  # keeps what `ops.plain` has set
        self._program = threads.submit(copy().run, compile_step, *arguments)
        self._beside = threads.submit(copy().run, beside)
        threads.shutdown(wait=False)
        if alone:
            self._program.result()

    def program(self) -> Callable:
        """Waits for all that was begun, raises its errors, and returns the compiled step."""
        self._beside.result()
        return self._program.result()

    def batches(self) -> Iterator[tuple]:
        """Yields the arguments of each dispatch, as `feed` does."""
        first = self._first
        self._first = None
        yield first
        yield from self._feed


def feed(exp: Experiment, start: int, dispatch: int) -> Iterator[tuple]:
    """Yields the arguments of each dispatch after step `start`, already on the devices."""
    mesh = exp.mesh
    data = exp.data
    seed = exp.config.seed
    size = exp.config.batch_size
    total = exp.config.total_steps

    if dispatch == 1:
        for batch in data.train(start, total, size, rows(mesh, size), seed=seed):
            yield (put_batch(mesh, batch, size),)
        return

    images, labels = data.resident()
    images, labels = put_replicated(mesh, (as_words(images), labels))
    by_step = along_batch(mesh, axis=1)
    for first in range(start, total, dispatch):
        steps = range(first, first + dispatch)
        order = [data.train_indices(step, size, seed=seed) for step in steps]
        yield images, labels, put(by_step, np.stack(order))


def early_evaluations(first: int, every: int, dispatch: int = 1) -> frozenset[int]:
    """Returns the steps of early evaluations, which come before those after `every` steps.

    The first is after step `first`, and each further one a tenth later, until a tenth is `every`
    steps. So the step at which a level is reached is known to a tenth of it. Each is rounded up to
    the end of a program of `dispatch` steps. If `first` is 0, there are none.
    """
    steps = set()
    step = first
    while 0 < step < 10 * every:
        steps.add(math.ceil(step / dispatch) * dispatch)
        step += max(1, step // 10)
    return frozenset(steps)


# For a loss or gradient that is not finite: at which step, and where in the network it begins.


def forward_order(exp: Experiment) -> list[str]:
    """Returns the paths of the parameters ('dense_0/dense/kernel') in the forward pass's order."""
    names: list[str] = []

    def initial():
        # jax has not sorted the keys yet: parameters are in the order in which they were made.
        state = build.initial_state(exp)
        names.extend(traverse_util.flatten_dict(state.params, sep="/"))
        return state

    jax.eval_shape(initial)
    return names


def leaf_names(exp: Experiment) -> list[str]:
    """Returns the paths of the parameters in the tree's order, which `gradient_square` has."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_state(exp).params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def diverged_error(
    step: int,
    loss: float,
    squares: np.ndarray,
    leaves: Sequence[str],
    forward: Sequence[str],
) -> DivergedError:
    """Makes the error that ends a run that has diverged.

    squares: [parameters], sums of squares of the gradients, in the order of `leaves` (the tree's).
    forward: the same paths in the order of the forward pass; the message names the first of them
    whose gradient is not finite.
    """
    pairs = zip(leaves, squares, strict=True)
    bad = {name for name, square in pairs if not np.isfinite(square)}

    where = ""
    in_order = [name for name in forward if name in bad]
    if in_order:
        first = in_order[0]
        layer, _, _ = first.rpartition("/")
        where = f": first in {layer or first} ({first})"
    return DivergedError(
        f"diverged at step {step:,}: loss {loss}, gradient not finite in {len(bad)} of "
        f"{len(leaves)} parameters{where}; the records and the last finite checkpoint are kept"
    )
