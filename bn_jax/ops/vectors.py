"""Operations on all parameters at once, with few kernels on GPUs and without copies of parameters.

XLA for GPUs launches one or two kernels for every sum of squares and every update of an array. It
also copies a parameter if it cannot prove that the parameter is read before it is overwritten. In a
step of six layers `squares`, `raveled` and `after` save 38 of 166 kernels; in one of eight layers
`gathered` saves 14 of 175; in one of twelve layers `after` saves 21 of 233, because it puts its
numbers into one array (docs/performance.md).
"""

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
        return jnp.stack([jnp.sum(jnp.square(x)) for x in arrays])

    sums = []
    for first in range(0, len(arrays), TOGETHER):
        together = arrays[first : first + TOGETHER]
        sums.append(_squares_of_rows(together))

    # The array of each row.
    rows = [-(-x.size // ROW) for x in arrays]
    numbers = np.arange(len(arrays))
    owner = np.repeat(numbers, rows)

    # `where`, not a product with zeros: a value that is not finite must not reach other sums.
    mine = jnp.arange(len(arrays))[:, None] == jnp.array(owner)
    found = jnp.sum(jnp.where(mine, jnp.concatenate(sums), 0), axis=1)
    return lax.optimization_barrier(found)  # so that a sum over the arrays starts here


def _squares_of_rows(arrays: Sequence[jax.Array]) -> jax.Array:
    """Returns sums of squares of rows of ROW values; zeros fill up the last row of each array."""
    parts = []
    for x in arrays:
        missing = -x.size % ROW  # values of the last row
        parts += [x.reshape(-1), jnp.zeros(missing, x.dtype)]

    values = jnp.concatenate([part for part in parts if part.size])
    rows = values.reshape(-1, ROW)
    return jnp.sum(jnp.square(rows), axis=1)


def raveled(tree: Any) -> Any:
    """Flattens every array of a tree to one axis, on GPUs.

    The arrays then have the parameters' own layout in memory. cuDNN returns gradients in another
    layout, in which XLA would otherwise compute the update, transposing the parameters twice.
    """
    return jax.tree.map(jnp.ravel, tree) if hand_tuned("vectors") else tree


def after(known: jax.Array, *numbers: Any) -> tuple[Any, ...]:
    """Returns the scalars `numbers` such that XLA cannot use them before the scalar `known`.

    They are read from one array, so that XLA can merge updates of one shape into one kernel.
    """
    if not hand_tuned("vectors"):
        return numbers
    never = (known != known) & (known == known)  # false even for NaN
    return tuple(lax.optimization_barrier(jnp.where(never, 0, jnp.stack(numbers))))


def gathered(tree: Any) -> Any:
    """Reads the float32 scalars of a tree from one array, so that one kernel reads them all."""
    leaves, structure = jax.tree.flatten(tree)
    places = [k for k, x in enumerate(leaves) if jnp.ndim(x) == 0 and x.dtype == jnp.float32]
    if not places or not hand_tuned("vectors"):
        return tree
    scalars = lax.optimization_barrier(jnp.stack([leaves[k] for k in places]))
    for k, scalar in zip(places, scalars, strict=True):
        leaves[k] = scalar
    return jax.tree.unflatten(structure, leaves)
