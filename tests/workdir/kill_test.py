"""SIGKILL at random instants, in the middle of saves too: the run ends with the bits of one that
was never stopped, every start succeeds, nothing is left lying about."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.support import processes
from tests.support.processes import ROOT, arrays

COMMON = {
    "total_steps": 1_000_000,  # until the killing is over
    "log_every": 1,
    "checkpoint_wait": 1e9,  # saves are many and steps short here: all are waited for
    "statistics_batches": 2,
    "record.activations": (),
    "record.tensorboard": False,
}
# A save every few steps, so that many kills fall into one.
MLP = ("mnist_bn", COMMON | {"steps_per_dispatch": 1, "checkpoint_every": 5, "eval_every": 50})
INCEPTION = (
    "bn_x30",
    COMMON | {"model.width": 0.0625, "checkpoint_every": 2, "eval_every": 20, "dropout": 0.4},
    # As tests of this network in this process have it: they share its program.
    {"XLA_FLAGS": os.environ["XLA_FLAGS"], "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
)

# Imports once and forks for every start: a start is then what the trainer does, not what Python
# does. Each line of input is a number of steps; each line of output a pid, then an exit status.
SERVER = """
import importlib, json, os, pathlib, sys, traceback
import grain, jax
from bn_jax import train
from bn_jax.distributed import startup
from bn_jax.experiment import build, programs
from bn_jax.data import memory
name, settings, workdir = sys.argv[1:]
digits = memory.digits()
memory.digits = lambda: digits  # read once
make = build.mesh.make
build.mesh.make = lambda *_: make(jax.devices()[:1])
programs._source()  # remembered: the package's files are read once, too
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        try:
            config = importlib.import_module(f"configs.{name}").get_config("digits")
            values = {k: tuple(v) if isinstance(v, list) else v
                      for k, v in json.loads(settings).items()}
            config.update_from_flattened_dict(values | {"total_steps": int(line)})
            startup.use_compilation_cache()
            train.run(config, pathlib.Path(workdir))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Trainer:
    """Starts a run in `workdir` again and again; nothing of it is left running behind the `with`.

    what: name of a config, settings, and perhaps what else its environment holds.
    patch: Python, run before the first start.
    """

    def __init__(self, what, workdir: pathlib.Path, patch: str = ""):
        self.workdir, self.log = workdir, workdir.with_suffix(".log")
        workdir.parent.mkdir(exist_ok=True)
        env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
        env |= dict(*what[2:])
        self.server = processes.start(
            [sys.executable, "-c", patch + SERVER, what[0], json.dumps(what[1]), str(workdir)],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.server.pid, signal.SIGKILL)
        self.server.communicate()

    def start(self, total: int) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(f"{total}\n")
        self.server.stdin.flush()
        line = next(line for line in self.server.stdout if line.strip().isdecimal())
        self.child = int(line)
        return self.child

    def wait(self) -> int:
        """The status of the child: 9 if it was killed, 0 if it has ended."""
        assert self.server.stdout is not None
        return int(next(line for line in self.server.stdout if line.strip().isdecimal()))

    def newest(self) -> int:
        """The newest checkpoint, 0 if there is none."""
        names = (self.workdir / "checkpoints").glob("[0-9]*")
        return max((int(path.name) for path in names), default=0)

    def saving(self) -> bool:
        """Whether a save is under way, or was when the process was killed."""
        return any((self.workdir / "checkpoints").glob("tmp.*"))

    def until(self, what: Callable[[], bool], poll: float) -> None:
        deadline = time.monotonic() + 600
        while not what():
            alive = pathlib.Path(f"/proc/{self.child}").exists()  # one that ended is waited for
            assert alive and time.monotonic() < deadline, self.log.read_text()
            time.sleep(poll)


def kill_once(trainer: Trainer, rng: random.Random, early: bool) -> bool:
    """One start and one kill, perhaps before anything is trained. Whether it fell into a save."""
    before, when = trainer.newest(), rng.random()
    at_start = early and when < 0.15  # compiling, restoring
    pid = trainer.start(COMMON["total_steps"])
    if at_start:
        time.sleep(rng.uniform(0, 2))
    else:  # after one more save at least, so that the run comes forward
        trainer.until(lambda: trainer.newest() > before, poll=0.02)
        if when < 0.6:  # in the middle of a save
            trainer.until(trainer.saving, poll=0.002)
            time.sleep(rng.uniform(0, 0.03))
        else:
            time.sleep(rng.uniform(0, 0.3))
    os.kill(pid, signal.SIGKILL)
    assert trainer.wait() == signal.SIGKILL, trainer.log.read_text()  # else the start had failed
    return trainer.saving() and not at_start  # else it may be left from the kill before


def redone(workdir: pathlib.Path) -> list[int]:
    """Steps that each restart did again."""
    run = json.loads((workdir / "run.json").read_text())
    lines = [json.loads(x) for x in (workdir / "timing.jsonl").read_text().splitlines()]
    found = []
    for number, attempt in enumerate(run["attempts"][1:]):
        reached = max(x["step"] for x in lines if x["attempt"] <= number)
        found.append(reached - attempt["resume_step"])
    return found


def go_on(cut: Trainer, what, folder: pathlib.Path) -> list[int]:
    """Ends a run that was killed, and compares it with one that was not: the steps that each
    restart did again."""
    interval = what[1]["checkpoint_every"]
    total = cut.newest() + 2 * interval + 1  # the last one is no multiple of anything
    with Trainer(what, folder / "whole") as whole:
        for trainer in (cut, whole):
            trainer.start(total)
            assert trainer.wait() == 0, trainer.log.read_text()

    assert arrays(cut.workdir, total) == arrays(whole.workdir, total)
    texts = [(t.workdir / "metrics.jsonl").read_bytes() for t in (cut, whole)]
    assert texts[0] == texts[1] and texts[0].count(b'"train"') == total
    # Nothing besides what the other run has; inside a step orbax may cut its files differently.
    files = [
        {str(p.relative_to(t.workdir)) for depth in ("*", "*/*", "*/*/*") for p in
         t.workdir.glob(depth)} for t in (cut, whole)
    ]  # fmt: skip
    assert files[0] == files[1] and f"checkpoints/{total}/manifest.json" in files[0]
    run = json.loads((cut.workdir / "run.json").read_text())
    assert {a["status"] for a in run["attempts"][:-1]} <= {"killed"}
    return redone(cut.workdir)


CASES = [
    pytest.param(MLP, 10, id="mlp"),
    pytest.param(MLP, 90, id="mlp-in-full", marks=pytest.mark.faults),
    pytest.param(INCEPTION, 6, id="inception-in-full", marks=pytest.mark.faults),
]


@pytest.mark.parametrize(("what", "kills"), CASES)
def test_any_kill_leaves_the_bits_of_the_uninterrupted_run(tmp_path, what, kills, measured):
    began, rng, interval = time.monotonic(), random.Random(kills), what[1]["checkpoint_every"]
    with Trainer(what, tmp_path / "cut") as cut:
        in_saves = sum(kill_once(cut, rng, early=i > 0) for i in range(kills))
        again = max(go_on(cut, what, tmp_path))
    assert again <= interval
    assert in_saves >= kills // 5  # nearly half are aimed at one
    name = f"SIGKILL of {what[0]}: {in_saves} in saves, redone <= {again} of {interval}"
    measured(name, injected=kills, detected=kills, lost=0, seconds=time.monotonic() - began)
