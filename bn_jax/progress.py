"""What a person sees while a run goes on: step, loss, images/s, time left."""

import collections
import math
import sys
import time
from typing import Any, TextIO

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
