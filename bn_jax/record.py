"""What a run leaves behind: run.json, metrics.jsonl, timing.jsonl, TensorBoard events.

* run.json: config, versions, commit, hardware, attempts, status, results, time ledger.
* metrics.jsonl: one JSON object a line, `step` and `kind` first. It holds nothing that depends on
  when or how often the run was interrupted: after a resume it is, byte for byte, the file of the
  uninterrupted run.
* timing.jsonl: wall time and its parts, a line for each training line, attempts apart.
"""

import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import numpy as np

from bn_jax import disk, lock, provenance
from bn_jax.errors import ConfigError, DivergedError, Preempted
from bn_jax.ledger import Ledger, account
from bn_jax.progress import Progress

# A resumed run may change how long it goes on and what it keeps and shows, not what it computes.
MAY_CHANGE = frozenset(
    (
        "total_steps",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_last",
        "keep_best",
        "eval_batch_size",
        "record.tensorboard",
        "data.dir",
    )
)
STATUSES = ("running", "done", "diverged", "preempted", "failed")


class Recorder:
    """Records one attempt at a run; holds the workdir's lock. Only process 0 writes.

    As a context manager it finishes with the status that the exception, if any, stands for.

    Args:
      workdir: created if absent.
      config: plain JSON.
      info: more for run.json, plain JSON.
      resume_step: the step that was restored, 0 for a fresh start; later lines are dropped.
      total_steps: of the whole run.
      tensorboard: also write events to WORKDIR/tensorboard.
      is_main: whether this is process 0.
      started: time.monotonic() of the program's start (ledger.process_started()); default: now.

    Raises:
      LockedError, ConfigError (workdir of another config), DiskError.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        config: Mapping[str, Any],
        info: Mapping[str, Any],
        resume_step: int,
        total_steps: int,
        tensorboard: bool,
        is_main: bool,
        started: float | None = None,
    ):
        self.workdir = pathlib.Path(workdir)
        self._ledger = Ledger(time.monotonic() if started is None else started)
        self._main, self._step, self._finished = is_main, resume_step, False
        self._lock: lock.WorkdirLock | None = None
        self._events: Any = None
        if not is_main:
            return
        self._progress = Progress(total_steps)
        with disk.reported(self.workdir, "cannot create"):
            self.workdir.mkdir(parents=True, exist_ok=True)
        self._lock = lock.WorkdirLock(self.workdir)
        try:
            self._begin(config, info, resume_step, tensorboard)
        except BaseException:
            self._lock.release()
            raise

    def _begin(
        self, config: Mapping[str, Any], info: Mapping[str, Any], resume_step: int, events: bool
    ) -> None:
        before = _read_run(self.workdir) or {}
        if before:
            _require_same_config(self.workdir, before["config"], config)
        if self._lock and self._lock.taken_over:
            self.say(self._lock.taken_over)
        for warning in _truncate(self.workdir / "metrics.jsonl", resume_step):
            self.say(warning)
        for warning in _truncate(self.workdir / "timing.jsonl", None):
            self.say(warning)
        attempts = before.get("attempts", [])
        for attempt in attempts:  # killed ones could not say so themselves
            if attempt["status"] == "running":
                attempt["status"] = "killed"
        attempts.append(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": _now(),
                "resume_step": resume_step,
                "status": "running",
            }
        )
        self._run: dict[str, Any] = {
            "status": "running",
            "config": dict(config),
            "info": dict(info),
            "source": provenance.source(),
            "versions": provenance.versions(),
            "hardware": provenance.hardware(),
            "attempts": attempts,
            "results": {},
            "ledger": None,
        }
        self._write_run()
        with disk.reported(self.workdir, "cannot write in"):
            self._metrics = (self.workdir / "metrics.jsonl").open("a", encoding="utf-8")
            self._timing = (self.workdir / "timing.jsonl").open("a", encoding="utf-8")
        self._mark()
        if events:
            import tensorboardX  # 0.1 s, and not needed by everyone

            self._events = tensorboardX.SummaryWriter(
                str(self.workdir / "tensorboard"), purge_step=resume_step + 1 if before else None
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
        line = {"step": int(step), "kind": kind} | {k: _plain(v) for k, v in values.items()}
        self._append(self._metrics, line)
        if kind == "train":
            self._mark()
        if self._events is not None:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._events.add_scalar(f"{kind}/{name}", value, step)

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

    def sync(self) -> None:
        """Puts the lines so far on the disk itself; before a checkpoint that they must not miss."""
        if self._main:
            with disk.reported(self.workdir, "cannot write in"):
                for file in (self._metrics, self._timing):
                    os.fsync(file.fileno())

    # At the end

    def finish(self, status: str, **results: Any) -> None:
        """Ends run.json with status, results and ledger, and gives the workdir back.

        A second call does nothing.
        """
        if status not in STATUSES:
            raise ValueError(f"{status!r} is not one of {STATUSES}")
        if self._finished or not self._main:
            return
        self._finished = True
        try:
            self._progress.end()
            self._mark()
            self._metrics.close()
            self._timing.close()
            if self._events is not None:
                self._events.close()
            self._run["attempts"][-1] |= {"status": status, "finished": _now()}
            self._run["status"] = status
            self._run["results"] = {k: _plain(v) for k, v in results.items()}
            lines = [json.loads(x) for x in (self.workdir / "timing.jsonl").open(encoding="utf-8")]
            resumed = [attempt["resume_step"] for attempt in self._run["attempts"]]
            self._run["ledger"] = account(lines, resumed)
            self._write_run()
        finally:
            assert self._lock is not None
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.finish("done")
            return
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
        with disk.reported(self.workdir, "cannot write in"):
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()

    def _write_run(self) -> None:
        text = json.dumps(self._run, indent=1, allow_nan=False) + "\n"
        disk.write_atomic(self.workdir / "run.json", text.encode())


def check_workdir(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuses a workdir that cannot be used for `config`, before anything is written.

    Raises:
      ConfigError: not a directory, not writable, or of another config (MAY_CHANGE apart).
      LockedError: another run is at work in it.
    """
    workdir = pathlib.Path(workdir)
    parent = disk.existing_parent(workdir)
    if not parent.is_dir():
        raise ConfigError(f"workdir {workdir}: {parent} is not a directory; choose another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"workdir {workdir}: {parent} is not writable; choose another")
    run = _read_run(workdir)
    if run is not None:
        _require_same_config(workdir, run["config"], config)
    lock.refuse_if_held(workdir)


def _read_run(workdir: pathlib.Path) -> dict[str, Any] | None:
    path = workdir / "run.json"
    try:
        run = json.loads(path.read_bytes())
        if {"config", "attempts"} <= run.keys():
            return run
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError):
        pass
    raise ConfigError(f"{path} cannot be read as a run's record; move it away or choose another")


def _require_same_config(
    workdir: pathlib.Path, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    old, new = _flat(old), _flat(json.loads(json.dumps(new)))
    absent = "absent"
    differs = [
        f"{key} ({old.get(key, absent)} there, {new.get(key, absent)} here)"
        for key in sorted(old.keys() | new.keys())
        if key not in MAY_CHANGE and old.get(key, absent) != new.get(key, absent)
    ]
    if differs:
        raise ConfigError(
            f"{workdir} belongs to another config: {', '.join(differs)}. "
            "Choose another --workdir, or delete this one."
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        flat.update(inner if inner is not None else {f"{prefix}{key}": value})
    return flat


def _truncate(path: pathlib.Path, last: int | None) -> list[str]:
    """Drops torn lines and, given `last`, lines of later steps; returns what there is to say."""
    if not path.exists():
        return []
    data = path.read_bytes()
    kept, torn = [], 0
    for line in data.splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
            whole = line.endswith(b"\n")
        except (ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            torn += 1
        elif last is None or step <= last:
            kept.append(line)
    if b"".join(kept) != data:
        disk.write_atomic(path, b"".join(kept))
    return [f"{path}: dropped {torn} damaged line(s)"] if torn else []


def _plain(value: Any) -> Any:
    """JSON's numbers, strings and lists; a float's repr round-trips, float32 through float64."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if not isinstance(value, float):
        return _plain(np.asarray(value).tolist())
    return value if math.isfinite(value) else str(value)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
