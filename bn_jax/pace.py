"""Who of several processes is gone, silent or stuck: decided from what they say, and from nothing
else. No sockets, threads or clocks: times come in as numbers, in seconds.
"""

import collections
import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from bn_jax.errors import ConfigError

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
