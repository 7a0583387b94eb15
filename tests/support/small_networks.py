"""Networks with random weights and statistics that are no longer the initial ones, untrained."""

import jax
import numpy as np
from ml_collections import ConfigDict

from bn_jax import models, step
from bn_jax.batch_norm import CONVERGED
from bn_jax.weights.network import Network


def variables(config: ConfigDict, classes: int, shape, seed: int = 0):
    """Random `params` and `batch_stats`, such that activations neither vanish nor explode."""
    model = models.build(config, classes)
    like = jax.eval_shape(lambda: step.init_state(model, 0, shape))
    random = np.random.default_rng(seed)

    def value(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            found = random.normal(0, np.sqrt(2 / fan_in), leaf.shape)
        elif name in ("scale", "var"):
            found = random.uniform(0.5, 1.5, leaf.shape)
        else:
            found = random.normal(0, 0.2, leaf.shape)
        return np.asarray(CONVERGED if name == "count" else found, np.float32)

    tree = {"params": like.params, "batch_stats": like.batch_stats}
    return jax.tree_util.tree_map_with_path(value, tree)


def network(config: ConfigDict, classes: int, channels: int, seed: int = 0) -> Network:
    """A network to export."""
    shape = (config.image_size, config.image_size, channels)
    config.precision = "highest"  # as `weights.network.load` has it
    found = variables(config, classes, shape, seed)
    if not found["batch_stats"]:
        del found["batch_stats"]
    model = models.build(config, classes)
    return Network(config, model, found, shape, classes, "population", {"step": "7"})
