"""Errors that a user can act on. Each carries the process exit code of docs/operations.md.

A message is one line: what is wrong, the value, the limit, the remedy.
"""


class UserError(Exception):
    """Base of all errors that end a command with one line and no traceback."""

    exit_code = 1


class ConfigError(UserError):
    """Command line, config or data location cannot be used."""

    exit_code = 2


class DataError(UserError):
    """A record or shard of the data is damaged."""

    exit_code = 3


class DivergedError(UserError):
    """Loss or gradient is no longer finite: a result, not a fault."""

    exit_code = 4


class CheckpointError(UserError):
    """No usable checkpoint."""

    exit_code = 5


class PeerLostError(UserError):
    """Another process of this run died or hangs."""

    exit_code = 6


class DiskError(UserError):
    """The workdir's disk is full or cannot be written."""

    exit_code = 7


class LockedError(UserError):
    """Another run holds the workdir."""

    exit_code = 8


class Preempted(UserError):  # noqa: N818 (it is no error: the state is saved)
    """The run was told to stop and has saved its state: run the same command again."""

    exit_code = 75
