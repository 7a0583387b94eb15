"""The Linen modules: drop-in for flax.linen.BatchNorm, folding, Algorithm 2, activations."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bn_jax import batch_norm, layers


def draw(*shape, seed=0):
    return np.float32(np.random.default_rng(seed).normal(1, 2, shape))


class Net(nn.Module):
    """Two convolutions, one of them grouped, and a dense layer with BN each."""

    norm: object = layers.BatchNorm

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = layers.ConvBN(6, (3, 3), norm=self.norm, name="a")(x, train=train, mask=mask)
        x = layers.ConvBN(6, (3, 3), (2, 2), self.norm, feature_group_count=3, name="b")(
            x, train=train, mask=mask
        )
        return Hidden(self.norm, name="c")(x.mean((1, 2)), train=train, mask=mask)


class Hidden(nn.Module):
    """dense + bn, the names that `fold_variables` knows."""

    norm: object

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = nn.Dense(5, use_bias=self.norm is None, name="dense")(x)
        if self.norm is None:
            return x
        return self.norm(name="bn")(x, use_running_average=not train, mask=mask)


@pytest.fixture(scope="module")
def trained():
    """Net, its variables after two training steps, and its input."""
    x, net = draw(8, 6, 6, 3), Net()
    variables = net.init(jax.random.key(0), x, train=True)
    params = jax.tree.map(lambda p: p + 0.3 * draw(*p.shape, seed=3), variables["params"])
    variables = {"params": params, "batch_stats": variables["batch_stats"]}
    step = jax.jit(lambda v: net.apply(v, x, train=True, mutable=["batch_stats"])[1])
    for _ in range(2):
        variables |= step(variables)
    return net, variables, x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": False, "axis": 1},
        {"use_scale": False},
        {"scale_init": nn.initializers.zeros},
    ],
)
def test_same_tree_and_values_as_flax(options):
    """Arguments, leaves, outputs, gradients; and a Flax checkpoint loads as it is, as converged."""
    x = draw(4, 6, 3)
    options = {"momentum": 0.9, "epsilon": 1e-3, **options}
    ours = layers.BatchNorm(**options)
    flax = nn.BatchNorm(use_fast_variance=False, **options)
    theirs = flax.init(jax.random.key(0), x, use_running_average=False)
    mine = ours.init(jax.random.key(0), x, use_running_average=False)
    assert mine["batch_stats"].pop("count") == 0
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, theirs)
    mask = np.arange(4)[:, None, None] < 3

    def loss(x, module, train, **kw):
        y, updates = module.apply(
            theirs, x, use_running_average=not train, mutable=["batch_stats"], **kw
        )
        return jnp.sum(jnp.sin(y[:3])), updates["batch_stats"]

    for train, kw in ((True, {}), (True, {"mask": mask}), (False, {})):
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames=("module", "train"))
        run = functools.partial(step, x, train=train, **kw)
        (a, mine), da = run(module=ours)
        (b, wanted), db = run(module=flax)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(da[:3], db[:3], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mine["mean"], wanted["mean"], rtol=1e-5, atol=1e-6)
        if train:  # Flax's update is with the biased variance, ours with m/(m-1) times that
            m = 18 if kw else 24
            m = m * (1 if options.get("axis") != 1 else 0.5)
            unbiased = 0.9 + (wanted["var"] - 0.9) * m / (m - 1)
            np.testing.assert_allclose(mine["var"], unbiased, rtol=1e-5)
        assert set(mine) == {"mean", "var"}  # the structure that went in


def test_flax_checkpoint_for_inference_without_mutable():
    x = draw(4, 3)
    variables = nn.BatchNorm().init(jax.random.key(0), x, use_running_average=True)
    y = layers.BatchNorm(use_running_average=True).apply(variables, x)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_are_flax_ones(dtype, x_dtype):
    x = jnp.asarray(draw(8, 3), x_dtype)
    for module in (layers.BatchNorm, nn.BatchNorm):
        y, v = module(dtype=dtype).init_with_output(jax.random.key(0), x, use_running_average=False)
        assert y.dtype == jnp.result_type(dtype or jnp.promote_types(x_dtype, jnp.float32))
        assert v["batch_stats"]["mean"].dtype == jnp.float32


def test_init_checks_no_group_and_updates_nothing():
    module = layers.BatchNorm(group_size=32)
    variables = module.init(jax.random.key(0), draw(1, 3), use_running_average=False)
    assert variables["batch_stats"]["count"] == 0
    with pytest.raises(ValueError, match=r"group_size is 32.*batch of 8"):
        module.apply(variables, draw(8, 3), use_running_average=False, mutable=["batch_stats"])
    with pytest.raises(TypeError, match="int32"):
        module.apply(variables, jnp.ones((32, 3), int), use_running_average=False)


def test_statistics_need_mutable():
    module = layers.BatchNorm()
    variables = module.init(jax.random.key(0), draw(4, 3), use_running_average=True)
    with pytest.raises(Exception, match="batch_stats"):
        module.apply(variables, draw(4, 3), use_running_average=False)


def test_every_argument_of_flax_is_taken():
    fields = [f.name for f in dataclasses.fields(nn.BatchNorm)]
    ours = [f.name for f in dataclasses.fields(layers.BatchNorm)]
    assert ours == [*fields[:-2], "group_size", *fields[-2:]]  # parent and name are last


def test_adopted_statistics_and_back():
    """Adopted, an update changes them by 1 - momentum, as it does in Flax; without, too."""
    x = draw(8, 3)
    theirs = nn.BatchNorm().init(jax.random.key(0), x, use_running_average=True)
    adopted = layers.adopt_stats(theirs["batch_stats"])
    assert adopted["count"] == np.float32(batch_norm.CONVERGED)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, layers.flax_stats(adopted), theirs["batch_stats"])
    )
    module = layers.BatchNorm(use_running_average=False, momentum=0.9)

    def update(stats):
        _, new = module.apply({**theirs, "batch_stats": stats}, x, mutable=["batch_stats"])
        return new["batch_stats"]

    for start in (
        adopted,
        theirs["batch_stats"],
        {**theirs["batch_stats"], "count": jnp.float32(jnp.inf)},
    ):
        new = update(start)
        np.testing.assert_allclose(new["mean"], 0.1 * x.mean(0), rtol=1e-5)
        assert jax.tree.structure(new) == jax.tree.structure(start)
    for count in (0, 3):
        new = update(layers.adopt_stats(theirs["batch_stats"], count))
        weight = 0.1 / (1 - 0.9 ** (count + 1))
        np.testing.assert_allclose(new["mean"], weight * x.mean(0), rtol=1e-5)
        assert new["count"] == count + 1


def test_nnx_bridge():
    """An NNX model holds the module by Flax's bridge: parameters, statistics, gradients."""
    x, dy = draw(16, 3), draw(16, 3, seed=1)
    model = nnx.bridge.ToNNX(layers.BatchNorm(momentum=0.9), rngs=nnx.Rngs(0))
    model.lazy_init(x, use_running_average=False)
    y = model(x, use_running_average=False, mutable=["batch_stats"])
    y = y[0] if isinstance(y, tuple) else y
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(model.mean[...], x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model(x, use_running_average=True).mean(0), 0, atol=1e-6)

    def loss(model, x):
        y = model(x, use_running_average=False, mutable=["batch_stats"])
        return jnp.sum(dy * (y[0] if isinstance(y, tuple) else y))

    by_params, by_x = nnx.grad(loss, argnums=(0, 1))(model, x)
    stats = batch_norm.init_stats((3,))
    run = functools.partial(batch_norm.normalize, train=True, epsilon=1e-5, momentum=0.9)
    _, vjp = jax.vjp(lambda *a: run(*a, stats)[0], x, jnp.ones(3), jnp.zeros(3))
    for got, want in zip((by_x, by_params["scale"], by_params["bias"]), vjp(dy), strict=True):
        np.testing.assert_allclose(got[...], want, rtol=1e-5, atol=1e-5)  # sums of 16 values


def test_algorithm_2_over_a_network(trained):
    """merge_stats of fresh passes: the first layer's against its own inputs in float64."""
    net, variables, _ = trained
    batches = [draw(8, 6, 6, 3, seed=s) for s in range(3)]

    @jax.jit
    def step(total, x):
        fresh = layers.fresh_stats(variables["batch_stats"])
        _, updates = net.apply(
            {**variables, "batch_stats": fresh}, x, train=True, mutable=["batch_stats"]
        )
        return layers.merge_stats(total, updates["batch_stats"])

    total = layers.fresh_stats(variables["batch_stats"])
    for x in batches:
        total = step(total, x)
    assert jax.tree.structure(total) == jax.tree.structure(variables["batch_stats"])
    kernel = variables["params"]["a"]["conv"]["kernel"]
    u = [
        np.float64(nn.Conv(6, (3, 3), use_bias=False).apply({"params": {"kernel": kernel}}, x))
        for x in batches
    ]
    m = 8 * 6 * 6
    got = total["a"]["bn"]
    np.testing.assert_allclose(got["mean"], np.mean([v.mean((0, 1, 2)) for v in u], 0), rtol=1e-5)
    biased = np.mean([v.var((0, 1, 2)) for v in u], 0)
    np.testing.assert_allclose(got["var"], m / (m - 1) * biased, rtol=1e-5)
    assert all(total[k]["bn"]["count"] == 3 for k in "abc")


def test_activations_are_recorded_only_where_asked_for():
    x = draw(4, 5, 5, 3)
    conv = layers.ConvBN(2, (3, 3))
    variables = conv.init(jax.random.key(0), x, train=True)
    assert set(variables) == {"params", "batch_stats"}
    y, updates = conv.apply(variables, x, train=True, mutable=["batch_stats"])
    same, seen = conv.apply(variables, x, train=True, mutable=["batch_stats", "activations"])
    assert set(updates) == {"batch_stats"}
    seen = seen["activations"]
    np.testing.assert_allclose(y, nn.relu(seen["input"][0]), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(y, same, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        seen["pre_bn"][0],
        nn.Conv(2, (3, 3), use_bias=False).apply({"params": variables["params"]["conv"]}, x),
    )
    plain = layers.ConvBN(2, (3, 3), norm=None, activation=nn.sigmoid)
    variables = plain.init(jax.random.key(0), x, train=True)
    assert set(variables["params"]["conv"]) == {"kernel", "bias"}
    y, seen = plain.apply(variables, x, train=False, mutable=["activations"])
    np.testing.assert_allclose(y, nn.sigmoid(seen["activations"]["input"][0]))


def test_local_response_norm():
    """Against the definition, windows cut at the edges."""
    x = np.float64(draw(2, 3, 7)) * 30
    want = np.empty_like(x)
    for c in range(7):
        near = x[..., max(0, c - 2) : c + 3]
        want[..., c] = x[..., c] / (1 + 1e-4 / 5 * (near**2).sum(-1)) ** 0.75
    got = layers.LocalResponseNorm().apply({}, np.float32(x))
    np.testing.assert_allclose(got, want, rtol=1e-5)  # float32 pow
    assert np.max(np.abs(want / x - 1)) > 0.02  # the constants matter here
    half = layers.LocalResponseNorm().apply({}, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_stats_without_count_are_converged():
    tree = {"a": {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}
    assert layers.fresh_stats(tree)["a"]["bn"]["count"] == 0
    assert isinstance(batch_norm.init_stats((2,)), batch_norm.Stats)
