"""What every test relies on: 8 virtual CPU devices, and real data where there is some."""

import os
import pathlib
import sys
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get(
    "XLA_FLAGS", ""
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `configs` is found from any working directory

# Tests that train the same network share its program; not the user's cache, which hides failures.
_CACHE = tempfile.TemporaryDirectory(prefix="bn_jax_test_cache_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name  # of the processes that tests start, too
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

_table: list[tuple[str, int, int, int, str]] = []  # of faults: what, injected, detected, lost, note


@pytest.fixture
def measured(request):
    """Adds a line to the table of faults: measured(what, injected=, detected=, lost=, seconds=).

    A test that fails before it has added one counts as one fault lost.
    """
    before = len(_table)

    def add(what: str, *, injected: int, detected: int, lost: int, seconds: float | None = None):
        note = "" if seconds is None else f"{seconds:.1f} s"
        _table.append((what, injected, detected, lost, note))

    yield add
    if len(_table) == before:
        _table.append((f"FAILED: {request.node.name}"[:57], 1, 0, 1, ""))


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints the table of faults, if there were any."""
    if _table:
        terminalreporter.section("faults: injected / detected / lost")
        for what, injected, detected, lost, note in sorted(_table):
            terminalreporter.write_line(f"{what:<58}{injected:>6}{detected:>6}{lost:>6}  {note}")
        total = [sum(row[i] for row in _table) for i in (1, 2, 3)]
        terminalreporter.write_line(f"{'total':<58}{total[0]:>6}{total[1]:>6}{total[2]:>6}")


flags.FLAGS.mark_as_parsed()  # grain reads absl flags


@pytest.fixture
def test_data() -> pathlib.Path:
    """Real data for tests (not part of the repository), or a skip that says so."""
    folder = pathlib.Path(os.environ.get("BN_JAX_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder} (set BN_JAX_TEST_DATA)")
    return folder
