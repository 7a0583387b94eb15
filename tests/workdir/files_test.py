"""Disks that fill or cannot be written: reported within a step, the last good step intact."""

import errno
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.errors import DiskError
from bn_jax.workdir import files
from bn_jax.workdir.recorder import Recorder
from tests.support.small_states import is_state_of, open_checkpoints, state_at


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 1 MB; needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    # Lazily: a file that could not be flushed stays open until it is collected.
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_too_little_space_is_reported_before_a_save_begins(tmp_path, monkeypatch):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1))
        checkpoints.wait()
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(DiskError, match=r"0\.0 MB free on this disk, 1\.\d MB needed"):
            checkpoints.save(2, state_at(2))
        assert checkpoints.steps() == [1]


def test_a_disk_that_fills_leaves_the_last_good_checkpoint(small_disk, monkeypatch, measured):
    monkeypatch.setattr(files, "require_free", lambda *_: None)  # another process took the space
    directory = small_disk / "checkpoints"
    with open_checkpoints(directory) as checkpoints:
        checkpoints.save(1, state_at(1))
        checkpoints.wait()
        big = state_at(2) | {"big": jnp.asarray(np.random.default_rng(0).random((1024, 512)))}
        checkpoints.save(2, big)
        with pytest.raises(DiskError, match=f"{directory}: .*MB free"):
            checkpoints.wait()
        step, state, _ = checkpoints.restore(state_at(0)) or pytest.fail()
        assert step == 1 and is_state_of(1, state)
        assert sorted(p.name for p in directory.iterdir()) == ["1", "index.json"]
        checkpoints.save(2, state_at(2))  # there is space again
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
    measured("disk full during a save", injected=1, detected=1, lost=0)


def test_records_on_a_full_disk_are_reported_and_resume_later(small_disk, measured):
    def open_run() -> Recorder:
        return Recorder(
            small_disk / "run",
            config={},
            info={},
            total_steps=3,
            tensorboard=False,
            is_main=True,
        )

    filler = small_disk / "filler"
    with pytest.raises(DiskError, match="No space left on device"), open_run() as recorder:
        recorder.begin(0)
        recorder.write("eval", 1, top1=0.5)
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        for _ in range(1000):  # fills the last page that the file has
            recorder.write("eval", 2, top1=0.25)
    filler.unlink()
    with open_run() as recorder:
        recorder.begin(1)
        recorder.write("eval", 2, top1=0.25)
    assert (small_disk / "run" / "metrics.jsonl").read_text() == (
        '{"step": 1, "kind": "eval", "top1": 0.5}\n{"step": 2, "kind": "eval", "top1": 0.25}\n'
    )
    measured("disk full under the records", injected=1, detected=1, lost=0)


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("")
    with open_checkpoints(tmp_path / "file" / "checkpoints") as checkpoints:
        checkpoints.save(1, state_at(1))
        with pytest.raises(DiskError) as caught:
            checkpoints.wait()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["ENOSPC", "EDQUOT", "EROFS", "EIO", "EACCES", "EPERM", "ESTALE", "EFBIG"]
)
def test_every_error_of_a_disk_is_one_line(tmp_path, name):
    """A full disk, a quota, a read-only mount, a failing one, a server that is gone, ..."""
    number = getattr(errno, name)
    match = re.escape(os.strerror(number))
    with pytest.raises(DiskError, match=match) as caught, files.reported(tmp_path, "cannot write"):
        raise OSError(number, os.strerror(number))
    assert "\n" not in str(caught.value)


def test_a_mistake_of_the_program_is_not_an_error_of_the_disk(tmp_path):
    with pytest.raises(IsADirectoryError), files.reported(tmp_path, "cannot write"):
        raise IsADirectoryError(errno.EISDIR, "is a directory")
