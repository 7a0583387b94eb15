"""Population statistics of a checkpoint (Algorithm 2), computed once and kept beside it.

WORKDIR/population/STEP.npz holds the statistics and a sealed header: the digest of the checkpoint's
manifest, a digest of the config, and one of every array. A file that is damaged, or was made from
another checkpoint or config, is not used: the statistics are computed again. Nothing in it can run
code (no pickle), and it may be deleted at any time.
"""

import io
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from bn_jax.errors import DiskError
from bn_jax.workdir import checkpoint, files, guard, reader

FOLDER = "population"
_HEADER = "header"


def checkpoint_digest(run: pathlib.Path, step: int) -> str:
    """Digest of a checkpoint's manifest, hence of all that the checkpoint holds."""
    return checkpoint.digest((run / "checkpoints" / str(step) / checkpoint.MANIFEST).read_bytes())


def cached(
    run: pathlib.Path, step: int, config: Mapping[str, Any], like: Any, compute: Callable[[], Any]
) -> tuple[Any, bool]:
    """The statistics of checkpoint `step` of a workdir, and whether they came from the file.

    config: the run's, as plain values. like: tree of the statistics' shapes. `compute` makes them
    where there is no usable file, which is then written; where the disk cannot be written, a line
    on stderr says so.
    """
    path = run / FOLDER / f"{step}.npz"
    origin = {
        "step": step,
        "checkpoint": checkpoint_digest(run, step),
        "config": checkpoint.digest(checkpoint.canonical(_decisive(config))),
    }
    if path.exists():
        try:
            return _load(path, origin, like), True
        except checkpoint.DamagedError as error:
            files.warn(f"{path} is not used ({error}); the statistics are computed again")
    statistics = jax.device_get(compute())
    if jax.process_index() != 0:  # each process computes the same, and one keeps it
        return statistics, False
    try:
        _save(path, origin, statistics)
    except DiskError as error:
        files.warn(f"statistics not kept: {error}")
    return statistics, False


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that statistics may depend on."""
    fields = {k: v for k, v in reader.flat(config).items() if k not in guard.MAY_CHANGE}
    # Older files were made from `statistics_batches` training batches. These are the same
    # statistics only where a training batch is one group.
    group = fields.get("bn.group_size")
    if group not in (None, fields.get("batch_size")):
        fields["mini_batch"] = group
    return fields


def _save(path: pathlib.Path, origin: Mapping[str, Any], statistics: Any) -> None:
    names, leaves = checkpoint.flatten_arrays(statistics)
    arrays = {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}
    entries = {name: checkpoint.array_entry(array) for name, array in arrays.items()}
    header = np.frombuffer(checkpoint.seal({**origin, "arrays": entries}), np.uint8)
    contents: dict[str, Any] = {_HEADER: header, **arrays}
    out = io.BytesIO()
    np.savez(out, **contents)
    with files.reported(path, "cannot write"):
        path.parent.mkdir(exist_ok=True)
    files.write_atomic(path, out.getvalue())


def _load(path: pathlib.Path, origin: Mapping[str, Any], like: Any) -> Any:
    """Raises DamagedError if the file is not what `_save` wrote for this origin."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise checkpoint.DamagedError(f"it cannot be read: {error}") from None
    body = checkpoint.unseal(arrays.pop(_HEADER, np.zeros(0, np.uint8)).tobytes(), "its header")
    for key, value in origin.items():
        if body.get(key) != value:
            raise checkpoint.DamagedError(f"it was made from another {key}")
    names, leaves = checkpoint.flatten_arrays(like)
    shapes = {name: list(leaf.shape) for name, leaf in zip(names, leaves, strict=True)}
    if shapes != {name: entry["shape"] for name, entry in body["arrays"].items()}:
        raise checkpoint.DamagedError("it was made from another network")
    checkpoint.check_arrays(arrays, body)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in names])
