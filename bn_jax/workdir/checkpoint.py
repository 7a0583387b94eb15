"""Saves and restores checkpoints, each of which is whole or absent.

Orbax writes the arrays; digests, quarantine and the fallback to an older step are ours.

A step is a directory. It appears under its number by one rename, after all its files are on disk:

    1200/arrays/          the state as orbax stores it
    1200/manifest.json    digests of every array and every file, metric, meta
    index.json            the steps that are there, so that the loss of one is noticed
    tmp.1500/             a save under way, or one that was when the process was killed
    quarantine/900/       a damaged step, kept for inspection, never restored

Only process 0 writes and reads, without a barrier: the state of data-parallel training is the same
in every process, and a save at preemption must not wait for a process that is gone. The others
receive the restored bytes from process 0, so the directory need not be on a shared disk.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import math
import pathlib
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from flax import traverse_util

from bn_jax.distributed import mesh
from bn_jax.errors import CheckpointError, DiskError, DivergedError, UserError
from bn_jax.workdir import files
from bn_jax.workdir.files import warn

MANIFEST = "manifest.json"
INDEX = "index.json"
QUARANTINE = "quarantine"
TMP = "tmp."

_DIGEST_BYTES = 20  # 160 bits, so that accidental collisions do not occur in practice


# The manifest: what a step must contain, so that damage is noticed.
#
# Orbax restores flipped bits without noticing, so every step carries `manifest.json`:
#
# * `arrays`: for each array, by its path in the tree, its shape, dtype and the BLAKE2b digest of
#   its bytes in C order, taken from the host copy before anything is written;
# * `files`: for each file of the step, its size and digest, taken after writing;
# * `step`, `metric`, `meta`, and a digest of all the above. The file is canonical JSON: a manifest
#   that differs in any byte from its own re-encoding is damaged.


class DamagedError(Exception):
    """A step does not hold what was saved; the message says where."""


def digest(data: Any) -> str:
    """Computes BLAKE2b of a bytes-like object, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def array_entry(array: np.ndarray) -> dict[str, Any]:
    """Returns shape, dtype and digest of one host array."""
    # ascontiguousarray makes a scalar one-dimensional; the bytes are the same.
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {"shape": list(array.shape), "dtype": array.dtype.name, "digest": digest(data)}


def file_entry(path: pathlib.Path) -> dict[str, Any]:
    """Returns the size and the digest of one file."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES))
    return {"size": path.stat().st_size, "digest": found.hexdigest()}


def file_entries(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns size and digest of every file below `directory` but the manifest, by relative path.

    Hidden files are left out, because those that NFS and desktops make may vanish at any time.
    """
    return {
        path.relative_to(directory).as_posix(): file_entry(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST and not path.name.startswith(".")
    }


def canonical(value: Any) -> bytes:
    """Encodes `value` as JSON in a unique way: sorted keys, no spaces, a final newline.

    Raises:
      ValueError, TypeError: `value` is not plain JSON, or has NaN or infinity in it.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode() + b"\n"


def seal(body: Mapping[str, Any]) -> bytes:
    """Encodes `body`, together with its digest, as canonical JSON."""
    return canonical({"body": body, "digest": digest(canonical(body))})


def unseal(data: bytes, what: str) -> dict[str, Any]:
    """Decodes what `seal` wrote, and returns the body.

    Raises:
      DamagedError: `data` is not exactly what `seal` wrote; `what` names it in the message.
    """
    try:
        value = json.loads(data)
        whole = value.keys() == {"body", "digest"} and canonical(value) == data
        if whole and digest(canonical(value["body"])) == value["digest"]:
            return value["body"]
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise DamagedError(f"{what} is damaged ({len(data)} bytes)")


@contextlib.contextmanager
def _permitted(path: pathlib.Path) -> Iterator[None]:
    """Raises DiskError for a file that this user may not read, which does not mean damage."""
    try:
        yield
    except PermissionError as error:
        raise DiskError(
            f"{path} cannot be read: {error.strerror}; make it readable for this user"
        ) from error


def load_manifest(directory: pathlib.Path, step: int) -> dict[str, Any]:
    """Reads a step directory's manifest, and checks its digest and the step's number.

    Raises:
      DamagedError: it is missing, altered, or of another step.
      DiskError: this user may not read it.
    """
    try:
        with _permitted(directory / MANIFEST):
            data = (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    body = unseal(data, MANIFEST)
    if body["step"] != step:
        raise DamagedError(f"the directory is named {step} but holds step {body['step']}")
    return body


def check_files(directory: pathlib.Path, body: Mapping[str, Any]) -> None:
    """Raises DamagedError unless the step has all files of its manifest, byte for byte.

    Other files, such as desktops, NFS and rsync leave, are ignored.
    """
    for name, entry in body["files"].items():
        path = directory / name
        try:
            with _permitted(path):
                found = file_entry(path)
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise DamagedError(f"{name} cannot be read: {error.strerror or error}") from error
        if found["size"] != entry["size"]:
            raise DamagedError(
                f"{name} has {found['size']} bytes, but {entry['size']} were written"
            )
        if found != entry:
            raise DamagedError(f"{name} has changed: its digest differs")


def check_arrays(arrays: Mapping[str, np.ndarray], body: Mapping[str, Any]) -> None:
    """Raises DamagedError unless the restored arrays are, bit for bit, those that were saved."""
    for name, entry in body["arrays"].items():
        if name not in arrays:
            raise DamagedError(f"array {name} is missing")
        if array_entry(arrays[name]) != entry:
            raise DamagedError(f"array {name} differs from what was saved")


# The arrays: the leaves of a pytree on disk, through orbax.
#
# Leaves are named by their path ('params/stem/conv/kernel') and stored as a nested dict, which any
# reader of orbax checkpoints understands.


@functools.cache
def _orbax() -> Any:
    """Imports orbax.checkpoint, once a run's checkpoints are opened.

    Importing this module does not import it, because it adds a handler to the root logger.
    """
    import orbax.checkpoint

    return orbax.checkpoint


def flatten_arrays(tree: Any) -> tuple[list[str], list[Any]]:
    """Lists names and leaves of a pytree. Raises ValueError if two leaves share a name."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"two leaves share a name: {sorted(names)}")
    return names, [leaf for _, leaf in pairs]


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays to the new directory `path`."""
    with _checkpointer() as checkpointer:
        nested = traverse_util.unflatten_dict(dict(arrays), sep="/")
        checkpointer.save(path, args=_orbax().args.StandardSave(nested))


def load_arrays(
    path: pathlib.Path, entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Reads the arrays of a manifest's entries from `path`.

    Raises:
      DamagedError: orbax cannot read them.
    """
    like = {name: np.empty(e["shape"], np.dtype(e["dtype"])) for name, e in entries.items()}
    nested = traverse_util.unflatten_dict(like, sep="/")
    restore = _orbax().args.StandardRestore(nested)
    try:
        with _checkpointer() as checkpointer:
            tree = checkpointer.restore(path, args=restore)
    except Exception as error:
        # The files are those that were written, so orbax failed to write or to read them. In either
        # case the step cannot be used, like a damaged one.
        raise DamagedError(f"orbax cannot read it: {first_line(error)}") from error

    names, leaves = flatten_arrays(tree)
    return {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}


def place_arrays(array: np.ndarray, like: Any) -> jax.Array:
    """Places an array on the devices of `like.sharding`, or on the default device."""
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
        want = wants.get(name)
        hold = holds.get(name)
        if want != hold:
            raise CheckpointError(
                f"{path} belongs to another model: {name} is {_describe(hold)} in the checkpoint, "
                f"{_describe(want)} in this run. Use the config and code that wrote it."
            )


def require_finite(step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises DivergedError naming the first array with NaN or infinity in it."""
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.integer) or array.dtype == bool:
            continue

        wide = array.astype(np.float32) if array.dtype.itemsize < 4 else array
        # The count of a BN's updates may be infinite, if converged statistics were imported.
        is_count = name.split("/")[-1] == "count"
        fine = ~np.isnan(wide) if is_count else np.isfinite(wide)
        if not fine.all():
            raise DivergedError(f"step {step} is not saved: {name} is not finite")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    # Process 0 works alone, so that no barrier of orbax waits for a process that is gone.
    alone = _orbax().options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="bn_jax"
    )
    handler = _orbax().StandardCheckpointHandler(multiprocessing_options=alone)
    checkpointer = _orbax().Checkpointer(handler, multiprocessing_options=alone)
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def _describe(entry: tuple[list[int], str] | None) -> str:
    return "absent" if entry is None else f"{entry[1]}{entry[0]}"


# The directory of step directories: which steps are there, and what is out of place.


class Steps:
    """The step directories in `directory`. If `read_only`, nothing is moved, removed or written."""

    def __init__(self, directory: pathlib.Path, *, read_only: bool):
        self.directory = pathlib.Path(directory).absolute()
        self.read_only = read_only

    def path(self, step: int) -> pathlib.Path:
        """Returns where `step` is, or would be."""
        return self.directory / str(step)

    def numbers(self) -> list[int]:
        """Lists the step directories' numbers, ascending. The steps are not verified."""
        return sorted(int(path.name) for path in self._entries() if _is_step(path))

    def metrics(self) -> dict[int, float | None]:
        """Returns the metric of each step whose manifest can be read."""
        metrics = {}
        for step in self.numbers():
            with contextlib.suppress(DamagedError):
                metrics[step] = load_manifest(self.path(step), step)["metric"]
        return metrics

    def tidy(self) -> bool:
        """Removes unfinished saves and reports what is out of place.

        Returns:
          Whether a step has ever been saved here.
        """
        index = self._read_index()
        ever = index is not None or (self.directory / QUARANTINE).is_dir()
        for path in self._entries():
            if path.name.startswith(TMP) or files.is_scratch(path):
                if not self.read_only:
                    remove(path)
            elif path.name.startswith(".") or path.name == QUARANTINE or _is_step(path):
                pass
            elif path.is_dir():
                # A step that was renamed, such as "1200 (copy)".
                ever = True
                self.quarantine(path, "its name is not the number of a step")

        here = self.numbers()
        missing = sorted(set(index or ()) - set(here))
        for step in missing:
            warn(f"checkpoint {self.path(step)} was saved but is no longer there")
        if here and (missing or not index):
            self.write_index(self.metrics())
        return ever or bool(here)

    def quarantine(self, path: pathlib.Path, why: str) -> None:
        """Moves a damaged step to the quarantine and says so in one line."""
        if self.read_only:
            warn(f"checkpoint {path} is not used: {why}")
            return

        target = self.directory / QUARANTINE / path.name
        count = 1
        while target.exists():
            target = target.with_name(f"{path.name}.{count}")
            count += 1
        with files.reported(path, "cannot quarantine"):
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
        warn(f"checkpoint {path} is damaged ({why}); moved to {QUARANTINE}/{target.name}")

    def write_index(self, steps: Iterable[int]) -> None:
        """Records which steps are there."""
        if not self.read_only:
            data = seal({"steps": sorted(steps)})
            files.write_atomic(self.directory / INDEX, data)

    def _read_index(self) -> list[int] | None:
        path = self.directory / INDEX
        try:
            with _permitted(path):
                return unseal(path.read_bytes(), INDEX)["steps"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, DamagedError) as error:
            warn(f"{path}: {error}; rebuilt from the steps that are there")
            return []

    def _entries(self) -> list[pathlib.Path]:
        with _permitted(self.directory):
            return sorted(self.directory.iterdir()) if self.directory.is_dir() else []


def remove(path: pathlib.Path) -> None:
    """Deletes a file or directory; if killed meanwhile, no half step keeps its number."""
    if not path.exists():
        return

    if path.is_file():
        path.unlink()
        return

    if not path.name.startswith(TMP):
        path = path.rename(path.with_name(f"{TMP}delete.{path.name}"))
    shutil.rmtree(path)


def _is_step(path: pathlib.Path) -> bool:
    return path.is_dir() and path.name.isdecimal() and str(int(path.name)) == path.name


# Saving and restoring: what a run calls.


class Checkpoints:
    """The checkpoints of one run. All processes make one and call the same methods.

    Args:
      directory: is created at the first save.
      keep_last: how many of the newest steps to keep, at least 1; with 2 there is a fallback.
      keep_best: how many of the steps with the highest `metric` to keep in addition.
      keep_every: also keep every step that this number divides; 0 for none.
      read_only: never clean, quarantine or write; for commands that read a run in progress.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        keep_last: int,
        keep_best: int,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last={keep_last} must be >= 1, keep_best={keep_best} >= 0")

        self.keep_last = keep_last
        self.keep_best = keep_best
        self.keep_every = keep_every
        self._steps = Steps(directory, read_only=read_only)
        self.directory = self._steps.directory
        self._main = jax.process_index() == 0
        self._pending: concurrent.futures.Future[None] | None = None
        self._worker: concurrent.futures.ThreadPoolExecutor | None = None
        self._metrics: dict[int, float | None] | None = None  # of the steps that are there
        logging.getLogger("absl").addFilter(_quiet)
        _orbax()  # imported now, when nothing waits for it yet

    def steps(self) -> list[int]:
        """Lists the steps on this process's disk, ascending. They are not verified yet."""
        return self._steps.numbers()

    # Saving

    def save(
        self,
        step: int,
        state: Any,
        *,
        metric: float | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves `state` (a pytree of arrays) as `step`; returns when it is copied to the host.

        It waits for a save that is still under way. `meta` is plain JSON, which `restore` returns.

        Raises:
          DiskError: too little space for this save, or the previous one failed.
          DivergedError: the previous save held NaN or infinity; it was not committed.
        """
        self.wait()
        names, leaves = flatten_arrays(state)
        if self._main:
            # Half as much again is for manifests, orbax's indices and records written meanwhile.
            files.require_free(self.directory, sum(x.nbytes for x in leaves) * 3 // 2 + (1 << 20))
        arrays = dict(zip(names, mesh.to_host(leaves), strict=True))
        if not self._main:
            return
        if self._worker is None:
            self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")

        finite = metric is not None and math.isfinite(metric)
        body = {"step": step, "metric": metric if finite else None, "meta": dict(meta or {})}
        canonical(body)  # raises here, where the caller sees it, if `meta` is not JSON
        self._pending = self._worker.submit(self._write, step, arrays, body)

    def check(self) -> None:
        """Raises the error of a background save that has ended; cheap enough for every step."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until no save is under way; raises as `check` does."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def settle(self, seconds: float) -> None:
        """Waits at most `seconds` for a save under way; raises nothing. Any thread may call it."""
        if self._pending is not None:
            most = min(seconds, threading.TIMEOUT_MAX)
            concurrent.futures.wait([self._pending], timeout=most)

    def close(self) -> None:
        """Waits, and ends the thread; the object can still be used."""
        try:
            self.wait()
        finally:
            if self._worker is not None:
                self._worker.shutdown()
                self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except UserError as second:
            if error is None:
                raise
            files.warn(str(second))  # the first error is the one that ends the command

    def _write(self, step: int, arrays: dict[str, np.ndarray], body: dict[str, Any]) -> None:
        """Writes one step and removes those that are no longer kept. It runs in the thread."""
        scratch = self.directory / f"{TMP}{step}"
        final = self._steps.path(step)
        require_finite(step, arrays)
        body["arrays"] = {name: array_entry(array) for name, array in arrays.items()}
        try:
            with files.reported(self.directory, "cannot save a checkpoint in"):
                self.directory.mkdir(parents=True, exist_ok=True)
                remove(scratch)
                scratch.mkdir()
                save_arrays(scratch / "arrays", arrays)
                body["files"] = file_entries(scratch)
                files.write_atomic(scratch / MANIFEST, seal(body))

                remove(final)  # it exists after a fallback to an older step
                scratch.rename(final)
                files.sync_directory(self.directory)
            self._retain(step, body["metric"])
        except Exception as error:
            with contextlib.suppress(OSError):
                remove(scratch)
            if isinstance(error, DiskError):
                raise
            # Orbax and tensorstore wrap the system's error in errors of their own.
            raise DiskError(
                f"cannot save step {step} in {self.directory}: {first_line(error)}; "
                f"{files.free_text(self.directory)}. The previous checkpoint is intact: free space "
                "and run the same command again."
            ) from error

    def _retain(self, step: int, metric: float | None) -> None:
        """Removes the steps that are neither among the newest nor the best, nor kept for ever."""
        metrics = self._steps.metrics() if self._metrics is None else self._metrics
        metrics[step] = metric
        keep = set(sorted(metrics)[-self.keep_last :])
        ranked = sorted((m, -s) for s, m in metrics.items() if m is not None)  # ties: earlier wins
        keep |= {-s for _, s in ranked[max(0, len(ranked) - self.keep_best) :]}
        if self.keep_every:
            keep |= {s for s in metrics if s % self.keep_every == 0}
        self._metrics = {s: m for s, m in metrics.items() if s in keep}

        # The index is written first: a kill in between leaves a step too many, not a missing one.
        self._steps.write_index(keep)
        for old in sorted(metrics.keys() - keep):
            remove(self._steps.path(old))

    # Restoring

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest good step, or the given one; returns (step, state, meta).

        Args:
          like: a pytree of jax.ShapeDtypeStruct (with `sharding`, or for the default device) or of
            arrays. The state has its structure and shardings, whichever devices saved it.
          step: a particular step, without fallback to another.

        Returns:
          None if and only if the directory has never held a step.

        Raises:
          CheckpointError: no step is good, `step` is absent or damaged, or `like` is the state of
            another model.
        """
        self.wait()
        self._metrics = None
        names, leaves = flatten_arrays(like)

        # Process 0 reads, and sends all processes what it found or why it failed.
        arrays: dict[str, np.ndarray] = {}
        header: dict[str, Any] = {"step": None}
        if self._main:
            try:
                found = self._read(names, leaves, step)
                if found is not None:
                    header = {"step": found[0], "meta": found[2]}
                    arrays = found[1]
            except UserError as error:
                header = {"error": str(error), "code": error.exit_code}
        header = json.loads(mesh.broadcast(json.dumps(header).encode()))
        if "error" in header:
            kind = DiskError if header["code"] == DiskError.exit_code else CheckpointError
            raise kind(header["error"])
        if header["step"] is None:
            return None

        # All arrays are sent at once, because each size of a broadcast is a program to compile.
        data = mesh.broadcast(b"".join(arrays[name].tobytes() for name in names if self._main))
        placed = []
        start = 0
        for leaf in leaves:
            count = math.prod(leaf.shape)
            array = np.frombuffer(data, leaf.dtype, count, start).reshape(leaf.shape)
            placed.append(place_arrays(array, leaf))
            start += array.nbytes
        return header["step"], jax.tree.unflatten(jax.tree.structure(like), placed), header["meta"]

    def _read(
        self, names: Sequence[str], leaves: Sequence[Any], wanted: int | None
    ) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
        """Reads the newest good step, or the wanted one; returns (step, arrays by name, meta)."""
        ever = self._steps.tidy()
        bad = []
        for step in self.steps()[::-1] if wanted is None else [wanted]:
            path = self._steps.path(step)
            if not path.is_dir():
                raise CheckpointError(f"{self.directory} has no step {step}; it has {self.steps()}")
            try:
                body = load_manifest(path, step)
                check_files(path, body)
                require_same_model(path, names, leaves, body["arrays"])
                arrays = load_arrays(path / "arrays", body["arrays"])
                check_arrays(arrays, body)
            except DamagedError as error:
                bad.append(step)
                self._steps.quarantine(path, str(error))
                continue

            if bad:
                self._steps.write_index(self._steps.metrics())
            return step, arrays, body["meta"]

        if not ever:
            return None
        raise CheckpointError(
            f"{self.directory}: no usable checkpoint (damaged: "
            f"{', '.join(map(str, bad)) or 'all that were saved are gone'}). Restore one from a "
            "backup, or delete this directory to start from step 0."
        )


def _quiet(record: logging.LogRecord) -> bool:
    """Filters out what orbax logs about each save; errors are kept."""
    return record.levelno > logging.WARNING or "orbax" not in record.pathname
