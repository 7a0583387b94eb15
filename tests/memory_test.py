"""Memory of a compiled training step, beside flax.linen.BatchNorm and plain autodiff.

Both sides are compiled alike, with the options of training, and have the same pools and
convolutions. `python -m benchmarks.memory` records the figures and the time of a step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.memory import SETTINGS, Tower, compile_step, flax_norm
from bn_jax import batch_norm, models
from bn_jax.layers import BatchNorm, ConvBN
from configs import bn_x30

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the limits were measured on XLA's CPU compiler"
)


def test_a_step_takes_a_fifth_less_than_flax():
    """Convolution, BN and ReLU, 8 times: 0.68; 1.00 where XLA keeps x - mean for the backward."""
    ours, flax = (compile_step(m, 64, 3, 8) for m in (Tower(), Tower(flax_norm)))
    assert ours.temporary <= 0.8 * flax.temporary


@pytest.mark.parametrize("masked", [False, True])
def test_one_block_keeps_x_alone(masked):
    """jax.value_and_grad of three ConvBN, in arrays of x's size: 8, with Flax's 10."""
    x = jax.ShapeDtypeStruct((8, 64, 64, 16), jnp.float32)
    mask = jnp.arange(8) < 7 if masked else None

    def temporary(norm):
        block = ConvBN(16, (1, 1), norm=norm)
        variables = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, train=True), x)

        def loss(variables, x):
            for _ in range(3):
                x, _ = block.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
            return jnp.sum(jnp.square(x))

        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(variables, x)
        return compiled.compile().memory_analysis().temp_size_in_bytes // (x.size * 4)

    assert temporary(functools.partial(BatchNorm, epsilon=1e-3)) <= temporary(flax_norm) - 1


@pytest.mark.slow
def test_the_whole_inception_step_takes_a_fifth_less_than_flax():
    """bn_x30 at 224 px, batch 32: 1,219 MiB and 1,665 MiB with jax 0.10.2."""
    shape = {k: v for k, v in SETTINGS["imagenet"].items() if k != "classes"}
    model = models.build(bn_x30.get_config(), 1000)
    ours, flax = (compile_step(m, **shape) for m in (model, model.clone(norm=flax_norm)))
    assert ours.temporary <= 0.8 * flax.temporary


def test_gradients_are_those_of_plain_autodiff_in_float64():
    """Of the formulas as they stand: y by autodiff through mean and variance, ReLU and a mask."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, dy = rng.normal(2, 3, (2, 8, 5, 6))
        gamma, beta = rng.normal(size=(2, 6))
        mask = jnp.arange(8) != 3

        def plain(x, gamma, beta):
            x_G = jnp.reshape(x, (2, 4, 5, 6))
            keep = jnp.reshape(mask, (2, 4, 1, 1))
            mean = jnp.mean(x_G, (1, 2), keepdims=True, where=keep)
            var = jnp.mean(jnp.square(x_G - mean), (1, 2), keepdims=True, where=keep)
            y = gamma * (x_G - mean) / jnp.sqrt(var + 1e-3) + beta
            return jnp.reshape(jnp.where(keep, jnp.maximum(y, 0), 0), x.shape)

        def ours(x, gamma, beta):
            stats = batch_norm.init_stats((6,), jnp.float64)
            return batch_norm.normalize(
                x, gamma, beta, stats, train=True, group_size=4, mask=mask, relu=True,
                epsilon=1e-3, momentum=0.9,
            )[0]  # fmt: skip

        def gradients(f):
            y, vjp = jax.vjp(f, x, gamma, beta)
            return y, *vjp(jnp.asarray(dy))

        for got, want in zip(jax.jit(lambda: gradients(ours))(), gradients(plain), strict=True):
            # 1e-12: float64 rounding (1e-16) times the condition of sums of 20 values.
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
