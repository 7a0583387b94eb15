"""Where the time of a run went, attempts that were killed included.

Parts are exclusive: a part inside another one pauses the outer, so that parts and `other` sum to
the wall time. All times are seconds.
"""

import collections
import contextlib
import itertools
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

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


# What a person sees while a run goes on: step, loss, images/s, time left.


_WINDOW = 30.0  # seconds of training that the rate is averaged over


class Progress:
    """One rewritten line on a terminal, a plain line every few seconds elsewhere.

    Args:
      total_steps: of the run.
      stream: default stdout.
      every: seconds between lines; default 0.2 on a terminal, 5 elsewhere.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None, every: float | None = None):
        self._total = total_steps
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._every = every if every is not None else (0.2 if self._terminal else 5.0)
        self._next = -math.inf
        self._examples = 0
        self._width = 0  # of the line to be rewritten
        self._seen: collections.deque[tuple[float, int, int]] = collections.deque()

    def update(self, step: int, loss: Any, examples: int, clock: float | None = None) -> None:
        """Tells that `step` steps are done, `examples` examples since the last call.

        Args:
          step: 1-based count of finished steps.
          loss: a number, or an array that is fetched only if a line is written.
          examples: seen since the last call.
          clock: seconds of training so far, without compiling, evaluation and saving, so that
            the rate is that of training; default: the wall clock.
        """
        clock = time.monotonic() if clock is None else clock
        self._examples += examples
        self._seen.append((clock, step, self._examples))
        while len(self._seen) > 2 and clock - self._seen[0][0] > _WINDOW:
            self._seen.popleft()
        now = time.monotonic()
        if now < self._next and step < self._total:
            return
        self._next = now + self._every
        self._show(self._line(step, float(loss)))

    def _line(self, step: int, loss: float) -> str:
        then, first, examples = self._seen[0]
        seconds, steps = self._seen[-1][0] - then, step - first
        text = f"step {step}/{self._total}  loss {loss:.4f}"
        if seconds > 0 and steps > 0:
            rate = (self._examples - examples) / seconds
            left = (self._total - step) * seconds / steps
            text += f"  {rate:.0f} images/s  ETA {duration(left)}"
        return text

    def _show(self, text: str) -> None:
        if self._terminal:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line of its own; it stays."""
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._stream.write(text + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Leaves the rewritten line as it is and begins a new one."""
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


def duration(seconds: float) -> str:
    """75 -> '1:15', 7500 -> '2:05:00'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class CountDisplay:
    """A line with images, images/s and the time left: on a terminal in place, else every 10 s."""

    def __init__(self, total: int):
        self.total, self.done, self.stopped = total, 0, False
        self._began = self._shown = time.monotonic()
        self._every = 0.2 if sys.stderr.isatty() else 10.0
        self._lock = threading.Lock()

    def add(self, n: int) -> None:
        """Counts images; shows the line when it is due, and at the end."""
        with self._lock:
            self.done += n
            now = time.monotonic()
            if now - self._shown < self._every and self.done < self.total:
                return
            self._shown = now
            rate = self.done / max(now - self._began, 1e-9)
            left = (self.total - self.done) / rate
            end = "\n" if self.done == self.total or not sys.stderr.isatty() else ""
            start = "\r" if sys.stderr.isatty() else ""
            print(
                f"{start}{self.done:,} of {self.total:,} images, {rate:,.0f} images/s, "
                f"{left // 3600:.0f}:{left % 3600 // 60:02.0f}:{left % 60:02.0f} left",
                end=end,
                file=sys.stderr,
                flush=True,
            )
