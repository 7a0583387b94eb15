"""What all commands share: mistakes in one line, help, and the installed wheel."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import venv

import pytest

from bn_jax import errors
from bn_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*words: str, python: str = sys.executable, cwd: pathlib.Path = ROOT, **env: str):
    return subprocess.run(
        [python, "-m", *words],
        cwd=cwd, env=os.environ | {"XLA_FLAGS": ""} | env, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bn_jax.figures"], "the following arguments are required: --workdir"),
        (["bn_jax.figures", "--workdir=x", "--oot=y"], "unrecognized arguments: --oot=y"),
        (["bn_jax.figures", "--workdir=gs://bucket/run"], "gs:// is not supported; mount"),
        (["bn_jax.main", "--config=bn_x30:digits", "--workdir=gs://b/r"], "gs:// is not supported"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(words, said, tmp_path):
    done = run(*words, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())  # no folder "gs:"


# What the table of codes in docs/operations.md says of each error.
CODES = {
    errors.ConfigError: (2, "command line, config, data location or workdir"),
    errors.DataError: (3, "record or shard of the data is damaged"),
    errors.DivergedError: (4, "diverged"),
    errors.CheckpointError: (5, "no usable checkpoint"),
    errors.PeerLostError: (6, "process"),
    errors.DiskError: (7, "disk is full or cannot be written"),
    errors.LockedError: (8, "another run uses this workdir"),
    errors.Preempted: (75, "told to stop"),
}


def test_every_errors_code_is_that_of_the_table():
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    table = {row[0]: row[1] for row in rows if row[0].isdecimal()}
    assert len(table) == len(CODES) + 1  # and 0
    for error, (code, meaning) in CODES.items():
        assert error.exit_code == code
        assert meaning in table[str(code)], code
    named = {c for c in vars(errors).values() if isinstance(c, type)}
    assert {c for c in named if issubclass(c, errors.UserError)} == {*CODES, errors.UserError}


def test_urls_are_refused_wherever_a_path_may_stand():
    for word in ("--config.data.dir=gs://bucket", "--workdir=runs/a,s3://b", "gs://x"):
        with pytest.raises(ConfigError, match="is not supported; mount"):
            errors.require_paths(["--seed=1", word])
    errors.require_paths(["--workdir=runs/a,runs/b", "--config=configs/bn_x30.py:digits"])


def test_help_names_configs_and_scales():
    done = run("bn_jax.main", "--help", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "configs").glob("[a-z]*.py"):
        assert f"\n{path.stem} " in f"\n{done.stdout}"
    assert "Scales: imagenet (default), digits" in done.stdout and "--workdir" in done.stdout


@pytest.mark.slow
def test_the_wheel_carries_its_configs(tmp_path):
    """Built, installed into a fresh environment, used from another folder."""
    wheels, place = tmp_path / "wheels", tmp_path / "elsewhere"
    place.mkdir()
    (place / "configs").mkdir()  # of a project that has its own
    (place / "configs" / "__init__.py").touch()
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    done = run(*build, "--wheel-dir", str(wheels))
    assert done.returncode == 0, done.stderr
    [wheel] = wheels.glob("bn_jax-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    assert run(*install, python=python).returncode == 0
    # The packages that it needs, without this checkout: a path file is not read a second time.
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def installed(*words: str) -> str:
        env = {"PYTHONPATH": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        done = run("bn_jax.main", *words, python=python, cwd=place, BN_JAX_SMOKE="1", **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "\nbn_x30 " in installed("--list")
    assert "learning_rate: 0.045" in installed("--config=bn_x30", "--dry_run")
    assert "of 1,000 examples" in installed("--config=mnist_bn:digits", "--workdir=run")
    assert (place / "run" / "run.json").is_file()


@pytest.mark.parametrize("words", ["--list", "--config=bn_x5:digits --dry_run"])
def test_a_reader_that_has_enough_ends_a_command_quietly(words):
    """`| head -1`. (A traceback with BrokenPipeError.)"""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "bn_jax.main", *words.split()],
            cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 141 and done.stderr == ""
    assert "141 (" in (ROOT / "docs" / "operations.md").read_text()


def test_a_file_url_is_answered_with_its_path():
    """(It was to mount a bucket.)"""
    with pytest.raises(ConfigError, match=r"file:///data/x: write the path alone, /data/x$"):
        errors.require_paths(["--config.data.dir=file:///data/x"])
