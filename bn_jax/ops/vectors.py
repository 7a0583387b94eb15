"""What the step does with all parameters, for GPUs: few kernels, and no copies of the parameters.

XLA for GPUs launches a kernel for each array. Of 210 gradients and 70 kernels it takes two for each
sum of squares, and one for each copy of a parameter that it is not sure to have read before it is
overwritten. With these forms the step of BN-x30 has 0 kernels fewer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax.ops.forms import hand_tuned

ROW = 1024
TOGETHER = 40  # arrays that one kernel reads: XLA's limit is 96 operands


def squares(arrays: Sequence[jax.Array]) -> jax.Array:
    """The sum of squares of each of these arrays, [arrays]."""
    if not hand_tuned("vectors"):
        return jnp.stack([jnp.sum(jnp.square(x)) for x in arrays])
    some = [arrays[k : k + TOGETHER] for k in range(0, len(arrays), TOGETHER)]
    return jnp.concatenate([_squares(few) for few in some])


def _squares(arrays: Sequence[jax.Array]) -> jax.Array:
    """`squares`: of rows, each filled up with zeros, of which none holds values of two arrays."""
    parts = []
    owner = []
    for k, x in enumerate(arrays):
        rows = -(-x.size // ROW)
        owner += [k] * rows
        parts += [x.reshape(-1), jnp.zeros(rows * ROW - x.size, x.dtype)]
    values = jnp.concatenate([part for part in parts if part.size])
    sums = jnp.sum(jnp.square(values.reshape(-1, ROW)), axis=1)

    # Not a product with zeros: what is not finite stays in its own array's sum.
    mine = jnp.array(owner)[:, None] == jnp.arange(len(arrays))
    return jnp.sum(jnp.where(mine, sums[:, None], 0), axis=0)


def raveled(tree: Any) -> Any:
    """The tree with arrays of one axis.

    What is computed with them has the parameters' own order in memory. A gradient as cuDNN gives it
    has another one, in which XLA would do all that follows, and turn the parameters to it and back.
    """
    return jax.tree.map(jnp.ravel, tree) if hand_tuned("vectors") else tree


def after(known: jax.Array, tree: Any) -> Any:
    """The tree, in a way that XLA cannot compute before `known`, a scalar."""
    if not hand_tuned("vectors"):
        return tree
    never = (known != known) & (known == known)
    return jax.tree.map(lambda x: jnp.where(never, 0, x), tree)


def gathered(tree: Any) -> Any:
    """The tree with all its scalars out of one array, so that they are read by one kernel."""
    leaves, structure = jax.tree.flatten(tree)
    places = [k for k, x in enumerate(leaves) if jnp.ndim(x) == 0]
    if not places or not hand_tuned("vectors"):
        return tree
    scalars = lax.optimization_barrier(jnp.stack([leaves[k] for k in places]))
    for k, scalar in zip(places, scalars, strict=True):
        leaves[k] = scalar
    return jax.tree.unflatten(structure, leaves)
