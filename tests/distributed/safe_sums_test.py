"""jaxlib 0.10.2's wrong sums on CPUs: who sets the flag against them, and that it helps."""

import os
import pathlib
import subprocess
import sys

import jax
import jaxlib
import pytest

from bn_jax import batch_norm
from bn_jax.batch_norm import SAFE_SUMS
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
    assert batch_norm.sums_may_be_wrong()
    startup.use_safe_sums()
    assert os.environ["XLA_FLAGS"] == f"--other=1 {SAFE_SUMS}"
    assert not batch_norm.sums_may_be_wrong()


def test_a_value_of_the_users_stays(old_jaxlib, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    startup.use_safe_sums()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_experimental_ynn_fusion_type="


@pytest.mark.parametrize("begun_with", [True, False])
def test_a_run_is_resumed_as_it_began(old_jaxlib, begun_with):
    """The flag changes last digits, and a resumed run ends as one that never stopped."""
    flags = SAFE_SUMS if begun_with else ""
    startup.use_safe_sums({"hardware": {"variables": {"XLA_FLAGS": flags}}})
    assert (SAFE_SUMS in os.environ["XLA_FLAGS"]) == begun_with


def test_newer_ones_need_no_flag(monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", "0.12.0")
    monkeypatch.setenv("XLA_FLAGS", "")
    startup.use_safe_sums()
    assert os.environ["XLA_FLAGS"] == ""


# Without a command: who imports bn_jax.batch_norm is told once.

LIBRARY = """
import sys, warnings
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as found:
    import jaxlib
    if len(sys.argv) > 1:
        jaxlib.__version__ = sys.argv[1]
    import bn_jax.layers, bn_jax.nnx
    import jax.numpy as jnp
    from bn_jax import batch_norm
    at_import = len([w for w in found if "39103" in str(w.message)])
    x = jnp.ones((4, 3))
    for train in (True, True, False):
        stats = batch_norm.init_stats(3)
        batch_norm.normalize(x, None, None, stats, train=train, epsilon=1e-3, momentum=0.9)
    said = [w for w in found if "39103" in str(w.message)]
    print(at_import, len(said), *{w.filename for w in said}, *{w.message for w in said})
"""


def library(*arguments: str, flags: str = "") -> str:
    """What a program without our commands is told: at the import and altogether, where, what."""
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_library_user_is_told_once_of_wrong_sums():
    """Before, only the commands knew: a user's own program had wrong sums and was not told."""
    said = library("0.10.2")
    assert said.startswith("0 1 <string> bn_jax: jaxlib 0.10.2 ")
    assert "jax issue 39103" in said and f"XLA_FLAGS={SAFE_SUMS}" in said


@pytest.mark.parametrize("version", ["0.11.2", "0.12.0", "1.0"])
def test_users_of_newer_ones_are_told_nothing(version):
    assert library(version) == "0 0"


def test_who_has_set_the_flag_is_told_nothing():
    assert library("0.10.2", flags=f"--xla_force_host_platform_device_count=1 {SAFE_SUMS}") == "0 0"


def test_the_version_that_is_installed_decides():
    assert library().startswith("0 1" if OLD else "0 0")


def test_no_warning_where_sums_are_not_of_cpus(old_jaxlib, monkeypatch, recwarn):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    batch_norm._warn_of_wrong_sums.__wrapped__()
    assert not recwarn.list
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.warns(UserWarning, match="39103"):
        batch_norm._warn_of_wrong_sums.__wrapped__()


def test_every_command_that_compiles_sets_the_flag_first():
    package = pathlib.Path(startup.__file__).resolve().parents[1]
    found = {}
    for path in package.rglob("*.py"):
        text = path.read_text()
        if "startup.use_compilation_cache(" in text and "run_command(" in text:
            before = text.partition("startup.use_compilation_cache(")[0]
            found[path.relative_to(package).as_posix()] = "startup.use_safe_sums(" in before
    assert len(found) >= 5 and all(found.values()), found
