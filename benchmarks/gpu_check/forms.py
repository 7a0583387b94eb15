"""A plugin of pytest: on any backend `bn_jax.ops` has the hand-tuned forms, which are CPU's own.

    pytest -p benchmarks.gpu_check.forms tests/ops

The tests compare these forms with the plain ones; on a GPU they would else compare nothing.
"""

import pytest

from bn_jax import ops


@pytest.fixture(autouse=True)
def hand_tuned_forms():
    """Chooses the forms of a CPU for every test."""
    with ops.tracing_for("cpu"):
        yield
