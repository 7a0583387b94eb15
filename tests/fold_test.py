"""Folding a network's BN into its convolutions and dense layers (Alg. 2, line 12)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import layers, models
from configs import bn_x30, mnist_bn


class Grouped(nn.Module):
    """Grouped convolution and a kernel of stride 2, which the paper's networks do not have."""

    norm: object = functools.partial(layers.BatchNorm, epsilon=1e-3)

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = layers.ConvBN(6, (3, 3), norm=self.norm, name="a")(x, train=train, mask=mask)
        grouped = layers.ConvBN(6, (3, 3), (2, 2), self.norm, feature_group_count=3, name="b")
        return grouped(x, train=train, mask=mask)


def network(name, dtype):
    if name == "grouped":
        return Grouped()
    config = {"inception": bn_x30, "mlp": mnist_bn}[name].get_config("digits").unlock()
    assert config.bn.epsilon == 1e-3
    config.bn.group_size = None
    config.dtype = dtype
    return models.build(config, 10)


@functools.cache
def trained(name):
    """Variables and images: noise on every parameter, and the moments of a batch as statistics."""
    rng = np.random.default_rng(0)
    model = network(name, "float32")
    shape = (8, 6, 6, 3) if name == "grouped" else (16, 28, 28, 1)
    images = rng.integers(0, 256, shape).astype(np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=True))

    def draw(path, leaf):
        if path[-1].key == "kernel":  # Glorot's
            window, (fan_in, fan_out) = np.prod(leaf.shape[:-2]), leaf.shape[-2:]
            return np.float32(
                rng.normal(size=leaf.shape) * (2 / window / (fan_in + fan_out)) ** 0.5
            )
        return np.float32((path[-1].key == "scale") + 0.3 * rng.normal(size=leaf.shape))

    params = jax.tree_util.tree_map_with_path(draw, shapes["params"])
    start = {"params": params, "batch_stats": layers.fresh_stats(shapes["batch_stats"])}
    run = jax.jit(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"], rngs=KEYS))
    return {"params": params, **run(start)[1]}, images


KEYS = {"dropout": jax.random.key(1)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["grouped", "mlp", "inception"])
def test_a_folded_network_gives_the_same_with_fewer_operations(name, dtype):
    """All layers of the network that is trained on the digits; its variables after one pass."""
    variables, images = trained(name)
    with jax.enable_x64(dtype == "float64"):
        model = network(name, dtype)
        variables, x = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a), dtype), (variables, images)
        )
        folded = layers.fold_variables(variables, epsilon=1e-3)
        run, plain = (
            jax.jit(lambda v, x, m=m: m.apply(v, x, train=False)).lower(v, x).compile()
            for m, v in ((model, variables), (model.clone(norm=None), folded))
        )
        want, got = run(variables, x), plain(folded, x)
    assert "bn" not in str(jax.tree.structure(folded))
    limit = 1e-5 if dtype == "float32" else 1e-12
    assert np.max(np.abs(want - got)) <= limit * np.max(np.abs(want))
    assert plain.as_text().count(" = ") < run.as_text().count(" = ")


def test_fold_refuses_what_it_cannot():
    bn = {"scale": jnp.ones(3), "bias": jnp.ones(3)}
    stats = {"x": {"bn": {"mean": jnp.ones(3), "var": jnp.ones(3)}}}
    with pytest.raises(ValueError, match="/x has a bn beside 0 layers"):
        layers.fold_variables({"params": {"x": {"bn": bn}}, "batch_stats": stats}, epsilon=1e-3)
