"""Faults injected into checkpoints, records, disks and signals: detected, reported, survived."""

import ast
import collections
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import disk, record
from bn_jax.checkpoint import Checkpoints
from bn_jax.errors import CheckpointError, DiskError

ROOT = pathlib.Path(__file__).resolve().parent.parent
MUTATIONS = 240


def state_at(step: int) -> dict[str, jnp.ndarray]:
    """A state that says which step it is of."""
    rng = np.random.default_rng(step)
    return {
        "kernel": jnp.asarray(rng.normal(size=(16, 8)).astype(np.float32)),
        "mean": jnp.asarray(rng.normal(size=8).astype(np.float32)),
        "zero": jnp.zeros(64),  # all one byte: compresses to almost nothing
        "step": jnp.int32(step),
    }


def is_state_of(step: int, state: dict[str, jnp.ndarray]) -> bool:
    good = state_at(step)
    return all(np.asarray(state[k]).tobytes() == np.asarray(good[k]).tobytes() for k in good)


def open_checkpoints(directory: pathlib.Path) -> Checkpoints:
    return Checkpoints(directory, keep_last=3, keep_best=0)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three good steps: 10, 20, 30."""
    directory = tmp_path_factory.mktemp("template") / "checkpoints"
    with open_checkpoints(directory) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, state_at(step), meta={"step": step})
    return directory


# Integrity


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


def extra_file(step: pathlib.Path, rng: random.Random) -> None:
    (step / "arrays" / "d" / "extra").write_bytes(b"x")


FILE_FAULTS = (flip, truncate, grow, empty, delete, shuffle_blocks)
STEP_FAULTS = (empty_step, rename_newer, rename_other, remove_step, older_content, extra_file)


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


def test_every_mutation_of_the_newest_step_is_detected(template, tmp_path, capfd):
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
            # Said once: afterwards the directory is in order, and training goes on in it.
            assert checkpoints.restore(state_at(0)) is not None
            assert capfd.readouterr().err == "", name
        done[name.split()[0]] += 1
    assert sum(done.values()) == MUTATIONS >= 200 and len(done) == 12, done


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


# Killed in the middle of a save

SAVE_FOREVER = """
import pathlib, sys
sys.path[:0] = sys.argv[1:3]
from faults_test import open_checkpoints, state_at
with open_checkpoints(pathlib.Path(sys.argv[3])) as checkpoints:
    found = checkpoints.restore(state_at(0))
    step = found[0] if found else 0
    print("start", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, state_at(step), meta={"step": step})
        checkpoints.wait()
        print("saved", step, flush=True)
"""


def test_sigkill_during_saves_loses_nothing_that_was_saved(tmp_path: pathlib.Path):
    directory, rng, newest = tmp_path / "checkpoints", random.Random(4), 0
    command = [sys.executable, "-c", SAVE_FOREVER, str(ROOT), str(ROOT / "tests"), str(directory)]
    for _ in range(4):  # the trainer itself is killed by other tests; this one hits only saves
        with (tmp_path / "log").open("w+") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            deadline = time.monotonic() + 60
            while "saved" not in (text := (tmp_path / "log").read_text()):
                assert child.poll() is None and time.monotonic() < deadline, text
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            child.kill()
            child.wait()
        lines = (tmp_path / "log").read_text().split("\n")
        assert lines[0].startswith("start ") and int(lines[0].split()[1]) >= newest, lines
        newest = int([line for line in lines if line.startswith("saved")][-1].split()[1])
    with open_checkpoints(directory) as checkpoints:
        step, state, meta = checkpoints.restore(state_at(0)) or pytest.fail()
    assert step in (newest, newest + 1) and is_state_of(step, state) and meta == {"step": step}
    names = [p.name for p in directory.iterdir()]
    assert not [n for n in names if n.startswith(("tmp", ".", "quarantine"))], names


def test_unfinished_saves_are_cleaned_and_never_restored(template, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(template, directory)
    shutil.copytree(directory / "30", directory / "tmp.40")
    shutil.copytree(directory / "10", directory / "tmp.delete.5")
    (directory / ".index.json.77.tmp").write_text("{")
    with open_checkpoints(directory) as checkpoints:
        step, _, _ = checkpoints.restore(state_at(0)) or pytest.fail()
    assert step == 30
    assert sorted(p.name for p in directory.iterdir()) == ["10", "20", "30", "index.json"]


# Disks


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
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(DiskError, match=r"0\.0 MB free on this disk, 1\.\d MB needed"):
            checkpoints.save(2, state_at(2))
        assert checkpoints.steps() == [1]


def test_a_disk_that_fills_leaves_the_last_good_checkpoint(small_disk, monkeypatch):
    monkeypatch.setattr(disk, "require_free", lambda *_: None)  # another process took the space
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


def test_records_on_a_full_disk_are_reported_and_go_on_later(small_disk: pathlib.Path):
    def open_run() -> record.Recorder:
        return record.Recorder(
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


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("")
    with open_checkpoints(tmp_path / "file" / "checkpoints") as checkpoints:
        checkpoints.save(1, state_at(1))
        with pytest.raises(DiskError) as caught:
            checkpoints.wait()
    assert "\n" not in str(caught.value)


# Safety

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "_pickle"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
FORBIDDEN_METHODS = {"yaml.load", "torch.load", "np.load", "numpy.load"}


def unsafe(source: str) -> list[str]:
    """What in a Python source could run code that it reads from disk."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] * (node.module.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append("allow_pickle")
        elif isinstance(node, ast.Call):
            call = node.func
            if isinstance(call, ast.Name) and call.id in FORBIDDEN_CALLS:
                found.append(call.id)
            elif isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name):
                name = f"{call.value.id}.{call.attr}"
                refused = [k for k in node.keywords if k.arg == "allow_pickle"]
                found += [name] * (name in FORBIDDEN_METHODS and not refused)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy as np\nnp.load(f)",
        "np.load(f, allow_pickle=True)",
        "f(allow_pickle=x)",
        "eval(text)",
        "import joblib.memory",
    ],
)
def test_the_gate_sees_code_that_runs_what_it_reads(source: str):
    assert unsafe(source)


def test_nothing_read_from_disk_can_run_code():
    assert not unsafe("np.load(f, allow_pickle=False)\nmodel.eval()\n")
    files = sorted((ROOT / "bn_jax").rglob("*.py"))
    assert len(files) > 10
    assert {str(f): unsafe(f.read_text()) for f in files if unsafe(f.read_text())} == {}


def test_a_secret_of_the_environment_is_nowhere_in_the_workdir(tmp_path, monkeypatch):
    secret = "hunter2-3f9a1c77"
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "BN_JAX_SECRET", "GOOGLE_API_KEY"):
        monkeypatch.setenv(name, secret)
    with record.Recorder(
        tmp_path, config={"seed": 1}, info={}, total_steps=2, tensorboard=True, is_main=True
    ) as recorder:
        recorder.begin(0)
        recorder.write("train", 1, loss=0.5)
        with open_checkpoints(tmp_path / "checkpoints") as checkpoints:
            checkpoints.save(1, state_at(1))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 8
    for path in files:
        assert secret.encode() not in path.read_bytes(), path
