"""requirements.lock and requirements-demo.lock: what `make setup` and `make demo` install."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The modules of the packages that the demo's lock leaves out.
LEFT_OUT = {
    *("joblib", "pandas", "sklearn", "threadpoolctl", "tzdata"),
    *("certifi", "charset_normalizer", "idna", "requests", "urllib3"),
    *("docstring_parser", "immutabledict", "promise", "pyarrow", "simple_parsing", "toml", "wrapt"),
    *("tensorflow_datasets", "tensorflow_metadata"),
}


def pins(name: str) -> dict[str, set[str]]:
    """Package==version with its markers, and the hashes that are allowed."""
    found: dict[str, set[str]] = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / name).read_text()):
        pin, *hashes = re.split(r"\s*\\\n\s*", entry.strip())
        if pin and not pin.startswith("#"):
            found[pin.rstrip(" \\")] = {h.removeprefix("--hash=") for h in hashes}
    return found


def test_the_demo_has_packages_of_the_whole_lock_and_no_others():
    demo = pins("requirements-demo.lock")
    whole = pins("requirements.lock")
    assert 50 < len(demo) < len(whole) / 2
    by_version = {pin.partition(" ")[0]: hashes for pin, hashes in whole.items()}
    for pin, hashes in demo.items():
        assert hashes and hashes <= by_version[pin.partition(" ")[0]], pin


def test_no_lock_names_an_index():
    for name in ("requirements.lock", "requirements-demo.lock"):
        text = (ROOT / name).read_text()
        assert "http" not in text and "--index" not in text and "/" not in text.replace("://", "")


def test_the_demo_imports_nothing_that_its_lock_leaves_out(tmp_path):
    whole, demo = (
        {re.sub(r"[-.]", "_", pin.partition("==")[0]) for pin in pins(name)}
        for name in ("requirements.lock", "requirements-demo.lock")
    )
    names = sorted((whole - demo) | LEFT_OUT)
    run = (
        f"import sys; sys.modules.update(dict.fromkeys({names}))\n"
        "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    )
    workdir = f"--workdir={tmp_path / 'run'}"
    training = [
        "--config=mnist_bn:digits",
        "--config.total_steps=20",
        "--config.eval_every=20",
        "--config.statistics_batches=2",
    ]
    for words in (["bn_jax.main", *training], ["bn_jax.figures", "--html"]):
        done = subprocess.run(
            [sys.executable, "-c", run, *words, workdir],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": ""},  # one device
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "figures" / "run.png").is_file()
    assert (tmp_path / "run" / "figures" / "report.html").is_file()
