"""docs/batch_norm.md: every block of Python runs, in order; Haiku's and Equinox's if installed."""

import importlib.util
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

PAGE = (pathlib.Path(__file__).resolve().parent.parent / "docs" / "batch_norm.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
OPTIONAL = {"haiku": "import haiku", "equinox": "import equinox"}


def normalized(y):
    """Whether each 32 examples have mean 0 and variance 1."""
    groups = np.float64(y).reshape(2, -1, 16)
    np.testing.assert_allclose(groups.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(groups.std(1), 1, atol=1e-3)  # epsilon takes 5e-4


def run(optional=None):
    """The names that the page's blocks leave, without those that need another library."""
    names = {"__name__": "page"}
    for block in BLOCKS:
        needs = [name for name, line in OPTIONAL.items() if line in block]
        if needs in ([], [optional]):
            exec(block, names)
            if needs:
                return names
    assert optional is None
    return names


def test_the_page():
    names = run()
    stats = names["variables"]["batch_stats"]
    assert set(stats) == {"mean", "var", "count"}
    assert names["y"].dtype == jnp.bfloat16
    np.testing.assert_allclose(names["unbiased"], names["images"].var(0, ddof=1), rtol=1e-4)
    assert set(names["back"]) == {"mean", "var"} and set(names["ours"]) == {"mean", "var", "count"}
    assert not np.any(names["updates"]["batch_stats"]["count"] - 1)


@pytest.mark.parametrize("library", OPTIONAL)
def test_other_libraries(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    names = run(library)
    normalized(names["y"])
    if library == "haiku":
        [stats] = names["state"]["batch_norm"].values()
        y, _ = names["net"].apply(names["params"], names["state"], None, names["x"], False)
    else:
        stats = names["state"].get(names["bn"].index)
        y, _ = names["bn"](names["x"], names["state"], train=False)
    assert stats.count == 1
    np.testing.assert_allclose(np.float64(y).mean((0, 1, 2)), 0, atol=1e-5)
