"""Named host arrays on disk, through orbax: what a checkpoint step is made of.

A pytree's leaves are named by their path ('params/stem/conv/kernel') and stored as a nested dict,
which any reader of orbax checkpoints understands.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bn_jax import manifest
from bn_jax.errors import CheckpointError, DivergedError

# Process 0 works alone, so that no barrier of orbax waits for a process that is gone.
_ALONE = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="bn_jax"
)


def flatten(tree: Any) -> tuple[list[str], list[Any]]:
    """Names and leaves of a pytree. Raises ValueError if two leaves share a name."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"two leaves share a name: {sorted(names)}")
    return names, [leaf for _, leaf in pairs]


def save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays to the new directory `path`."""
    with _orbax() as checkpointer:
        checkpointer.save(path, args=ocp.args.StandardSave(_nest(arrays)))


def load(path: pathlib.Path, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Reads the arrays of a manifest's entries from `path`.

    Raises:
      manifest.DamagedError: orbax cannot read them.
    """
    like = {name: np.empty(e["shape"], np.dtype(e["dtype"])) for name, e in entries.items()}
    try:
        with _orbax() as checkpointer:
            tree = checkpointer.restore(path, args=ocp.args.StandardRestore(_nest(like)))
    except Exception as error:
        # The files are what was written, so the writer or the reader is at fault: the step is as
        # unusable as a damaged one.
        raise manifest.DamagedError(f"orbax cannot read it: {first_line(error)}") from error
    names, leaves = flatten(tree)
    return {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}


def place(array: np.ndarray, like: Any) -> jax.Array:
    """The array on the devices of `like.sharding`, or on the default device."""
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def require_same_model(
    path: pathlib.Path,
    names: Sequence[str],
    leaves: Sequence[Any],
    entries: Mapping[str, Mapping[str, Any]],
) -> None:
    """Raises CheckpointError naming the first array that this run and `path` do not share."""
    wants = {n: (list(x.shape), np.dtype(x.dtype).name) for n, x in zip(names, leaves, strict=True)}
    holds = {n: (e["shape"], e["dtype"]) for n, e in entries.items()}
    for name in sorted(wants.keys() | holds.keys()):
        want, hold = wants.get(name), holds.get(name)
        if want != hold:
            raise CheckpointError(
                f"{path} is of another model: {name} is {_describe(hold)} in the checkpoint, "
                f"{_describe(want)} in this run. Use the config and code that wrote it."
            )


def require_finite(step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises DivergedError naming the first array with NaN or infinity in it."""
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.integer) or array.dtype == bool:
            continue
        wide = array.astype(np.float32) if array.dtype.itemsize < 4 else array
        # A count of statistics updates is infinite where a converged tree was imported.
        fine = ~np.isnan(wide) if name.split("/")[-1] == "count" else np.isfinite(wide)
        if not fine.all():
            raise DivergedError(f"step {step} is not saved: {name} is not finite")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=_ALONE)
    checkpointer = ocp.Checkpointer(handler, multiprocessing_options=_ALONE)
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def _nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """{'a/b': x} -> {'a': {'b': x}}."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = array
    return tree


def _describe(entry: tuple[list[int], str] | None) -> str:
    return "absent" if entry is None else f"{entry[1]}{entry[0]}"
