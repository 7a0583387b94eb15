"""Temporary memory of a compiled training step, against flax.linen.BatchNorm and plain autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax import models, ops, optim, step
from bn_jax.layers import BatchNorm, ConvBN
from configs import bn_x30


class FlaxBatchNorm(nn.BatchNorm):
    """Flax's, without the mask: one of examples does not broadcast there."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(x, use_running_average)


class Tower(nn.Module):
    """Convolutions with BN and a pool: several layers, whose gradients need not live together."""

    norm: object

    @nn.compact
    def __call__(self, images, *, train, mask=None):
        x = images.astype(jnp.float32)
        for i in range(8):
            conv = ConvBN(16, (3, 3), norm=self.norm, convolve=ops.conv, name=f"conv_{i}")
            x = conv(x, train=train, mask=mask)
        return nn.Dense(10)(jnp.mean(ops.max_pool(x, 2), (1, 2)))


def temporary(model, pixels, batch, options):
    """Bytes of temporaries of the compiled step, which never runs."""

    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    state = jax.eval_shape(lambda: step.init_state(model, 0, (pixels, pixels, 3)))
    examples = {
        "image": shape(batch, pixels, pixels, 3, dtype=jnp.uint8),
        "label": shape(batch, dtype=jnp.int32),
        "mask": shape(batch, dtype=jnp.bool_),
    }
    hyper = optim.Hyper(*(shape() for _ in range(5)))
    compiled = (
        jax.jit(functools.partial(step.train_step, model=model), donate_argnums=0)
        .lower(state, examples, hyper, shape(dtype=np.uint32))
        .compile(compiler_options=options)
    )
    return compiled.memory_analysis().temp_size_in_bytes


def ratio(ours, theirs, pixels, batch):
    return temporary(ours, pixels, batch, ops.compiler_options()) / temporary(
        theirs, pixels, batch, None
    )


def test_memory_of_convolutions_bn_and_pools():
    flax = functools.partial(FlaxBatchNorm, momentum=0.99)
    assert ratio(Tower(BatchNorm), Tower(flax), 64, 8) <= 0.8


@pytest.mark.slow
def test_memory_of_the_whole_inception_step():
    """224 px, batch 32: at least 20% less than Flax's BN in the same network, compiled as usual."""
    model = models.build(bn_x30.get_config(), 1000)
    flax = functools.partial(FlaxBatchNorm, momentum=0.99, epsilon=1e-3)
    assert ratio(model, model.clone(norm=flax), 224, 32) <= 0.8
