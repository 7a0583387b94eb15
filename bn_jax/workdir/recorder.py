"""What a run leaves behind: run.json, metrics.jsonl, timing.jsonl, events for TensorBoard or W&B.

* run.json: config, versions, commit, hardware (also of each attempt), status, results, ledger.
* metrics.jsonl: one JSON object a line, `step` and `kind` first. It holds nothing that depends on
  when or how often the run was interrupted: after a resume it is, byte for byte, the file of the
  uninterrupted run.
* timing.jsonl: wall time and its parts, a line for each training line, attempts apart.
"""

import json
import os
import pathlib
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import jax

from bn_jax.errors import DivergedError, Preempted
from bn_jax.workdir import files, guard, provenance, reader, trackers
from bn_jax.workdir.timing import Ledger, Progress, account, process_started

STATUSES = ("running", "done", "diverged", "preempted", "failed")


class Recorder:
    """Records one attempt at a run; holds the workdir's lock from here to `finish`.

    Every process makes one; only process 0 (`is_main`) writes. `begin` must follow once it is known
    which step was restored, since the lock comes before the restore. As a context manager it
    finishes with the status that the exception, if any, stands for.

    Args:
      workdir: created if absent.
      config: plain JSON.
      info: more for run.json, plain JSON.
      total_steps: of the whole run.
      tensorboard, wandb: also write events to WORKDIR/tensorboard, to Weights & Biases.
      is_main: whether this is process 0.
      started: time.monotonic() of the program's start (ledger.process_started()); default: now.

    Raises ConfigError (workdir of another config or not writable; no wandb), LockedError,
    DiskError.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        config: Mapping[str, Any],
        info: Mapping[str, Any],
        total_steps: int,
        tensorboard: bool,
        wandb: bool = False,
        is_main: bool,
        started: float | None = None,
    ):
        trackers.check(wandb and is_main)
        guard.check_workdir(workdir, config, info, is_main=is_main)
        guard.require_same_threads(workdir, jax.default_backend(), provenance.cpu_threads())
        self.workdir = pathlib.Path(workdir)
        self._ledger = Ledger(time.monotonic() if started is None else started)
        self._main, self._step, self._begun = is_main, 0, False
        self._config, self._info = config, info
        self._asked = {"tensorboard": tensorboard, "wandb": wandb}
        self._writers: list[trackers.Writer] = []
        self._lock: guard.WorkdirLock | None = None
        if is_main:
            self._progress = Progress(total_steps)
            guard.create(self.workdir)
            self._lock = guard.WorkdirLock(self.workdir)
            for folder in (self.workdir, self.workdir / "figures"):
                files.sweep(folder)
            if self._lock.taken_over:
                self.say(self._lock.taken_over)

    def begin(self, resume_step: int) -> None:
        """Starts the records after `resume_step` (0: from scratch); later lines are dropped."""
        self._step, self._begun = resume_step, True
        if not self._main:
            return
        before = reader.read_record(self.workdir) or {"attempts": []}
        # From scratch, the lines of step 0 are written again, too.
        for warning in files.truncate(self.workdir / "metrics.jsonl", resume_step or -1):
            self.say(warning)
        for warning in files.truncate(self.workdir / "timing.jsonl", None):
            self.say(warning)
        attempts = before["attempts"]
        origin = provenance.origin()
        # `before` for attempts without an origin of their own: older records.
        if attempts and (changed := provenance.changes(before | attempts[-1], origin)):
            self.say(f"{self.workdir}: not as in the attempt before: {changed}")
        guard.new_attempt(attempts, resume_step, origin)
        self._run: dict[str, Any] = {
            "status": "running",
            "config": dict(self._config),
            "info": dict(self._info),
            **origin,  # the latest attempt's
            "attempts": attempts,
            "results": {},
            "ledger": None,
        }
        self._write_run()
        with files.reported(self.workdir, "cannot write in"):
            self._metrics = (self.workdir / "metrics.jsonl").open("a", encoding="utf-8")
            self._timing = (self.workdir / "timing.jsonl").open("a", encoding="utf-8")
        self._mark()
        self._writers = trackers.writers(
            self.workdir, resume_step, self._config, self.say, **self._asked
        )

    # While it runs

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a line to metrics.jsonl. Call it for step k before saving checkpoint k.

        Values are numbers, strings, or (nested lists of) arrays of numbers; not-finite ones become
        the strings 'nan', 'inf', '-inf', which float() reads. No wall-clock values: they would
        differ after a resume; they go to timing.jsonl by themselves.

        Raises:
          DiskError: full or unwritable; a torn line is dropped at the next start.
        """
        self._step = max(self._step, step)
        if not self._main:
            return
        line = {"step": int(step), "kind": kind} | {k: files.plain(v) for k, v in values.items()}
        self._append(self._metrics, line)
        if kind == "train":
            self._mark()
        numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
        for writer in self._writers if numbers else ():
            writer.write(step, {f"{kind}/{name}": value for name, value in numbers.items()})

    def progress(self, step: int, loss: Any, examples: int) -> None:
        """`examples` more are done, up to `step`; shown now and then. See Progress.update."""
        self._step = max(self._step, step)
        if self._main:
            wall, parts = self._ledger.snapshot()
            aside = parts["startup"] + parts["compile"] + parts["save"] + parts["evaluate"]
            self._progress.update(step, loss, examples, wall - aside)

    def say(self, text: str) -> None:
        """A line for the person who watches; process 0 only."""
        if self._main:
            self._progress.say(text)

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Charges the time inside to `part`, one of ledger.PARTS; inner parts pause outer ones."""
        return self._ledger.timed(part)

    def at(self) -> tuple[str, float]:
        """The part that time is charged to now, and the seconds of steps and input so far."""
        parts = self._ledger.snapshot()[1]
        return self._ledger.part, parts["step"] + parts["input"]

    def sync(self) -> None:
        """Puts the lines so far on the disk itself; before a checkpoint that they must not miss."""
        if self._main:
            with files.reported(self.workdir, "cannot write in"):
                for file in (self._metrics, self._timing):
                    os.fsync(file.fileno())

    # At the end

    def finish(self, status: str, **results: Any) -> None:
        """Ends run.json with status, results and ledger, and gives the workdir back.

        A second call does nothing.
        """
        if status not in STATUSES:
            raise ValueError(f"{status!r} is not one of {STATUSES}")
        held, self._lock = self._lock, None
        if held is None:
            return
        try:
            if self._begun:
                self._end(status, results)
        finally:
            held.release()

    def _end(self, status: str, results: Mapping[str, Any]) -> None:
        self._progress.end()
        self._mark()
        with files.reported(self.workdir, "cannot write in"):
            self._metrics.close()
            self._timing.close()
        for writer in self._writers:
            writer.close(status)
        self._run["attempts"][-1] |= {"status": status, "finished": guard.now()}
        self._run["status"] = status
        self._run["results"] = {k: files.plain(v) for k, v in results.items()}
        text = (self.workdir / "timing.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        resumed = [attempt["resume_step"] for attempt in self._run["attempts"]]
        self._run["ledger"] = account(lines, resumed)
        self._write_run()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.finish("done") if error is None else self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Finishes with the status that `error` stands for; also from another thread."""
        status = "failed"
        if isinstance(error, DivergedError):
            status = "diverged"
        elif isinstance(error, (Preempted, KeyboardInterrupt)):
            status = "preempted"
        try:
            self.finish(status, error=f"{type(error).__name__}: {error}".splitlines()[0])
        except Exception as second:
            # The first error is the one to report; a full disk often causes both.
            self._progress.say(f"run.json could not be finished: {second}")

    # Files

    def _mark(self) -> None:
        wall, parts = self._ledger.snapshot()
        line = {"attempt": len(self._run["attempts"]) - 1, "step": self._step, "wall": wall}
        self._append(self._timing, line | {"parts": parts})

    def _append(self, file: Any, line: Mapping[str, Any]) -> None:
        with files.reported(self.workdir, "cannot write in"):
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()

    def _write_run(self) -> None:
        text = json.dumps(self._run, indent=1, allow_nan=False) + "\n"
        files.write_atomic(self.workdir / "run.json", text.encode())


def open_workdir(workdir: pathlib.Path, config: Mapping[str, Any], **info: Any) -> Recorder:
    """The Recorder of this process for a run of `config`, timed from the start of the process."""
    return Recorder(
        workdir,
        config=config,
        info=info,
        total_steps=config["total_steps"],
        tensorboard=config["record"]["tensorboard"],
        wandb=config["record"]["wandb"],
        is_main=jax.process_index() == 0,
        started=process_started(),
    )
