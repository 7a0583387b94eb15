"""Processes beside the call's own, each with a log, which end when their time is up."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Child:
    """`python -m MODULE ARGUMENTS` from the checkout, its output in `log`.

    It takes GPU memory as it needs it: others use the GPU, too.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], log: pathlib.Path, variables: Mapping[str, str]
    ):
        self.log = log
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | dict(variables)
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, until: float) -> int | None:
        """The exit code; None if the child had not ended at `until` and was killed.

        until: of time.monotonic().
        """
        try:
            return self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            return None

    def last_line(self) -> str:
        """The last line of the log that is not empty."""
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")[:300]
