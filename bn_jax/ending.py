"""How a process ends whose exit must wait for nobody: its last line, its exit code, its abort."""

import contextlib
import ctypes
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from bn_jax import command

_handlers: list[Any] = []  # C calls them: they must never be collected


def report(error: BaseException) -> int:
    """Prints an error as commands do, a traceback if it is no user's; returns the exit code."""

    def fail() -> None:
        raise error

    try:
        command.run(fail)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    return 1


def flush() -> None:
    """Writes out what was printed, as the usual exit does."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def catch_abort(before: Callable[[], None]) -> None:
    """Calls `before`, in the thread that aborts, before abort() ends the process.

    Python's own handlers come too late for that: they run when the C code has returned.
    """
    libc = ctypes.CDLL(None)

    def on_abort(number: int) -> None:
        before()
        libc.signal(signal.SIGABRT, 0)  # abort() goes on

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    _handlers.append(handler)
    libc.signal(signal.SIGABRT, handler)
