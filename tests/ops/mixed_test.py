"""bfloat16 layers whose parameters get float32 gradients, summed in float32 between devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import scale
from bn_jax import ops
from bn_jax.distributed import mesh
from bn_jax.layers import BatchNorm, ConvBN
from bn_jax.ops import mixed

SHAPES = [
    # size of x, kernel, strides, padding, groups
    ((8, 8), (3, 3, 4, 5), (1, 1), "SAME", 1),
    ((7, 10), (3, 3, 4, 5), (2, 2), "SAME", 1),
    ((9, 8), (7, 7, 1, 16), (2, 2), "SAME", 4),  # the separable stem
    ((8, 9), (3, 3, 4, 5), (2, 2), [(1, 1), (1, 1)], 1),
    ((9, 9), (2, 2, 4, 5), (3, 3), "VALID", 1),  # rows that no window sees
    ((5, 5), (1, 1, 4, 5), (1, 1), "SAME", 1),
]


def random(shape, seed, dtype):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(("size", "shape", "strides", "padding", "groups"), SHAPES)
def test_gradients_are_those_of_the_rounded_kernel(size, shape, strides, padding, groups):
    x = random((6, *size, 4), 0, jnp.bfloat16)
    kernel = random(shape, 1, jnp.float32)

    def layer(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return ops.conv(
            x, kernel, strides, padding, feature_group_count=groups, dimension_numbers=numbers
        )

    y, pullback = jax.vjp(layer, x, kernel)
    dy = random(y.shape, 2, jnp.bfloat16)
    dx, dkernel = pullback(dy)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    want, pullback = jax.vjp(layer, x.astype(jnp.float32), rounded)
    want_dx, want_dkernel = pullback(dy.astype(jnp.float32))
    # float32 sums of the same products, in another order
    np.testing.assert_allclose(dkernel, want_dkernel, rtol=1e-5, atol=1e-5)
    # rounded to bfloat16 (8 bits) at the end; XLA for CPUs does not say how it adds up before
    for narrow, wide in ((y, want), (dx, want_dx)):
        np.testing.assert_allclose(
            narrow.astype(np.float32), wide, rtol=2**-7, atol=2**-7 * np.abs(wide).max()
        )


@pytest.mark.parametrize(("size", "shape", "strides", "padding", "groups"), SHAPES)
def test_on_a_gpu_the_sum_of_a_filter_gradient_is_rounded_once(
    size, shape, strides, padding, groups
):
    x = random((6, *size, 4), 0, jnp.bfloat16)
    kernel = random(shape, 1, jnp.float32)

    def layer(kernel, x):
        return mixed.conv(x, kernel, strides, padding, groups, None)

    with ops.tracing_for("gpu"):
        y, pullback = jax.vjp(lambda kernel: layer(kernel, x), kernel)
        dy = random(y.shape, 2, jnp.bfloat16)
        (dkernel,) = pullback(dy)
    assert dkernel.dtype == jnp.float32

    with jax.enable_x64(True):
        exact = x.astype(jnp.float64)
        _, pullback = jax.vjp(lambda kernel: layer(kernel, exact), kernel.astype(jnp.float64))
        (want,) = pullback(dy.astype(jnp.float64))
    want = np.asarray(want)
    if shape[:2] == (1, 1):  # a product in float32
        np.testing.assert_allclose(dkernel, want, rtol=1e-5, atol=1e-5)
        return
    # bfloat16 has 8 bits: half a unit in the last place, and the float32 sum's own error.
    np.testing.assert_allclose(dkernel, want, rtol=2**-8, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_as_wide_as_the_parameters_all_is_as_in_flax(dtype):
    with jax.enable_x64(True):
        x = random((4, 8, 8, 3), 0, np.float32)
        options = {"features": 5, "kernel_size": (3, 3), "strides": (2, 2), "dtype": dtype}
        pairs = [
            (mixed.Conv(conv_general_dilated=ops.conv, **options), nn.Conv(**options), x),
            (mixed.Dense(5, dtype=dtype), nn.Dense(5, dtype=dtype), x[:, 0, 0]),
        ]
        for ours, flax, x in pairs:
            params = flax.init(jax.random.key(0), x)

            def loss(params, x, layer):
                return jnp.sum(jnp.sin(layer.apply(params, x)))

            both = [jax.value_and_grad(loss, (0, 1))(params, x, layer) for layer in (ours, flax)]
            jax.tree.map(np.testing.assert_array_equal, *both)


class Network(nn.Module):
    """Every kind of layer that Inception has: with and without BN, separable, strided, dense."""

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(ConvBN, dtype=jnp.bfloat16)
        norm = functools.partial(BatchNorm, group_size=4, dtype=jnp.bfloat16)
        x = mixed.Conv(
            6, (3, 3), feature_group_count=3, conv_general_dilated=ops.conv, dtype=jnp.bfloat16
        )(x)
        x = conv(8, (3, 3), strides=(2, 2), norm=norm)(x.astype(jnp.bfloat16), train=True)
        x = conv(8, (1, 1), norm=None)(x, train=True)
        assert x.dtype == jnp.bfloat16
        return mixed.Dense(3, dtype=jnp.bfloat16)(jnp.mean(x, (1, 2)))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_devices_add_gradients_up_in_float32(backend):
    """Read from the program as it is cut for 8 devices, before XLA for CPUs widens bfloat16."""
    devices = mesh.make()
    assert devices.size == 8
    network = Network()
    x = jnp.ones((32, 8, 8, 3), jnp.bfloat16)
    variables = network.init(jax.random.key(0), x)

    def loss(params, x):
        y, updates = network.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            x, mutable=["batch_stats"],
        )  # fmt: skip
        return jnp.mean(jnp.square(y.astype(jnp.float32))), updates

    step = jax.jit(
        jax.grad(loss, has_aux=True),
        in_shardings=(mesh.replicated(devices), mesh.along_batch(devices)),
        out_shardings=mesh.replicated(devices),
    )
    with ops.tracing_for(backend):
        lowered = step.lower(variables["params"], x)
    _, cut = scale.compiled(lowered, {})
    assert {kind for kind, _ in cut} == {"all-reduce"}
    assert {dtype for c in cut for dtype in c.bytes} == {"f32"}
    sums = sum(sum(c.bytes.values()) for c in cut)
    assert sums >= 4 * sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("n", "rows"), [(8, 16), (3, 12), (8, 12)])
def test_a_kernel_s_gradient_on_some_devices_is_that_of_one(n, rows, kind):
    """By the form of GPUs; 12 rows do not divide by 8 devices, and are then added up in float32."""
    devices = jax.make_mesh((n,), ("data",), axis_types=(kind,), devices=jax.devices()[:n])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, 9, 9, 4)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 4, 5)), jnp.float32)
    weights = np.float32(rng.normal(size=(rows, 5, 5, 5)))

    def loss(kernel, x):
        y = mixed.conv(x, kernel, (2, 2), "SAME", 1, None)
        return jnp.sum(y.astype(jnp.float32) * weights)  # dy is the same whatever y is

    spread = PartitionSpec("data") if rows % n == 0 else PartitionSpec()
    with ops.tracing_for("gpu"):
        one = jax.jit(jax.grad(loss))(kernel, x)
        many = jax.jit(jax.grad(loss))(
            jax.device_put(kernel, NamedSharding(devices, PartitionSpec())),
            jax.device_put(x, NamedSharding(devices, spread)),
        )
    assert one.dtype == many.dtype == jnp.float32
    # Each device's sum is rounded once to 8 bits.
    np.testing.assert_allclose(many, one, atol=2**-8 * float(jnp.max(jnp.abs(one))))
