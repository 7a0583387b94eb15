"""SIGKILL with the usual `checkpoint_wait`: how much is redone where a save outlives its share."""

import json
import os
import random
import signal
import time

import pytest

from tests.workdir.kill_test import COMMON, Trainer, go_on

INTERVAL = 40  # steps of 0.05 s at least: 2 s, of which a save is given 4%
USUAL = {name: value for name, value in COMMON.items() if name != "checkpoint_wait"}
MLP = (
    "mnist_bn",
    USUAL | {"steps_per_dispatch": 1, "checkpoint_every": INTERVAL, "eval_every": 10 * INTERVAL},
)

# A save takes a second longer. WORKDIR.saves has "late STEP" for a save that is left to
# go on beside the training, "there STEP" when one is on disk.
SLOW = """
import pathlib, sys, time
from bn_jax import train
from bn_jax.workdir import checkpoint
from bn_jax.workdir.checkpoint import Checkpoints
log = pathlib.Path(sys.argv[3]).with_suffix(".saves")
def note(text):
    with log.open("a") as file:
        file.write(text + "\\n")
put, report = checkpoint.save_arrays, train.Loop.report
save, settle, write = Checkpoints.save, Checkpoints.settle, Checkpoints._write
def slow_put(path, values):
    time.sleep(1)
    put(path, values)
def slow_report(self, pending):
    time.sleep(0.05)
    report(self, pending)
def noted_save(self, step, *arguments, **more):
    save(self, step, *arguments, **more)
    self.newest = step
def noted_settle(self, seconds):
    settle(self, seconds)
    if self._pending is not None and not self._pending.done():
        note(f"late {self.newest}")
def noted_write(self, step, *arguments):
    write(self, step, *arguments)
    note(f"there {step}")
checkpoint.save_arrays, train.Loop.report = slow_put, slow_report
Checkpoints.save, Checkpoints.settle, Checkpoints._write = noted_save, noted_settle, noted_write
"""


def late(trainer: Trainer) -> int:
    """The step whose save outlived its share and is not on disk yet, else 0."""
    saves = trainer.workdir.with_suffix(".saves")
    last = saves.read_text().splitlines()[-1:] if saves.exists() else []
    kind, step = last[0].split() if last else ("there", "0")
    return int(step) if kind == "late" else 0


def reached(trainer: Trainer) -> int:
    lines = (trainer.workdir / "timing.jsonl").read_text().splitlines()
    return max(json.loads(line)["step"] for line in lines[-2:] if line.endswith("}"))


@pytest.mark.faults
def test_at_most_an_interval_and_what_was_trained_beside_a_late_save_is_redone(tmp_path, measured):
    rng, beside = random.Random(0), []
    with Trainer(MLP, tmp_path / "cut", SLOW) as cut:
        for number in range(6):
            before = cut.newest()
            pid = cut.start(COMMON["total_steps"])
            cut.until(lambda: cut.newest() > before, poll=0.02)  # noqa: B023
            if number % 2:
                cut.until(lambda: late(cut) > cut.newest(), poll=0.01)  # the next one
                cut.until(lambda: reached(cut) > late(cut), poll=0.01)
                time.sleep(rng.uniform(0, 0.3))
            else:
                time.sleep(rng.uniform(0, 1.5))
            os.kill(pid, signal.SIGKILL)
            assert cut.wait() == signal.SIGKILL, cut.log.read_text()  # else the start had failed
            beside.append(reached(cut) - late(cut) if late(cut) else 0)
            with cut.workdir.with_suffix(".saves").open("a") as saves:
                saves.write("there 0\n")  # that save is no more
        again = go_on(cut, MLP, tmp_path)
    # A save waits for the one before it, so that it cannot be later than an interval.
    assert max(beside) <= INTERVAL < max(again)
    bounds = [INTERVAL + steps for steps in beside]
    assert len(again) == 6 and all(map(int.__le__, again, bounds)), (again, beside)
    name = f"SIGKILL, saves late: redone <= {max(again)} of {INTERVAL} + {max(beside)}"
    measured(name, injected=6, detected=6, lost=0)
