"""Writes the records of a run, whose fields `lines` defines.

* run.json: config, versions, commit, hardware (also of each attempt), status, results, ledger.
* metrics.jsonl: a JSON object in each line, `step` and `kind` first. Nothing in it depends on when
  or how often the run was interrupted. After a resume it equals, byte for byte, the file of an
  uninterrupted run: on CPU, and on GPUs with `deterministic` (not run there).
* timing.jsonl: wall time and its parts, after each training line; the lines of each attempt have
  its number.
* Events for TensorBoard or Weights & Biases, if they are asked for.
"""

import json
import pathlib
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import jax

from bn_jax.errors import DivergedError, Preempted
from bn_jax.workdir import files, guard, provenance, reader, trackers
from bn_jax.workdir.lines import RunRecord, TimingLine
from bn_jax.workdir.timing import Ledger, Progress, account, process_started

TIMING = "timing.jsonl"
STATUSES = ("running", "done", "diverged", "preempted", "failed")


class Recorder:
    """Records one attempt at a run, and holds the workdir's lock until `finish`.

    Every process makes one, but only process 0 (`is_main`) writes. The lock is taken before a step
    is restored; once that step is known, call `begin`. As a context manager it finishes with the
    status that the exception, if any, stands for.

    Args:
      workdir: created if absent.
      config: plain JSON.
      info: more for run.json, plain JSON.
      total_steps: of the whole run.
      write_seconds: the least time between two writes of lines; `sync` and `finish` write at once.
      tensorboard, wandb: whether to write events to WORKDIR/tensorboard, to Weights & Biases.
      is_main: whether this is process 0.
      started: time.monotonic() of the program's start (timing.process_started()); default: now.

    Raises:
      ConfigError: the workdir is of another config or cannot be written; wandb is not installed.
      LockedError: another run holds the workdir.
      DiskError: the disk is full.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        config: Mapping[str, Any],
        info: Mapping[str, Any],
        total_steps: int,
        write_seconds: float = 0.0,
        tensorboard: bool,
        wandb: bool = False,
        is_main: bool,
        started: float | None = None,
    ):
        trackers.check(wandb and is_main)
        guard.check_workdir(workdir, config, info, is_main=is_main)
        guard.require_same_threads(workdir, jax.default_backend(), provenance.cpu_threads())

        self.workdir = pathlib.Path(workdir)
        self._config = config
        self._info = info
        self._total = total_steps
        self._write_seconds = write_seconds
        self._main = is_main
        self._step = 0
        self._begun = False
        self._ledger = Ledger(time.monotonic() if started is None else started)
        self._asked = {"tensorboard": tensorboard, "wandb": wandb}
        self._writers: list[trackers.Writer] = []
        self._lock: guard.WorkdirLock | None = None

        if is_main:
            self._progress = Progress(total_steps)
            guard.create(self.workdir)
            self._lock = guard.WorkdirLock(self.workdir)
            for folder in (self.workdir, self.workdir / "figures"):
                files.remove_scratch(folder)
            if self._lock.taken_over:
                self.say(self._lock.taken_over)

    def begin(self, resume_step: int) -> None:
        """Starts the records after `resume_step` (0: from scratch), and drops later lines."""
        self._step = resume_step
        self._begun = True
        if not self._main:
            return

        # From scratch, the lines of step 0 are written again, too.
        for warning in files.truncate(self.workdir / reader.METRICS, resume_step or -1):
            self.say(warning)
        for warning in files.truncate(self.workdir / TIMING, None):
            self.say(warning)

        self._run = self._new_record(resume_step)
        self._write_run()
        with files.reported(self.workdir, "cannot write in"):
            self._metrics = files.Lines(self.workdir / reader.METRICS, self._write_seconds)
            self._timing = files.Lines(self.workdir / TIMING, self._write_seconds)
        self._mark()

        self._writers = trackers.writers(
            self.workdir, resume_step, self._config, self.say, **self._asked
        )

    def _new_record(self, resume_step: int) -> RunRecord:
        """Makes run.json with one more attempt; says so if its code or versions have changed."""
        before = reader.read_record(self.workdir)
        attempts = [] if before is None else before.get("attempts", [])
        origin = provenance.origin()
        if before is not None and attempts:
            # In older records only the record as a whole has an origin, not each attempt.
            changed = provenance.changes({**before, **attempts[-1]}, origin)
            if changed:
                self.say(f"{self.workdir}: differs from the previous attempt: {changed}")
            if attempts[-1]["status"] == "running":
                self.say(
                    f"{self.workdir}: the previous attempt was killed, or jax ended it because it "
                    "had lost another process"
                )

        guard.new_attempt(attempts, resume_step, origin)
        return {
            "status": "running",
            "config": dict(self._config),
            "info": dict(self._info),
            "source": origin["source"],
            "versions": origin["versions"],
            "hardware": origin["hardware"],
            "attempts": attempts,
            "results": {},
            "ledger": None,
        }

    def keep_place(self) -> None:
        """Records where the data of a finished run lie now; nothing else changes."""
        run = reader.read_record(self.workdir) if self._main else None
        place = self._config["data"]["dir"]
        if run is None or run["config"]["data"]["dir"] == place:
            return
        run["config"]["data"]["dir"] = place
        run["info"] = dict(self._info)  # of the same data; its description may name the folder
        self._run = run
        self._write_run()

    # While it runs

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a line to metrics.jsonl; call it for step k before checkpoint k is saved.

        Args:
          kind: train, eval, test or activation.
          step: 1-based; 0 is the initial state.
          values: numbers, strings, or (nested lists of) arrays of numbers, as `lines` has them for
            the kind. None of them may depend on the clock, or they would differ after a resume.

        Raises:
          LockedError: another run took the workdir over, while this process was paused.
          DiskError: the disk is full or cannot be written. The next start drops a cut line.
        """
        self._step = max(self._step, step)
        if not self._main:
            return

        self._require_held()
        plain = {name: files.plain(value) for name, value in values.items()}
        self._append(self._metrics, {"step": int(step), "kind": kind, **plain})
        if kind == "train":
            self._mark()

        scalars = {f"{kind}/{k}": v for k, v in plain.items() if isinstance(v, (int, float))}
        for writer in self._writers if scalars else ():
            writer.write(step, scalars)

    def progress(self, step: int, loss: float, examples: int) -> None:
        """Counts `examples` more, up to `step`; shows the progress now and then."""
        self._step = max(self._step, step)
        if not self._main:
            return

        # images/s is the speed of training alone.
        wall, parts = self._ledger.snapshot()
        other = parts["startup"] + parts["compile"] + parts["save"] + parts["evaluate"]
        text = f"step {step}/{self._total}  loss {loss:.4f}"
        self._progress.update(step, text, examples, wall - other)

    def say(self, text: str) -> None:
        """Prints a line for the user, in process 0 only."""
        if self._main:
            self._progress.say(text)

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Charges the time inside to `part`, one of timing.PARTS; inner parts pause outer ones."""
        return self._ledger.timed(part)

    def at(self) -> tuple[str, float]:
        """Returns the current part of the ledger, and the seconds of steps and input so far."""
        parts = self._ledger.snapshot()[1]
        return self._ledger.part, parts["step"] + parts["input"]

    def sync(self) -> None:
        """Flushes all lines to the disk itself, so that a checkpoint is never ahead of them.

        Raises:
          LockedError: another run took the workdir over, while this process was paused.
          DiskError: the disk is full or cannot be written.
        """
        if self._main:
            self._require_held()
            with files.reported(self.workdir, "cannot write in"):
                for lines in (self._metrics, self._timing):
                    lines.sync()

    # At the end

    def finish(self, status: str, **results: Any) -> None:
        """Ends run.json with status, results and ledger, and gives the workdir back.

        A second call does nothing.
        """
        if status not in STATUSES:
            raise ValueError(f"{status!r} is not one of {STATUSES}")

        lock = self._lock
        self._lock = None
        if lock is None:
            return

        try:
            # If another run took the workdir over, the records are that run's.
            if self._begun and lock.held():
                self._end(status, results)
        finally:
            lock.release()

    def _end(self, status: str, results: Mapping[str, Any]) -> None:
        self._progress.end()
        self._mark()
        with files.reported(self.workdir, "cannot write in"):
            self._metrics.close()
            self._timing.close()
        for writer in self._writers:
            writer.close(status)

        attempt = self._run["attempts"][-1]
        attempt["status"] = status
        attempt["finished"] = files.now()
        self._run["status"] = status
        self._run["results"] = {k: files.plain(v) for k, v in results.items()}

        text = (self.workdir / TIMING).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        resumed = [attempt["resume_step"] for attempt in self._run["attempts"]]
        self._run["ledger"] = account(lines, resumed)
        self._write_run()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.finish("done")
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Finishes with the status that `error` stands for; any thread may call it."""
        status = "failed"
        if isinstance(error, DivergedError):
            status = "diverged"
        elif isinstance(error, (Preempted, KeyboardInterrupt)):
            status = "preempted"

        try:
            self.finish(status, error=f"{type(error).__name__}: {error}".splitlines()[0])
        except Exception as second:
            # The first error is reported; a full disk often causes both.
            self._progress.say(f"run.json could not be finished: {second}")

    # Files

    def _require_held(self) -> None:
        if self._lock is not None:
            self._lock.require_held()

    def _mark(self) -> None:
        """Appends to timing.jsonl how the time was spent so far."""
        wall, parts = self._ledger.snapshot()
        line: TimingLine = {
            "attempt": len(self._run["attempts"]) - 1,
            "step": self._step,
            "wall": wall,
            "parts": parts,
        }
        self._append(self._timing, line)

    def _append(self, lines: files.Lines, line: Mapping[str, Any]) -> None:
        with files.reported(self.workdir, "cannot write in"):
            lines.append(line)

    def _write_run(self) -> None:
        text = json.dumps(self._run, indent=1, allow_nan=False) + "\n"
        files.write_atomic(self.workdir / reader.RUN, text.encode())


def open_workdir(workdir: pathlib.Path, config: Mapping[str, Any], **info: Any) -> Recorder:
    """Makes this process's Recorder for a run of `config`, timed from the process's start.

    info: more for run.json, plain JSON. Raises as `Recorder` does.
    """
    return Recorder(
        workdir,
        config=config,
        info=info,
        total_steps=config["total_steps"],
        write_seconds=config["write_seconds"],
        tensorboard=config["record"]["tensorboard"],
        wandb=config["record"]["wandb"],
        is_main=jax.process_index() == 0,
        started=process_started(),
    )
