"""Checkpoints that are whole or not there: orbax, our own digests, quarantine and fallback.

Layout of the directory (`WORKDIR/checkpoints`):

    1200/arrays/...        what orbax writes: a nested dict of arrays, named by tree path
    1200/manifest.json     digests of arrays and files (bn_jax/manifest.py)
    index.json             the steps that are there, to notice when one vanishes
    tmp.1500/              a save that is under way, or was when the process was killed
    quarantine/900/        a damaged step, kept for inspection, never restored; delete at will

A step appears under its number by one rename, after all its files are on disk. Process 0 alone
writes and reads, without a barrier: the state of data-parallel training is the same everywhere,
and a save at preemption must not wait for a peer that is gone. Other processes receive the
restored bytes from process 0, so the directory need not be on a shared disk.
"""

import concurrent.futures
import contextlib
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from bn_jax import disk, hosts, manifest
from bn_jax.errors import CheckpointError, DiskError, DivergedError, UserError

INDEX = "index.json"
QUARANTINE = "quarantine"
_TMP = "tmp."
_ALONE = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="bn_jax"
)


class Checkpoints:
    """The checkpoints of one run. All processes construct it and call its methods alike.

    Args:
      directory: created at the first save.
      keep_last: how many of the newest steps to keep, at least 1; 2 leaves one to fall back to.
      keep_best: how many of the steps with the highest `metric` to keep besides.
      read_only: never clean, quarantine or write; for commands that look at a run in progress.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        keep_last: int,
        keep_best: int,
        read_only: bool = False,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last={keep_last} must be >= 1, keep_best={keep_best} >= 0")
        self.directory = pathlib.Path(directory).absolute()
        self.keep_last, self.keep_best, self.read_only = keep_last, keep_best, read_only
        self._main = jax.process_index() == 0
        self._pending: concurrent.futures.Future[None] | None = None
        self._worker: concurrent.futures.ThreadPoolExecutor | None = None
        self._metrics: dict[int, float | None] | None = None  # of the steps on disk
        logging.getLogger("absl").addFilter(_quiet)

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

        A save still under way is waited for. `meta` is plain JSON and comes back from `restore`.

        Raises:
          DiskError: too little space for this save, or the previous one failed.
          DivergedError: the previous save held NaN or infinity; it was not committed.
        """
        assert not self.read_only
        self.wait()
        names, leaves = _flatten(state)
        if self._main:
            # Half as much again: manifests, orbax' indices, and records written meanwhile.
            needed = sum(leaf.nbytes for leaf in leaves) * 3 // 2 + (1 << 20)
            disk.require_free(self.directory, needed)
        arrays = dict(zip(names, hosts.to_host(leaves), strict=True))
        if not self._main:
            return
        if self._worker is None:
            self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        body = {"step": step, "metric": _finite(metric), "meta": dict(meta or {})}
        manifest.canonical(body)  # a meta that is not JSON fails here, in the caller
        self._pending = self._worker.submit(self._write, step, arrays, body)

    def check(self) -> None:
        """Raises what a finished save in the background ran into; free enough for every step."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when no save is under way; raises as `check` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits and frees the thread; the object can still restore."""
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
            _say(f"bn_jax: {second}")  # the first error is the one that ends the command

    def _write(self, step: int, arrays: dict[str, np.ndarray], body: dict[str, Any]) -> None:
        scratch, final = self.directory / f"{_TMP}{step}", self.directory / str(step)
        for name, array in arrays.items():
            _require_finite(step, name, array)
        body["arrays"] = {name: manifest.array_entry(array) for name, array in arrays.items()}
        try:
            with disk.reported(self.directory, "cannot save a checkpoint in"):
                self.directory.mkdir(parents=True, exist_ok=True)
                _remove(scratch)
                scratch.mkdir()
                with _orbax() as checkpointer:
                    checkpointer.save(scratch / "arrays", args=ocp.args.StandardSave(_nest(arrays)))
                body["files"] = manifest.file_entries(scratch)
                disk.write_atomic(scratch / manifest.NAME, manifest.seal(body))
                if final.exists():  # saved again after going back to an older step
                    _remove(final)
                scratch.rename(final)
                disk.sync_directory(self.directory)
        except Exception as error:
            with contextlib.suppress(OSError):
                _remove(scratch)
            if isinstance(error, DiskError):
                raise
            # Orbax and tensorstore wrap the system's error in their own.
            raise DiskError(
                f"cannot save step {step} in {self.directory}: {_first_line(error)}; "
                f"{disk.free_text(self.directory)}. The previous checkpoint is intact: free space "
                "and run the same command again."
            ) from error
        self._retain(step, body["metric"])

    def _retain(self, step: int, metric: float | None) -> None:
        metrics = self._known_metrics()
        metrics[step] = metric
        keep = set(sorted(metrics)[-self.keep_last :])
        ranked = sorted((m, s) for s, m in metrics.items() if m is not None)
        keep |= {s for _, s in ranked[len(ranked) - self.keep_best :]}
        drop = metrics.keys() - keep
        for old in drop:
            del metrics[old]
        self._write_index(metrics)
        for old in sorted(drop):
            _remove(self.directory / str(old))

    # Looking

    def steps(self) -> list[int]:
        """Numbers of the steps on this process's disk, ascending; not yet verified."""
        return sorted(int(p.name) for p in self._entries() if _is_step(p))

    def best_step(self) -> int | None:
        """The step with the highest metric (the earliest of equals); None if none has one."""
        metrics = [(m, -s) for s, m in self._scan_metrics().items() if m is not None]
        return -max(metrics)[1] if metrics else None

    def _entries(self) -> list[pathlib.Path]:
        return sorted(self.directory.iterdir()) if self.directory.is_dir() else []

    def _known_metrics(self) -> dict[int, float | None]:
        if self._metrics is None:
            self._metrics = self._scan_metrics()
        return self._metrics

    def _scan_metrics(self) -> dict[int, float | None]:
        metrics = {}
        for step in self.steps():
            with contextlib.suppress(manifest.DamagedError):
                metrics[step] = manifest.load(self.directory / str(step), step)["metric"]
        return metrics

    # Restoring

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest good step, or the given one: (step, state, meta).

        Args:
          like: pytree of jax.ShapeDtypeStruct (with `sharding`, or for the default device) or of
            arrays; the state comes back in its structure and shardings, whatever devices saved it.
          step: a particular step; then there is no falling back to another.

        Returns:
          None if and only if the directory has never held a step.

        Raises:
          CheckpointError: no step is good, `step` is absent or damaged, or `like` is the state of
            another model.
        """
        self.wait()
        self._metrics = None
        names, leaves = _flatten(like)
        arrays: dict[str, np.ndarray] = {}
        header: dict[str, Any] = {}
        if self._main:
            try:
                found = self._read(names, leaves, step)
                header = {"step": None}
                if found is not None:
                    header, arrays = {"step": found[0], "meta": found[2]}, found[1]
            except CheckpointError as error:
                header = {"error": str(error)}
        header = json.loads(hosts.broadcast(json.dumps(header).encode()))
        if "error" in header:
            raise CheckpointError(header["error"])
        if header["step"] is None:
            return None
        placed = []
        for name, leaf in zip(names, leaves, strict=True):
            data = hosts.broadcast(arrays[name].tobytes() if self._main else None)
            array = np.frombuffer(data, leaf.dtype).reshape(leaf.shape)
            placed.append(_place(array, leaf))
        return header["step"], jax.tree.unflatten(jax.tree.structure(like), placed), header["meta"]

    def _read(
        self, names: Sequence[str], leaves: Sequence[Any], wanted: int | None
    ) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
        held = self._tidy()
        candidates = self.steps()[::-1] if wanted is None else [wanted]
        bad = []
        for step in candidates:
            path = self.directory / str(step)
            if wanted is not None and not path.is_dir():
                raise CheckpointError(
                    f"{self.directory} has no step {wanted}; it has {self.steps() or 'none'}"
                )
            try:
                body = manifest.load(path, step)
                manifest.check_files(path, body)
                _require_same_model(self.directory, step, names, leaves, body)
                arrays = _load_arrays(path / "arrays", body)
                manifest.check_arrays(arrays, body)
            except manifest.DamagedError as error:
                bad.append(step)
                self._set_aside(path, str(error))
                continue
            if not self.read_only and bad:
                self._write_index(self._scan_metrics())
            return step, arrays, body["meta"]
        if not held and not bad:
            return None
        raise CheckpointError(
            f"{self.directory}: no usable checkpoint (damaged or missing: "
            f"{', '.join(map(str, bad)) or 'all that were saved'}). Bring one back, or delete this "
            "directory to start from step 0."
        )

    def _tidy(self) -> bool:
        """Removes unfinished saves, reports what is out of place; has a step ever been saved?"""
        index = self._read_index()
        held = index is not None or (self.directory / QUARANTINE).is_dir()
        for path in self._entries():
            if path.name.startswith((_TMP, ".")):
                if not self.read_only:
                    _remove(path)
            elif path.is_dir() and path.name != QUARANTINE and not _is_step(path):
                held = True
                self._set_aside(path, "not the name of a step")
        here = set(self.steps())
        missing = sorted(set(index or ()) - here)
        for step in missing:
            _say(f"checkpoint {self.directory / str(step)} was saved but is no longer there")
        if not self.read_only and here and (missing or index is None):
            self._write_index(self._scan_metrics())
        return held or bool(here)

    def _set_aside(self, path: pathlib.Path, why: str) -> None:
        if self.read_only:
            _say(f"checkpoint {path} is not used: {why}")
            return
        target = self.directory / QUARANTINE / path.name
        count = 1
        while target.exists():
            target = target.with_name(f"{path.name}.{count}")
            count += 1
        with disk.reported(path, "cannot move aside"):
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
        _say(f"checkpoint {path} is damaged ({why}); moved to {QUARANTINE}/{target.name}")

    def _read_index(self) -> list[int] | None:
        path = self.directory / INDEX
        if not path.exists():
            return None
        try:
            return manifest.unseal(path.read_bytes(), INDEX)["steps"]
        except (OSError, manifest.DamagedError) as error:
            _say(f"{path}: {error}; rebuilt from the steps that are there")
            return []

    def _write_index(self, metrics: Mapping[int, float | None]) -> None:
        disk.write_atomic(self.directory / INDEX, manifest.seal({"steps": sorted(metrics)}))


def _flatten(tree: Any) -> tuple[list[str], list[Any]]:
    """Leaves with names like 'params/stem/conv/kernel'."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"two leaves share a name: {sorted(names)}")
    return names, [leaf for _, leaf in pairs]


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


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=_ALONE)
    checkpointer = ocp.Checkpointer(handler, multiprocessing_options=_ALONE)
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def _load_arrays(path: pathlib.Path, body: Mapping[str, Any]) -> dict[str, np.ndarray]:
    like = {n: np.empty(e["shape"], np.dtype(e["dtype"])) for n, e in body["arrays"].items()}
    try:
        with _orbax() as checkpointer:
            tree = checkpointer.restore(path, args=ocp.args.StandardRestore(_nest(like)))
    except Exception as error:
        # The files are what was written, so this is a writer or reader at fault: the step is as
        # unusable as a damaged one.
        raise manifest.DamagedError(f"orbax cannot read it: {_first_line(error)}") from error
    names, leaves = _flatten(tree)
    return {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}


def _require_same_model(
    directory: pathlib.Path,
    step: int,
    names: Sequence[str],
    leaves: Sequence[Any],
    body: Mapping[str, Any],
) -> None:
    """CheckpointError naming the first array that the model and the checkpoint do not share."""
    wants = {n: (list(x.shape), np.dtype(x.dtype).name) for n, x in zip(names, leaves, strict=True)}
    holds = {n: (e["shape"], e["dtype"]) for n, e in body["arrays"].items()}
    for name in sorted(wants.keys() | holds.keys()):
        want, hold = wants.get(name), holds.get(name)
        if want != hold:
            raise CheckpointError(
                f"{directory / str(step)} is of another model: {name} is {_describe(hold)} in the "
                f"checkpoint, {_describe(want)} in this run. Use the config and code that wrote it."
            )


def _describe(entry: tuple[list[int], str] | None) -> str:
    return "absent" if entry is None else f"{entry[1]}{entry[0]}"


def _place(array: np.ndarray, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _require_finite(step: int, name: str, array: np.ndarray) -> None:
    # A count of statistics updates is infinite where a converged tree was imported.
    if not np.issubdtype(array.dtype, np.integer) and array.dtype != bool:
        wide = array.astype(np.float32) if array.dtype.itemsize < 4 else array
        if np.isnan(wide).any() or (name.split("/")[-1] != "count" and np.isinf(wide).any()):
            raise DivergedError(f"step {step} is not saved: {name} is not finite")


def _finite(metric: float | None) -> float | None:
    return None if metric is None or not np.isfinite(metric) else float(metric)


def _is_step(path: pathlib.Path) -> bool:
    return path.is_dir() and path.name.isdecimal() and str(int(path.name)) == path.name


def _remove(path: pathlib.Path) -> None:
    """Deletes a directory so that a kill in the middle leaves no half step under its number."""
    if not path.exists():
        return
    if not path.name.startswith(_TMP):
        path = path.rename(path.with_name(f"{_TMP}delete.{path.name}"))
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _quiet(record: logging.LogRecord) -> bool:
    """Keeps orbax' chatter about each save out of the user's terminal; its errors stay."""
    return record.levelno > logging.WARNING or "orbax" not in record.pathname
