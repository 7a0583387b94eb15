"""A folder that behaves like a flat bucket under gcsfuse: no append, no rename of folders.

* What is written to a file is in the bucket when the file is synced or closed: a whole new object.
* A folder is renamed file by file; a kill in the middle leaves some on either side.
* A file is renamed by a copy, which is there at once, and the removal of the original.
* flock is known to its own host alone.
"""

import fcntl
import os
import pathlib
import shutil

import pytest


class Killed(BaseException):
    """The process ends here; nothing that handles errors runs."""


class Store:
    """The bucket as the host at work in `folder` sees it; `mount` is what any other host sees."""

    def __init__(self, folder: pathlib.Path, patch: pytest.MonkeyPatch):
        self.folder, self.left = folder, -1
        self._open: list[tuple[pathlib.Path, object]] = []
        self._uploaded: dict[pathlib.Path, tuple[bytes, int] | None] = {}
        folder.mkdir()
        path_open, os_open, fsync = pathlib.Path.open, os.open, os.fsync
        rename, replace = pathlib.Path.rename, pathlib.Path.replace

        def opening(path, mode="r", *args, **options):
            self._note(path, set(mode) & set("wa+x"))
            file = path_open(path, mode, *args, **options)
            self._open.append((path, file))
            return file

        def opening_low(path, flags, *args, **options):
            self._note(pathlib.Path(path), flags & (os.O_RDWR | os.O_WRONLY))
            file = os_open(path, flags, *args, **options)
            self._open.append((pathlib.Path(path), file))
            return file

        def syncing(file):
            fsync(file)
            self._upload(pathlib.Path(f"/proc/self/fd/{file}").readlink())

        def renaming(path, target):
            if not (path.is_dir() and self._here(path)):
                return rename(path, target)
            # Backwards: a checkpoint's manifest goes first, the arrays that it vouches for last.
            for source in sorted((p for p in path.rglob("*") if p.is_file()), reverse=True):
                copy = pathlib.Path(target) / source.relative_to(path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                self._step()
                shutil.copy2(source, copy)
                self._step()
                source.unlink()
            shutil.rmtree(path)
            return pathlib.Path(target)

        def replacing(path, target):
            if not self._here(path):
                return replace(path, target)
            self._step()
            shutil.copy2(path, target)
            self._step()
            path.unlink()
            return pathlib.Path(target)

        patch.setattr(pathlib.Path, "open", opening)
        patch.setattr(os, "open", opening_low)
        patch.setattr(os, "fsync", syncing)
        patch.setattr(pathlib.Path, "rename", renaming)
        patch.setattr(pathlib.Path, "replace", replacing)
        patch.setattr(fcntl, "flock", lambda *_: None)

    def kill_after(self, operations: int) -> None:
        """Raises Killed in place of a copy or removal, after so many of them; -1: never."""
        self.left = operations

    def mount(self, folder: pathlib.Path) -> pathlib.Path:
        """The bucket as it is now, in `folder`; files that this host has open as last uploaded."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        for path, file in self._open:
            if self._closed(path, file):
                continue
            there, last = folder / path.relative_to(self.folder), self._uploaded[path]
            if last is None:
                there.unlink(missing_ok=True)
            else:
                there.write_bytes(last[0])
                os.utime(there, ns=(last[1], last[1]))
        return folder

    def _here(self, path: pathlib.Path) -> bool:
        return self.folder in pathlib.Path(path).absolute().parents

    def _note(self, path: pathlib.Path, writing) -> None:
        if writing and self._here(path) and path not in self._uploaded:
            self._uploaded[path] = None
            self._upload(path)

    def _upload(self, path: pathlib.Path) -> None:
        if path in self._uploaded and path.is_file():
            self._uploaded[path] = (path.read_bytes(), path.stat().st_mtime_ns)

    def _closed(self, path: pathlib.Path, file) -> bool:
        if path not in self._uploaded:
            return True
        if not isinstance(file, int):
            return file.closed
        link = pathlib.Path(f"/proc/self/fd/{file}")
        return not link.exists() or link.readlink() != path

    def _step(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1
