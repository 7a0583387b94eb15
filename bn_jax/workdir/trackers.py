"""Where the numbers of metrics.jsonl go besides: TensorBoard, Weights & Biases. Process 0 only."""

import concurrent.futures
import importlib.util
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from bn_jax.errors import ConfigError
from bn_jax.workdir import files

ID = "wandb_id"  # file in the workdir


class Writer(Protocol):
    """Takes scalars as they are recorded."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """`scalars` ("train/loss", ...) of a step."""

    def close(self, status: str) -> None:
        """The attempt ends with this status of run.json."""


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
    """The writers that are asked for, of an attempt that goes on after `resume_step`."""
    found: list[Writer] = [TensorBoard(workdir, resume_step)] if tensorboard else []
    return [*found, Wandb(workdir, config, say)] if wandb else found


class TensorBoard:
    """Events in WORKDIR/tensorboard.

    tensorboardX imports torch where that is installed, for seconds: it is imported in another
    thread from the first numbers on, and they wait for it.
    """

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        self._place = {"logdir": str(workdir / "tensorboard"), "purge_step": resume_step + 1}
        self._waiting: list[tuple[str, float, int, float]] = []  # add_scalar's arguments
        self._package: concurrent.futures.Future | None = None
        self._events: Any = None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """As `Writer` has it."""
        if self._package is None:
            threads = concurrent.futures.ThreadPoolExecutor(1)
            self._package = threads.submit(importlib.import_module, "tensorboardX")
            threads.shutdown(wait=False)
        self._waiting += [(name, value, step, time.time()) for name, value in scalars.items()]
        if self._package.done():
            self._flush()

    def _flush(self) -> None:
        if self._package is None:
            return
        if self._events is None:
            self._events = self._package.result().SummaryWriter(**self._place)
        for scalar in self._waiting:
            self._events.add_scalar(*scalar)
        self._waiting.clear()

    def close(self, status: str) -> None:
        """As `Writer` has it."""
        del status
        self._flush()
        if self._events is not None:
            self._events.close()


class Wandb:
    """A run of Weights & Biases, the same one for all attempts: its id is in WORKDIR/wandb_id.

    Its own variables (WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, ...) hold. Whatever it fails
    with, training goes on: that is said once, and nothing more is sent.
    """

    def __init__(
        self, workdir: pathlib.Path, config: Mapping[str, Any], say: Callable[[str], None]
    ):
        self._say, self._run = say, None
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
            settings=wandb.Settings(console="off"),  # the terminal belongs to progress.py
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """As `Writer` has it."""
        # Steps that an earlier attempt has sent are the same numbers; wandb leaves them out.
        if self._run is not None:
            self._try(self._run.log, dict(scalars), step=step)

    def close(self, status: str) -> None:
        """As `Writer` has it."""
        if self._run is not None:
            self._try(self._run.finish, exit_code=int(status != "done"))

    def _try(self, call: Callable[..., Any], *args: Any, **options: Any) -> None:
        try:
            call(*args, **options)
        except Exception as error:
            self._run = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"Weights & Biases failed and is left out from here on: {reason}")
