"""Of several processes one dies, hangs or fails: all end within 30 s, and say which one it was.

A collective of XLA waits for ever for a process that is gone, and `jax.distributed` ends a run by
SIGABRT, after 100 s and without a reason. So a thread in each process tells process 0 every second
where its training loop is (bn_jax/peers.py), and process 0 decides who holds up the others
(bn_jax/pace.py). Whoever learns of a fault ends with exit code 6, records finished and the newest
checkpoint whole. No exit waits for anyone for long: processes end by os._exit, since the usual one
waits for all others at a barrier of jax.

With one process nothing of this is started.
"""

import contextlib
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax

from bn_jax import ending
from bn_jax.errors import DivergedError, PeerLostError, Preempted, UserError
from bn_jax.pace import SILENCE, Pace, Peer, step_timeout
from bn_jax.peers import Star

BEAT = 1.0  # seconds between signs of life
GRACE = 2.0  # seconds in which the main thread may notice a fault by itself
LAST = 7.0  # seconds after which a process that should end is gone, whatever it does
_REMEDY = "; the newest checkpoint is kept: start all processes again"

Place = Callable[[], tuple[int, str, float | None]]


class Watchdog:
    """Context manager around a run of one or many processes, after `jax.distributed.initialize`.

    With many it does not return: the process ends with os._exit, having said what there is to say.

    Raises:
      ConfigError: BN_JAX_STEP_TIMEOUT is no number of seconds.
      PeerLostError: process 0 cannot be reached.
    """

    def __init__(self) -> None:
        self._me, self._processes = jax.process_index(), jax.process_count()
        self._pace = Pace(step_timeout())
        self._star: Star | None = None
        self._place: Place = lambda: (-1, "startup", None)
        self._finish: Callable[[UserError], None] = lambda error: None
        self._owner = threading.Lock()  # of the two flags: who ends this process?
        self._leaving = False  # the main thread
        self._taken = False  # the watching one
        self._ended = False  # there is nothing left to do but to wait for the others
        self._verdict: UserError | None = None
        self._said = False
        self._known = threading.Event()  # the verdict is
        self._over = threading.Event()  # the run is, by a verdict or since everyone has ended

    def __enter__(self) -> Self:
        if self._processes == 1:
            return self
        from jax._src import distributed  # jax has no public name for its key-value store

        state, now = distributed.global_state, time.monotonic()
        # Process 0 hears of everyone, the others of process 0.
        heard = range(self._processes) if self._me == 0 else (0, self._me)
        self._pace.peers = {process: Peer(process, now) for process in heard}
        where = str(state.coordinator_address)
        try:
            self._star = Star(state.client, self._me, self._processes, where, "bn_jax/watchdog")
        except Exception as error:  # the store's errors are jax's own
            raise PeerLostError(
                f"process 0, at {where}, cannot be reached on a port of its own "
                f"({str(error).partition(chr(10))[0][:100]}): open the ports between the hosts"
            ) from error
        ending.catch_abort(self._aborted)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def follow(self, place: Place, finish: Callable[[UserError], None]) -> None:
        """From now on the training loop is at `place()`: (last step begun, part of the ledger,
        seconds of its slowest dispatch).

        finish: leaves whole records behind; called from another thread if the main thread is stuck
        when this process has to end by the fault of another.
        """
        self._place, self._finish = place, finish

    @contextlib.contextmanager
    def blaming(self) -> Iterator[None]:
        """Around the loop: an error whose cause is another process is raised as a PeerLostError."""
        try:
            yield
        except BaseException as error:
            if self._star is None:
                raise
            if _from_runtime(error):  # a collective has failed: who has gone?
                self._known.wait(SILENCE + 5 * BEAT)
            self._leave()
            own = isinstance(error, UserError) and not isinstance(error, PeerLostError)
            if self._verdict is not None and not own:
                raise self._verdict from error
            raise

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._star is None:
            return
        self._leave()
        if error is not None and error is self._verdict:
            code = self._say()
        elif error is None or isinstance(error, Preempted):
            code = 0 if error is None else ending.report(error)
            self._ended = True
            self._over.wait()  # not for ever: who does not end is found out
            if self._verdict is not None and error is None:
                code = self._say()
        else:
            code = ending.report(error)
            self._over.set()
            name = self._pace.peers[self._me].name()
            text = f"{name} ended with {type(error).__name__}: {_line(error)}"
            self._star.send(fault=text, code=code)
        self._quit(code)

    def _leave(self) -> None:
        """The main thread ends this process, unless the other one does already."""
        with self._owner:
            self._leaving = not self._taken
        if self._taken:
            threading.Event().wait()

    def _quit(self, code: int) -> None:
        assert self._star is not None
        ending.flush()
        until = time.monotonic() + LAST
        # Without process 0's service the other ones end by SIGABRT: it goes last.
        while self._me == 0 and self._star.wires and time.monotonic() < until:
            time.sleep(0.02)
        os._exit(code)

    # The watching thread

    def _watch(self) -> None:
        try:
            before = time.monotonic()
            while True:
                now = time.monotonic()
                if now - before > 5 * BEAT:  # this process was frozen, or the machine too busy
                    self._pace.forgive(now - before)
                before = now
                self._beat(now)
                for process, line in self._collect(now + BEAT):
                    self._take(process, line)
                if not self._over.is_set() and (
                    why := self._pace.blame(time.monotonic(), stuck=self._me == 0)
                ):
                    self._convict(PeerLostError(why + _REMEDY))
        except Exception as error:  # without a watch nobody would ever end
            traceback.print_exc()
            self._convict(PeerLostError(f"the watch over the processes has failed: {error!r}"))

    def _beat(self, now: float) -> None:
        assert self._star is not None
        step, part, self._pace.slowest = self._place()
        about = {"step": step, "part": part, "ended": self._ended}
        about |= {"host": socket.gethostname(), "pid": os.getpid()}
        self._pace.seen(self._me, about, now)
        self._star.send(**about)
        if self._me == 0 and all(peer.ended for peer in self._pace.peers.values()):
            self._star.send(over=True)
            self._over.set()

    def _collect(self, until: float) -> list[tuple[int, dict[str, Any] | None]]:
        """What arrives up to a time; earlier, if it is more than signs of life."""
        assert self._star is not None
        found: list[tuple[int, dict[str, Any] | None]] = []
        while (left := until - time.monotonic()) > 0:
            found += self._star.poll(left)
            if any(line is None or "step" not in line for _, line in found):
                break
        return found

    def _take(self, process: int, line: dict[str, Any] | None) -> None:
        if self._over.is_set():
            return
        if line is None:
            name = self._pace.peers[process].name()
            self._convict(PeerLostError(f"{name} was killed, or its machine failed{_REMEDY}"))
        elif "fault" in line:
            kind = DivergedError if line["code"] == DivergedError.exit_code else PeerLostError
            self._convict(kind(line["fault"]))
        elif "over" in line:
            self._over.set()
        elif "step" in line:
            self._pace.seen(process, line, time.monotonic())

    def _convict(self, error: UserError) -> None:
        """Tells everyone of a fault, and ends this process: by its main thread, if it can."""
        assert self._star is not None
        self._verdict = error
        if self._me == 0:
            self._star.send(fault=str(error), code=error.exit_code)
        self._over.set()
        self._known.set()
        threading.Thread(target=self._kill, args=(error.exit_code,), daemon=True).start()
        threading.Thread(target=self._end, args=(error,), daemon=True).start()

    def _end(self, error: UserError) -> None:
        until = time.monotonic() + GRACE
        while time.monotonic() < until and not self._leaving:
            time.sleep(0.02)
        with self._owner:
            self._taken = not self._leaving
        if self._taken:
            try:
                self._finish(error)
            finally:
                self._quit(self._say())

    def _kill(self, code: int) -> None:
        time.sleep(LAST)
        threading.Thread(target=self._say, daemon=True).start()  # stderr may be stuck, too
        time.sleep(0.5)
        os._exit(code)

    def _aborted(self) -> None:
        """jax aborts a process when process 0's service is gone: first let it say who is."""
        if self._known.wait(GRACE):
            time.sleep(LAST + 1)  # the process is being ended

    def _say(self) -> int:
        """The verdict in one line, once. Returns its exit code."""
        assert self._verdict is not None
        said, self._said = self._said, True
        return self._verdict.exit_code if said else ending.report(self._verdict)


def _from_runtime(error: BaseException) -> bool:
    """Whether an error may have come from a device or the network rather than from this code."""
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
