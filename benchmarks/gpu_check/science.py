"""Call 2: BN against the same network without it, on natural images of 64 px, full width.

Every run is that of a command, `python -m bn_jax.main` with the arguments that science.json lists,
in a folder as bn_jax.sweep leaves it: `python -m bn_jax.figures --workdir=RUNS` draws them. All run
in this process, one after the other, and share compiled programs and the data set, which rests on
the device: no crops, mirroring or distortion.

Stage 1: BN-x5 and BN-x5 less BN, 3 seeds each, from the same initial weights. Without BN seed 0
tries both RATES; the one with the higher last accuracy (on the same pictures) has the other seeds.
Stage 2: BN-Baseline, BN-x30, and plain Inception at BN-x5's rate.
All take the same number of steps, chosen from measured times so that all fit; below LEAST_STEPS the
networks have hardly begun to learn, and the result says so.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
import statistics
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import simplejpeg
from ml_collections import ConfigDict

from bn_jax import train
from bn_jax.data import pipeline
from bn_jax.errors import DivergedError, Preempted, UserError
from bn_jax.experiment import build, config, evaluator, programs

SEEDS = 3
RATES = ("0.0075", "0.0015")  # of BN-x5 less BN: BN-x5's own and Inception's
LEAST_STEPS = 3000
MOST_STEPS = 12_000  # as the configs' scale `folder` has it
RECORDS = ("run.json", "metrics.jsonl", "timing.jsonl")
SPARE = 0.1  # of the time is left alone: steps are not all alike


class Network(NamedTuple):
    """A network of the comparison: the folder of its runs, its experiment, what it changes."""

    name: str
    config: str
    settings: tuple[str, ...] = ()


BN = Network("bn_x5", "bn_x5")
LESS_BN = {
    rate: Network(
        f"bn_x5_less_bn/learning_rate={rate}",
        "bn_x5",
        ("name=bn_x5_less_bn", "norm=none", f"learning_rate={rate}"),
    )
    for rate in RATES
}
OTHERS = (
    Network("bn_baseline", "bn_baseline"),
    Network("bn_x30", "bn_x30"),
    Network("inception_x5", "inception_x5"),
)


class Scale(NamedTuple):
    """What a smoke run has smaller."""

    settings: tuple[str, ...]
    dispatch: int  # steps in one program
    eval_every: int  # steps, a multiple of `dispatch`; runs are as long as a multiple of it
    least: int
    most: int


FULL = Scale(("image_size=64",), 50, 500, LEAST_STEPS, MOST_STEPS)
SMOKE = Scale(
    (
        "image_size=16",
        "model.width=0.03125",
        "batch_size=8",
        "bn.group_size=8",
        "eval_batch_size=8",
        "statistics_batches=2",
    ),
    2,
    4,
    4,
    4,
)


class Run(NamedTuple):
    """One run to be made."""

    network: Network
    seed: int

    @property
    def name(self) -> str:
        """Of its folder below the others'."""
        return f"{self.network.name}/seed_{self.seed}"


class Science:
    """All runs of a call.

    Args:
      pictures: folder of train/CLASS/* and val/CLASS/*.
      runs: folder of the runs.
      out: where runs.tar.gz is kept.
      smoke: whether everything is tiny.
    """

    def __init__(
        self, pictures: pathlib.Path, runs: pathlib.Path, out: pathlib.Path, *, smoke: bool
    ):
        self.pictures = pictures
        self.runs = runs
        self.out = out
        self.scale = SMOKE if smoke else FULL
        self.smoke = smoke
        self.step_seconds: dict[str, float] = {}  # by network
        self.overhead = 0.0  # seconds of a run that are not steps
        self.steps = 0
        self.results: list[dict[str, Any]] = []
        self.best_rate = ""

    def arguments(self, run: Run, steps: int) -> list[str]:
        """The command line of a run: the experiment, then FIELD=VALUE."""
        scale = self.scale
        return [
            f"{run.network.config}:folder",
            f"data.dir={self.pictures}",
            "data.crop=1.0",
            "data.mirror=False",
            "data.distortion=0.0",
            "record.activations=()",
            "record.tensorboard=False",
            *scale.settings,
            *run.network.settings,
            f"steps_per_dispatch={scale.dispatch}",
            f"total_steps={steps}",
            f"eval_every={scale.eval_every}",
            f"checkpoint_every={steps}",
            f"log_every={scale.dispatch}",
            "keep_last=1",
            "keep_best=0",
            f"seed={run.seed}",
        ]

    def config(self, run: Run, steps: int) -> ConfigDict:
        """The config that bn_jax.main would have with these arguments."""
        file, *settings = self.arguments(run, steps)
        return config.read(file, settings)

    def experiment(self, network: Network) -> build.Experiment:
        """What a run of this network is made of."""
        return build.build(self.config(Run(network, 0), self.scale.eval_every))

    def networks(self) -> list[Network]:
        """One network for each training program: those that differ in numbers alone share it."""
        return [BN, LESS_BN[RATES[0]], OTHERS[0], OTHERS[2]]

    def compile(self, until: float) -> dict[str, Any]:
        """Compiles all programs at once, in threads. Raises TimeoutError if that takes too long."""
        start = time.monotonic()
        experiments = [self.experiment(network) for network in self.networks()]
        tasks = []
        for exp in experiments:
            tasks += [
                lambda e=exp: train.Prepared(e, 0, self.scale.dispatch, lambda: None).program(),
                evaluator.Evaluator(exp).compile,
                lambda e=exp: build.create_state(e),
            ]
        pool = concurrent.futures.ThreadPoolExecutor(len(tasks))
        futures = [pool.submit(task) for task in tasks]
        concurrent.futures.wait(futures, max(0.0, until - time.monotonic()))
        pool.shutdown(wait=False, cancel_futures=True)
        late = sum(not future.done() for future in futures)
        if late:
            raise TimeoutError(f"{late} of {len(futures)} programs not compiled in time")
        for future in futures:
            future.result()
        seconds = time.monotonic() - start
        return {
            "programs": len(futures),
            "rows": [["programs compiled", f"{len(futures)} in {seconds:.0f} s"]],
        }

    def measure(self, until: float) -> dict[str, Any]:
        """Times a step of every network, and what a run has besides steps."""
        for network in (BN, LESS_BN[RATES[0]], *OTHERS):
            self.step_seconds[network.name] = self._time_step(network)
        self.step_seconds[LESS_BN[RATES[1]].name] = self.step_seconds[LESS_BN[RATES[0]].name]

        # A short run, whole: the time beside its steps is that of every run.
        steps = self.scale.eval_every
        start = time.monotonic()
        with contextlib.suppress(UserError):
            self._train(Run(BN, 0), steps, self.runs.parent / "first", until)
        seconds = time.monotonic() - start
        self.overhead = max(0.0, seconds - steps * self.step_seconds[BN.name])
        rows = [
            [f"a step of {name}", f"{1e3 * seconds:.2f} ms"]
            for name, seconds in self.step_seconds.items()
        ]
        rows.append(["a run, less its steps", f"{self.overhead:.1f} s"])
        return {"step_seconds": self.step_seconds, "overhead": self.overhead, "rows": rows}

    def _time_step(self, network: Network) -> float:
        """Median seconds of a step over four dispatches, after one."""
        exp = self.experiment(network)
        prepared = train.Prepared(exp, 0, self.scale.dispatch, lambda: None)
        program = prepared.program()
        state = build.create_state(exp)
        fed = next(prepared.batches())
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            state, metrics = program(state, *fed, *prepared.rest)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:]) / self.scale.dispatch

    def plan(self, seconds: float) -> dict[str, Any]:
        """Chooses the number of steps of all runs for this time, in whole intervals of evaluation.

        If all runs have LEAST_STEPS, all run; else the number is for stage 1, of which stage 2 gets
        what is left.
        """
        stage_1, stage_2 = stages(RATES[0])
        scale = self.scale
        for runs in ([*stage_1, *stage_2], stage_1):
            steps = self._fitting(runs, seconds)
            if steps >= scale.least:
                break
        self.steps = int(np.clip(steps, scale.eval_every, scale.most))
        rows = [["steps of every run", f"{self.steps:,}"]]
        if self.steps < scale.least:
            rows.append(["science", f"too short to compare: {scale.least:,} steps are needed"])
        return {"steps": self.steps, "enough": self.steps >= scale.least, "rows": rows}

    def _fitting(self, runs: Sequence[Run], seconds: float) -> int:
        """Steps that all these runs can take in this time, in whole intervals."""
        evaluations = self.scale.eval_every
        a_step = sum(self.step_seconds[run.network.name] for run in runs)
        # The overhead was that of a run with one evaluation; a longer one has more, which are
        # at most as much each.
        share = self.overhead / 4
        left = (1 - SPARE) * seconds - len(runs) * self.overhead
        steps = left / (a_step + len(runs) * share / evaluations)
        return max(0, int(steps / evaluations) * evaluations)

    def train(self, until: float) -> dict[str, Any]:
        """Makes the runs in their order until time is out; keeps all records after each."""
        first, _ = stages(RATES[0])
        tried = [run for run in first if run.seed == 0]
        for run in tried:
            self._one(run, until)
        self.best_rate = self._better_rate()
        stage_1, stage_2 = stages(self.best_rate)
        for run in [*(run for run in stage_1 if run.seed), *stage_2]:
            self._one(run, until)
        self._settle_names()
        self._keep()
        return self.result()

    def _one(self, run: Run, until: float) -> None:
        """Makes a run, if it fits, and keeps what it recorded."""
        needed = self.steps * self.step_seconds[run.network.name] + self.overhead
        found: dict[str, Any] = {
            "run": run.name,
            "seed": run.seed,
            "arguments": self.arguments(run, self.steps),
        }
        if time.monotonic() + needed > until:
            self.results.append({**found, "status": "not run: no time"})
            return

        start = time.monotonic()
        workdir = self.runs / run.name
        try:
            scores = self._train(run, self.steps, workdir, until)
            found |= {"status": "done", "top1": scores["top1"]}
        except DivergedError as error:
            found |= {"status": "diverged", "error": str(error)}
        except Preempted:
            found |= {"status": "stopped: no time"}
        found["seconds"] = round(time.monotonic() - start, 1)
        self.results.append(found)
        self._keep()

    def _train(self, run: Run, steps: int, workdir: pathlib.Path, until: float) -> dict[str, Any]:
        """`train.run`, which is asked to stop, with its state saved, when time is out."""
        # A few seconds before, since a stop waits for a dispatch and saves the state.
        seconds = max(0.1, until - time.monotonic() - 3)
        alarm = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
        alarm.daemon = True
        alarm.start()
        try:
            return train.run(self.config(run, steps), workdir)
        finally:
            alarm.cancel()

    def _better_rate(self) -> str:
        """The rate of BN-x5 less BN with the higher last accuracy of seed 0."""
        scores = {}
        for rate, network in LESS_BN.items():
            run = next((r for r in self.results if r["run"] == f"{network.name}/seed_0"), {})
            scores[rate] = run.get("top1", -1.0)
        return max(scores, key=lambda rate: scores[rate])

    def _settle_names(self) -> None:
        """Gives the runs at the better rate the folder of the network's own name."""
        folder = self.runs / LESS_BN[self.best_rate].name
        if folder.is_dir():
            for child in folder.iterdir():
                child.rename(folder.parent / child.name)
            folder.rmdir()

    def _keep(self) -> None:
        """Writes runs.tar.gz anew: the records of all runs so far."""
        part = self.out / ".runs.tar.gz"
        with tarfile.open(part, "w:gz") as tar:
            for file in sorted(self.runs.rglob("*")):
                if file.name in RECORDS:
                    tar.add(file, f"runs/{file.relative_to(self.runs)}")
        part.replace(self.out / "runs.tar.gz")
        (self.out / "science.json").write_text(json.dumps(self.results, indent=1) + "\n")

    def result(self) -> dict[str, Any]:
        """Accuracies by network, and the difference that BN makes, seed by seed."""
        tops: dict[str, dict[int, float]] = {}
        for found in self.results:
            if "top1" in found:
                name = found["run"].rpartition("/seed_")[0]
                tops.setdefault(name, {})[found["seed"]] = 100 * found["top1"]
        rows = []
        for name, scores in tops.items():
            values = list(scores.values())
            figure = f"{statistics.mean(values):.1f}% ({min(values):.1f} to {max(values):.1f})"
            rows.append([f"{name}, {len(values)} seeds, accuracy after {self.steps:,}", figure])
        rows += [[found["run"], found["status"]] for found in self.results if "top1" not in found]
        less = tops.get(LESS_BN[self.best_rate].name, {})
        with_bn = tops.get(BN.name, {})
        differences = [with_bn[seed] - less[seed] for seed in with_bn if seed in less]
        if differences:
            said = ", ".join(f"{d:+.1f}" for d in differences)
            figure = f"{statistics.mean(differences):+.1f} points ({said})"
            if self.steps < self.scale.least:
                figure += "; too short to compare"
            rows.append([f"BN-x5 less itself without BN, at {self.best_rate}", figure])
        return {
            "steps": self.steps,
            "better_rate_without_bn": self.best_rate,
            "accuracy": tops,
            "differences": differences,
            "rows": rows,
        }


def stages(rate: str) -> tuple[list[Run], list[Run]]:
    """All runs in their order: stage 1, in which seed 0 without BN has both rates, and stage 2."""
    seeds = range(SEEDS)
    stage_1 = [Run(BN, 0), *(Run(network, 0) for network in LESS_BN.values())]
    for seed in seeds[1:]:
        stage_1 += [Run(BN, seed), Run(LESS_BN[rate], seed)]
    stage_2 = [Run(network, seed) for seed in seeds for network in OTHERS]
    return stage_1, stage_2


def made_up_pictures(folder: pathlib.Path) -> pathlib.Path:
    """Two classes of made-up pictures, 16 and 8 of each, for a smoke run."""
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for number in range(2 * count):
            label = number % 2
            place = folder / split / f"class_{label}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(100 * label, 100 * label + 150, (16, 16, 3), dtype=np.uint8)
            (place / f"{number}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    return folder


@contextlib.contextmanager
def shared(*, anywhere: bool) -> Iterator[None]:
    """Runs inside share compiled programs and opened data sets; each is made once.

    anywhere: whether a CPU, too, takes several steps in a dispatch, which is slow there.
    """
    real_program = programs.compiled
    real_data = pipeline.open_data
    real_check = build.check
    made: dict[str, concurrent.futures.Future] = {}
    lock = threading.Lock()

    def once(key: list, make: Any) -> Any:
        text = json.dumps(key, sort_keys=True, default=str)
        with lock:
            future = made.get(text)
            first = future is None
            if future is None:
                future = made[text] = concurrent.futures.Future()
        if first:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def compiled(name, function, arguments, fields, *, jit=jax.jit, made_from=None):
        traced = {k: v for k, v in fields.items() if k not in programs.NOT_TRACED}
        shapes = [[str(leaf.shape), str(leaf.dtype)] for leaf in jax.tree.leaves(arguments)]
        structure = str(jax.tree.structure(arguments))
        key = [name, traced, made_from, shapes, structure, str(getattr(jit, "keywords", {}))]
        options = {"jit": jit, "made_from": made_from}
        return once(key, lambda: real_program(name, function, arguments, fields, **options))

    def open_data(found):
        key = ["data", found.data.to_dict(), found.image_size, found.steps_per_dispatch > 1]
        return once(key, lambda: real_data(found))

    def check(found, devices=None, **options):
        real_check(found, None if anywhere else devices, **options)

    with (
        mock.patch.object(programs, "compiled", compiled),
        mock.patch.object(pipeline, "open_data", open_data),
        mock.patch.object(build, "check", check),
    ):
        yield
