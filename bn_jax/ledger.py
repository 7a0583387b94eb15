"""Where the time of a run went, attempts that were killed included.

Parts are exclusive: a part inside another one pauses the outer, so that parts and `other` sum to
the wall time. All times are seconds.
"""

import contextlib
import itertools
import os
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

PARTS = ("startup", "compile", "input", "step", "save", "evaluate", "figures")

_FIRST = itertools.count()


def process_started() -> float:
    """time.monotonic() at which this process began: importing jax is part of a run's start-up.

    Only the first call says so; later ones say now, as the first run of a process pays for it.
    """
    if next(_FIRST):
        return time.monotonic()
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since boot; field 22 of proc(5)
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks
    except (OSError, IndexError, ValueError, AttributeError):  # not Linux
        return time.monotonic()
    return time.monotonic() - max(age, 0.0)


class Ledger:
    """A stop-watch of exclusive parts. One thread uses it; others may look.

    Args:
      started: time.monotonic() at which the wall time begins; until now counts as `startup`.
    """

    def __init__(self, started: float):
        self._started = self._since = started
        self._lock = threading.Lock()  # the watchdog finishes the records of a loop that is stuck
        self._stack = ["startup"]
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._enter("other")

    def _charge(self) -> None:
        with self._lock:
            now = time.monotonic()
            part = self._stack[-1]
            self._parts[part] = self._parts.get(part, 0.0) + now - self._since
            self._since = now

    @property
    def part(self) -> str:
        """Where the time goes at this moment."""
        return self._stack[-1]

    def _enter(self, part: str) -> None:
        self._charge()
        self._stack.append(part)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Charges the time inside to `part`."""
        if part not in PARTS:
            raise ValueError(f"{part!r} is not one of {PARTS}")
        self._enter(part)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def snapshot(self) -> tuple[float, dict[str, float]]:
        """Wall time and its parts so far; the parts sum to the wall time."""
        self._charge()
        return self._since - self._started, dict(self._parts)


def account(lines: Sequence[dict[str, Any]], resumed: Sequence[int]) -> dict[str, Any]:
    """The ledger of a run: all its attempts, with the work that was lost as a part of its own.

    Args:
      lines: of timing.jsonl, each with attempt (0, 1, ...), step, wall and parts.
      resumed: the step that each attempt resumed from.

    Returns:
      wall: time of all attempts up to the last line of each (what a killed attempt did after its
        last line is unknown: at most one log interval). parts: of what was kept. lost: wall time
        that attempts spent after the last line that a later one could resume from.
    """
    parts = dict.fromkeys((*PARTS, "other"), 0.0)
    wall = lost = 0.0
    for attempt in range(len(resumed)):
        own = [line for line in lines if line["attempt"] == attempt]
        if not own:
            continue
        limit = min(resumed[attempt + 1 :], default=own[-1]["step"])
        kept = [line for line in own if line["step"] <= limit]
        wall += own[-1]["wall"]
        lost += own[-1]["wall"] - (kept[-1]["wall"] if kept else 0.0)
        for part, seconds in kept[-1]["parts"].items() if kept else ():
            parts[part] = parts.get(part, 0.0) + seconds
    return {
        "wall": round(wall, 3),
        "parts": {part: round(seconds, 3) for part, seconds in parts.items()},
        "lost": round(lost, 3),
        "attempts": len(resumed),
    }
