"""The optimizer: learning rate schedule, momentum SGD and L2 (paper section 4.2).

Its numbers are data, not constants of the compiled program, so that networks that differ only in
them (BN-x5, BN-x30, "decay 6 times faster") share one program. A network without any L2 has a
program of its own.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.ops import vectors


class Hyper(NamedTuple):
    """The numbers of an experiment that enter the compiled step as data (float32 scalars).

    Attributes:
      learning_rate: the initial rate.
      decay_rate, decay_examples: the rate is multiplied by `decay_rate` every `decay_examples`
        training examples, continuously.
      l2: the coefficient of the L2 loss; None for no L2, which saves passes over the weights.
      momentum: the share of the velocity that a step keeps (0.9 in GoogLeNet; the paper does not
        say).
      warmup_from, warmup_examples: the first step has the share `warmup_from` of the rate, which
        grows to 1 over `warmup_examples` examples; 0 for no warm-up.
    """

    learning_rate: jax.typing.ArrayLike
    decay_rate: jax.typing.ArrayLike
    decay_examples: jax.typing.ArrayLike
    l2: jax.typing.ArrayLike | None
    momentum: Any
    warmup_from: jax.typing.ArrayLike = np.float32(1)
    warmup_examples: jax.typing.ArrayLike = np.float32(0)

    @classmethod
    def from_config(cls, config: Any) -> "Hyper":
        """Takes the numbers from an experiment's config, whose batch_size is the run's."""
        factor = rate_factor(config.learning_rate_scaling, config.batch_size, config.bn.group_size)
        return cls(
            learning_rate=np.float32(config.learning_rate * factor),
            decay_rate=np.float32(config.decay_rate),
            decay_examples=np.float32(config.decay_examples),
            l2=np.float32(config.l2) if config.l2 else None,
            momentum=np.float32(config.momentum),
            warmup_from=np.float32(1 / factor),
            warmup_examples=np.float32(config.warmup_examples),
        )


def rate_factor(scaling: str, batch_size: int, mini_batch: int | None) -> float:
    """Returns the factor that scales a rate for `mini_batch` examples to one for `batch_size`.

    scaling: "linear" for batch_size / mini_batch (Goyal et al. 2017, arXiv:1706.02677, section
    2.1); "sqrt" for its square root, which keeps the variance of a step (Krizhevsky 2014,
    arXiv:1404.5997, section 5); "none" for 1.

    Differs from the paper: `learning_rate_scaling` and `warmup_examples`, which are on at scale
    `pod` alone, adapt a rate for mini-batches of 32 to batches of many of them (arXiv:1706.02677,
    arXiv:1404.5997).
    """
    if scaling == "none" or mini_batch is None:
        return 1.0

    ratio = batch_size / mini_batch
    if scaling == "linear":
        return ratio
    return math.sqrt(ratio)


def decayed_rate(hyper: Hyper, step: jax.Array, batch_size: int) -> jax.Array:
    """Computes the rate of a step: learning_rate * decay_rate^(examples / decay_examples).

    step: 0 for the first. GoogLeNet lowers its rate by 4% every 8 epochs; the modified networks do
    so 6 times faster (section 4.2.1). Differs from the paper: the decay is continuous; the paper
    does not say whether it is that or a staircase. It equals `optax.exponential_decay`, which does
    not accept traced numbers.

    A scaled rate (`rate_factor`) can be warmed up: it rises linearly from the unscaled one over
    `warmup_examples` examples (Goyal et al. 2017, section 2.2, over 5 epochs).
    """
    examples = jnp.asarray(step, jnp.float32) * batch_size
    decay = jnp.power(hyper.decay_rate, examples / hyper.decay_examples)

    # Without a warm-up there are no examples in it, and nothing is divided by 0.
    warming = examples < hyper.warmup_examples
    length = jnp.maximum(hyper.warmup_examples, 1)
    warmed = jnp.where(warming, examples / length, 1)

    # The factor is exactly 1 after the warm-up, and without one.
    first = hyper.warmup_from
    unfinished = warmed < 1
    warmup = jnp.where(unfinished, first + (1 - first) * warmed, 1)

    return decay * hyper.learning_rate * warmup


def init_velocity(params: optax.Params) -> optax.TraceState:
    """Makes the optimizer's state before the first step: a velocity of 0, for any momentum."""
    return optax.trace(decay=0.0).init(params)


def momentum_step(
    grads: optax.Updates,
    velocity: optax.TraceState,
    params: optax.Params,
    *,
    learning_rate: jax.Array | float,
    momentum: jax.Array | float,
) -> tuple[optax.Params, optax.TraceState]:
    """Takes a step of SGD: v = momentum * v + g; w = w - rate * v (not Nesterov's momentum).

    Returns the new params and the new velocity. It is `optax.sgd(learning_rate, momentum)` with the
    two numbers as data.
    """
    trace, velocity = optax.trace(decay=momentum).update(grads, velocity)
    updates = jax.tree.map(lambda v: -learning_rate * v, trace)
    return optax.apply_updates(params, updates), velocity


def l2_penalty(params: optax.Params) -> jax.Array:
    """Sums w^2 / 2 over the kernels of convolutions and dense layers, to a float32 scalar.

    Scales, offsets and biases are not decayed. The paper does not define its "L2 weight
    regularization"; with this form the gradient is `l2 * w`.
    """
    kernels = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if _decays(path):
            kernels.append(leaf.astype(jnp.float32))

    if not kernels:
        return jnp.float32(0)
    squares = vectors.squares(kernels)
    return 0.5 * jnp.sum(squares)


def add_decay(grads: optax.Updates, params: optax.Params, l2: jax.typing.ArrayLike) -> Any:
    """Adds the gradient of `l2 * l2_penalty(params)` to the gradients."""

    def add(path, g, w):
        if _decays(path):
            return g + l2 * w
        return g

    return jax.tree_util.tree_map_with_path(add, grads, params)


def _decays(path) -> bool:
    return path[-1].key == "kernel"
