"""Who of several processes is gone, silent or stuck: decided from what they say, and from nothing
else. No sockets, threads or clocks: times come in as numbers, in seconds.
"""

import collections
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax

from bn_jax import errors
from bn_jax.errors import ConfigError, DivergedError, PeerLostError, Preempted, UserError

SILENCE = 15.0  # without a sign of life; a frozen process, a machine without power or network
STUCK = 20.0  # in one place of the training loop, at least
FACTOR = 10.0  # ... or this many times the longest of the last dispatches
FIRST = 300.0  # until the first dispatch is through: it may allocate, connect, load kernels
ASIDE = 1800.0  # start-up, compiling, evaluation, saving: hours only where something is wrong
FLOOR = "BN_JAX_STEP_TIMEOUT"  # environment variable: STUCK, for slow storage
_LOOP = ("step", "input")


@dataclasses.dataclass
class Peer:
    """What is known of one process. step: the last one that it has begun; part: of the ledger."""

    process: int
    since: float  # when it came to where it is
    heard: float = 0.0  # when it last gave a sign
    host: str = "unknown"
    pid: int = 0
    step: int = -1
    part: str = "startup"
    ended: bool = False  # it is done and waits for the others

    def __post_init__(self) -> None:
        self.heard = self.since

    def name(self) -> str:
        """For messages."""
        return f"process {self.process} (host {self.host}, pid {self.pid})"


class Dispatches:
    """How long the last 20 dispatches took. The first one allocates and connects: it counts only
    until there is another."""

    def __init__(self) -> None:
        self._count, self._total = 0, 0.0
        self._lengths: collections.deque[float] = collections.deque(maxlen=20)

    def through(self, total: float) -> None:
        """One more is through; `total`: seconds of all so far, evaluations and saves left out."""
        if self._count == 1:
            self._lengths.clear()
        self._lengths.append(total - self._total)
        self._count, self._total = self._count + 1, total

    def slowest(self) -> float | None:
        """Seconds of the longest; None before the first is through. From any thread."""
        return max(list(self._lengths), default=None)


class Pace:
    """Finds what takes far longer than it should.

    Args:
      floor: seconds in one place of the loop that are always allowed.
    """

    def __init__(self, floor: float = STUCK):
        self.floor = floor
        self.peers: dict[int, Peer] = {}
        self.slowest: float | None = None  # of the last dispatches; see Dispatches

    def limit(self, part: str) -> float:
        """Seconds that a process may stay in one place."""
        if part not in _LOOP:
            return max(ASIDE, self.floor)
        if self.slowest is None:
            return max(FIRST, self.floor)
        return max(self.floor, FACTOR * self.slowest)

    def seen(self, process: int, about: Mapping[str, Any], now: float) -> None:
        """A sign of life: host, pid, step, part and ended of a process."""
        peer = self.peers[process]
        peer.heard, peer.ended = now, bool(about["ended"])
        peer.host, peer.pid = str(about["host"]), int(about["pid"])
        if (peer.step, peer.part) != (about["step"], about["part"]):
            peer.step, peer.part, peer.since = int(about["step"]), str(about["part"]), now

    def forgive(self, seconds: float) -> None:
        """This process itself was frozen for so long: nobody is to blame for it."""
        for peer in self.peers.values():
            peer.heard += seconds
            peer.since += seconds

    def blame(self, now: float, *, stuck: bool) -> str:
        """The process that is silent or, with `stuck`, holds up the others, in words; '' if all is
        well."""
        running = [peer for peer in self.peers.values() if not peer.ended]
        for peer in running:
            if now - peer.heard > SILENCE:
                return (
                    f"{peer.name()} has given no sign of life for {SILENCE:.0f} s: it is frozen, "
                    "or its machine or network is gone"
                )
        return self._stuck(running, now) if stuck else ""

    def _stuck(self, running: list[Peer], now: float) -> str:
        """All wait for the process that is furthest behind; among equals for one that is not yet in
        the step itself. How long it may stay there depends on what it does there."""
        if not running:
            return ""
        behind = min(peer.step for peer in running)
        last = [peer for peer in running if peer.step == behind]
        elsewhere = [peer for peer in last if peer.part != "step"]
        if elsewhere:
            culprit = max(elsewhere, key=lambda peer: now - peer.since - self.limit(peer.part))
        else:  # the last one to come counts: until then the others could but wait
            culprit = max(last, key=lambda peer: peer.since)
        limit = self.limit(culprit.part)
        if now - culprit.since <= limit:
            return ""
        place = f"{culprit.part!r} of step {culprit.step:,}" if behind >= 0 else "its start"
        if not elsewhere and len(last) == len(self.peers) > 1:
            return f"all processes have waited for each other in {place} for {limit:.0f} s"
        return f"{culprit.name()} has been in {place} for {limit:.0f} s and does not go on"


def step_timeout() -> float:
    """Seconds in one place of the training loop that are always allowed: BN_JAX_STEP_TIMEOUT."""
    text = os.environ.get(FLOOR, str(STUCK))
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ConfigError(f"{FLOOR}={text}: not a positive number of seconds; {STUCK:.0f} is usual")


# Lines of JSON between the processes of one run, beside the devices: a star around process 0.
#
# Process 0 listens; the others find its port through the coordination service of
# `jax.distributed` and keep one TCP connection to it. The kernel closes a connection when its
# process dies, however it dies, so a death is seen at once; what hangs is seen by its silence.
# Nothing here ever blocks for longer than it is told to.


_LARGEST = 1 << 16  # bytes of one line; more is no line of ours
_PATIENCE = 60  # seconds for process 0 to say where it listens, and to be reached


class Wire:
    """One connection: `send` and `receive` return at once; `open` turns False when it is gone."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self.socket, self.open = sock, True
        self.process: int | None = None  # who is at the other end, once it has said so
        self._buffer = b""

    def send(self, **message: Any) -> None:
        """Sends one line. What a stopped process does not take is lost: it is silent anyway."""
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The lines that have arrived."""
        try:
            data = self.socket.recv(_LARGEST)
            self.open = bool(data)
            self._buffer += data
        except BlockingIOError:
            pass
        except OSError:
            self.open = False
        *lines, self._buffer = self._buffer.split(b"\n")
        found = []
        for line in lines:
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                self.open = False
        self.open = self.open and len(self._buffer) < _LARGEST
        return found

    def close(self) -> None:
        """Ends the connection."""
        self.open = False
        self.socket.close()


class Star:
    """This process's connections to the others: all of them on process 0, else the one to it.

    Args:
      client: the key-value store of the coordination service.
      process, processes: this process and how many there are.
      coordinator: HOST:PORT of the coordination service, which is on process 0's host.
      key: where in the store process 0 writes its port.

    Raises:
      OSError: process 0 cannot be reached.
    """

    def __init__(self, client: Any, process: int, processes: int, coordinator: str, key: str):
        self.wires: dict[int, Wire] = {}  # by process
        self._strangers: list[Wire] = []  # have not yet said who they are
        self._server: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._process, self._processes = process, processes
        if process == 0:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
            self._server.setblocking(False)
            self._selector.register(self._server, selectors.EVENT_READ)
            self._token = secrets.token_hex(16)
            client.key_value_set(key, f"{self._server.getsockname()[1]} {self._token}")
            return
        port, self._token = client.blocking_key_value_get(key, 1000 * _PATIENCE).split()
        host = coordinator.rpartition(":")[0].strip("[]")
        wire = Wire(socket.create_connection((host, int(port)), timeout=_PATIENCE))
        wire.process = 0
        self.wires[0] = wire
        self._selector.register(wire.socket, selectors.EVENT_READ)
        wire.send(token=self._token, process=process)

    def send(self, **message: Any) -> None:
        """One line to every process that is connected with this one."""
        for wire in list(self.wires.values()):  # the sender may be another thread
            wire.send(**message)

    def poll(self, seconds: float) -> list[tuple[int, dict[str, Any] | None]]:
        """What has arrived within `seconds`: (process, line), or (process, None) for one whose
        connection is gone."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                self._accept()
        found: list[tuple[int, dict[str, Any] | None]] = []
        for wire in self._strangers[:]:
            found += self._introduced(wire)
        for process, wire in list(self.wires.items()):
            found += [(process, line) for line in wire.receive()]
            if not wire.open:
                found.append((process, None))
                self._drop(wire)
                del self.wires[process]
        return found

    def _accept(self) -> None:
        assert self._server is not None
        with contextlib.suppress(OSError):
            wire = Wire(self._server.accept()[0])
            self._strangers.append(wire)
            self._selector.register(wire.socket, selectors.EVENT_READ)

    def _introduced(self, wire: Wire) -> list[tuple[int, dict[str, Any] | None]]:
        """The lines of a new connection, if it knows the run's token; else it is closed."""
        lines = wire.receive()
        if not lines and wire.open:
            return []
        self._strangers.remove(wire)
        first = lines[0] if lines else {}
        process = int(first.get("process", 0))
        expected = set(range(1, self._processes)) - self.wires.keys()
        if first.get("token") != self._token or process not in expected:
            self._drop(wire)
            return []
        wire.process = process
        self.wires[process] = wire
        return [(process, line) for line in lines[1:]]

    def _drop(self, wire: Wire) -> None:
        self._selector.unregister(wire.socket)
        wire.close()


# How a process ends whose exit must wait for nobody: its last line, its exit code, its abort.


_handlers: list[Any] = []  # C calls them: they must never be collected


def report(error: BaseException) -> int:
    """Prints an error as commands do, a traceback if it is no user's; returns the exit code."""

    def fail() -> None:
        raise error

    try:
        errors.run_command(fail)
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


# Of several processes one dies, hangs or fails: all end within 30 s, and say which one it was.
#
# A collective of XLA waits for ever for a process that is gone, and `jax.distributed` ends a run
# by SIGABRT, after 100 s and without a reason. So a thread in each process tells process 0 every
# second where its training loop is, and process 0 decides who holds up the others. Whoever learns
# of a fault ends with exit code 6, records finished and the newest checkpoint whole. No exit
# waits for anyone for long: processes end by os._exit, since the usual one waits for all others
# at a barrier of jax.
#
# With one process nothing of this is started.


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
        catch_abort(self._aborted)
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
            code = 0 if error is None else report(error)
            self._ended = True
            self._over.wait()  # not for ever: who does not end is found out
            if self._verdict is not None and error is None:
                code = self._say()
        else:
            code = report(error)
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
        flush()
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
        return self._verdict.exit_code if said else report(self._verdict)


def _from_runtime(error: BaseException) -> bool:
    """Whether an error may have come from a device or the network rather than from this code."""
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
