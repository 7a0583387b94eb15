"""What every test relies on: 8 virtual CPU devices, and real data where there is some."""

import json
import os
import pathlib
import sys
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker finds all this set, the same for all
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get(
        "XLA_FLAGS", ""
    )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Tests, and processes that they start, share programs; not the user's cache, which hides
    # failures.
    _FOLDER = tempfile.TemporaryDirectory(prefix="bn_jax_test_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(dir=_FOLDER.name)
    os.environ.setdefault("BN_JAX_FAULTS", f"{_FOLDER.name}/faults")

import jax
import pytest
from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `configs` is found from any working directory

from bn_jax.distributed import startup
from tests.support import processes

startup.use_safe_sums()  # as the commands do, before the first device is used
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# The table of faults, a line of JSON a row: what, injected, detected, lost, note. `make faults`
# names a file, to have one table of all its tests.
_TABLE = pathlib.Path(os.environ["BN_JAX_FAULTS"])


@pytest.fixture
def measured(request):
    """Adds a line to the table of faults: measured(what, injected=, detected=, lost=, seconds=).

    A test that fails before it has added one counts as one fault lost.
    """
    added = []

    def write(*row):
        added.append(row)
        with _TABLE.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def add(what: str, *, injected: int, detected: int, lost: int, seconds: float | None = None):
        write(what, injected, detected, lost, "" if seconds is None else f"{seconds:.1f} s")

    yield add
    if not added:
        write(f"FAILED: {request.node.name}"[:57], 1, 0, 1, "")


@pytest.fixture(autouse=True)
def children_end():
    """No process that a test has started outlives it, whether it passes or fails."""
    yield
    processes.end_children()


@pytest.fixture
def unoptimized():
    """Without LLVM's optimizations: Inception is compiled in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints the table of faults, if there were any."""
    rows = [json.loads(x) for x in _TABLE.read_text().splitlines()] if _TABLE.exists() else []
    if rows:
        terminalreporter.section("faults: injected / detected / lost")
        for what, injected, detected, lost, note in sorted(rows):
            terminalreporter.write_line(f"{what:<58}{injected:>6}{detected:>6}{lost:>6}  {note}")
        total = [sum(row[i] for row in rows) for i in (1, 2, 3)]
        terminalreporter.write_line(f"{'total':<58}{total[0]:>6}{total[1]:>6}{total[2]:>6}")


flags.FLAGS.mark_as_parsed()  # grain reads absl flags


@pytest.fixture
def test_data() -> pathlib.Path:
    """Real data for tests (not part of the repository), or a skip that says so."""
    folder = pathlib.Path(os.environ.get("BN_JAX_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder} (set BN_JAX_TEST_DATA)")
    return folder
