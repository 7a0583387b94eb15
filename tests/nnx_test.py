"""bn_jax.nnx.BatchNorm: constructor, attributes and behaviour of flax.nnx.BatchNorm."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bn_jax import batch_norm, layers
from bn_jax.nnx import BatchNorm, adopt_stats


def draw(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(1, 2, shape))


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        self.linear = nnx.Linear(6, 5, rngs=rngs)
        self.bn = norm(5, momentum=0.9, rngs=rngs)

    def __call__(self, x, **call):
        return jnp.sin(self.bn(self.linear(x), **call))


def test_constructor_attributes_and_variables_are_those_of_flax():
    theirs = inspect.signature(nnx.BatchNorm.__init__).parameters
    ours = inspect.signature(BatchNorm.__init__).parameters
    assert [*theirs, "group_size"] == list(ours)
    for name in theirs:
        if name not in ("self", "bias_init", "scale_init"):
            assert ours[name].default == theirs[name].default, name
            assert ours[name].kind == theirs[name].kind
    mine, flax = BatchNorm(5, rngs=nnx.Rngs(0)), nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    assert {*vars(flax), "count", "group_size"} == {*vars(mine)}
    for kind in (nnx.Param, nnx.BatchStat):
        found = nnx.state(mine, kind)
        assert {*nnx.state(flax, kind)} == {*found} - {"count"}
    options = {"use_bias": False, "use_scale": False, "rngs": nnx.Rngs(0)}
    assert BatchNorm(5, **options).scale is None
    assert BatchNorm(5, **options)(draw(8, 5)).shape == (8, 5)
    noted = BatchNorm(5, rngs=nnx.Rngs(0), scale_metadata={"sharding_metadata": ("x",)})
    assert noted.scale.sharding_metadata == ("x",)


@pytest.mark.parametrize("mask", [None, np.arange(8)[:, None] < 5])
def test_values_and_gradients_are_those_of_flax(mask):
    """One seed gives both the same parameters. Running estimates: debiased, and unbiased."""
    x = draw(8, 6)
    nets = [Net(norm, nnx.Rngs(1)) for norm in (BatchNorm, nnx.BatchNorm)]

    def loss(net, x):
        y = net(x, mask=mask)
        return jnp.sum(jnp.square(y[:5]))

    found = [nnx.jit(nnx.value_and_grad(loss))(net, x) for net in nets]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    inner = nets[0].linear(x)[: 5 if mask is not None else 8]
    np.testing.assert_allclose(nets[0].bn.mean[...], inner.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nets[0].bn.var[...], inner.var(0, ddof=1), rtol=1e-4)
    assert nets[0].bn.count[...] == 1


def test_train_eval_view_and_call():
    """The call decides, then what train(), eval() or nnx.view set."""
    x = draw(8, 6)
    net = Net(BatchNorm, nnx.Rngs(0))
    net.eval()
    assert net.bn.use_running_average
    first = net(x)
    assert net.bn.count[...] == 0
    trained = net(x, use_running_average=False)
    assert net.bn.count[...] == 1
    net.train()
    np.testing.assert_allclose(net(x), trained, rtol=1e-6)
    assert net.bn.count[...] == 2
    assert not np.allclose(first, trained)
    np.testing.assert_allclose(net(x, use_running_average=True).shape, (8, 5))
    frozen = nnx.view(net, use_running_average=True)
    frozen(x)
    assert net.bn.count[...] == 2
    unset = BatchNorm(5, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="use_running_average is None.*train\\(\\) or eval"):
        unset(draw(8, 5))


def test_lifted_transformations():
    """nnx.jit, scan over layers, vmap over an ensemble, split and merge."""
    x = draw(8, 5)

    @nnx.vmap(in_axes=0, out_axes=0)
    def members(key):
        return BatchNorm(5, group_size=4, rngs=nnx.Rngs(key))

    stack = members(jax.random.split(jax.random.key(0), 3))
    assert stack.mean.shape == (3, 5)

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def deep(layer, x):
        return jnp.sin(layer(x))

    want = x
    for _ in range(3):
        alone = BatchNorm(5, group_size=4, rngs=nnx.Rngs(0))
        want = jnp.sin(alone(want))
    np.testing.assert_allclose(deep(stack, x), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stack.count[...], [1, 1, 1])

    @nnx.vmap(in_axes=(0, None))
    def wide(layer, x):
        return layer(x)

    assert wide(stack, x).shape == (3, 8, 5)
    np.testing.assert_array_equal(stack.count[...], [2, 2, 2])
    graph, state = nnx.split(stack)
    again = nnx.merge(graph, state)
    np.testing.assert_array_equal(again.mean[...], stack.mean[...])


def test_it_is_the_core_and_the_linen_layer():
    x = draw(8, 3, 5)
    options = {"momentum": 0.9, "axis": (1, 2), "group_size": 4, "epsilon": 1e-3}
    layer = BatchNorm((3, 5), **options, rngs=nnx.Rngs(0))
    y = layer(x)
    linen = layers.BatchNorm(**options, use_running_average=False)
    variables = linen.init(jax.random.key(0), x)
    want, updates = linen.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, want)
    for name, value in updates["batch_stats"].items():
        np.testing.assert_array_equal(getattr(layer, name)[...], value)


def test_statistics_of_a_flax_model():
    """Filled in and adopted, an update changes them by 1 - momentum."""
    x = draw(8, 6)
    theirs = Net(nnx.BatchNorm, nnx.Rngs(0))
    theirs.bn.mean[...] = draw(5, seed=3)
    mine = Net(BatchNorm, nnx.Rngs(1))
    nnx.update(mine, nnx.state(theirs))
    adopt_stats(mine)
    assert mine.bn.count[...] == np.float32(batch_norm.CONVERGED)
    np.testing.assert_allclose(
        mine(x, use_running_average=True), theirs(x, use_running_average=True), rtol=1e-5
    )
    mine(x)
    theirs(x)
    np.testing.assert_allclose(mine.bn.mean[...], theirs.bn.mean[...], rtol=1e-4, atol=1e-6)
