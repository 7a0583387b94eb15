"""What the commands share: a user's error is one line on stderr and an exit code, no traceback."""

import sys
from collections.abc import Callable

from bn_jax.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Runs a command. A UserError becomes one line and its exit code; Ctrl-C exits with 130."""
    try:
        main()
    except UserError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def fail(message: str, code: int) -> None:
    """Ends the program with one line on stderr."""
    print(f"bn_jax: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)
