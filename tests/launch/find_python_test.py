"""launch/find_python.sh: the newest tested Python that works when it is run."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A stand-in for python3.N: it answers the script's question as that version would.
FAKE = """#!/bin/sh
case "$2" in *"!= '{version}'"*) exit 0;; esac
exit 1
"""
SHIM = """#!/bin/sh
echo "pyenv: $0: command not found" >&2
exit 127
"""


def install(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def find(folder: pathlib.Path) -> subprocess.CompletedProcess:
    """The script in a world of stand-ins: `folder`/bin is the PATH, `folder`/pyenv pyenv's root."""
    environment = {"PATH": str(folder / "bin"), "PYENV_ROOT": str(folder / "pyenv"), "HOME": "/"}
    (folder / "bin").mkdir(exist_ok=True)
    return subprocess.run(
        ["/bin/sh", ROOT / "launch" / "find_python.sh"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("version", ["3.13", "3.12"])
def test_on_the_path(tmp_path, version):
    python = install(tmp_path / "bin" / f"python{version}", FAKE.format(version=version))
    install(tmp_path / "bin" / "python3.11", FAKE.format(version="3.11"))
    done = find(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{python}\n", "")


def test_the_newest_is_taken_wherever_it_is(tmp_path):
    install(tmp_path / "bin" / "python3.12", FAKE.format(version="3.12"))
    newest = tmp_path / "pyenv" / "versions" / "3.13.7" / "bin" / "python3.13"
    install(newest, FAKE.format(version="3.13"))
    assert find(tmp_path).stdout == f"{newest}\n"


def test_a_shim_that_fails_when_it_is_run_is_passed_over(tmp_path):
    install(tmp_path / "bin" / "python3.13", SHIM)
    install(tmp_path / "bin" / "python3.12", SHIM)
    real = tmp_path / "pyenv" / "versions" / "3.12.1" / "bin" / "python3.12"
    install(real, FAKE.format(version="3.12"))
    assert find(tmp_path).stdout == f"{real}\n"


def test_uv_is_asked(tmp_path):
    python = install(tmp_path / "elsewhere" / "python3.12", FAKE.format(version="3.12"))
    answer = f'#!/bin/sh\n[ "$4" = 3.12 ] && echo {python} || exit 2\n'
    install(tmp_path / "bin" / "uv", answer)
    assert find(tmp_path).stdout == f"{python}\n"


def test_the_oldest_comes_with_a_line(tmp_path):
    python = install(tmp_path / "bin" / "python3", FAKE.format(version="3.11"))
    done = find(tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{python}\n")
    assert done.stderr == (
        "bn_jax: no Python of 3.13 3.12 was found; Python 3.11 stays on jax 0.10\n"
    )


def test_without_a_python_the_remedy_is_said(tmp_path):
    done = find(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "set PYTHON=" in done.stderr


def test_the_python_found_here_runs():
    done = subprocess.run(
        [ROOT / "launch" / "find_python.sh"], env=os.environ, capture_output=True, text=True
    )
    version = subprocess.run([done.stdout.strip(), "-V"], capture_output=True, text=True)
    assert version.stdout.startswith("Python 3.1")
