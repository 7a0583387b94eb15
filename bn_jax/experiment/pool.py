"""Runs processes side by side and shows what they do; Ctrl-C and SIGTERM stop them cleanly."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import NamedTuple, TextIO

from bn_jax.workdir import files
from bn_jax.workdir.timing import duration

POLL = 0.2  # seconds between looks at the processes
EVERY = 60.0  # seconds between lines about running processes, if stdout is not a terminal
TAIL = 4096  # bytes at the end of a log in which its last line is looked for

Task = tuple[str, Sequence[str], pathlib.Path, Callable[[Mapping[str, str]], dict[str, str]]]


class Running(NamedTuple):
    """A process that runs in a slot."""

    name: str
    process: subprocess.Popen
    log: pathlib.Path
    slot: int
    started: float


class Pool:
    """Runs processes, as many at a time as there are slots.

    A first signal to this process is passed on as SIGTERM to all running processes, and no further
    one is begun. A second signal kills them. Each process has its own session, so that a terminal's
    Ctrl-C reaches it only through this class: a run ends at once at a second signal.

    Args:
      slots: environment variables of each slot.
      total: the number of members of the sweep, for the count that is shown.
      stream: of the table; default stdout.
    """

    def __init__(
        self, slots: Sequence[Mapping[str, str]], total: int, stream: TextIO | None = None
    ):
        self.slots = list(slots)
        self.total = total
        self.stopped = False

        self._signals = 0  # received
        self._told = 0  # passed on
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._drawn = 0  # lines of the table on the terminal
        self._next = 0.0  # when the next line or table is due
        self._running: list[Running] = []

    def run(self, tasks: Sequence[Task]) -> dict[str, int | None]:
        """Runs each task: (name, command, log, slot's environment -> environment).

        Returns {name: exit code}; the code is None if the task was not begun because of a signal.
        If a signal ended the process, the code is that of a shell, 128 + the signal.
        """
        codes: dict[str, int | None] = {name: None for name, *_ in tasks}
        waiting = list(tasks)
        done = self.total - len(tasks)

        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            while self._running or (waiting and not self.stopped):
                free = set(range(len(self.slots))) - {r.slot for r in self._running}
                while waiting and free and not self.stopped:
                    self._begin(waiting.pop(0), min(free))
                    free.discard(self._running[-1].slot)

                time.sleep(POLL)
                self._pass_on()

                for ended in [r for r in self._running if r.process.poll() is not None]:
                    self._running.remove(ended)
                    code = ended.process.returncode
                    codes[ended.name] = code = code if code >= 0 else 128 - code
                    done += 1
                    took = duration(time.monotonic() - ended.started)
                    self._say(f"[{done}/{self.total}] {ended.name}: {_word(code)} after {took}")
                self._show(len(waiting))
        finally:
            self._erase()
            for left in self._running:  # some are left only after an error of this loop
                left.process.terminate()
            for number, handler in before.items():
                signal.signal(number, handler)
        return codes

    def _begin(self, task: Task, slot: int) -> None:
        """Starts a process in a slot; its output goes to its log."""
        name, words, log, environment = task
        with files.reported(log, "cannot write"):
            log.parent.mkdir(parents=True, exist_ok=True)
            file = log.open("ab")
        with file:
            process = subprocess.Popen(
                list(words),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(self.slots[slot]),
                start_new_session=True,
            )
        self._running.append(Running(name, process, log, slot, time.monotonic()))
        self._say(f"{name}: started, log {log}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal; the loop passes it on."""
        self._signals += 1
        self.stopped = True
        if self._signals == 1:
            text = "stopping: members save their state; once more ends them at once\n"
            os.write(2, text.encode())  # print is not safe in a handler

    def _pass_on(self) -> None:
        """Passes signals on to the processes. The handler cannot: it may interrupt `_begin`."""
        if self._signals == self._told:
            return
        number = signal.SIGTERM if self._signals == 1 else signal.SIGKILL
        for running in self._running:
            running.process.send_signal(number)
        self._told = self._signals

    # What a person sees

    def _say(self, text: str) -> None:
        self._erase()
        print(text, file=self._stream, flush=True)
        self._next = 0.0 if self._terminal else self._next

    def _show(self, waiting: int) -> None:
        now = time.monotonic()
        if now < self._next or not self._running:
            return
        first = self._next == 0.0
        self._next = now + (1.0 if self._terminal else EVERY)
        if first and not self._terminal:
            return  # there is nothing to report yet
        self._erase()
        width = shutil.get_terminal_size().columns - 1 if self._terminal else 200
        lines = [
            f"  {r.name:32} {duration(now - r.started):>8}  {last_line(r.log)}"[:width]
            for r in self._running
        ]
        if self._terminal:
            lines.append(f"  {waiting} waiting"[:width])
            self._drawn = len(lines)
        print("\n".join(lines), file=self._stream, flush=True)

    def _erase(self) -> None:
        if self._drawn:  # up to the table's first line, and clear from there
            self._stream.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0


def last_line(log: pathlib.Path) -> str:
    """Returns the last line in a log, which has the run's step, loss, images/s and time left."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _word(code: int) -> str:
    if code in (128 + signal.SIGTERM, 128 + signal.SIGKILL):
        return "ended by a signal"
    known = {0: "done", 4: "diverged (a result)", 75: "stopped, saved"}
    return known.get(code, f"failed with exit code {code}")
