"""Trainers as processes of their own, to be signalled, killed and started again."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


# The paper's MLP on the embedded digits: the real trainer, and it compiles in two seconds.
TRAIN = [
    "-m",
    "bn_jax.main",
    "--config=configs/mnist_bn.py:digits",
    "--config.total_steps=1500",
    "--config.eval_every=250",
    "--config.checkpoint_every=250",
    "--config.log_every=50",
    "--config.steps_per_dispatch=50",
    "--config.record.tensorboard=False",
]


_started: list[subprocess.Popen] = []


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """A child in a process group of its own; the fixture `children_end` ends the group."""
    child = subprocess.Popen(command, start_new_session=True, **options)
    _started.append(child)
    return child


def end_children() -> None:
    """Kills every child of `start` that still runs, with its own children."""
    while _started:
        child = _started.pop()
        if child.poll() is None:  # else its number may be another process's by now
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def free_port() -> int:
    """A port that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def spawn(
    arguments: list[str], log: pathlib.Path, processes: int = 1, platforms: str = "cpu"
) -> list[subprocess.Popen]:
    """Python processes with one device each; their output goes to LOG.0, LOG.1, ..."""
    port = free_port()
    children = []
    for index in range(processes):
        env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": platforms}
        if processes > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        with log.with_suffix(f".{index}").open("wb") as file:
            command = [sys.executable, *arguments]
            children.append(start(command, cwd=ROOT, env=env, stdout=file, stderr=file))
    return children


def wait_for(text: str, log: pathlib.Path, children: list[subprocess.Popen]) -> None:
    """Until LOG.0 has `text`; fails if a process ends before, or after two minutes."""
    deadline = time.monotonic() + 120
    while text not in (seen := log.with_suffix(".0").read_text()):
        assert all(c.poll() is None for c in children) and time.monotonic() < deadline, seen
        time.sleep(0.02)


def arrays(workdir: pathlib.Path, step: int) -> dict[str, object]:
    """Shape, dtype and digest of every array of a checkpoint."""
    text = (workdir / "checkpoints" / str(step) / "manifest.json").read_text()
    return json.loads(text)["body"]["arrays"]


def lines(workdir: pathlib.Path) -> bytes:
    return (workdir / "metrics.jsonl").read_bytes()
