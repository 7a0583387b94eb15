"""launch/find_python.sh: the newest tested Python that works when it is run."""

import os
import pathlib
import re
import shutil
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


def find(folder: pathlib.Path, *words: str) -> subprocess.CompletedProcess:
    """The script in a world of stand-ins: `folder`/bin is the PATH, `folder`/pyenv pyenv's root."""
    environment = {"PATH": str(folder / "bin"), "PYENV_ROOT": str(folder / "pyenv"), "HOME": "/"}
    (folder / "bin").mkdir(exist_ok=True)
    return subprocess.run(
        ["/bin/sh", ROOT / "launch" / "find_python.sh", *words],
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


def test_one_end_of_the_tested_versions_is_found(tmp_path):
    oldest = install(tmp_path / "bin" / "python3.11", FAKE.format(version="3.11"))
    install(tmp_path / "bin" / "python3.12", FAKE.format(version="3.12"))
    done = find(tmp_path, "oldest")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{oldest}\n", "")
    done = find(tmp_path, "newest")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bn_jax: no Python 3.13 was found\n"


# The smoke tests of `make check` on the ends of the tested versions.

# A stand-in that also makes an environment with itself in it, installs, and runs the tests, which
# end with {code}.
MAKES = """#!/bin/sh
case "$1 $2" in
  "-V ") echo "Python {version}.4" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") ;;
  "-m pytest") echo "tests of {version}: $*"; exit {code} ;;
  *"!= '{version}'"*) ;;
  "-c import sys;"*) ;;
  *) exit 1 ;;
esac
"""


def smoke(folder: pathlib.Path, *, used: str = "3.12") -> subprocess.CompletedProcess:
    """`make smoke` where `used` is the Python of .venv, in the same world of stand-ins."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    for tool in ("sh", "bash", "env", "mkdir", "cp", "touch", "grep", "awk"):
        link = folder / "bin" / tool
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(shutil.which(tool))
    install(folder / "venv" / "bin" / "python", MAKES.format(version=used, code=0))
    environment = {"PATH": str(folder / "bin"), "PYENV_ROOT": str(folder / "pyenv"), "HOME": "/"}
    return subprocess.run(
        [make, "-s", "-o", "setup", "smoke", f"VENV={folder / 'venv'}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_other_pythons_each_smoke_test_is_skipped_with_a_line(tmp_path):
    done = smoke(tmp_path)
    assert done.returncode == 0
    assert done.stdout == (
        "bn_jax: no Python 3.11 was found: its smoke tests are skipped\n"
        "bn_jax: no Python 3.13 was found: its smoke tests are skipped\n"
    )


@pytest.mark.parametrize("code", [0, 1])
def test_the_oldest_python_runs_the_smoke_tests_and_fails_with_them(tmp_path, code):
    """(The oldest Python was said to be supported, and no test ran on it.)"""
    install(tmp_path / "bin" / "python3.11", MAKES.format(version="3.11", code=code))
    done = smoke(tmp_path)
    assert (done.returncode == 0) == (code == 0)
    assert "tests of 3.11: -m pytest" in done.stdout
    [line] = [x for x in done.stdout.splitlines() if x.startswith("tests of")]
    files = [word for word in line.split() if word.endswith("_test.py")]
    assert len(files) > 4 and all((ROOT / file).is_file() for file in files)


def test_the_newest_python_runs_them_if_another_is_used(tmp_path):
    install(tmp_path / "bin" / "python3.13", MAKES.format(version="3.13", code=0))
    assert "tests of 3.13" in smoke(tmp_path).stdout
    assert "tests of" not in smoke(tmp_path, used="3.13").stdout


def test_the_smoke_tests_are_part_of_the_check():
    assert re.search(r"^check:.* smoke\b", (ROOT / "Makefile").read_text(), re.M)
    assert "make check" in (ROOT / ".ci" / "run").read_text()


def test_the_python_found_here_runs():
    done = subprocess.run(
        [ROOT / "launch" / "find_python.sh"], env=os.environ, capture_output=True, text=True
    )
    version = subprocess.run([done.stdout.strip(), "-V"], capture_output=True, text=True)
    assert version.stdout.startswith("Python 3.1")
