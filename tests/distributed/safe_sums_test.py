"""jaxlib 0.10.2's wrong sums on CPUs: who sets the flag against them, and that it helps."""

import os
import subprocess
import sys

import jaxlib
import pytest

from bn_jax.distributed import startup

OLD = jaxlib.__version__.startswith("0.10.")

# The sum of squares of M @ row, by row, as jax issue 39103 has it: one row was wrong.
SUMS = """
import sys
import jax
import jax.numpy as jnp
from bn_jax.distributed import startup
if "safe" in sys.argv:
    startup.use_safe_sums()
jax.config.update("jax_enable_x64", True)
for dtype, rows in ((jnp.float64, 16_385), (jnp.float32, 32_769)):
    index = jnp.arange(rows, dtype=dtype)
    x = jnp.stack((index, jnp.zeros_like(index), jnp.zeros_like(index)), axis=1)
    matrix = jnp.eye(3, dtype=dtype)
    sums = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(x)
    print(float(sums[-1]) == float(rows - 1) ** 2)
"""


def sums(*arguments: str) -> list[str]:
    """Whether each of the two sums is right, computed in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SUMS, *arguments],
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_sums_are_right_as_the_commands_compute_them():
    assert sums("safe") == ["True", "True"]


@pytest.mark.skipif(not OLD, reason="this jaxlib computes the sums rightly by itself")
def test_the_flag_is_what_makes_them_right():
    """Fails when jaxlib 0.10 is mended, and the flag can go."""
    assert "False" in sums()


@pytest.fixture
def old_jaxlib(monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "--other=1")


def test_the_flag_is_added_to_what_is_set(old_jaxlib):
    assert startup.sums_may_be_wrong()
    startup.use_safe_sums()
    assert os.environ["XLA_FLAGS"] == f"--other=1 {startup.SAFE_SUMS}"
    assert not startup.sums_may_be_wrong()


def test_a_value_of_the_users_stays(old_jaxlib, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    startup.use_safe_sums()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_experimental_ynn_fusion_type="


@pytest.mark.parametrize("begun_with", [True, False])
def test_a_run_is_resumed_as_it_began(old_jaxlib, begun_with):
    """The flag changes last digits, and a resumed run ends as one that never stopped."""
    flags = startup.SAFE_SUMS if begun_with else ""
    startup.use_safe_sums({"hardware": {"variables": {"XLA_FLAGS": flags}}})
    assert (startup.SAFE_SUMS in os.environ["XLA_FLAGS"]) == begun_with


def test_newer_ones_need_no_flag(monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", "0.12.0")
    monkeypatch.setenv("XLA_FLAGS", "")
    startup.use_safe_sums()
    assert os.environ["XLA_FLAGS"] == ""
