"""Stops a run on SIGTERM or Ctrl-C: after the same step in every process, with the state saved.

With several processes jax agrees on the step (`multihost_utils.reached_preemption_sync_point`). It
listens to SIGTERM alone, from `jax.distributed.initialize` on, and would not get the signal if
Python had a handler for it. So with several processes only Ctrl-C has a handler here, which sends
jax a SIGTERM. With one process both signals have a handler here.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Signals:
    """Context manager around the training loop, after `jax.distributed.initialize`.

    The first signal asks for a stop. After a first Ctrl-C a second one kills at once.

    Args:
      start: the step that the loop starts from.
      dispatch: steps between two calls of `stop_at`.
    """

    def __init__(self, start: int, dispatch: int) -> None:
        self._start = start
        self._dispatch = dispatch
        self._several = jax.process_count() > 1
        self._old: dict[int, Any] = {}
        self.requested = threading.Event()  # set by a signal to this process
        self.reason = "a signal to one of the processes" if self._several else ""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            numbers = [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]
            for number in numbers:
                self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            # The kernel's default needs no Python: it also ends a loop that is stuck in XLA.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.requested.is_set():
            return

        self.reason = name
        self.requested.set()
        text = f"bn_jax: {name}: stopping after this step"
        if number == signal.SIGINT:
            text += "; a second Ctrl-C ends at once and saves nothing"
        os.write(2, f"{text}\n".encode())  # print is not safe in a handler
        if self._several:
            signal.raise_signal(signal.SIGTERM)  # for jax

    def stop_at(self, step: int) -> bool:
        """Whether to stop after `step`, the last one of a dispatch; call it after each dispatch.

        All processes get True at the same step. A single process gets it after its first signal.
        """
        if not self._several:
            return self.requested.is_set()
        # jax needs consecutive numbers from 1 on; it stops at the one after the largest so far.
        dispatches = (step - self._start) // self._dispatch
        return multihost_utils.reached_preemption_sync_point(dispatches)
