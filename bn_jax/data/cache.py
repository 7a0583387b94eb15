"""Keeps arrays between runs, in the user's cache directory.

They are indices of a data set's files, which would take minutes to build again.
"""

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np
from absl import logging

from bn_jax.errors import ConfigError, expand_path

Arrays = dict[str, np.ndarray]


def directory() -> pathlib.Path | None:
    """Returns $BN_JAX_CACHE, else bn_jax in the user's cache; None for a user without a home."""
    if "BN_JAX_CACHE" in os.environ:
        return pathlib.Path(os.environ["BN_JAX_CACHE"])
    try:
        return expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bn_jax"
    except ConfigError:
        return None


def path_for(kind: str, state: object) -> pathlib.Path | None:
    """Returns the cache file for data files in this state (names, sizes, times), or None."""
    folder = directory()
    if folder is None:
        logging.warning("there is no home directory, so the %s index is not kept", kind)
        return None
    digest = hashlib.sha256(repr(state).encode("utf-8", "surrogateescape")).hexdigest()
    return folder / f"{kind}-{digest[:32]}.npz"


def load(path: pathlib.Path | None, is_whole: Callable[[Arrays], bool]) -> Arrays | None:
    """Reads the arrays of a file; returns None if it is absent, damaged or not whole.

    The caller then makes them again.
    """
    if path is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if is_whole(arrays):
            return arrays
    except FileNotFoundError:
        return None
    except Exception as e:  # a damaged cache must never end a run
        logging.warning("%s cannot be read (%s) and is made again", path, e)
    return None


def store(path: pathlib.Path | None, **arrays: np.ndarray) -> None:
    """Writes the file, whole or not at all. If the cache cannot be written, a warning is logged."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False, suffix=".part") as f:
            np.savez(f, **arrays)  # type: ignore[arg-type]
        pathlib.Path(f.name).replace(path)
    except OSError as e:
        logging.warning("%s is not kept: %s", path, e)
