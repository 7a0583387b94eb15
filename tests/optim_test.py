"""The optimizer against optax's own, and the decay against the paper's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax import optim

EPOCHS8 = 8 * 1_281_167


def hyper(decay_examples=EPOCHS8, rate=1.0):
    return optim.Hyper(np.float32(rate), np.float32(0.96), np.float32(decay_examples), 0.0, 0.9)


@pytest.mark.parametrize(
    ("examples", "steps", "factor"),
    [
        (EPOCHS8, 31_000_000, 0.0192),
        (EPOCHS8 / 6, 2_100_000, 0.2007),
        (EPOCHS8 / 6, 6_000_000, 0.0102),
    ],
)
def test_decay_factor_after_the_papers_steps(examples, steps, factor):
    got = optim.decayed_rate(hyper(examples), jnp.int32(steps), 32)
    assert abs(float(got) - factor) < 5e-5  # the factor is known to four decimals


def test_decay_is_optax_exponential_decay():
    schedule = optax.exponential_decay(0.045, EPOCHS8 / 6 / 32, 0.96)
    for step in (0, 1, 1000, 53_382, 10_000_000):
        got = optim.decayed_rate(hyper(EPOCHS8 / 6, 0.045), jnp.int32(step), 32)
        # float32 pow of an exponent of up to 187 steps of 4%: a few units in the 7th digit
        np.testing.assert_allclose(got, schedule(step), rtol=2e-5)


def test_first_step_uses_the_initial_rate():
    assert float(optim.decayed_rate(hyper(rate=0.045), jnp.int32(0), 32)) == np.float32(0.045)


def test_momentum_sgd_is_optax_sgd():
    key = jax.random.key(0)
    params = {"a": jax.random.normal(key, (3, 2)), "b": jnp.ones(4)}
    ours, theirs = optim.momentum_sgd(), optax.sgd(0.1, momentum=0.9)
    mine, reference = ours.init(params), theirs.init(params)
    p, q = params, params
    for k in range(5):
        grads = jax.tree.map(lambda x, k=k: jnp.sin(x + k), params)
        step, mine = ours.update(grads, mine, p, learning_rate=0.1, momentum=0.9)
        other, reference = theirs.update(grads, reference, q)
        p, q = optax.apply_updates(p, step), optax.apply_updates(q, other)
    # the same operations in the same order: not a bit apart but for a fused multiply-add
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), p, q)


def test_l2_counts_kernels_only():
    params = {
        "conv": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 7.0)},
        "bn": {"scale": jnp.full(3, 5.0), "bias": jnp.ones(3)},
    }
    assert float(optim.l2_penalty(params)) == 0.5 * 6 * 4
    grad = jax.grad(optim.l2_penalty)(params)
    assert np.all(grad["conv"]["kernel"] == 2.0) and not np.any(grad["bn"]["scale"])
