"""What the commands share: a user's error is one line on stderr and an exit code, no traceback."""

import re
import sys
from collections.abc import Callable
from typing import NoReturn

from bn_jax.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Runs a command. A UserError becomes one line and its exit code; Ctrl-C exits with 130."""
    try:
        main()
    except UserError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def fail(message: str, code: int) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(f"bn_jax: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def reason(error: Exception) -> str:
    """Why a command line was refused: an unknown field by name, a config's error without a stack.

    ml_collections reports an unknown field as an AttributeError around a quoted KeyError.
    """
    text = str(error)
    field = re.search(r"'(\w+)\\?'", text)
    if isinstance(error, (AttributeError, KeyError)) and field:
        close = re.search(r'Did you mean "(\w+)"', text)
        hint = f"did you mean {close[1]!r}?" if close else "--dry_run prints them all"
        return f"the config has no field {field[1]!r}: {hint}"
    stack = text.rpartition("Traceback (most recent call last):")[2]
    return text if stack == text else stack.strip().splitlines()[-1].partition("Error: ")[2]
