"""Measures how a run spends its time, including killed attempts, and shows its progress.

The parts are exclusive: a part that begins inside another one pauses the outer one. So the parts
and `other` sum to the wall time. All times are in seconds.
"""

import collections
import contextlib
import itertools
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from tqdm.std import tqdm

from bn_jax.workdir.lines import TimingLine

PARTS = ("startup", "compile", "input", "step", "save", "evaluate", "figures")

_CALLS = itertools.count()


def process_started() -> float:
    """Returns time.monotonic() at this process's start, so that imports count as start-up.

    Only the first call returns this. Later calls return the present time: of several runs in one
    process, the first one pays for the imports.
    """
    if next(_CALLS):
        return time.monotonic()

    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5)
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    except (OSError, IndexError, ValueError, AttributeError):  # not Linux
        return time.monotonic()
    return time.monotonic() - max(age, 0.0)


class Ledger:
    """A stopwatch with exclusive parts. One thread uses it; others may read it.

    Args:
      started: time.monotonic() at which the wall time begins; the time until now is `startup`.
    """

    def __init__(self, started: float):
        self._started = started
        self._since = started  # all time before this has been charged to a part
        self._stack = ["startup"]
        self._parts = dict.fromkeys(PARTS, 0.0)
        # The watchdog closes the records, and with them this ledger, when the loop is stuck.
        self._lock = threading.Lock()
        self._enter("other")

    @property
    def part(self) -> str:
        """The part that time is charged to now."""
        return self._stack[-1]

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
        """Returns the wall time and its parts so far; the parts sum to the wall time."""
        self._charge()
        return self._since - self._started, dict(self._parts)

    def _enter(self, part: str) -> None:
        self._charge()
        self._stack.append(part)

    def _charge(self) -> None:
        """Adds the time since the last call to the part that is under way."""
        with self._lock:
            now = time.monotonic()
            part = self._stack[-1]
            self._parts[part] = self._parts.get(part, 0.0) + now - self._since
            self._since = now


def account(lines: Sequence[TimingLine], resumed: Sequence[int]) -> dict[str, Any]:
    """Sums up the ledger of a run: the times of all its attempts, and of the work that was lost.

    Args:
      lines: of timing.jsonl.
      resumed: the step that each attempt resumed from.

    Returns:
      wall: time of all attempts up to the last line of each (what a killed attempt did after its
        last line is unknown: at most one log interval). parts: of what was kept. lost: wall time
        that attempts spent after the last line that a later one could resume from.
    """
    parts = dict.fromkeys((*PARTS, "other"), 0.0)
    wall = 0.0
    lost = 0.0
    for attempt in range(len(resumed)):
        own = [line for line in lines if line["attempt"] == attempt]
        if not own:
            continue

        # A later attempt kept only what came before the step that it resumed from.
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


# The line that shows how far a run is: step, loss, images/s, time left.


_WINDOW = 30.0  # seconds of work that the rate is averaged over


class _Line(tqdm):
    """A progress line: tqdm's, which is rewritten, on a terminal; elsewhere plain lines."""

    monitor_interval = 0  # no monitoring thread, since every update comes from the loop itself

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Shows `msg`, by default the line."""
        if self.fp.isatty():
            return super().display(msg, pos)
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False


# tqdm's default is a lock between processes, for which some versions of Python start a process.
_Line.set_lock(threading.RLock())


class Progress:
    """Shows how far a loop of known length is, with images/s and the time left.

    Args:
      total: steps, or whatever is counted.
      stream: default stdout.
      every: seconds between lines; default 0.2 on a terminal, 5 elsewhere.
    """

    def __init__(self, total: int, stream: TextIO | None = None, every: float | None = None):
        self._total = total
        self._stream = stream or sys.stdout
        self._every = every
        self._line: _Line | None = None
        self._images = 0
        self._seen: collections.deque[tuple[float, int]] = collections.deque()  # clock, images

    def update(self, done: int, what: str, images: int, clock: float | None = None) -> None:
        """Shows the line if it is due, and at the end.

        Args:
          done: of the total.
          what: the beginning of the line, such as "step 5/100  loss 2.3".
          images: how many more are done since the last call.
          clock: seconds of the work that images/s is the rate of, for example without evaluation;
            default: the wall clock. The time left is always that of the wall clock.
        """
        clock = time.monotonic() if clock is None else clock
        self._images += images
        self._seen.append((clock, self._images))
        while len(self._seen) > 2 and clock - self._seen[0][0] > _WINDOW:
            self._seen.popleft()

        text = f"{what}{self._rate()}"
        if self._line is None:
            self._line = self._begin(done, text)
            return

        self._line.bar_format = "{desc}  {remaining} left"  # known from the second call on
        self._line.set_description_str(text, refresh=False)
        shown = self._line.update(done - self._line.n)
        if done >= self._total and not shown:
            self._line.refresh()

    def _begin(self, done: int, text: str) -> _Line:
        """Makes the line, which is then shown for the first time."""
        terminal = self._stream.isatty()
        every = self._every
        if every is None:
            every = 0.2 if terminal else 5.0
        return _Line(
            desc=text,
            total=self._total,
            initial=done,
            file=self._stream,
            bar_format="{desc}",
            mininterval=every,
            miniters=1,
            smoothing=0,  # the time left is that at the mean rate, evaluations included
            dynamic_ncols=True,
            leave=terminal,
        )

    def _rate(self) -> str:
        """Writes the rate, such as '  1,234 images/s'; '' until it is known."""
        seconds = self._seen[-1][0] - self._seen[0][0]
        images = self._seen[-1][1] - self._seen[0][1]
        return f"  {images / seconds:,.0f} images/s" if seconds > 0 and images > 0 else ""

    def say(self, text: str) -> None:
        """Prints a permanent line above the one that is rewritten."""
        if self._line is not None and self._stream.isatty():
            self._line.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def end(self) -> None:
        """Leaves the line as it is; later output comes below it."""
        if self._line is not None:
            self._line.close()
            self._line = None


class ImageProgress:
    """`Progress` of a loop over images, on stderr; any thread may count."""

    def __init__(self, total: int):
        self._total = total
        self._done = 0
        self._progress = Progress(total, sys.stderr)
        self._lock = threading.Lock()

    def add(self, images: int) -> None:
        """Counts images that are done."""
        with self._lock:
            self._done += images
            text = f"{self._done:,} of {self._total:,} images"
            self._progress.update(self._done, text, images)
            if self._done >= self._total:
                self._progress.end()


def duration(seconds: float) -> str:
    """Writes a duration: '1:15' for 75 seconds, '2:05:00' for 7500."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
