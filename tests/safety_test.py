"""Nothing that is read from disk can run code, and no secret of the environment is written."""

import ast
import pathlib

import pytest

from bn_jax.workdir.recorder import Recorder
from tests.support.small_states import open_checkpoints, state_at

ROOT = pathlib.Path(__file__).resolve().parent.parent


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
    with Recorder(
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
