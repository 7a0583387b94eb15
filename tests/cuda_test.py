"""benchmarks.cuda: its command line everywhere; a program for an H100 where jax can compile one."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cuda, cuda_page
from bn_jax.errors import ConfigError
from bn_jax.ops import mixed

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = {
    "config": "bn_x30:synthetic",
    "batch": 256,
    "dtype": "bfloat16",
    "group": 32,
    "devices": 1,
    "ops": "gpu",
    "filter_gradients": "float32",
    "flags": "--xla_gpu_autotune_level=0",
    "jax": "0.0",
    "commit": "0123456",
    "compile_seconds": 60.0,
    "argument_bytes": 10**8,
    "temporary_bytes": 6_800_000_000,
    "kernels": 1947,
    "bytes_an_image": 283_000_000,
    "touched_an_image": 190_000_000,
    "convolutions": {"convForward bf16 x bf16 -> bf16, b01f_o01i->b01f": 92},
    "copies": 181,
    "kinds": {"copy": {"kernels": 181, "bytes_an_image": 5_400_000}},
    "largest": [
        {"name": "sum", "kind": "add", "times": 3, "bytes_an_image": 9_600_000, "layer": "stem"}
    ],
}


def test_figures_are_shown_in_their_units():
    lines = cuda.table(RECORD).splitlines()
    assert lines[0] == "1 x H100, compiled, not run: bn_x30:synthetic, bfloat16, gpu"
    assert "1,947 kernels, 181 of them copies" in lines
    assert (
        "283.0 MB an image, 190.0 of them touched" in lines
        and "6.80 GB of temporary memory" in lines
    )
    assert "        9.6   sum x 3   stem" in lines


def test_without_the_plugin_one_line_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cuda"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^2$"):
        cuda.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert "CUDA plugin is not installed" in line and "pip install 'jax[cuda13]'" in line


@pytest.mark.parametrize("wrong", [["--batch=32", "--devices=3"], ["--devices=0"], ["--batch=0"]])
def test_a_batch_that_the_devices_cannot_share_is_refused(wrong, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        cuda.parse(wrong)
    assert "is not a multiple" in capsys.readouterr().err


def test_the_config_is_the_named_one_with_what_was_asked_for():
    args = cuda.parse(["--batch=64", "--group=16", "--dtype=float32", "--config=bn_x5:synthetic"])
    config = cuda.training_config(args)
    assert (config.batch_size, config.bn.group_size, config.dtype) == (64, 16, "float32")
    assert config.image_size == 224 and config.model.width == 1
    assert cuda.parse(["--smoke"]).config == "mnist_bn:synthetic"


def test_a_batch_without_whole_groups_is_refused():
    with pytest.raises(ConfigError, match="group_size"):
        cuda.training_config(cuda.parse(["--batch=48"]))


def test_rounded_filter_gradients_are_near_those_in_float32():
    """The sum is taken in bfloat16's convolution, and rounded once."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(8, 6, 6, 4)), jnp.bfloat16)
    kernel = jnp.asarray(random.normal(size=(3, 3, 4, 5)), jnp.float32)

    def gradient():
        def loss(kernel):
            y = mixed.conv(x, kernel, (1, 1), "SAME", 1, None)
            return (y.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss)(kernel)

    usual = gradient()
    try:
        cuda.round_filter_gradients()
        rounded = gradient()
    finally:
        mixed.conv.defvjp(mixed._forward, mixed._backward)
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, rounded.astype(jnp.bfloat16).astype(jnp.float32))
    assert not np.array_equal(rounded, usual)
    # One rounding to 8 bits of significand, of sums that are added up in float32.
    np.testing.assert_allclose(rounded, usual, rtol=2**-8, atol=2**-8 * np.abs(usual).max())


def test_the_page_is_of_the_records_and_says_what_was_not_run():
    records = json.loads(cuda_page.RECORDS.read_text())
    assert records.keys() <= cuda_page.PROGRAMS.keys()
    assert cuda_page.PAGE.read_text() == cuda_page.page(records)
    text = cuda_page.page({"bfloat16_256": RECORD})
    assert "| bfloat16_256 | 1,947 | 181 | 0 | 6.80 | 283.0 | 190.0 |" in text
    older = {name: value for name, value in RECORD.items() if name != "touched_an_image"}
    assert "6.80 | 283.0 | not counted |" in cuda_page.page({"bfloat16_256": older})
    assert text.count("| not run |") == len(cuda_page.PROGRAMS) - 1
    assert "without a device: none." in text
    flags = f"--xla_gpu_autotune_level=0 {cuda_page.WITHOUT_TRITON}"
    text = cuda_page.page({"float32_32": {**RECORD, "flags": flags}})
    assert "without a device: float32_32." in text


def test_the_performance_page_has_the_recorded_figures():
    text = (ROOT / "docs" / "performance.md").read_text()
    records = json.loads(cuda_page.RECORDS.read_text())
    for name in ("bfloat16_256_plain", "bfloat16_256", "bfloat16_256_filters"):
        found = records[name]
        moved = f"{found['bytes_an_image'] / 1e6:.0f} MB, {found['temporary_bytes'] / 1e9:.1f} GB"
        assert f"| {found['kernels']:,} kernels, {moved} | compiled |" in text


def test_a_program_without_triton_keeps_its_other_flags():
    assert cuda_page.without_triton(["--batch=32", "--flags=--a=1"]) == [
        "--batch=32",
        f"--flags=--a=1 {cuda_page.WITHOUT_TRITON}",
    ]
    assert cuda_page.without_triton([]) == [f"--flags={cuda_page.WITHOUT_TRITON}"]


@pytest.mark.skipif(not cuda.installed(), reason=cuda.MISSING)
@pytest.mark.parametrize("devices", [1, 2])
def test_the_step_is_compiled_for_an_h100(devices, tmp_path):
    """The command itself, on the MLP."""
    out = tmp_path / "figures.json"
    text = tmp_path / "program.hlo"
    command = [sys.executable, "-m", "benchmarks.cuda", "--smoke", f"--devices={devices}"]
    command += ["--batch=64", f"--json={out}", f"--hlo={text}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found.keys() == RECORD.keys()
    assert found["kernels"] > 20 and found["bytes_an_image"] > 10_000
    assert found["temporary_bytes"] > 0 and found["convolutions"]
    assert len(found["largest"]) == 20
    assert ("all-reduce" in text.read_text()) == (devices > 1)
    assert f"{found['kernels']:,} kernels" in done.stdout
