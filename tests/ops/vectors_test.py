"""What the step does with all parameters is the same in the forms of GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax import ops, optim, step
from bn_jax.layers import BatchNorm, ConvBN
from bn_jax.ops import vectors


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def arrays():
    random = np.random.default_rng(0)
    shapes = [(3, 3, 40, 20), (), (vectors.ROW,), (vectors.ROW + 1,), (1, 5)]
    shapes += [(k + 1,) for k in range(vectors.TOGETHER)]
    return [jnp.asarray(random.normal(size=shape)) for shape in shapes]


def test_squares_are_those_of_each_array():
    some = arrays()
    with ops.tracing_for("gpu"):
        found = jax.jit(vectors.squares)(some)
    np.testing.assert_allclose(found, [np.sum(np.square(x)) for x in some], rtol=1e-14)
    with ops.plain():
        np.testing.assert_allclose(vectors.squares(some), found, rtol=1e-14)


def test_what_is_not_finite_is_found_in_its_own_array_only():
    some = arrays()
    some[3] = some[3].at[-1].set(jnp.nan)
    some[4] = some[4].at[0, 2].set(-jnp.inf)
    with ops.tracing_for("gpu"):
        found = np.asarray(vectors.squares(some))
    assert np.flatnonzero(~np.isfinite(found)).tolist() == [3, 4]
    assert np.isnan(found[3]) and found[4] == np.inf


@pytest.mark.parametrize("known", [0.0, np.nan, np.inf])
def test_numbers_that_come_after_another_have_the_same_bits(known):
    with ops.tracing_for("gpu"):
        found = jax.jit(vectors.after)(jnp.asarray(known), jnp.float32(0.1), jnp.float32(0.9))
    np.testing.assert_array_equal(found, np.float32([0.1, 0.9]))


def test_gathered_scalars_stay_in_their_places():
    tree = {"a": jnp.float32(3), "b": {"mean": jnp.arange(2.0), "count": jnp.float32(7)}}
    tree["c"] = jnp.int32(2**30 + 1)  # which float32 does not hold
    with ops.tracing_for("gpu"):
        found = jax.jit(vectors.gathered)(tree)
        assert vectors.gathered({"mean": tree["b"]["mean"]}).keys() == {"mean"}
    jax.tree.map(np.testing.assert_array_equal, found, tree)
    assert all(
        x.dtype == y.dtype for x, y in zip(*map(jax.tree.leaves, (found, tree)), strict=True)
    )


class Net(nn.Module):
    """Two layers with BN and a classifier with a bias."""

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        norm = functools.partial(BatchNorm, group_size=4, momentum=0.9, param_dtype=jnp.float64)
        x = x.astype(jnp.float64) / 255
        x = ConvBN(5, (3, 3), norm=norm, name="first")(x, train=train, mask=mask)
        x = ConvBN(6, (1, 1), norm=norm, name="second")(x, train=train, mask=mask)
        return nn.Dense(3, param_dtype=jnp.float64)(jnp.mean(x, (1, 2)))


@pytest.mark.parametrize("l2", [None, 0.1])
def test_a_step_with_the_forms_of_gpus_is_the_plain_step(l2):
    model = Net()
    state = step.init_state(model, 0, (6, 6, 2))
    random = np.random.default_rng(1)
    batch = {
        "image": jnp.asarray(random.integers(0, 256, (8, 6, 6, 2)), jnp.uint8),
        "label": jnp.asarray(random.integers(0, 3, 8), jnp.int32),
        "mask": jnp.arange(8) != 5,
    }
    hyper = optim.Hyper(0.1, 0.9, 1e3, l2, 0.9)

    def two_steps():
        train = jax.jit(functools.partial(step.train_step, model=model))
        return train(train(state, batch, hyper, 0)[0], batch, hyper, 0)

    with ops.tracing_for("gpu"):
        found, metrics = two_steps()
    with ops.plain():
        wanted, wanted_metrics = two_steps()
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, state)
    assert int(found.batch_stats["first"]["bn"]["count"]) == 2
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, found, wanted)
    jax.tree.map(close, metrics, wanted_metrics)
