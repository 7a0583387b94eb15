"""What the commands share: a user's error is one line on stderr and an exit code, no traceback."""

import argparse
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from bn_jax.errors import ConfigError, UserError


def run(main: Callable[[], None]) -> None:
    """Runs a command. A UserError becomes one line and its exit code; Ctrl-C exits with 130.

    So does a command line that argparse refuses: its own usage message of several lines hides what
    is wrong.
    """
    argparse.ArgumentParser.error = _refuse  # type: ignore[method-assign,assignment]
    try:
        require_paths(sys.argv[1:])
        main()
    except UserError as error:
        # What a thread still compiles is waited for: a second Ctrl-C ends that without a traceback.
        if threading.current_thread() is threading.main_thread():  # not the watchdog
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    fail(f"{message}; {parser.prog} --help names the options", ConfigError.exit_code)


def require_paths(argv: Sequence[str]) -> None:
    """Raises ConfigError for an option's value such as gs://bucket/run: no path of this machine.

    As a path it would be a new folder `gs:` here, of which a pod's other machines know nothing.
    """
    for word in argv:
        url = re.search(r"(?:^|[=,])(\w+)://[^,]*", word)
        if url:
            raise ConfigError(
                f"{word}: {url[1]}:// is not supported; mount the bucket (gcsfuse) and give the "
                "path of the mount (docs/operations.md, Several hosts)"
            )


def fail(message: str, code: int) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(f"bn_jax: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def reason(error: Exception) -> str:
    """Why a command line was refused: an unknown field by name, a config's error without a stack.

    ml_collections reports an unknown field as an AttributeError around a quoted KeyError; a module
    without an attribute, such as a file without `get_config`, is said as Python says it.
    """
    text = str(error)
    # Set in a config file, where the other fields follow in quotes, or on the command line.
    field = re.search(r'Key "(\w+)" does not exist', text) or re.search(r"'(\w+)\\?'", text)
    if isinstance(error, (AttributeError, KeyError)) and field and not text.startswith("module"):
        close = re.search(r'Did you mean "(\w+)"', text)
        hint = f"did you mean {close[1]!r}?" if close else "--dry_run prints them all"
        return f"the config has no field {field[1]!r}: {hint}"
    stack = text.rpartition("Traceback (most recent call last):")[2]
    return text if stack == text else stack.rpartition("Error: ")[2] or text
