"""The notebooks run from top to bottom, and are kept without outputs."""

import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# CPU seconds of the kernel and of what it starts: the clock on the wall would count other people's
# work. Three minutes of a quiet machine with two cores are at least as many of CPU.
LIMIT = 180
WIDGETS = "application/vnd.jupyter.widget-state+json"


def cpu_seconds() -> float:
    """Of the processes that this one has started and seen end, a notebook's kernel among them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def execute(path: pathlib.Path, folder: pathlib.Path, monkeypatch, replace=()) -> str:
    """Runs a notebook in `folder`, as a user's kernel would; returns what it printed."""
    nbclient = pytest.importorskip("nbclient", reason="needs the extra [notebooks]")
    pytest.importorskip("ipykernel", reason="needs the extra [notebooks]")
    nbformat = pytest.importorskip("nbformat", reason="needs the extra [notebooks]")
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, not this process' eight
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    text = path.read_text()
    for old, new in replace:
        assert old in text
        text = text.replace(old, new)
    notebook = nbformat.reads(text, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    start = cpu_seconds()
    nbclient.NotebookClient(notebook, timeout=1800, resources=resources).execute()
    used = cpu_seconds() - start
    print(f"{path.name}: {used:.0f} CPU seconds, limit {LIMIT}")
    assert 0 < used <= LIMIT
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    # What a widget shows is part of its state.
    widgets = notebook.metadata.get("widgets", {}).get(WIDGETS, {"state": {}})
    for widget in widgets["state"].values():
        outputs += widget["state"].get("outputs", ())
    assert not [o for o in outputs if o.get("name") == "stderr"]
    pictures = sum("image/png" in o.get("data", {}) for o in outputs)
    return "".join(o.get("text", "") for o in outputs) + f"\n{pictures} pictures"


def test_there_are_the_three():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {"activation_distributions", "batch_norm_by_hand", "reading_a_run"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_cleared(path):
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}  # no editor's traces


def test_batch_norm_by_hand(tmp_path, monkeypatch):
    out = execute(ROOT / "notebooks" / "batch_norm_by_hand.ipynb", tmp_path, monkeypatch)
    assert "mean 1.0000, variance 2.8500" in out  # of the ten numbers
    assert "2 devices" in out and "group_size=5: equal; all-reduces for y: 0" in out


@pytest.mark.slow
def test_reading_a_run(tmp_path, monkeypatch):
    out = execute(ROOT / "notebooks" / "reading_a_run.ipynb", tmp_path, monkeypatch)
    assert out.count("of 1,000 examples") >= 2 and "1 pictures" in out


@pytest.mark.slow
def test_activation_distributions(tmp_path, monkeypatch):
    out = execute(ROOT / "notebooks" / "activation_distributions.ipynb", tmp_path, monkeypatch)
    assert "| mnist_bn | dense_2/pre_bn | 0 to 2,000 |" in out and "% beyond 4" in out
    # Bands of the layer that both record, the map, and the histograms beside their slider.
    assert "3 pictures" in out


@pytest.mark.slow
def test_activation_distributions_of_inception(tmp_path, monkeypatch):
    """Of two workdirs that are there: short runs of a narrow Inception without and with BN."""
    layer = "inception_4e/conv_3x3"
    for name, paths in (
        ("inception", (f"{layer}/input",)),
        ("bn_baseline", (f"{layer}/input", f"{layer}/pre_bn")),
    ):
        settings = {
            "model.width": 0.0625, "total_steps": 4, "eval_every": 4, "checkpoint_every": 4,
            "statistics_batches": 1, "record.activation_every": 2, "record.activations": paths,
        }  # fmt: skip
        command = [sys.executable, "-m", "bn_jax.main", f"--config={name}:digits"]
        command += [f"--config.{k}={v}" for k, v in settings.items()]
        monkeypatch.setenv("XLA_FLAGS", "")
        monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        subprocess.run([*command, f"--workdir={name}"], cwd=tmp_path, check=True)
    out = execute(
        ROOT / "notebooks" / "activation_distributions.ipynb", tmp_path, monkeypatch,
        replace=[("runs/notebook/mnist_bn", "bn_baseline"), ("runs/notebook/mnist", "inception")],
    )  # fmt: skip
    assert f"{layer}/pre_bn" in out and "| inception_5b/conv_1x1/input | 0 to 4 |" in out


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["tiny40", "digits"])
def test_activation_distributions_of_published_runs(tmp_path, monkeypatch, folder):
    """Of runs that are only records."""
    found = [str(run) for run in sorted((ROOT / "results" / folder).glob("*/seed_0"))][:2]
    out = execute(
        ROOT / "notebooks" / "activation_distributions.ipynb", tmp_path, monkeypatch,
        replace=[("runs/notebook/mnist_bn", found[0]), ("runs/notebook/mnist", found[1])],
    )  # fmt: skip
    assert out.count("has no checkpoint: only what it recorded can be shown") == 2
    assert out.count(" recorded: ") == 2
