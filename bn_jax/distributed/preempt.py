"""Stopping on SIGTERM and Ctrl-C: at the same step on every host, with the state saved.

Orbax' and jax's own preemption support needs `jax.distributed` and knows no Ctrl-C; this works with
one process and with many.

With many, whichever process is signalled posts a request to the coordination service of
`jax.distributed`. A thread of every process sees it within POLL seconds, and, whatever its main
loop is doing, posts the last step that the loop began and holds the loop there. All then go on to
the largest of these steps, which some process has already begun, and stop. A step itself costs a
lock and a comparison.
"""

import contextlib
import itertools
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import jax

from bn_jax.errors import PeerLostError

POLL = 0.2  # seconds between looks at the coordination service, in the background
PATIENCE = 20.0  # seconds for all processes to answer a request
_NUMBERS = itertools.count()  # keys of the service cannot be written twice in a job


class Signals:
    """Context manager around the training loop; construct it after `jax.distributed.initialize`.

    The first SIGTERM or SIGINT asks for a stop; after a first Ctrl-C a second one kills at once.

    Args:
      dispatch: steps that the loop begins between two calls of `stop_at`.
    """

    def __init__(self, dispatch: int) -> None:
        self._dispatch = dispatch
        self.requested = threading.Event()  # by a signal to this process
        self.reason = ""
        self._lock = threading.Condition()
        # Last step that the loop was allowed to begin. 0 before the first call of stop_at: the
        # first dispatch is under way then, which all processes begin alike.
        self._began = 0
        self._held = False  # the loop may begin no further step until _target is known
        self._target: int | None = None
        self._error: Exception | None = None
        self._closed = threading.Event()
        self._old: dict[int, Any] = {}
        self._thread: threading.Thread | None = None
        self._key = f"bn_jax/stop/{next(_NUMBERS)}"

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # else Python allows no handler
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._on_signal)
        if jax.process_count() > 1:
            self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._closed.set()
        if self._thread is not None:
            self._thread.join(2 * POLL + 1)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            # The kernel's default needs no Python: it also ends a loop that is stuck in XLA.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self.requested.is_set():
            self.reason = name
            self.requested.set()
            text = f"bn_jax: {name}: stopping after this step; Ctrl-C ends at once, unsaved\n"
            os.write(2, text.encode())  # print is not safe in a handler

    def stop_at(self, step: int) -> bool:
        """Whether to stop after `step`; to be called after each dispatch, with its last step.

        All processes get True at the same step. With one process: as soon as there was a signal.

        Raises:
          PeerLostError: a process did not answer a request to stop.
        """
        if self._thread is None:
            return self.requested.is_set()
        with self._lock:
            deadline = time.monotonic() + 2 * PATIENCE
            while self._held and self._target is None and self._error is None:
                self._lock.wait(1.0)
                if time.monotonic() > deadline:
                    self._error = PeerLostError("no agreement on the step to stop at: peer lost")
            if self._error is not None:
                raise self._error
            if self._target is not None:
                return step >= self._target
            self._began = step + self._dispatch
            return False

    def _watch(self) -> None:
        """Thread: posts this process's request, sees anyone's, agrees on the step."""
        client = _client()
        posted = False
        while not self._closed.wait(POLL):
            try:
                if self.requested.is_set() and not posted:
                    with contextlib.suppress(Exception):  # another process was faster
                        client.key_value_set(f"{self._key}/request", self.reason)
                    posted = True
                client.key_value_try_get(f"{self._key}/request")
            except Exception:  # not asked for yet; a service that is gone is the watchdog's matter
                continue
            self._agree(client)
            return

    def _agree(self, client: Any) -> None:
        with self._lock:
            self._held = True
            mine = self._began
        target, error = mine, None
        me = process = jax.process_index()
        try:
            client.key_value_set(f"{self._key}/{me}", str(mine))
            for process in range(jax.process_count()):
                key = f"{self._key}/{process}"
                target = max(target, int(client.blocking_key_value_get(key, int(1000 * PATIENCE))))
        except Exception as lost:
            who = "the coordination service" if process == me else f"process {process}"
            error = PeerLostError(
                f"{who} did not answer within {PATIENCE:.0f} s of a request to stop "
                f"at step {mine}: {str(lost).partition(chr(10))[0][:100]}"
            )
        with self._lock:
            self._target, self._error = (target, None) if error is None else (None, error)
            self._lock.notify_all()


def _client() -> Any:
    """The key-value store that jax.distributed runs; jax has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client
