"""A loss or gradient that is not finite: at which step, and where in the network it begins."""

from collections.abc import Sequence

import jax
import numpy as np
from flax import traverse_util

from bn_jax import arrays as named
from bn_jax import experiment
from bn_jax.errors import DivergedError
from bn_jax.experiment import Experiment


def forward_order(exp: Experiment) -> list[str]:
    """Paths of the parameters, 'inception_3a/1x1/conv/kernel', as the forward pass meets them."""
    names: list[str] = []

    def initial():
        # Before jax sorts the keys, parameters stand in the order in which they were made.
        state = experiment.initial_state(exp)
        names.extend(traverse_util.flatten_dict(state.params, sep="/"))
        return state

    jax.eval_shape(initial)
    return names


def leaves(exp: Experiment) -> list[str]:
    """Paths of the parameters in the order of the tree, as a step's `gradient_square` has them."""
    return named.flatten(experiment.abstract_state(exp).params)[0]


def error(
    step: int, loss: float, squares: np.ndarray, leaves: Sequence[str], forward: Sequence[str]
) -> DivergedError:
    """The error that ends the run.

    squares: sums of squares of the gradients [parameters], in the order of `leaves` (the tree's);
    forward: the same paths in the order of the forward pass, whose first one is named.
    """
    pairs = zip(leaves, squares, strict=True)
    bad = {name for name, square in pairs if not np.isfinite(square)}
    first = next((name for name in forward if name in bad), "")
    where = f": first in {first.rpartition('/')[0] or first} ({first})" if first else ""
    return DivergedError(
        f"diverged at step {step:,}: loss {loss}, gradient not finite in {len(bad)} of "
        f"{len(leaves)} parameters{where}; the records and the last finite checkpoint are kept"
    )
