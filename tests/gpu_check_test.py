"""launch/gpu_check.sh and benchmarks/gpu_check: both calls at tiny sizes, and what they decide."""

import ast
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time

import pytest

from benchmarks.gpu_check import correctness, pack, profile, science, speed, torch_side
from benchmarks.gpu_check.call import Call

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "launch" / "gpu_check.sh"


def run(*options: str, **variables: str) -> subprocess.CompletedProcess:
    """The script, with this Python, on a CPU, whose code need not be fast."""
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"PYTHON": sys.executable, "XLA_FLAGS": flags} | variables
    command = ["bash", str(SCRIPT), *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def smoke(call: int, out: pathlib.Path) -> dict:
    """The results of a smoke run of one call, none of whose parts may have failed."""
    done = run(str(call), "--smoke", f"--out={out}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((out / f"call_{call}.json").read_text())
    for name, part in record["parts"].items():
        assert not {"failed", "dropped"} & part.keys(), (name, part)
    table = (out / f"call_{call}.md").read_text()
    assert "a smoke run, whose figures mean nothing" in table
    assert table.count("GB/s copied |") >= len(record["parts"])
    return record


def test_call_1(tmp_path):
    parts = smoke(1, tmp_path)["parts"]
    found = parts["correctness"]
    assert len(found["errors"]["rows"]) == 27 and all(r["passed"] for r in found["errors"]["rows"])
    assert found["tests"]["passed"] > 5 and not found["tests"]["failed_tests"]
    assert found["bits"]["equal"] == found["bits"]["arrays"] > 10

    record = json.loads((tmp_path / "step_gpu.json").read_text())
    assert record["sides"].keys() >= {"bn_jax", "plain Flax"}
    assert record["losses_agree"] and record["compiled"]["bn_jax"]["bytes_an_image"] > 0
    assert record["not_run"].keys() <= {"torch channels_last AMP", "torch.compile"}
    assert parts["batch 64"]["images_a_second"] > 0
    assert sum(kind["kernels"] for kind in parts["profile"]["kinds"].values()) > 0
    assert {"files", "step", "fed"} <= parts["fed"].keys()


def test_call_2(tmp_path):
    parts = smoke(2, tmp_path)["parts"]
    runs = json.loads((tmp_path / "science.json").read_text())
    assert [found["status"] for found in runs] == ["done"] * 16
    assert len(parts["science"]["differences"]) == 3
    with tarfile.open(tmp_path / "runs.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    folders = {file.parent.parent.name for file in tmp_path.rglob("run.json")}
    assert {"bn_x5", "bn_x5_less_bn", "bn_baseline", "bn_x30", "inception_x5"} < folders

    command = [sys.executable, "-m", "bn_jax.figures", f"--workdir={tmp_path / 'runs'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "`bn_x5_less_bn`" in done.stdout and "`bn_x30`" in done.stdout
    assert (tmp_path / "runs" / "figures" / "fig2.png").is_file()


@pytest.mark.slow
def test_pytorch_takes_part(tmp_path):
    """At full width and 224 px, which are the only ones of PyTorch's network."""
    if said := torch_side.missing():
        pytest.skip(said)
    sizes = speed.Sizes(smoke=True)
    sizes.size, sizes.width = 224, 1.0
    sides = speed.Speed(tmp_path, sizes)
    until = time.monotonic() + 1200
    sides.begin(until, extras=False)
    sides.compile(until)
    result = sides.measure(until)
    sides.close()
    assert result["not_run"] == {} and result["losses_agree"], result
    assert set(result["sides"]) == {speed.OURS, speed.FLAX, *list(torch_side.MODES)[:2]}


def test_a_part_that_does_not_fit_is_dropped(tmp_path):
    call = Call(1, tmp_path, 0.5, smoke=True)
    call.card = {"name": "a card", "bytes_a_second": 3e12}
    taken = call.part("one", 10, 0, lambda until: {"n": 1, "rows": [["it", "1"]]})
    assert taken["n"] == 1
    assert "dropped" in call.part("two", 10, 30, lambda until: pytest.fail("begun"))
    assert call.part("three", 10, 0, lambda until: 1 // 0)["failed"].startswith("ZeroDivision")
    record = json.loads((tmp_path / "call_1.json").read_text())
    assert list(record["parts"]) == ["one", "two", "three"]
    lines = (tmp_path / "call_1.md").read_text().splitlines()
    assert "| one | it | 1 | a card, 3,000 GB/s copied |" in lines


def test_a_part_ends_within_its_limit_and_the_budget(tmp_path):
    call = Call(1, tmp_path, 100, smoke=True)
    ends = [call.part(str(n), limit, 0, lambda until: {"until": until - time.monotonic()})
            for n, limit in enumerate((10, 1000))]  # fmt: skip
    assert 9 < ends[0]["until"] <= 10 and 99 < ends[1]["until"] <= 100


def planned(seconds: float, step: float, overhead: float) -> tuple[int, bool]:
    """Steps that are chosen for these times, and whether they are enough to compare."""
    study = science.Science(*[pathlib.Path()] * 3, smoke=False)
    names = [science.BN, *science.LESS_BN.values(), *science.OTHERS]
    study.step_seconds = {network.name: step for network in names}
    study.overhead = overhead
    plan = study.plan(seconds)
    assert study.steps % study.scale.eval_every == 0
    return plan["steps"], plan["enough"]


def test_the_number_of_steps_is_chosen_so_that_all_runs_fit():
    steps, enough = planned(400, 0.004, 2)
    assert enough and steps >= 3000
    assert 16 * (steps * 0.004 + 2) < 400
    assert planned(100_000, 0.004, 2) == (science.MOST_STEPS, True)


def test_where_not_all_fit_stage_1_has_enough_steps_first():
    steps, enough = planned(400, 0.008, 2)
    assert enough and 7 * (steps * 0.008 + 2) < 400 < 16 * (steps * 0.008 + 2)


def test_too_few_steps_are_said_to_be_too_few():
    steps, enough = planned(60, 0.008, 2)
    assert not enough and steps < 3000


def test_the_order_of_the_runs():
    first, second = (list(map(str, (r.name for r in runs))) for runs in science.stages("0.0015"))
    assert first[:3] == ["bn_x5/seed_0", "bn_x5_less_bn/learning_rate=0.0075/seed_0",
                         "bn_x5_less_bn/learning_rate=0.0015/seed_0"]  # fmt: skip
    assert first[3:] == ["bn_x5/seed_1", "bn_x5_less_bn/learning_rate=0.0015/seed_1",
                         "bn_x5/seed_2", "bn_x5_less_bn/learning_rate=0.0015/seed_2"]  # fmt: skip
    assert len(second) == 9 and second[:2] == ["bn_baseline/seed_0", "bn_x30/seed_0"]


def test_results_of_tests_are_read_from_a_log_that_was_cut():
    one = (
        "tests/a_test.py::test_one[x 1] PASSED   [ 10%]\ntests/a_test.py::test_two FAILED [ 20%]\n"
    )
    many = "[gw0] [ 1%] PASSED tests/b_test.py::three \n[gw1] [ 2%] FAILED tests/b_test.py::four\n"
    found = correctness.read_tests(one + many + "tests/c_test.py::test_fi")
    assert found["passed"] == 2
    assert found["failed_tests"] == ["tests/a_test.py::test_two", "tests/b_test.py::four"]


def test_kernels_are_told_apart():
    events = [
        ("sm90_xmma_wgrad_implicit_gemm_bf16", 0, 2e6),
        ("void cudnn::engines::nchwToNhwcKernel", 2e6, 1e6),
        ("loop_multiply_fusion_3", 4e6, 1e6),
        ("input_reduce_fusion", 5e6, 1e6),
    ]
    found = profile.summary(events, 1)
    assert found["busy_milliseconds"] == 5 and found["span_milliseconds"] == 6
    assert next(iter(found["kinds"])) == "convolution, filter gradient"
    assert {"reduction", "elementwise"} < set(found["kinds"])


def test_the_count_of_benchmarks_cuda(tmp_path):
    page = ROOT / "results" / "bench" / "cuda.json"
    record = json.loads(page.read_text())["bfloat16_256"]
    assert list(speed.read_count(page, 256).values()) == [record["bytes_an_image"]]
    file = tmp_path / "bf16.json"
    file.write_text(json.dumps(record | {"bytes_an_image": 7}))
    assert list(speed.read_count(file, 256).values()) == [7]
    assert speed.read_count(file, 32) == {}
    file.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="not what benchmarks.cuda --json writes"):
        speed.read_count(file, 256)


@pytest.fixture
def images(tmp_path):
    """A tar of 3 classes of train and 2 of val, a picture each."""
    file = tmp_path / "few.tar"
    with tarfile.open(file, "w") as tar:
        for place in ("train/a", "train/b", "train/c", "val/a", "val/b"):
            content = place.encode()
            info = tarfile.TarInfo(f"few/{place}/1.JPEG")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def test_pictures_of_the_first_classes_are_packed(tmp_path, images):
    pack.pictures(images, tmp_path / pack.PICTURES, 2)
    folder = pack.unpack(tmp_path, tmp_path / "unpacked")
    found = sorted(str(f.relative_to(folder)) for f in folder.rglob("*.JPEG"))
    assert found == [f"{place}/1.JPEG" for place in ("train/a", "train/b", "val/a", "val/b")]
    assert (folder / "train/a/1.JPEG").read_text() == "train/a"
    with pytest.raises(pack.PackError, match="has 3 classes, 20 are needed"):
        pack.pictures(images, tmp_path / "x", 20)
    with pytest.raises(pack.PackError, match="no pictures in .*--images=TAR"):
        pack.pictures(tmp_path / "none.tar", tmp_path / "x", 2)


def test_what_the_check_imports_is_there_or_packed():
    """A module that a test of call 1 lacks would end them all before the first."""
    roots = [*correctness.TESTS, "tests/conftest.py"]
    files = [ROOT / name for name in roots]
    for folder in ("bn_jax", "configs", "benchmarks/gpu_check", "tests/support"):
        files += (ROOT / folder).rglob("*.py")
    files = [f for f in files if not {"figures", "studies"} & set(f.parts)]  # run elsewhere

    names = set()
    for file in files:
        for node in ast.parse(file.read_text()).body:  # what a function imports may be absent
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
    names -= {*sys.stdlib_module_names, "bn_jax", "configs", "benchmarks", "tests"}
    packed = {package.replace("-", "_") for package in pack.PACKAGES}
    assert names > {"jax", "hypothesis"}
    assert names - packed - set(pack.THERE) == set()


def test_a_pack_that_is_too_large_is_refused_with_its_sizes(tmp_path, images, monkeypatch):
    monkeypatch.setattr(pack, "checkout_bytes", lambda: 3 * 2**20)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").write_bytes(bytes(2**20))
    pack.pictures(images, tmp_path / pack.PICTURES, 2)
    assert "wheels 1.0, pictures 0.0, checkout 3.0, together 4.0 MiB" in pack.check_size(tmp_path)
    with pytest.raises(pack.PackError, match="together 4.0 MiB: more than 2$"):
        pack.check_size(tmp_path, 2 * 2**20)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("3", "option '3' is none of"),
        ("1 --out=x", "call 1 needs --pack=DIR and --out=DIR"),
        ("2 --pack=x --out=y --budget=soon", "--budget='soon' is not a number of seconds"),
        ("", "name a call, 1 or 2, or --pack=DIR to make the pack, or --smoke"),
        ("1 --pack=none --out=x", "no wheels in .*none: make it with launch/gpu_check.sh --pack="),
    ],
)
def test_wrong_options(options, said, tmp_path):
    done = run(*shlex.split(options))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.search(said, done.stderr), done.stderr


def test_shellcheck():
    places = os.pathsep.join([os.environ["PATH"], str(pathlib.Path(sys.executable).parent)])
    tool = shutil.which("shellcheck", path=places) or pytest.skip("shellcheck is not installed")
    done = subprocess.run([tool, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
