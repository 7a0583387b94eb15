"""Operations on all parameters at once, with few kernels on GPUs and without copies of parameters.

XLA for GPUs launches one or two kernels for every sum of squares and every update of an array. It
also copies a parameter if it cannot prove that the parameter is read before it is overwritten. In a
step of six layers `squares`, `raveled` and `after` save 38 of 166 kernels; in one of eight layers
`gathered` saves 14 of 175; in one of twelve layers `after` saves 21 of 233, because it puts its
numbers into one array (docs/performance.md).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bn_jax.ops.forms import hand_tuned

ROW = 1024
TOGETHER = 40  # arrays that one kernel reads, two operands for each; XLA's limit is 96


def squares(arrays: Sequence[jax.Array]) -> jax.Array:
    """Returns the sum of squares of each array, as one array [len(arrays)]."""
    if not hand_tuned("vectors"):
        totals = [jnp.sum(jnp.square(x)) for x in arrays]
        return jnp.stack(totals)

    sums = []
    for first in range(0, len(arrays), TOGETHER):
        together = arrays[first : first + TOGETHER]
        sums.append(_squares_of_rows(together))

    # The number of the array that each row belongs to. The rows of an array are rounded up.
    rows = [math.ceil(x.size / ROW) for x in arrays]
    numbers = np.arange(len(arrays))
    owner = np.repeat(numbers, rows)

    number = jnp.arange(len(arrays))
    mine = number[:, None] == jnp.array(owner)
    all_sums = jnp.concatenate(sums)
    # `where`, not a product with zeros: a value that is not finite must not reach other sums.
    own_sums = jnp.where(mine, all_sums, 0)
    found = jnp.sum(own_sums, axis=1)

    # The barrier makes a sum over the arrays start here.
    return lax.optimization_barrier(found)


def _squares_of_rows(arrays: Sequence[jax.Array]) -> jax.Array:
    """Returns sums of squares of rows of ROW values; zeros fill up the last row of each array."""
    parts = []
    for x in arrays:
        missing = -x.size % ROW  # values of the last row
        parts.append(x.reshape(-1))
        parts.append(jnp.zeros(missing, x.dtype))

    not_empty = [part for part in parts if part.size]
    values = jnp.concatenate(not_empty)
    rows = values.reshape(-1, ROW)
    return jnp.sum(jnp.square(rows), axis=1)


def raveled(tree: Any) -> Any:
    """Flattens every array of a tree to one axis, on GPUs.

    The arrays then have the parameters' own layout in memory. cuDNN returns gradients in another
    layout, in which XLA would otherwise compute the update, transposing the parameters twice.
    """
    if not hand_tuned("vectors"):
        return tree
    return jax.tree.map(jnp.ravel, tree)


def after(known: jax.Array, *numbers: Any) -> tuple[Any, ...]:
    """Returns the scalars `numbers` such that XLA cannot use them before the scalar `known`.

    They are read from one array, so that XLA can merge updates of one shape into one kernel.
    """
    if not hand_tuned("vectors"):
        return numbers

    # XLA does not see that this is false for every value, NaN included.
    never = (known != known) & (known == known)
    together = jnp.stack(numbers)
    late = jnp.where(never, 0, together)

    late = lax.optimization_barrier(late)
    return tuple(late)


def gathered(tree: Any) -> Any:
    """Reads the float32 scalars of a tree from one array, so that one kernel reads them all."""
    leaves, structure = jax.tree.flatten(tree)
    places = []
    for k, leaf in enumerate(leaves):
        if jnp.ndim(leaf) == 0 and leaf.dtype == jnp.float32:
            places.append(k)

    if not places or not hand_tuned("vectors"):
        return tree

    together = jnp.stack([leaves[k] for k in places])
    scalars = lax.optimization_barrier(together)
    for k, scalar in zip(places, scalars, strict=True):
        leaves[k] = scalar
    return jax.tree.unflatten(structure, leaves)
