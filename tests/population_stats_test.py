"""population_stats: Algorithm 2 for networks in Linen and NNX, with our layers and with Flax's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax
import bn_jax.nnx
from bn_jax import layers


def draw(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(1, 2, shape))


BATCHES = [draw(n, 6, seed=n) for n in (16, 16, 5, 9)]  # unequal
KERNEL = draw(6, 5, seed=1)


class Linen(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(5, use_bias=False, name="dense")(x)
        x = self.norm(name="first")(x, use_running_average=not train)
        return self.norm(name="second")(jnp.sin(x), use_running_average=not train)


class Nnx(nnx.Module):
    def __init__(self, norm):
        self.first, self.second = norm(5, rngs=nnx.Rngs(0)), norm(5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.second(jnp.sin(self.first(x @ KERNEL)))


def expected(biased):
    """In float64: every batch weighted by its examples."""
    found = []
    for layer in range(2):
        total = np.zeros((2, 5))
        for x in BATCHES:
            u = np.float64(x) @ np.float64(KERNEL)
            if layer:
                u = np.sin((u - u.mean(0)) / np.sqrt(u.var(0) + 1e-5))
            total += len(u) * np.stack([u.mean(0), u.var(0, ddof=0 if biased else 1)])
        found.append(total / sum(map(len, BATCHES)))
    return found


def agree(stats, biased):
    for name, (mean, var) in zip(("first", "second"), expected(biased), strict=True):
        # Flax's var is E[x^2] - E[x]^2, and 1 - momentum is a difference of float32 near 1.
        limit = 1e-3 if biased else 2e-5
        np.testing.assert_allclose(stats[name]["mean"][...], mean, rtol=limit, atol=limit)
        np.testing.assert_allclose(stats[name]["var"][...], var, rtol=limit, atol=limit)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("norm", [layers.BatchNorm, nn.BatchNorm])
def test_linen(norm, jit):
    model = Linen(norm)
    variables = model.init(jax.random.key(0), BATCHES[0], train=False)
    variables["params"]["dense"]["kernel"] = KERNEL
    variables["batch_stats"] = jax.tree.map(lambda a: a + 3, variables["batch_stats"])
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    stats = bn_jax.population_stats(jax.jit(train) if jit else train, variables, iter(BATCHES))
    agree(stats, norm is nn.BatchNorm)
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    if norm is layers.BatchNorm:
        assert stats["first"]["count"] == 4


@pytest.mark.parametrize("norm", [bn_jax.nnx.BatchNorm, nnx.BatchNorm])
def test_nnx(norm):
    model = Nnx(norm)
    model(BATCHES[0])
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    stats = bn_jax.population_stats(nnx.jit(lambda m, x: m(x)), model, BATCHES)
    agree(stats, norm is nnx.BatchNorm)
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    nnx.update(model, stats)
    agree({"first": {"mean": model.first.mean, "var": model.first.var},
           "second": {"mean": model.second.mean, "var": model.second.var}},
          norm is nnx.BatchNorm)  # fmt: skip


def test_masked_batches_count_by_their_valid_examples():
    layer = layers.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), BATCHES[0])
    batches = [
        {"x": draw(8, 6, seed=1), "mask": np.arange(8) < 8},
        {"x": draw(8, 6, seed=2), "mask": np.arange(8) < 3},
        {"x": draw(8, 6, seed=3), "mask": np.zeros(8, bool)},
    ]

    def train(variables, batch):
        return layer.apply(variables, batch["x"], mask=batch["mask"], mutable=["batch_stats"])

    stats = bn_jax.population_stats(train, variables, batches)
    rows = [np.float64(b["x"][b["mask"]]) for b in batches[:2]]
    np.testing.assert_allclose(stats["mean"], np.concatenate(rows).mean(0), rtol=1e-5, atol=1e-6)
    want = (8 * rows[0].var(0, ddof=1) + 3 * rows[1].var(0, ddof=1)) / 11
    np.testing.assert_allclose(stats["var"], want, rtol=1e-5)
    assert stats["count"] == 2
    for none in ([], batches[2:]):
        with pytest.raises(ValueError, match="no batch with two valid values"):
            bn_jax.population_stats(train, variables, none)


def test_a_momentum_of_1_is_refused():
    model = Linen(functools.partial(nn.BatchNorm, momentum=1.0))
    variables = model.init(jax.random.key(0), BATCHES[0], train=False)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="momentum 1.*below 1"):
        bn_jax.population_stats(train, variables, BATCHES)


def test_processes_bring_their_own_batches(monkeypatch):
    """As two processes would: what each has gathered is given to the other."""
    from jax.experimental import multihost_utils

    layer = layers.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), BATCHES[0])
    train = functools.partial(layer.apply, mutable=["batch_stats"])
    want = bn_jax.population_stats(train, variables, BATCHES)
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def gather(tree):
        sent.append(tree)
        return jax.tree.map(lambda a: np.stack([a, np.zeros_like(a)]), tree)

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    bn_jax.population_stats(train, variables, BATCHES[:1])
    both = lambda tree: jax.tree.map(lambda a, b: np.stack([a, b]), sent[0], tree)  # noqa: E731
    monkeypatch.setattr(multihost_utils, "process_allgather", both)
    got = bn_jax.population_stats(train, variables, BATCHES[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
