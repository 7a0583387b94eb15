"""Guards a workdir: it has one config and one data set, and only one run may use it at a time.

Both are checked before anything is compiled or written.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bn_jax.errors import ConfigError, DiskError, LockedError
from bn_jax.workdir import files
from bn_jax.workdir.lines import Attempt
from bn_jax.workdir.reader import added_since, completed, flat, read_record

# A resumed run may change how long it trains and what it keeps and shows, not what it computes.
MAY_CHANGE = frozenset(
    (
        "total_steps",
        "log_every",
        "eval_every",
        "eval_early",
        "eval_test",
        "checkpoint_every",
        "checkpoint_wait",
        "write_seconds",
        "keep_last",
        "keep_best",
        "keep_every",
        "eval_batch_size",
        "record.tensorboard",
        "record.wandb",
        "data.dir",
    )
)

# Which activations are recorded. Lines of training and evaluation do not depend on it.
OBSERVED = frozenset(
    ("record.activations", "record.activation_every", "record.activation_examples")
)

# Fields of run.json's info.data. The description is not compared: its folder may have changed.
SAME_DATA = (
    "name",
    "split",
    "train_examples",
    "eval_examples",
    "classes",
    "class_names",
    "image_shape",
    "digest",
)

ANY_THREADS = "BN_JAX_ANY_THREADS"  # environment variable


# Config, data and machine


def check_workdir(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
    *,
    is_main: bool = True,
) -> None:
    """Checks that a workdir can be used for `config`, before anything is written.

    Only process 0 (`is_main`) checks the lock, because the others would find process 0's own.

    Raises:
      ConfigError: it is not a directory, not writable, of another config (except for MAY_CHANGE),
        or was trained on other data than `info` describes.
      LockedError: another run uses it.
    """
    workdir = pathlib.Path(workdir)
    parent = files.existing_parent(workdir)
    if not parent.is_dir():
        raise ConfigError(f"workdir {workdir}: {parent} is not a directory; choose another")
    if not os.access(parent, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"workdir {workdir}: {parent} is not writable; choose another")

    run = read_record(workdir)
    if run is not None:
        before = run["info"].get("data", {})
        now = (info or {}).get("data", {})
        if "imported" in run["info"]:  # info.data then describes where the weights come from
            now = {}
        # A set of another size also changes the config (decay_examples); the message names the set.
        if before.get("name") == now.get("name"):
            require_same_data(workdir, before, now)
        require_same_config(workdir, run["config"], config)
        require_same_data(workdir, before, now)

    if is_main:
        refuse_if_held(workdir)


def as_begun(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """Returns the config with which a run resumes that was begun with an older version.

    Before there was a choice, `model.init` was Glorot's, and `decay_examples` was given instead of
    `decay_epochs`. What the command line sets explicitly is not changed: like any other change,
    `require_same_config` refuses it.
    """
    workdir = pathlib.Path(workdir)
    run = read_record(workdir)
    if run is None:
        return config

    since = added_since(workdir)
    found = ConfigDict(config.to_dict())
    if "model.init" in since and found.model.get("init") == "auto":
        found.model.init = run["config"]["model"]["init"]
    if "decay_epochs" in since and not found.get("decay_examples"):
        found.decay_epochs = 0.0
        found.decay_examples = run["config"]["decay_examples"]
    return found.lock()


def require_same_config(
    workdir: pathlib.Path, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    """Raises ConfigError that names the fields that differ, except for MAY_CHANGE."""
    old = flat(completed(old))
    new = flat(completed(json.loads(json.dumps(new))))  # tuples are lists in run.json
    absent = "absent"
    differs = [
        f"{key} ({old.get(key, absent)} there, {new.get(key, absent)} here)"
        for key in sorted(old.keys() | new.keys())
        if key not in MAY_CHANGE | OBSERVED and old.get(key, absent) != new.get(key, absent)
    ]
    if differs:
        raise ConfigError(
            f"{workdir} belongs to another config: {', '.join(differs)}. "
            "Choose another --workdir, or delete this one."
        )


def require_same_data(
    workdir: pathlib.Path, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Compares info.data of two attempts, as far as the older one has the fields.

    Raises:
      ConfigError: names what differs.
    """
    differs = [
        f"{key} ({_short(before[key])} there, {_short(now[key])} here)"
        for key in SAME_DATA
        if key in before and key in now and before[key] != now[key]
    ]
    if differs:
        raise ConfigError(
            f"{workdir} was trained on other data: {', '.join(differs)}. Point data.dir at the "
            "same data set (its folder may have moved), or choose another --workdir."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def require_same_threads(workdir: pathlib.Path, platform: str, threads: int) -> None:
    """Checks that a CPU run resumes with the same size of XLA's thread pool, for the same bits.

    Raises:
      ConfigError: the run in `workdir` used another number of threads, and BN_JAX_ANY_THREADS=1
        does not say that this does not matter.
    """
    run = read_record(workdir)
    if run is None or os.environ.get(ANY_THREADS) == "1":
        return

    before = run["hardware"]
    if before["platform"] == platform == "cpu" and before["cpu_threads"] != threads:
        raise ConfigError(
            f"{workdir} was trained with {before['cpu_threads']} CPU threads, this process has "
            f"{threads}: sums would be split differently, and the last digits would differ. Set "
            f"NPROC={before['cpu_threads']}, or {ANY_THREADS}=1 to accept other last digits."
        )


# The workdir itself and its attempts


def create(workdir: pathlib.Path) -> None:
    """Makes the directory if it is absent.

    Raises:
      ConfigError: it cannot be made there.
      DiskError: the disk is full.
    """
    try:
        with files.reported(workdir, "cannot create"):
            workdir.mkdir(parents=True, exist_ok=True)
    except DiskError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"workdir {workdir} cannot be created; choose another") from error


def new_attempt(attempts: list[Attempt], resume_step: int, origin: Mapping[str, Any]) -> None:
    """Adds an attempt that begins now to those of run.json."""
    for attempt in attempts:
        if attempt["status"] == "running":  # it was killed, and could not record that itself
            attempt["status"] = "killed"

    attempts.append(
        {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": files.now(),
            "resume_step": resume_step,
            "status": "running",
            "source": origin["source"],
            "versions": origin["versions"],
            "hardware": origin["hardware"],
        }
    )


# The lock: WORKDIR/lock names the run that holds the workdir, on one host or on a shared disk.
#
# It uses flock(2). The kernel drops the lock when its holder dies, however that happens, so a lock
# that was left on the same host is taken over at once. Between hosts flock works on NFS v4 and
# Lustre, but not with gcsfuse. Therefore a lock of another host is watched for a while before it is
# taken over: a live holder touches the file every few seconds. A holder that was paused for longer
# (by SIGSTOP, or with its virtual machine) finds another name in the file before it writes again,
# and ends.


LOCK = "lock"
BEAT = 5.0  # seconds between heartbeats
WATCH = 20.0  # seconds without a heartbeat after which a holder on another host counts as dead


class WorkdirLock:
    """Holds the workdir from its construction until release() or the end of the process.

    Args:
      workdir: exists.
      watch: seconds to wait for a heartbeat of a holder on another host.

    Raises:
      LockedError: another run holds it.
      DiskError: the lock cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, watch: float = WATCH):
        self.path = workdir / LOCK
        self.taken_over = ""  # a line for the user if the lock of a dead run was taken over
        with files.reported(workdir, "cannot lock"):
            self._file = _open_locked(self.path)

        try:
            holder = _holder(self._file)
            if holder:
                if holder["host"] != socket.gethostname():
                    _watch(self._file, holder, self.path, watch)
                self.taken_over = f"took over the lock of a run that is gone ({_name(holder)})"
            with files.reported(workdir, "cannot lock"):
                self._sign()
        except BaseException:
            os.close(self._file)
            raise

        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._heartbeat, name="lock", daemon=True)
        self._beat.start()

    def _sign(self) -> None:
        """Writes into the file who holds it."""
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": files.now()}
        self._mine = json.dumps(me).encode() + b"\n"
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, self._mine, 0)
        os.fsync(self._file)  # in an object store others only see it from here on

    def _heartbeat(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file)
                os.fsync(self._file)

    def held(self) -> bool:
        """Whether the file still has the name of this run."""
        try:
            return self.path.read_bytes() == self._mine
        except FileNotFoundError:
            return False
        except OSError:
            return True  # a failing disk is reported by the next write

    def require_held(self) -> None:
        """Raises LockedError if another run took the workdir over. Call it before writing."""
        if not self.held():
            raise LockedError(
                f"{self.path.parent} was taken over by another run, or its lock was removed, while "
                "this process gave no sign of life: it ends and writes nothing more"
            )

    def release(self) -> None:
        """Gives the workdir back; a second call does nothing."""
        if self._stop.is_set():
            return

        self._stop.set()
        self._beat.join()  # it must not touch the descriptor once that is closed and reused
        if self.held():
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        os.close(self._file)


def refuse_if_held(workdir: pathlib.Path) -> None:
    """Raises LockedError if a live process on this host holds `workdir`; writes nothing."""
    path = workdir / LOCK
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        _flock(file, path)
    finally:
        os.close(file)


def _open_locked(path: pathlib.Path) -> int:
    """Opens and locks the file. Raises LockedError if another process has the lock."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _flock(file, path)
            # The last holder may have removed the file between our open and our flock.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _flock(file: int, path: pathlib.Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path, _holder(file)) from None
    except OSError:
        pass  # the file system has no flock, so only the heartbeat decides


def _watch(file: int, holder: dict[str, Any], path: pathlib.Path, seconds: float) -> None:
    """Raises LockedError if there is a heartbeat within `seconds`."""
    before = os.fstat(file).st_mtime_ns
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, seconds / 4))
        if path.stat().st_mtime_ns != before:
            raise _in_use(path, holder)


def _in_use(path: pathlib.Path, holder: dict[str, Any]) -> LockedError:
    return LockedError(
        f"{path.parent} is in use by another run ({_name(holder)}): wait for it, stop it, or "
        "choose another --workdir"
    )


def _holder(file: int) -> dict[str, Any]:
    """Reads who holds the lock from its file; {} if that is empty or incomplete."""
    try:
        value = json.loads(os.pread(file, 4096, 0))
    except (OSError, ValueError):
        return {}
    whole = isinstance(value, dict) and {"host", "pid", "started"} <= value.keys()
    return value if whole else {}


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "holder unknown"
    return f"host {holder['host']}, pid {holder['pid']}, since {holder['started']}"
