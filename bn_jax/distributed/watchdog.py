"""Ends all processes of a run within 30 s when one of them dies, hangs or fails.

The processes of a run wait for each other in every step, so if one is lost, the others would wait
forever. Three things prevent that:

* jax's heartbeats (`startup.initialize`) notice a process that was killed, is frozen, lost its
  network or has left early. jax then aborts all others: exit code 134.
* The watch of this file notices that the training loop of its own process does not advance. It
  closes the records and ends the process with exit code 6. The others follow by jax.
* A process that meets an error leaves with the exit code of that error. It does not wait at the
  barrier at which jax usually holds processes until all have come.

A single process starts none of this.
"""

import collections
import contextlib
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import jax

from bn_jax import errors
from bn_jax.errors import ConfigError, PeerLostError, Preempted, UserError

STEP_TIMEOUT = "BN_JAX_STEP_TIMEOUT"  # environment variable that replaces ALWAYS

# Seconds that the training loop may stay in one place:
ALWAYS = 20.0  # in the loop, at least
FACTOR = 10.0  # or this many times the slowest of the last dispatches
FIRST = 300.0  # until the first dispatch has finished; it may allocate, connect, load kernels
OUTSIDE = 1800.0  # in start-up, compilation, evaluation and saving, whose duration is not known

# A step also waits for the input of all other processes. The process whose input hangs must be the
# first to end, so that the line on stderr names the input.
STEP_SHARE = 1.25

INTERVAL = 1.0  # seconds between two looks at the training loop
FROZEN = 5.0  # if there are more seconds between two looks, this process itself did not run
CLOSING = 7.0  # seconds for closing the records when the loop is stuck
FAREWELL = 5.0  # seconds to wait for other processes that end for the same reason as this one


class Place(NamedTuple):
    """Where a training loop is.

    step: the last step begun; -1 before the first. part: of the ledger, `workdir.timing.PARTS`.
    slowest: seconds, see `Dispatches.slowest`.
    """

    step: int
    part: str
    slowest: float | None


class Dispatches:
    """How long the last 20 dispatches took.

    The first one also allocates and connects, so it counts only until there is another.
    """

    def __init__(self) -> None:
        self.count = 0
        self._total = 0.0
        self._lengths: collections.deque[float] = collections.deque(maxlen=20)

    def finished(self, total: float) -> None:
        """Counts one more dispatch.

        total: seconds that all dispatches so far took, without evaluations and saves.
        """
        if self.count == 1:
            self._lengths.clear()
        self._lengths.append(total - self._total)
        self.count += 1
        self._total = total

    def slowest(self) -> float | None:
        """Returns the seconds of the slowest, None before the first ends; any thread may call."""
        return max(list(self._lengths), default=None)

    def mean(self) -> float:
        """Returns the mean seconds of a dispatch; at least one must have finished."""
        return sum(self._lengths) / len(self._lengths)


class StallDetector:
    """Finds a training loop that does not advance. Times are passed in, in seconds.

    Args:
      always: seconds that the loop may always stay in one place.
    """

    def __init__(self, always: float = ALWAYS):
        self._always = always
        self._place = (-1, "")
        self._since = 0.0  # when the loop came to its place
        self._looked = math.inf  # when `look` was called last

    def limit(self, part: str, slowest: float | None) -> float:
        """Returns the seconds for which a loop may stay in `part` of one step."""
        if part not in ("input", "step"):
            return max(OUTSIDE, self._always)
        if slowest is None:
            seconds = max(FIRST, self._always)
        else:
            seconds = max(FACTOR * slowest, self._always)
        return seconds if part == "input" else STEP_SHARE * seconds

    def look(self, place: Place, now: float) -> str:
        """Returns where the loop is stuck, in words, or '' if it is not."""
        if now - self._looked > FROZEN:
            # The loop did not run either: the process was stopped, or the machine was too busy.
            self._since += now - self._looked
        self._looked = now

        if (place.step, place.part) != self._place:
            self._place = (place.step, place.part)
            self._since = now

        limit = self.limit(place.part, place.slowest)
        if now - self._since <= limit:
            return ""
        where = f"of step {place.step:,}" if place.step >= 0 else "before the first step"
        return f"no progress for {limit:.0f} s in {place.part!r} {where}"


class Watchdog:
    """Context manager around a run of one or many processes and `startup.initialize`.

    Once `jax.distributed` is initialized, an error ends this process here, by os._exit with the
    error's code. A run that is done or preempted returns; at the usual exit jax waits until all
    processes have come there.

    Raises:
      ConfigError: BN_JAX_STEP_TIMEOUT is not a positive number of seconds.
    """

    def __init__(self) -> None:
        self._detector = StallDetector(step_timeout())
        self._place: Callable[[], Place]  # see `follow`
        self._close: Callable[[UserError], None]
        self._ending = threading.Lock()  # belongs to the thread that ends this process
        self._over = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not jax.distributed.is_initialized():
            return
        self._ending.acquire()  # never returns if the watch already ends this process
        self._over.set()
        if error is not None and not isinstance(error, Preempted):
            # If another process is lost, there is nobody to wait for.
            patience = 0.0 if isinstance(error, PeerLostError) else FAREWELL
            leave(report(error), patience)

    def follow(self, place: Callable[[], Place], close: Callable[[UserError], None]) -> None:
        """Watches a training loop from now on, if there are several processes.

        Args:
          place: says where the loop is; called from another thread.
          close: completes the records; called from another thread when the loop is stuck.
        """
        self._place = place
        self._close = close
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            stuck = self._detector.look(self._place(), time.monotonic())
            if stuck:
                self._end(stuck)
                return

    def _end(self, stuck: str) -> None:
        """Ends this process from the watching thread, since the main thread cannot."""
        if not self._ending.acquire(blocking=False):
            return  # the main thread is ending it
        error = PeerLostError(
            f"process {jax.process_index()}: {stuck}; the newest checkpoint is kept: start all "
            f"processes again (for slow storage set {STEP_TIMEOUT})"
        )

        def close() -> None:
            try:
                self._close(error)
            finally:
                report(error)
                flush()

        # It runs in a thread of its own, because the disk or stderr may be what is stuck.
        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(CLOSING)
        os._exit(error.exit_code)


def step_timeout() -> float:
    """Returns BN_JAX_STEP_TIMEOUT: seconds that the loop may always stay in one place."""
    text = os.environ.get(STEP_TIMEOUT, str(ALWAYS))
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 < seconds < math.inf:
            return seconds
    raise ConfigError(
        f"{STEP_TIMEOUT}={text} must be a positive number of seconds; the default is {ALWAYS:.0f}"
    )


@contextlib.contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Raises PeerLostError instead of the error of a collective that has lost a process."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or not failed_collective(error):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise PeerLostError(
            f"process {jax.process_index()} has lost another process ({reason}); the newest "
            "checkpoint is kept: start all processes again"
        ) from error


def failed_collective(error: BaseException) -> bool:
    """Whether a collective operation failed, which happens when a process is gone.

    Gloo (CPU) was tried: it raises a ValueError. NCCL and TPUs were not; their words are taken from
    XLA's messages.
    """
    if isinstance(error, UserError):
        return False
    return bool(re.search(r"Gloo|NCCL|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED", str(error)))


def report(error: BaseException) -> int:
    """Prints an error as commands do, with a traceback unless it is a UserError.

    Returns its exit code.
    """

    def fail() -> None:
        raise error

    try:
        errors.run_command(fail)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    return 1


def leave(code: int, patience: float) -> None:
    """Ends this process with `code`, whether the other processes end or not.

    If all processes end, as after divergence, they meet at jax's barrier, and each keeps its code.
    Without the barrier process 0 might end first, and then jax aborts the others.

    patience: seconds to wait for the others.
    """
    flush()
    if patience > 0:
        meeting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        meeting.start()
        meeting.join(patience)
    os._exit(code)


def flush() -> None:
    """Writes out what was printed, as the usual exit does."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
