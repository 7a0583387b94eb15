"""Damaged checkpoints: every mutation is detected, reported, and the step before it restored."""

import collections
import errno
import os
import pathlib
import random
import re
import shutil
from collections.abc import Callable, Iterator

import pytest

from bn_jax.errors import CheckpointError, DiskError
from bn_jax.workdir import checkpoint
from bn_jax.workdir.checkpoint import Checkpoints
from tests.support.small_states import is_state_of, open_checkpoints, save_three, state_at

MUTATIONS = 240


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three good steps: 10, 20, 30."""
    return save_three(tmp_path_factory.mktemp("template") / "checkpoints")


def flip(path: pathlib.Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: pathlib.Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def grow(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 9)))


def empty(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def delete(path: pathlib.Path, rng: random.Random) -> None:
    path.unlink()


def shuffle_blocks(path: pathlib.Path, rng: random.Random) -> None:
    """Two halves swapped: the same bytes, the same size."""
    data = path.read_bytes()
    if data[: len(data) // 2] * 2 == data:
        flip(path, rng)
    else:
        path.write_bytes(data[len(data) // 2 :] + data[: len(data) // 2])


def empty_step(step: pathlib.Path, rng: random.Random) -> None:
    shutil.rmtree(step)
    step.mkdir()


def rename_newer(step: pathlib.Path, rng: random.Random) -> None:
    step.rename(step.with_name(str(rng.randint(31, 10**6))))


def rename_other(step: pathlib.Path, rng: random.Random) -> None:
    step.rename(step.with_name(rng.choice(["030", "step30", "30.bak", "30 (copy)", "-30"])))


def remove_step(step: pathlib.Path, rng: random.Random) -> None:
    shutil.rmtree(step)


def older_content(step: pathlib.Path, rng: random.Random) -> None:
    shutil.rmtree(step)
    shutil.copytree(step.with_name("10"), step)


FILE_FAULTS = (flip, truncate, grow, empty, delete, shuffle_blocks)
STEP_FAULTS = (empty_step, rename_newer, rename_other, remove_step, older_content)


def mutations(step: pathlib.Path, count: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every file in turn with a bit flip, then random faults in random files and of the step."""
    rng = random.Random(0)
    found = sorted(p for p in step.rglob("*") if p.is_file())
    sizes = {p.relative_to(step): p.stat().st_size for p in found}
    files = list(sizes)
    assert len(files) >= 8
    for index in range(count):
        if index < 2 * len(files):
            fault, name = flip, files[index % len(files)]
        elif index % 4 == 0:
            fault, name = STEP_FAULTS[index // 4 % len(STEP_FAULTS)], pathlib.Path()
        else:
            fault, name = rng.choice(FILE_FAULTS), rng.choice(files)
        if fault in FILE_FAULTS and not sizes[name]:  # orbax' marker of success is an empty file
            fault = grow if fault is flip else delete
        yield f"{fault.__name__} {name}", lambda f=fault, n=name: f(step / n, rng)


def test_every_mutation_of_the_newest_step_is_detected(template, tmp_path, capfd, measured):
    directory = tmp_path / "checkpoints"
    done: collections.Counter[str] = collections.Counter()
    shutil.copytree(template, directory)
    for name, mutate in mutations(directory / "30", MUTATIONS):
        shutil.rmtree(directory)
        shutil.copytree(template, directory)
        mutate()
        with open_checkpoints(directory) as checkpoints:
            step, state, meta = checkpoints.restore(state_at(0)) or pytest.fail(name)
            assert step == 20 and is_state_of(20, state) and meta == {"step": 20}, name
            line = capfd.readouterr().err
            assert line.startswith("bn_jax: checkpoint ") and re.search(r"/-?\d|/step30", line), (
                name
            )
            gone = name.startswith("remove_step")
            assert ("is no longer there" if gone else "moved to quarantine/") in line, name
            assert (directory / "quarantine").exists() == (not gone), name
            assert checkpoints.steps() == [10, 20], name
            # Said once: afterwards the directory is in order, and training continues in it.
            assert checkpoints.restore(state_at(0)) is not None
            assert capfd.readouterr().err == "", name
        done[name.split()[0]] += 1
    assert sum(done.values()) == MUTATIONS >= 200 and len(done) == 11, done
    for kind, count in done.items():
        measured(f"checkpoint: {kind}", injected=count, detected=count, lost=0)


EXTRA = (
    ".DS_Store",  # the Finder
    "._manifest.json",  # macOS on other file systems
    ".nfs000000000a1b2c3d00000001",  # NFS, of a file that was open when it was removed
    ".manifest.json.Xa81bQ",  # rsync, under way
    "arrays/.DS_Store",
    "arrays/d/extra",
    "Thumbs.db",
)


@pytest.mark.parametrize("read_only", [False, True])
def test_files_that_were_not_saved_do_no_harm_and_stay(template, tmp_path, capfd, read_only):
    directory = tmp_path / "checkpoints"
    shutil.copytree(template, directory)
    others = [directory / "30" / name for name in EXTRA]
    others += [directory / name for name in (".DS_Store", ".nfs0001", ".20.Xa81bQ", "notes.txt")]
    for path in others:
        path.write_bytes(b"x")
    (directory / ".snapshot").mkdir()  # of a file server
    with Checkpoints(directory, keep_last=3, keep_best=0, read_only=read_only) as checkpoints:
        step, state, _ = checkpoints.restore(state_at(0)) or pytest.fail()
    assert step == 30 and is_state_of(30, state) and capfd.readouterr().err == ""
    assert all(path.exists() for path in others) and (directory / ".snapshot").is_dir()


def test_a_file_of_nfs_that_was_there_during_the_save_may_vanish(tmp_path, monkeypatch):
    save = checkpoint.save_arrays

    def leave_one_open(path, arrays):
        save(path, arrays)
        (path / ".nfs0001").write_bytes(b"x")

    monkeypatch.setattr(checkpoint, "save_arrays", leave_one_open)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1))
        checkpoints.wait()
        (tmp_path / "1" / "arrays" / ".nfs0001").unlink()
        assert checkpoints.restore(state_at(0)) is not None


def test_a_step_with_files_of_others_in_it_can_be_removed(template, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(template, directory)
    (directory / "10" / ".DS_Store").write_bytes(b"x")
    with open_checkpoints(directory) as checkpoints:
        checkpoints.save(40, state_at(40))
        checkpoints.wait()
        assert checkpoints.steps() == [20, 30, 40]


def test_a_step_that_this_user_may_not_read_is_not_damaged(template, tmp_path, monkeypatch):
    directory = tmp_path / "checkpoints"
    shutil.copytree(template, directory)

    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for method in ("read_bytes", "open"):
        with monkeypatch.context() as patch:
            real = getattr(pathlib.Path, method)
            patch.setattr(
                pathlib.Path,
                method,
                lambda path, *a, real=real, **k: (
                    refuse(path) if "30" in path.parts else real(path, *a, **k)
                ),
            )
            with open_checkpoints(directory) as checkpoints, pytest.raises(DiskError) as caught:
                checkpoints.restore(state_at(0))
        assert "cannot be read: Permission denied; make it readable" in str(caught.value)
    assert not (directory / "quarantine").exists()


def test_a_damaged_index_is_said_and_the_newest_step_restored(template, tmp_path, capfd):
    rng = random.Random(1)
    for fault in (flip, truncate, grow, empty) * 5:
        directory = tmp_path / "checkpoints"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(template, directory)
        fault(directory / "index.json", rng)
        with open_checkpoints(directory) as checkpoints:
            step, state, _ = checkpoints.restore(state_at(0)) or pytest.fail()
        assert step == 30 and is_state_of(30, state)
        assert "index.json is damaged" in capfd.readouterr().err


@pytest.mark.parametrize("fault", [flip, empty_step, remove_step])
def test_with_no_good_step_the_run_ends_and_does_not_start_again(template, tmp_path, fault):
    directory = tmp_path / "checkpoints"
    shutil.copytree(template, directory)
    for step in ("10", "20", "30"):
        target = directory / step
        fault(target / "manifest.json" if fault is flip else target, random.Random(2))
    with open_checkpoints(directory) as checkpoints:
        for _ in range(2):  # also when everything is in quarantine already
            with pytest.raises(CheckpointError, match="no usable checkpoint"):
                checkpoints.restore(state_at(0))


def test_two_steps_with_swapped_names_are_both_refused(template, tmp_path, capfd):
    directory = tmp_path / "checkpoints"
    shutil.copytree(template, directory)
    (directory / "30").rename(directory / "x")
    (directory / "20").rename(directory / "30")
    (directory / "x").rename(directory / "20")
    with open_checkpoints(directory) as checkpoints:
        step, _, _ = checkpoints.restore(state_at(0)) or pytest.fail()
    err = capfd.readouterr().err
    assert step == 10
    assert "named 30 but holds step 20" in err and "named 20 but holds step 30" in err


def test_a_particular_step_that_is_damaged_is_not_replaced_by_another(template, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(template, directory)
    flip(directory / "20" / "manifest.json", random.Random(3))
    with open_checkpoints(directory) as checkpoints:
        with pytest.raises(CheckpointError, match="damaged: 20"):
            checkpoints.restore(state_at(0), step=20)
        assert checkpoints.steps() == [10, 30]
