"""The directory of step directories: what is there, what should be, what is put aside.

1200/            a step: arrays/ and manifest.json
index.json       the steps that are there, to notice when one vanishes
tmp.1500/        a save that is under way, or was when the process was killed
quarantine/900/  a damaged step, kept for inspection, never restored; delete at will
"""

import contextlib
import pathlib
import shutil
import sys
from collections.abc import Iterable

from bn_jax import disk, manifest

INDEX = "index.json"
QUARANTINE = "quarantine"
TMP = "tmp."


class Shelf:
    """Step directories below `directory`; with `read_only` nothing is moved, removed or written."""

    def __init__(self, directory: pathlib.Path, *, read_only: bool):
        self.directory, self.read_only = pathlib.Path(directory).absolute(), read_only

    def path(self, step: int) -> pathlib.Path:
        """Where `step` is or would be."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Numbers of the step directories, ascending; not verified."""
        return sorted(int(path.name) for path in self._entries() if _is_step(path))

    def metrics(self) -> dict[int, float | None]:
        """The metric of each step whose manifest can be read."""
        metrics = {}
        for step in self.steps():
            with contextlib.suppress(manifest.DamagedError):
                metrics[step] = manifest.load(self.path(step), step)["metric"]
        return metrics

    def tidy(self) -> bool:
        """Removes unfinished saves, reports what is out of place; has a step ever been saved?"""
        index = self._read_index()
        held = index is not None or (self.directory / QUARANTINE).is_dir()
        for path in self._entries():
            if path.name.startswith((TMP, ".")):
                if not self.read_only:
                    remove(path)
            elif path.is_dir() and path.name != QUARANTINE and not _is_step(path):
                held = True
                self.set_aside(path, "not the name of a step")
        here = self.steps()
        missing = sorted(set(index or ()) - set(here))
        for step in missing:
            say(f"checkpoint {self.path(step)} was saved but is no longer there")
        if here and (missing or not index):
            self.write_index(self.metrics())
        return held or bool(here)

    def set_aside(self, path: pathlib.Path, why: str) -> None:
        """Moves a damaged step to the quarantine and says so in one line."""
        if self.read_only:
            say(f"checkpoint {path} is not used: {why}")
            return
        target = self.directory / QUARANTINE / path.name
        count = 1
        while target.exists():
            target = target.with_name(f"{path.name}.{count}")
            count += 1
        with disk.reported(path, "cannot move aside"):
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
        say(f"checkpoint {path} is damaged ({why}); moved to {QUARANTINE}/{target.name}")

    def write_index(self, steps: Iterable[int]) -> None:
        """Notes which steps are there."""
        if not self.read_only:
            data = manifest.seal({"steps": sorted(steps)})
            disk.write_atomic(self.directory / INDEX, data)

    def _read_index(self) -> list[int] | None:
        path = self.directory / INDEX
        if not path.exists():
            return None
        try:
            return manifest.unseal(path.read_bytes(), INDEX)["steps"]
        except (OSError, manifest.DamagedError) as error:
            say(f"{path}: {error}; rebuilt from the steps that are there")
            return []

    def _entries(self) -> list[pathlib.Path]:
        return sorted(self.directory.iterdir()) if self.directory.is_dir() else []


def remove(path: pathlib.Path) -> None:
    """Deletes a directory so that a kill in the middle leaves no half step under its number."""
    if not path.exists():
        return
    if not path.name.startswith(TMP):
        path = path.rename(path.with_name(f"{TMP}delete.{path.name}"))
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def say(line: str) -> None:
    """One line for the user, on stderr."""
    print(f"bn_jax: {line}", file=sys.stderr, flush=True)


def _is_step(path: pathlib.Path) -> bool:
    return path.is_dir() and path.name.isdecimal() and str(int(path.name)) == path.name
