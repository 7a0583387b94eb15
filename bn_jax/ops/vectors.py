"""What the step does with all parameters, in few kernels on GPUs, without copies of parameters.

XLA for GPUs launches a kernel or two for every sum of squares and every update of an array, and
copies a parameter that it is not sure to have read before it is overwritten. In a step of six
layers `squares`, `raveled` and `after` save 38 of 166 kernels; in one of eight `gathered` saves 14
of 175; in one of twelve `after` saves 21 of 233 by making one array of its numbers
(docs/performance.md).
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
    """The sum of squares of each of these arrays, [arrays]."""
    if not hand_tuned("vectors"):
        return jnp.stack([jnp.sum(jnp.square(x)) for x in arrays])
    sums = [_squares_of_rows(arrays[k : k + TOGETHER]) for k in range(0, len(arrays), TOGETHER)]
    rows = [-(-x.size // ROW) for x in arrays]

    # Not a product with zeros: what is not finite stays in its own array's sum.
    owner = np.repeat(np.arange(len(arrays)), rows)
    mine = jnp.arange(len(arrays))[:, None] == jnp.array(owner)
    found = jnp.sum(jnp.where(mine, jnp.concatenate(sums), 0), axis=1)
    return lax.optimization_barrier(found)  # so that a sum over the arrays starts here


def _squares_of_rows(arrays: Sequence[jax.Array]) -> jax.Array:
    """Sums of squares of rows, filled up with zeros, of which none is of two arrays."""
    parts = []
    for x in arrays:
        parts += [x.reshape(-1), jnp.zeros(-x.size % ROW, x.dtype)]
    values = jnp.concatenate([part for part in parts if part.size])
    return jnp.sum(jnp.square(values.reshape(-1, ROW)), axis=1)


def raveled(tree: Any) -> Any:
    """The tree with arrays of one axis.

    What is computed with them has the parameters' own order in memory. A gradient as cuDNN gives it
    has another one, in which XLA would do all that follows, and turn the parameters to it and back.
    """
    return jax.tree.map(jnp.ravel, tree) if hand_tuned("vectors") else tree


def after(known: jax.Array, *numbers: Any) -> tuple[Any, ...]:
    """The scalars `numbers`, in a way that XLA cannot compute before the scalar `known`.

    They come out of one array: updates that read it, and have one shape, are one kernel.
    """
    if not hand_tuned("vectors"):
        return numbers
    never = (known != known) & (known == known)  # not even if it is NaN
    return tuple(lax.optimization_barrier(jnp.where(never, 0, jnp.stack(numbers))))


def gathered(tree: Any) -> Any:
    """The tree with its float32 scalars out of one array, so that one kernel reads them."""
    leaves, structure = jax.tree.flatten(tree)
    places = [k for k, x in enumerate(leaves) if jnp.ndim(x) == 0 and x.dtype == jnp.float32]
    if not places or not hand_tuned("vectors"):
        return tree
    scalars = lax.optimization_barrier(jnp.stack([leaves[k] for k in places]))
    for k, scalar in zip(places, scalars, strict=True):
        leaves[k] = scalar
    return jax.tree.unflatten(structure, leaves)
