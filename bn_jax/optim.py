"""Momentum SGD, exponential decay by examples seen, and L2 (paper section 4.2).

The rate and its decay are data, not constants of the compiled program, so that networks which
differ only in numbers (BN-x5, BN-x30, "decay 6 times faster") share one program. No L2 at all is
another one.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Hyper(NamedTuple):
    """The numbers of an experiment that enter the compiled step as data (float32 scalars).

    learning_rate: initial rate. decay_rate, decay_examples: the rate is multiplied by `decay_rate`
    every `decay_examples` training examples (continuously). l2: coefficient of the L2 loss, or None
    for none, without its passes over the weights. momentum: share of the velocity kept (GoogLeNet's
    0.9; the paper gives none).
    warmup_from, warmup_examples: the share of the rate that the first step has, and the examples
    over which it grows to the whole (0: at once).
    """

    learning_rate: jax.typing.ArrayLike
    decay_rate: jax.typing.ArrayLike
    decay_examples: jax.typing.ArrayLike
    l2: jax.typing.ArrayLike | None
    momentum: jax.typing.ArrayLike
    warmup_from: jax.typing.ArrayLike = np.float32(1)
    warmup_examples: jax.typing.ArrayLike = np.float32(0)


SCALINGS = ("none", "linear", "sqrt")


def rate_factor(scaling: str, batch_size: int, mini_batch: int | None) -> float:
    """What a rate for mini-batches of `mini_batch` examples is multiplied by for `batch_size`.

    "linear": batch_size / mini_batch (Goyal et al. 2017, arXiv:1706.02677, section 2.1). "sqrt":
    its square root, which keeps the variance of a step (Krizhevsky 2014, arXiv:1404.5997, section
    5). "none": 1.

    Differs from the paper: `learning_rate_scaling` and `warmup_examples`, off by default, fit a
    rate for mini-batches of 32 to batches of many of them (arXiv:1706.02677, arXiv:1404.5997).
    """
    if scaling == "none" or mini_batch is None:
        return 1.0
    ratio = batch_size / mini_batch
    return ratio if scaling == "linear" else math.sqrt(ratio)


def decayed_rate(hyper: Hyper, step: jax.Array, batch_size: int) -> jax.Array:
    """Rate of step `step` (0 for the first): learning_rate * decay_rate^(examples/decay_examples).

    GoogLeNet lowers its rate by 4% every 8 epochs; the modified networks do so 6 times faster
    (section 4.2.1). Differs from the paper: the decay is continuous, not a staircase, because the
    paper does not say which. Equal to `optax.exponential_decay`, which takes no traced numbers.

    A scaled rate (`rate_factor`) can be warmed up: from the unscaled one in a line over
    `warmup_examples` examples (Goyal et al. 2017, section 2.2, over 5 epochs).
    """
    examples = jnp.asarray(step, jnp.float32) * batch_size
    decay = jnp.power(hyper.decay_rate, examples / hyper.decay_examples)
    warmed = jnp.where(
        examples < hyper.warmup_examples, examples / jnp.maximum(hyper.warmup_examples, 1), 1
    )
    # Exactly 1 after the warm-up, and without one.
    warmup = jnp.where(warmed < 1, hyper.warmup_from + (1 - hyper.warmup_from) * warmed, 1)
    return decay * hyper.learning_rate * warmup


def momentum_sgd() -> optax.GradientTransformationExtraArgs:
    """SGD with momentum: v = momentum * v + g; w = w - rate * v (not Nesterov).

    `update(grads, state, params, learning_rate=..., momentum=...)` takes the two numbers as data;
    with constants it is `optax.sgd(learning_rate, momentum)`. The state is optax's `TraceState`.
    """

    def init(params: optax.Params) -> optax.TraceState:
        return optax.TraceState(trace=jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None, *, learning_rate, momentum, **unused):
        del params, unused
        trace = jax.tree.map(lambda g, v: g + momentum * v, grads, state.trace)
        return jax.tree.map(lambda v: -learning_rate * v, trace), optax.TraceState(trace=trace)

    return optax.GradientTransformationExtraArgs(init, update)


def l2_penalty(params: optax.Params) -> jax.Array:
    """(1/2) * sum of squares over the kernels of convolutions and dense layers, a float32 scalar.

    Scale, offset and biases are not decayed. The paper gives no form for its "L2 weight
    regularization"; this one makes the gradient `l2 * w`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = [leaf for path, leaf in leaves if path[-1].key == "kernel"]
    return 0.5 * sum((jnp.sum(jnp.square(k.astype(jnp.float32))) for k in kernels), jnp.float32(0))
