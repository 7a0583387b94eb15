"""Keeps the population statistics of a checkpoint (Algorithm 2) beside it.

WORKDIR/population/STEP.npz holds the statistics and a sealed header, with digests of the
checkpoint's manifest, of the config and of every array. If a file is damaged, or was made from
another checkpoint or config, the statistics are computed again. The file holds no pickle, so
reading it cannot run code. It may be deleted at any time.
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
    """Returns the digest of a checkpoint's manifest, which identifies the whole checkpoint."""
    manifest = run / "checkpoints" / str(step) / checkpoint.MANIFEST
    return checkpoint.digest(manifest.read_bytes())


def cached(
    run: pathlib.Path, step: int, config: Mapping[str, Any], like: Any, compute: Callable[[], Any]
) -> tuple[Any, bool]:
    """Returns the statistics of checkpoint `step` of a workdir, and whether a file had them.

    config: the run's, as plain values. like: a tree of the statistics' shapes. compute: makes the
    statistics if there is no usable file; then a file is written. If the disk cannot be written, a
    line on stderr says so.
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
    if jax.process_index() != 0:  # all processes compute the same, and process 0 keeps it
        return statistics, False
    try:
        _save(path, origin, statistics)
    except DiskError as error:
        files.warn(f"the statistics are not kept: {error}")
    return statistics, False


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config on which statistics may depend."""
    fields = {k: v for k, v in reader.flat(config).items() if k not in guard.MAY_CHANGE}

    # Older files were made from `statistics_batches` whole training batches, newer ones from as
    # many groups. The two are the same only if a training batch is one group. Otherwise this field
    # gives newer files another digest, so that older ones are not used.
    group = fields.get("bn.group_size")
    one_group = group in (None, fields.get("batch_size"))
    if not one_group:
        fields["mini_batch"] = group
    return fields


def _save(path: pathlib.Path, origin: Mapping[str, Any], statistics: Any) -> None:
    """Writes the statistics with a header of `origin` and the arrays' digests. Raises DiskError."""
    names, leaves = checkpoint.flatten_arrays(statistics)
    arrays = {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}

    entries = {name: checkpoint.array_entry(array) for name, array in arrays.items()}
    header = checkpoint.seal({**origin, "arrays": entries})
    contents: dict[str, Any] = {_HEADER: np.frombuffer(header, np.uint8), **arrays}

    out = io.BytesIO()
    np.savez(out, **contents)
    with files.reported(path, "cannot write"):
        path.parent.mkdir(exist_ok=True)
    files.write_atomic(path, out.getvalue())


def _load(path: pathlib.Path, origin: Mapping[str, Any], like: Any) -> Any:
    """Reads the statistics; raises DamagedError unless `_save` wrote the file for this origin."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise checkpoint.DamagedError(f"it cannot be read: {error}") from None

    header = arrays.pop(_HEADER, np.zeros(0, np.uint8))
    body = checkpoint.unseal(header.tobytes(), "its header")
    for key, value in origin.items():
        if body.get(key) != value:
            raise checkpoint.DamagedError(f"it was made from another {key}")

    names, leaves = checkpoint.flatten_arrays(like)
    wanted = {name: list(leaf.shape) for name, leaf in zip(names, leaves, strict=True)}
    held = {name: entry["shape"] for name, entry in body["arrays"].items()}
    if held != wanted:
        raise checkpoint.DamagedError("it was made from another network")

    checkpoint.check_arrays(arrays, body)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in names])
