"""Checkpoints that are whole or not there: orbax, our own digests, quarantine and fallback.

A step appears under its number by one rename, after all its files are on disk (bn_jax/shelf.py has
the layout, bn_jax/manifest.py the digests). Process 0 alone writes and reads, without a barrier:
the state of data-parallel training is the same everywhere, and a save at preemption must not wait
for a peer that is gone. Other processes receive the restored bytes from process 0, so the
directory need not be on a shared disk.
"""

import concurrent.futures
import contextlib
import json
import logging
import math
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from bn_jax import arrays as named
from bn_jax import disk, hosts, manifest, shelf
from bn_jax.errors import CheckpointError, DiskError, UserError


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
        self.keep_last, self.keep_best = keep_last, keep_best
        self._shelf = shelf.Shelf(directory, read_only=read_only)
        self.directory = self._shelf.directory
        self._main = jax.process_index() == 0
        self._pending: concurrent.futures.Future[None] | None = None
        self._worker: concurrent.futures.ThreadPoolExecutor | None = None
        self._metrics: dict[int, float | None] | None = None  # of the steps that are there
        logging.getLogger("absl").addFilter(_quiet)

    def steps(self) -> list[int]:
        """Numbers of the steps on this process's disk, ascending; not yet verified."""
        return self._shelf.steps()

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
        self.wait()
        names, leaves = named.flatten(state)
        if self._main:
            # Half as much again: manifests, orbax' indices, and records written meanwhile.
            disk.require_free(self.directory, sum(x.nbytes for x in leaves) * 3 // 2 + (1 << 20))
        arrays = dict(zip(names, hosts.to_host(leaves), strict=True))
        if not self._main:
            return
        if self._worker is None:
            self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        finite = metric is not None and math.isfinite(metric)
        body = {"step": step, "metric": metric if finite else None, "meta": dict(meta or {})}
        manifest.canonical(body)  # a meta that is not JSON fails here, in the caller
        self._pending = self._worker.submit(self._write, step, arrays, body)

    def check(self) -> None:
        """Raises what a finished save in the background ran into; cheap enough for every step."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when no save is under way; raises as `check` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def settle(self, seconds: float) -> None:
        """Gives a save under way so long to end; raises nothing. From any thread."""
        if self._pending is not None:
            most = min(seconds, threading.TIMEOUT_MAX)
            concurrent.futures.wait([self._pending], timeout=most)

    def close(self) -> None:
        """Waits and frees the thread; the object can still be used."""
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
            shelf.say(str(second))  # the first error is the one that ends the command

    def _write(self, step: int, arrays: dict[str, np.ndarray], body: dict[str, Any]) -> None:
        scratch, final = self.directory / f"{shelf.TMP}{step}", self._shelf.path(step)
        named.require_finite(step, arrays)
        body["arrays"] = {name: manifest.array_entry(array) for name, array in arrays.items()}
        try:
            with disk.reported(self.directory, "cannot save a checkpoint in"):
                self.directory.mkdir(parents=True, exist_ok=True)
                shelf.remove(scratch)
                scratch.mkdir()
                named.save(scratch / "arrays", arrays)
                body["files"] = manifest.file_entries(scratch)
                disk.write_atomic(scratch / manifest.NAME, manifest.seal(body))
                shelf.remove(final)  # saved again after going back to an older step
                scratch.rename(final)
                disk.sync_directory(self.directory)
            self._retain(step, body["metric"])
        except Exception as error:
            with contextlib.suppress(OSError):
                shelf.remove(scratch)
            if isinstance(error, DiskError):
                raise
            # Orbax and tensorstore wrap the system's error in their own.
            raise DiskError(
                f"cannot save step {step} in {self.directory}: {named.first_line(error)}; "
                f"{disk.free_text(self.directory)}. The previous checkpoint is intact: free space "
                "and run the same command again."
            ) from error

    def _retain(self, step: int, metric: float | None) -> None:
        metrics = self._shelf.metrics() if self._metrics is None else self._metrics
        metrics[step] = metric
        keep = set(sorted(metrics)[-self.keep_last :])
        ranked = sorted((m, -s) for s, m in metrics.items() if m is not None)
        keep |= {-s for _, s in ranked[max(0, len(ranked) - self.keep_best) :]}
        self._metrics = {s: m for s, m in metrics.items() if s in keep}
        # The index first: a kill in between leaves a step too many, not one that seems lost.
        self._shelf.write_index(keep)
        for old in sorted(metrics.keys() - keep):
            shelf.remove(self._shelf.path(old))

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
        names, leaves = named.flatten(like)
        arrays: dict[str, np.ndarray] = {}
        header: dict[str, Any] = {"step": None}
        if self._main:
            try:
                found = self._read(names, leaves, step)
                if found is not None:
                    header, arrays = {"step": found[0], "meta": found[2]}, found[1]
            except UserError as error:
                header = {"error": str(error), "code": error.exit_code}
        header = json.loads(hosts.broadcast(json.dumps(header).encode()))
        if "error" in header:
            kind = DiskError if header["code"] == DiskError.exit_code else CheckpointError
            raise kind(header["error"])
        if header["step"] is None:
            return None
        # One broadcast for all: each size of a broadcast is a program to compile.
        data = hosts.broadcast(b"".join(arrays[name].tobytes() for name in names if self._main))
        placed, start = [], 0
        for leaf in leaves:
            count = math.prod(leaf.shape)
            array = np.frombuffer(data, leaf.dtype, count, start).reshape(leaf.shape)
            placed.append(named.place(array, leaf))
            start += array.nbytes
        return header["step"], jax.tree.unflatten(jax.tree.structure(like), placed), header["meta"]

    def _read(
        self, names: Sequence[str], leaves: Sequence[Any], wanted: int | None
    ) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
        ever = self._shelf.tidy()
        bad = []
        for step in self.steps()[::-1] if wanted is None else [wanted]:
            path = self._shelf.path(step)
            if not path.is_dir():
                raise CheckpointError(f"{self.directory} has no step {step}; it has {self.steps()}")
            try:
                body = manifest.load(path, step)
                manifest.check_files(path, body)
                named.require_same_model(path, names, leaves, body["arrays"])
                arrays = named.load(path / "arrays", body["arrays"])
                manifest.check_arrays(arrays, body)
            except manifest.DamagedError as error:
                bad.append(step)
                self._shelf.set_aside(path, str(error))
                continue
            if bad:
                self._shelf.write_index(self._shelf.metrics())
            return step, arrays, body["meta"]
        if not ever:
            return None
        raise CheckpointError(
            f"{self.directory}: no usable checkpoint (damaged: "
            f"{', '.join(map(str, bad)) or 'all that were saved are gone'}). Bring one back, or "
            "delete this directory to start from step 0."
        )


def _quiet(record: logging.LogRecord) -> bool:
    """Keeps orbax' chatter about each save out of the user's terminal; its errors stay."""
    return record.levelno > logging.WARNING or "orbax" not in record.pathname
