"""Errors that a user can act on. Each has its exit code, as docs/operations.md lists them.

A message is one line that says what is wrong, the value, the limit and the remedy.
"""

import argparse
import contextlib
import io
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn


class UserError(Exception):
    """The base of all errors that end a command with one line and no traceback."""

    exit_code = 1


class ConfigError(UserError):
    """The command line, the config or the data's location cannot be used."""

    exit_code = 2


class DataError(UserError):
    """A record or shard of the data is damaged."""

    exit_code = 3


class DivergedError(UserError):
    """The loss or gradient is no longer finite, which is a result and not a fault."""

    exit_code = 4


class CheckpointError(UserError):
    """No checkpoint can be used."""

    exit_code = 5


class PeerLostError(UserError):
    """Another process of this run has died or hangs."""

    exit_code = 6


class DiskError(UserError):
    """The workdir's disk is full or cannot be written."""

    exit_code = 7


class LockedError(UserError):
    """Another run holds the workdir."""

    exit_code = 8


class Preempted(UserError):  # noqa: N818 (not an error: the state is saved)
    """The run was told to stop and has saved its state: run the same command again."""

    exit_code = 75


# What the commands share: a UserError becomes one line on stderr and an exit code.


class Parser(argparse.ArgumentParser):
    """Parses as argparse does, but refuses a command line in one line.

    argparse's own usage message has several lines, which hide what is wrong.
    """

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message and the exit code of a ConfigError."""
        fail(f"{message}; {self.prog} --help names the options", ConfigError.exit_code)

    def parse_with_fields(self) -> tuple[argparse.Namespace, list[str]]:
        """Parses the command line; returns its options, and FIELD=VALUE of each --config.FIELD."""
        args, rest = self.parse_known_args()
        for word in rest:
            if not word.startswith("--config."):
                self.error(f"unexpected argument {word!r}: options are written --name=value")
        return args, [word.removeprefix("--config.") for word in rest]


def run_command(main: Callable[[], None]) -> None:
    """Runs a command. A UserError becomes one line and its exit code; Ctrl-C exits with 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the stream may lack a name's characters
    try:
        require_paths(sys.argv[1:])
        main()
    except UserError as error:
        # Python waits for a compilation in another thread. Ctrl-C then ends it without traceback.
        if threading.current_thread() is threading.main_thread():  # not the watchdog
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of the output (`| head`) has ended. Python would fail again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # what a shell reports for a program that SIGPIPE ended


def expand_path(text: str) -> pathlib.Path:
    """Replaces ~ in a path by the user's home.

    Raises ConfigError if the user has no home directory, as in some containers.
    """
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{text}: this user has no home directory; set HOME or give the path without ~"
        ) from None


def printable(path: str | pathlib.Path) -> str:
    """Escapes what cannot be printed in a path.

    Bytes that are not UTF-8 are escaped, so that any stream can print the path. Control characters
    are escaped, so that it stays one line and does not control the terminal.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", text)


@contextlib.contextmanager
def reading(path: str | pathlib.Path) -> Iterator[None]:
    """Turns an error of the file system while `path` is read into a ConfigError of one line."""
    try:
        yield
    except OSError as e:
        raise ConfigError(
            f"{printable(e.filename or path)} cannot be read ({e.strerror or e}): mend or remove it"
        ) from None


def require_paths(argv: Sequence[str]) -> None:
    """Raises ConfigError for an option's value such as gs://bucket/run, which is not a local path.

    Used as a path, it would make a folder `gs:` here, which a pod's other machines do not see.
    """
    for word in argv:
        url = re.search(r"(?:^|[=,])(\w+)://([^,]*)", word)
        if url and url[1] == "file":
            raise ConfigError(f"{word}: write the path alone, {url[2]}")
        if url:
            raise ConfigError(
                f"{word}: {url[1]}:// is not supported; mount the bucket (gcsfuse) and give the "
                "path of the mount (docs/operations.md, Several hosts)"
            )


def fail(message: str, code: int) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(f"bn_jax: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)
