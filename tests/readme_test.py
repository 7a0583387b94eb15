"""What the documents tell to type is typed, and what they list is what there is.

Training runs are shortened by BN_JAX_SMOKE=1. What needs ImageNet or other hardware is checked with
--dry_run, set-up commands against the metadata they name.
"""

import importlib.metadata
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ENVIRONMENT = ["python3", "-m", "venv", ".venv"]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text: str = README) -> list[list[str]]:
    lines = "".join(blocks("sh", text)).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def recipe(target: str) -> list[list[str]]:
    """The module runs that `make TARGET` would start, as the Makefile has them."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    outer = ("MAKE", "MFLAGS", "VENV", "PYTHON", "MNIST")  # of a `make test` around this one
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", "-o", ".venv/.demo", target],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]
    assert all(line[0] == ".venv/bin/python" for line in lines), done.stdout
    return [["python", *line[1:]] for line in lines]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("readme")


def type_in(words: list[str], place: pathlib.Path) -> subprocess.CompletedProcess:
    """Runs `python -m ...` as typed, in an empty folder instead of the checkout."""
    assert words[0] == "python", words
    environment = os.environ | typing_environment(place)
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=place, env=environment, capture_output=True, text=True
    )


def typing_environment(place: pathlib.Path) -> dict[str, str]:
    """Environment variables under which a document's commands are typed."""
    return {
        "BN_JAX_SMOKE": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # one device, as on a user's machine
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(place / "c")),
        # Inception's programs take a minute of CPU to compile; their results mean nothing here.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
        "TFDS_DATA_DIR": str(place / "no_data"),
    }


def succeed(words: list[str], place: pathlib.Path) -> str:
    done = type_in(words, place)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_demo_and_the_commands_on_its_run(place):
    typed = commands()
    assert ["make", "demo"] in typed
    lines = recipe("demo")
    assert len(lines) == 2 and all(line in typed for line in lines)  # beside `make demo`
    out = succeed(lines[0], place)
    assert "of 1,000 examples" in out
    assert "not comparable" in out  # the limits of the digits
    pictures = [line for line in out.splitlines() if line.endswith(".png")]
    assert pictures and all((place / p).stat().st_size > 0 for p in pictures)
    Image.new("L", (28, 28)).save(place / "digit.png")
    for words in typed:
        if words[:2] == ["python", "-m"] and "--workdir=runs/bn_x30" in words[3:4]:
            out = succeed(words, place)
            said = {"export": ".onnx: ", "predict": "digit.png", "figures": "report.html"}
            assert said.get(words[2].removeprefix("bn_jax."), "1,000 examples") in out, words


def make_fig1(place: pathlib.Path, python: str, *options: str) -> subprocess.CompletedProcess:
    """`make fig1` in an empty folder, with `python` in place of the environment's."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    outer = ("MAKE", "MFLAGS", "VENV", "PYTHON", "MNIST")  # of a `make test` around this one
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    environment |= typing_environment(place) | {"BN_JAX_OFFLINE": "1"}
    environment["BN_JAX_CACHE"] = str(place / "no_cache")
    for name in ("requirements-demo.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, place / name)
    return subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), "-o", ".venv/.demo", "fig1",
         f"RUN={python} -m", *options],
        cwd=place, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_fig1_without_mnist_is_short_and_says_so(place):
    assert ["make", "fig1"] in commands()
    done = make_fig1(place, sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MNIST is not in" in done.stderr
    assert "embedded digits: 1,500 steps, before they are overfitted" in done.stdout
    assert "| without BN | 200 |" in done.stdout and "| with BN | 200 |" in done.stdout
    assert (place / "runs/fig1_digits/figures/fig1.png").stat().st_size > 0
    run = json.loads((place / "runs/fig1_digits/mnist_bn/run.json").read_text())
    assert run["config"]["record"]["activation_every"] == 100


def test_fig1_uses_the_mnist_that_is_given_or_found(tmp_path):
    """With `echo` as Python: what would run."""
    given = make_fig1(tmp_path, "echo", "MNIST=my folder").stdout.splitlines()
    assert given == [
        f"-m bn_jax.main --config=configs/{name}.py:mnist --config.data.dir=my folder "
        f"--workdir=runs/fig1_mnist/{name}"
        for name in ("mnist", "mnist_bn")
    ] + ["-m bn_jax.figures --workdir=runs/fig1_mnist"]
    # What `prepare mnist` prints, here by echo, is the folder.
    found = make_fig1(tmp_path, "echo").stdout.splitlines()
    assert "--config.data.dir=-m bn_jax.prepare mnist " in found[0]


def table(place, *more: str) -> list[str]:
    """What `make table` prints, typed with more options of the sweep."""
    assert ["make", "table"] in commands()
    sweep, figures = recipe("table")
    assert (sweep[2], figures[2]) == ("bn_jax.sweep", "bn_jax.figures")
    outs = [succeed([*sweep, *more], place)]
    return outs if more else [*outs, succeed(figures, place)]


def test_table_starts_six_runs(place):
    [out] = table(place, "--dry_run")
    runs = re.findall(r"--workdir=runs/table/(\w+)/seed_0", out)
    assert len(runs) == len(set(runs)) == 6


@pytest.mark.slow  # six programs of Inception are compiled
def test_table(place):
    out = table(place)[-1]
    rows = set(re.findall(r"^\| `(\w+)` \| [\d.]+ \|", out, re.M))  # name and rate
    assert rows == {
        path.name for path in (place / "runs/table").glob("*") if (path / "seed_0").is_dir()
    }
    assert len(rows) == 6, out
    for name in ("fig2.png", "fig3.md"):
        assert (place / "runs/table/figures" / name).stat().st_size > 0


def test_list_names_every_config_and_dry_runs_parse(place):
    out = succeed(["python", "-m", "bn_jax.main", "--list"], place)
    for path in (ROOT / "configs").glob("*.py"):
        assert path.stem == "__init__" or re.search(rf"^{path.stem} ", out, re.M), path
    for words in commands():
        if words[:3] == ["python", "-m", "bn_jax.main"] and not is_run_elsewhere(words):
            out = succeed([*words, "--dry_run"], place)
            assert "workdir: runs/" in out, words


def test_the_studies_are_listed(place):
    words = ["python", "-m", "bn_jax.study", "--list"]
    assert words in commands()
    assert "Does BN smooth the loss?" in succeed(words, place)


def is_run_elsewhere(words: list[str]) -> bool:
    return "--list" in words or "--workdir=runs/bn_x30" in words


def test_prepare_takes_the_options(place):
    words = [w for w in commands() if w[2:4] == ["bn_jax.prepare", "imagenet"]]
    assert len(words) == 1
    done = type_in(words[0], place)
    # The options are understood; the tars are not there, which is one line and code 2.
    assert done.returncode == 2 and done.stderr.startswith("bn_jax: no "), done.stderr
    assert "ILSVRC2012_img_train.tar" in done.stderr and "usage" not in done.stderr


def test_import_takes_the_options(place):
    """With a file: tests/weights_commands_test.py, as docs/weights.md has it."""
    words = [w for w in commands() if w[2:3] == ["bn_jax.import_weights"]]
    assert len(words) == 1
    done = type_in(words[0], place)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("bn_jax: cannot read bninception.safetensors"), done.stderr


def test_every_command_is_one_that_these_tests_know():
    known = (
        "main",
        "evaluate",
        "figures",
        "prepare",
        "predict",
        "export",
        "import_weights",
        "study",
    )
    for words in commands():
        if words[0] == "python":
            assert words[1] == "-m" and words[2].removeprefix("bn_jax.") in known, words
        else:
            assert words[0] in ("make", "pip", ".") or words == ENVIRONMENT, words


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "launch" / "README.md"])
def test_python_is_typed_where_the_packages_are(path):
    """The tests type with their own Python; a user's has no packages before `activate`."""
    assert "\nVENV ?= .venv\n" in (ROOT / "Makefile").read_text()
    typed = commands(path.read_text())
    first = next(i for i, w in enumerate(typed) if w[0] in ("python", "pip", "launch/local.sh"))
    assert [".", ".venv/bin/activate"] in typed[:first]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120  # two screens


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z0-9_]+):", (ROOT / "Makefile").read_text(), re.M))
    texts = "\n".join(path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"))
    named = {w[1] for w in commands(texts) if w[0] == "make"}
    named |= set(re.findall(r"`make ([a-z0-9_]+)", texts))
    assert {"demo", "fig1", "test", "check"} <= named <= targets


def test_make_faults_names_every_file_that_injects_faults():
    """A name that does not exist ends pytest before the first test."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    named = re.search(r"^FAULTS := (.*)$", makefile, re.M)[1].split()
    paths = [ROOT / "tests" / f"{name}_test.py" for name in named]
    assert [path for path in paths if not path.is_file()] == []

    counts = re.compile(r"^def test_.*\bmeasured\b", re.M)
    tests = (ROOT / "tests").rglob("*_test.py")
    assert {path for path in tests if counts.search(path.read_text())} <= set(paths)


def test_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_jax = importlib.metadata.metadata("jax").get_all("Provides-Extra")
    extras = {".": project["optional-dependencies"], "jax": of_jax}
    installs = [w[2:] for w in commands() if w[:2] == ["pip", "install"]]
    assert len(installs) == 3
    for words in installs:
        for name, wanted in re.findall(r"(\.|\w+)\[([\w,]+)\]", " ".join(words)):
            assert set(wanted.split(",")) <= set(extras[name]), words


def test_library_examples():
    names: dict = {"__name__": "readme"}
    library = (ROOT / "docs" / "batch_norm.md").read_text()
    examples = library[library.index("## Two examples") : library.index("## The swap")]
    for block in [*blocks("python"), *blocks("python", examples)]:
        exec(block, names)
    assert names["norm"].group_size == 32
    groups = np.asarray(names["y"], np.float64).reshape(2, -1, 16)
    # float32 sums of 2,048 values near 1: errors of about 1e-7 times a few; epsilon takes 5e-4.
    np.testing.assert_allclose(groups.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(groups.std(axis=1), 1, atol=1e-3)
    assert float(names["stats"].count) == 1
    assert names["logits"].shape == (64, 10)
    assert float(names["updates"]["batch_stats"]["BatchNorm_0"]["count"]) == 1


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target
