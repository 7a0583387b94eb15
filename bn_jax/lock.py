"""One run per workdir: `WORKDIR/lock` names its holder, on one host or on a shared file system.

The lock is flock(2): the kernel drops it when the holder dies, however it dies, so a stale lock on
the same host is taken over at once. Between hosts NFS v4 and Lustre carry it too, gcsfuse does not:
a lock left by another host is therefore watched for a while before it is taken over, since a live
holder touches the file every few seconds.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from typing import Any

from bn_jax import disk
from bn_jax.errors import LockedError

NAME = "lock"
BEAT = 5.0  # seconds between heartbeats
WATCH = 20.0  # seconds without one after which a holder on another host is taken for dead


class WorkdirLock:
    """Holds the workdir from construction to release() or the end of the process.

    Args:
      workdir: exists.
      watch: seconds to look for a heartbeat of a holder on another host.

    Raises:
      LockedError: another run holds it.
      DiskError: the lock cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, watch: float = WATCH):
        self.path = workdir / NAME
        self.taken_over = ""  # one line on a stale lock, if there was one
        with disk.reported(workdir, "cannot lock"):
            self._file = _open_locked(self.path)
        try:
            holder = _holder(self._file)
            if holder:
                if holder["host"] != socket.gethostname():
                    _watch(self._file, holder, self.path, watch)
                self.taken_over = f"took over the lock of a run that is gone ({_name(holder)})"
            started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            me = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
            with disk.reported(workdir, "cannot lock"):
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, json.dumps(me).encode() + b"\n", 0)
                os.fsync(self._file)  # in an object store others see it only from here on
        except BaseException:
            os.close(self._file)
            raise
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._heartbeat, name="lock", daemon=True)
        self._beat.start()

    def _heartbeat(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file)
                os.fsync(self._file)

    def release(self) -> None:
        """Gives the workdir back; a second call does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._beat.join()  # it must not touch a descriptor that is closed and used again
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        os.close(self._file)


def refuse_if_held(workdir: pathlib.Path) -> None:
    """Raises LockedError if a live process has the flock of `workdir`; writes nothing."""
    path = workdir / NAME
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        _flock(file, path)
    finally:
        os.close(file)


def _open_locked(path: pathlib.Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _flock(file, path)
            # Its last holder may have removed the file between our open and our flock.
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
        pass  # a file system without flock: the heartbeat alone decides


def _watch(file: int, holder: dict[str, Any], path: pathlib.Path, seconds: float) -> None:
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
    """What the lock file says; {} where it says nothing whole."""
    try:
        value = json.loads(os.pread(file, 4096, 0))
        return value if {"host", "pid", "started"} <= value.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "holder unknown"
    return f"host {holder['host']}, pid {holder['pid']}, since {holder['started']}"
