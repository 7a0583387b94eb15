"""The training loop: batches in, steps out; records, evaluations and checkpoints every k steps.

The state after step k is a function of (config, k): what a step sees depends on (seed, step) only,
so a run that is stopped and started again ends with the same bits as one that never stopped.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bn_jax import dispatch as dispatches
from bn_jax import divergence, evaluator, experiment, fingerprint, pace, preempt, record
from bn_jax import step as steps
from bn_jax.activations import Taps
from bn_jax.checkpoint import Checkpoints
from bn_jax.errors import ConfigError, Preempted
from bn_jax.experiment import Experiment
from bn_jax.population import running_gap
from bn_jax.watchdog import Watchdog
from bn_jax.workdir import read_run


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
    exp = experiment.build(config)
    dispatches.check_devices(exp)
    config, taps = exp.config, Taps(exp)
    watch = watch or Watchdog()  # not entered, it does nothing
    info = experiment.describe(exp)
    info["data"]["digest"] = fingerprint.digest(exp.data)
    records = record.open_workdir(workdir, config.to_dict(), **info)
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
        records: record.Recorder,
        checkpoints: Checkpoints,
    ):
        self.exp, self.taps, self.records = exp, taps, records
        self.checkpoints = checkpoints
        self.evaluator = evaluator.Evaluator(exp)
        self.dispatch, self.saved = 1, 0.0  # steps, see `start`; seconds trained before a save
        self.begun, self.taken = -1, pace.Dispatches()  # last step begun; how long steps take
        self.prepared: dispatches.Prepared  # see `prepare`
        self.scores: dict[str, Any] = {}

    def run(self, step: int, state: steps.TrainState, signals: preempt.Signals) -> dict[str, Any]:
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

    def start(self) -> tuple[int, steps.TrainState]:
        """The state to go on from: the newest good checkpoint's, or a new one."""
        exp = self.exp
        with self.records.timed("startup"):
            found = self.checkpoints.restore(experiment.abstract_state(exp))
            if found is not None:
                step, state, meta = found
                self.resume(step, meta["scores"])
                return step, state
        self.dispatch = dispatches.steps_per_dispatch(exp.config)
        self.records.begin(0)
        self.prepare(0)
        with self.records.timed("compile"):
            state = experiment.create_state(exp)
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
        self.dispatch = dispatches.steps_per_dispatch(self.exp.config, step)
        before = read_run(workdir)
        if step == total and before is not None and before["status"] == "done":
            return  # nothing to add: the record stays as it is
        self.records.begin(step)
        self.records.say(f"resumed from step {step:,}")
        if step < total:
            self.prepare(step)

    def prepare(self, step: int) -> None:
        """Begins to compile what the dispatch after `step` needs; a new state is made meanwhile."""
        exp, data = self.exp, self.exp.data
        size = sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_state(exp).params))
        self.records.say(
            f"{exp.config.name}: {size:,} parameters, {data.num_train:,} training examples, "
            f"{exp.mesh.size} x {exp.mesh.devices.flat[0].device_kind}; compiling ..."
        )
        with self.records.timed("input"):
            self.prepared = dispatches.Prepared(exp, step, self.dispatch, self.taps.compile)

    def train(self, step: int, state: steps.TrainState, signals: preempt.Signals) -> None:
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

    def at_interval(self, step: int, state: steps.TrainState, stopping: bool, reason: str) -> None:
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
                leaves, forward = divergence.leaves(self.exp), divergence.forward_order(self.exp)
                raise divergence.error(step, line["loss"], squares[i], leaves, forward)
            if step % self.exp.config.log_every == 0 or step == self.exp.config.total_steps:
                self.records.write("train", step, **line)
        examples = self.dispatch * self.exp.config.batch_size
        self.records.progress(last, float(metrics["loss"][-1]), examples)

    def evaluate(self, step: int, state: steps.TrainState) -> None:
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

    def record_activations(self, step: int, state: steps.TrainState) -> None:
        """Writes the percentiles of the chosen activations."""
        if self.taps.paths:
            with self.records.timed("evaluate"):
                for layer, values in self.taps.record(state).items():
                    self.records.write("activation", step, layer=layer, **values)
