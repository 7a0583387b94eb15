"""Sends the numbers of metrics.jsonl to TensorBoard and Weights & Biases, from process 0 only."""

import importlib.util
import os
import pathlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from bn_jax.errors import ConfigError
from bn_jax.workdir import files

ID = "wandb_id"  # file in the workdir


class Writer(Protocol):
    """Takes scalars as they are recorded."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the `scalars` ("train/loss", ...) of a step."""

    def close(self, status: str) -> None:
        """Ends the attempt, with this status of run.json."""


def check(wandb: bool) -> None:
    """Raises ConfigError if Weights & Biases is asked for and not installed."""
    if wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "record.wandb=True needs the package wandb: pip install wandb, or set it to False"
        )


def writers(
    workdir: pathlib.Path,
    resume_step: int,
    config: Mapping[str, Any],
    say: Callable[[str], None],
    *,
    tensorboard: bool,
    wandb: bool,
) -> list[Writer]:
    """Makes the writers that are asked for, for an attempt that resumes after `resume_step`."""
    found: list[Writer] = []
    if tensorboard:
        found.append(TensorBoard(workdir, resume_step))
    if wandb:
        found.append(Wandb(workdir, config, say))
    return found


class TensorBoard:
    """Writes events to WORKDIR/tensorboard."""

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        self._folder = workdir / "tensorboard"
        self._purge_step = resume_step + 1  # events of an earlier attempt from here on are dropped
        self._events: Any = None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the `scalars` of a step."""
        if self._events is None:
            # Imported with the first numbers, not before the first step: the package imports torch
            # where that is installed, which takes a second or two.
            import tensorboardX

            self._events = tensorboardX.SummaryWriter(
                logdir=str(self._folder), purge_step=self._purge_step
            )
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        """Ends the attempt."""
        del status
        if self._events is not None:
            self._events.close()


class Wandb:
    """Writes to a run of Weights & Biases, one for all attempts, whose id is in WORKDIR/wandb_id.

    The package's own variables (WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, ...) apply. If it
    fails, a line says so, training continues, and nothing more is sent.
    """

    def __init__(
        self, workdir: pathlib.Path, config: Mapping[str, Any], say: Callable[[str], None]
    ):
        self._say = say
        self._run: Any = None
        path = workdir / ID
        if not path.exists():
            files.write_atomic(path, f"{uuid.uuid4().hex[:8]}\n".encode())
        self._try(self._init, workdir, config, path.read_text().strip())

    def _init(self, workdir: pathlib.Path, config: Mapping[str, Any], name: str) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "bn_jax"),
            id=name,
            resume="allow",
            name=str(workdir),
            dir=str(workdir),
            config=dict(config),
            settings=wandb.Settings(console="off"),  # the terminal has our own progress line
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the `scalars` of a step."""
        # Steps that an earlier attempt sent have the same numbers; wandb ignores them.
        if self._run is not None:
            self._try(self._run.log, dict(scalars), step=step)

    def close(self, status: str) -> None:
        """Ends the attempt."""
        if self._run is not None:
            self._try(self._run.finish, exit_code=int(status != "done"))

    def _try(self, call: Callable[..., Any], *args: Any, **options: Any) -> None:
        try:
            call(*args, **options)
        except Exception as error:
            self._run = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"Weights & Biases failed, and gets no more numbers: {reason}")
