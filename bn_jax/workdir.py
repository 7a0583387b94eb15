"""May this workdir be used for this config? Asked before anything is compiled or written."""

import errno
import json
import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

from bn_jax import disk, lock
from bn_jax.errors import ConfigError, DiskError

# A resumed run may change how long it goes on and what it keeps and shows, not what it computes.
MAY_CHANGE = frozenset(
    (
        "total_steps",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "checkpoint_wait",
        "keep_last",
        "keep_best",
        "eval_batch_size",
        "record.tensorboard",
        "record.wandb",
        "data.dir",
    )
)

# Fields that older records lack, each with the value that stands for what runs did then.
ADDED = {
    "reproducible": False,
    "checkpoint_wait": 0.0,
    "learning_rate_scaling": "none",
    "warmup_examples": 0.0,
    "record.wandb": False,
    "precision": "default",
}

# Of run.json's info.data; the description may name a folder, which may change.
SAME_DATA = (
    "name", "split", "train_examples", "eval_examples", "classes", "class_names", "image_shape",
    "digest",
)  # fmt: skip

ANY_THREADS = "BN_JAX_ANY_THREADS"  # environment variable


def check_workdir(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
    *,
    is_main: bool = True,
) -> None:
    """Refuses a workdir that cannot be used for `config`, before anything is written.

    The lock is looked at by process 0 only (`is_main`): the others would find process 0's own.

    Raises:
      ConfigError: not a directory, not writable, of another config (MAY_CHANGE apart), or trained
        on other data than `info` describes.
      LockedError: another run is at work in it.
    """
    workdir = pathlib.Path(workdir)
    parent = disk.existing_parent(workdir)
    if not parent.is_dir():
        raise ConfigError(f"workdir {workdir}: {parent} is not a directory; choose another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"workdir {workdir}: {parent} is not writable; choose another")
    run = read_run(workdir)
    if run is not None:
        require_same_config(workdir, run["config"], config)
        before = run["info"]
        if info and "data" in info and "data" in before and "imported" not in before:
            require_same_data(workdir, before["data"], info["data"])
    if is_main:
        lock.refuse_if_held(workdir)


def require_same_threads(workdir: pathlib.Path, platform: str, threads: int) -> None:
    """Refuses to go on with a CPU run under another size of XLA's thread pool: other bits.

    Raises:
      ConfigError: the run in `workdir` used another number of threads, and BN_JAX_ANY_THREADS=1
        does not say that this does not matter.
    """
    run = read_run(workdir)
    if run is None or os.environ.get(ANY_THREADS) == "1":
        return
    before = run["hardware"]
    if before["platform"] == platform == "cpu" and before["cpu_threads"] != threads:
        raise ConfigError(
            f"{workdir} was trained with {before['cpu_threads']} CPU threads, this process has "
            f"{threads}: sums would be split otherwise and the bits differ. Set "
            f"NPROC={before['cpu_threads']}, or {ANY_THREADS}=1 to go on all the same."
        )


def new_attempt(attempts: list[dict[str, Any]], resume_step: int, origin: dict[str, Any]) -> None:
    """Adds an attempt that begins now to those of run.json."""
    for attempt in attempts:  # killed ones could not say so themselves
        if attempt["status"] == "running":
            attempt["status"] = "killed"
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": now()}
    attempts.append(me | {"resume_step": resume_step, "status": "running"} | origin)


def now() -> str:
    """The local time, with its zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def create(workdir: pathlib.Path) -> None:
    """Makes the directory if it is absent.

    Raises:
      ConfigError: it cannot be there at all.
      DiskError: the disk is full.
    """
    try:
        with disk.reported(workdir, "cannot create"):
            workdir.mkdir(parents=True, exist_ok=True)
    except DiskError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"workdir {workdir} cannot be created; choose another") from error


def read_run(workdir: pathlib.Path) -> dict[str, Any] | None:
    """WORKDIR/run.json; None if there is none. Raises ConfigError if it is not one."""
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


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded config with the fields that were ADDED since."""
    found = dict(config)
    for field, value in ADDED.items():
        section, _, name = field.rpartition(".")
        if section and name not in found.get(section, {}):
            found[section] = {**found.get(section, {}), name: value}
        elif not section:
            found.setdefault(name, value)
    return found


def require_same_config(
    workdir: pathlib.Path, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    """Raises ConfigError naming the fields that differ, MAY_CHANGE apart."""
    old, new = _flat(completed(old)), _flat(completed(json.loads(json.dumps(new))))
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


def require_same_data(
    workdir: pathlib.Path, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Compares info.data of two attempts; what the older one does not hold is not compared.

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


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        flat.update(inner if inner is not None else {f"{prefix}{key}": value})
    return flat
