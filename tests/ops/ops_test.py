"""Hand-tuned operations equal the plain ones, values and gradients, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax import ops
from bn_jax.layers import BatchNorm, ConvBN
from bn_jax.models.inception import Block, Fig5Row, Inception
from bn_jax.models.initializers import Gaussian

CPU_FORMS = ["max_pool", "max_places", "conv_1x1", "kernel_gradient", "products"]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def both(function, *arguments):
    """Value and gradients with the hand-tuned form and with the plain one."""
    results = []
    for context in (None, ops.plain()):
        if context is None:
            assert all(map(ops.hand_tuned, CPU_FORMS))
            results.append(_run(function, arguments))
        else:
            with context:
                assert not any(map(ops.hand_tuned, ops.FORMS))
                results.append(_run(function, arguments))
    return results


def _run(function, arguments):
    out, pullback = jax.vjp(function, *arguments)
    return out, pullback(random(out.shape, 9).astype(out.dtype))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 3), (4, 7), (8, 8), (9, 6)])
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool(stride, size, ties):
    x = random((2, *size, 3))
    if ties:  # after a ReLU most windows hold several zeros, and whole windows of them
        x = jnp.maximum(jnp.round(x), 0)
    (y, (dx,)), (want, (want_dx,)) = both(lambda x: ops.max_pool(x, stride), x)
    np.testing.assert_array_equal(y, want)
    # Equal terms, added in another order: at most 9 of size 1.
    np.testing.assert_allclose(dx, want_dx, rtol=0, atol=1e-14)
    assert y.shape[1:3] == tuple(-(-n // stride) for n in size)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 3), (7, 7), (9, 6)])
@pytest.mark.parametrize("ties", [False, True])
def test_a_tpu_s_max_pool_of_stride_1(size, ties):
    x = random((2, *size, 3))
    if ties:
        x = jnp.maximum(jnp.round(x), 0)
    with ops.tracing_for("tpu"):
        y, (dx,) = _run(lambda x: ops.max_pool(x, 1), (x,))
        want, (want_dx,) = _run(lambda x: ops._plain_max_pool(x, 1), (x,))
    np.testing.assert_array_equal(y, want)
    # Equal terms, added in another order: at most 9 of size 1.
    np.testing.assert_allclose(dx, want_dx, rtol=0, atol=1e-14)


def test_max_pool_keeps_dtype_infinity_and_nan():
    x = jnp.asarray(np.full((1, 4, 4, 1), -np.inf), jnp.bfloat16).at[0, 1, 1, 0].set(jnp.nan)
    y = ops.max_pool(x, 2)
    assert y.dtype == jnp.bfloat16
    assert bool(jnp.isnan(y[0, 0, 0, 0]))
    assert float(y[0, 1, 1, 0]) == -np.inf


def test_max_pool_residual_is_a_byte_a_value():
    """What the backward pass keeps: the places, not the input."""
    x = jnp.ones((1, 8, 8, 4), jnp.float32)
    kept = jax.eval_shape(lambda x: jax.vjp(lambda x: ops.max_pool(x, 1), x)[1], x)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)]
    assert sum(sizes) == x.size


def temporary_bytes_of_two_pools() -> int:
    """Compiles a function of its own each time, or jax would remember the first."""
    x = jnp.ones((4, 28, 28, 16), jnp.float32)

    def loss(x):
        first = ops.max_pool(jnp.tanh(x), 2)
        return jnp.sum(ops.max_pool(jnp.tanh(first), 2) ** 2)

    program = jax.jit(jax.grad(loss)).lower(x).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jaxlib 0.10.2 drops the barrier")
def test_xla_keeps_the_places_and_not_the_input(monkeypatch):
    kept = temporary_bytes_of_two_pools()
    monkeypatch.setitem(ops.FORMS, "max_places", ())
    assert kept < 0.75 * temporary_bytes_of_two_pools()


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((1, 1, 6, 5), {}),  # becomes a product
        ((3, 3, 6, 5), {}),
        ((3, 2, 6, 5), {"padding": "VALID"}),
        ((3, 3, 6, 5), {"kernel_dilation": 2}),
        ((1, 1, 6, 5), {"strides": (2, 2)}),
        ((1, 1, 2, 6), {"feature_group_count": 3}),
    ],
)
def test_conv(kernel, options):
    """As flax.linen.Conv calls it. Sums of at most 54 terms of size 1, in another order."""
    x = random((2, 4, 5, 6))
    layer = nn.Conv(
        kernel[-1],
        kernel[:2],
        use_bias=False,
        conv_general_dilated=ops.conv,
        dtype=jnp.float64,
        **options,
    )
    params = {"params": {"kernel": random(kernel, 1)}}
    (y, grads), (want, want_grads) = both(layer.apply, params, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-13)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), grads, want_grads
    )


def test_products():
    x = random((2, 4, 5, 6))
    kernels = [random((1, 1, 6, n), n) for n in (3, 1, 5)]

    def merged(x, *kernels):
        return jnp.concatenate(ops.products(x, kernels), -1)

    def separate(x, *kernels):
        numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return jnp.concatenate([ops.conv(x, k, (1, 1), "SAME", **numbers) for k in kernels], -1)

    with ops.plain():
        want, want_grads = _run(separate, (x, *kernels))
    got, grads = _run(merged, (x, *kernels))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)  # sums of 6 terms of size 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), grads, want_grads
    )


ROWS = {
    "average": Fig5Row("x", 2, 3, 4, 5, 6, "avg", 7),
    "maximum": Fig5Row("x", 2, 3, 4, 5, 6, "max", 7),
    "stride": Fig5Row("x", 0, 3, 4, 5, 6, "max", 0, 2),
}
NORM = functools.partial(BatchNorm, dtype=jnp.float64, param_dtype=jnp.float64)


@pytest.mark.parametrize(
    ("row", "norm", "symmetric"),
    [("average", NORM, False), ("maximum", None, True), ("stride", None, False)],
)
def test_module_has_the_gradients_of_the_plain_one(row, norm, symmetric):
    conv = functools.partial(ConvBN, norm=norm, kernel_init=Gaussian(), dtype=jnp.float64)
    check_gradients(Block(ROWS[row], conv, 1.0, symmetric), random((4, 5, 6, 3)), limit=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "variant"), [(NORM, "paper"), (None, "caffe")])
def test_inception_has_the_gradients_of_the_plain_one(norm, variant):
    model = Inception(5, width=1 / 16, variant=variant, norm=norm, dtype=jnp.float64)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28, 3), dtype=np.uint8)
    check_gradients(model, images, limit=1e-9)  # the rounding of 69 layers


def check_gradients(model, x, limit):
    """Output, statistics and the gradient of every parameter, relative to the largest value."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=True))
    # numpy's numbers: a random generator is slow to compile
    variables = jax.tree.map(lambda leaf: random(leaf.shape) / max(leaf.size, 9) ** 0.5, shapes)

    def loss(params):
        y, updates = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(y * random(y.shape, 3)), (y, updates)

    step = jax.value_and_grad(loss, has_aux=True)
    got = jax.jit(step)(variables["params"])
    with ops.plain():
        # A function of its own: under the first one's name jit would find the first program.
        want = jax.jit(lambda params: step(params))(variables["params"])

    def compare(path, a, b):
        error = float(jnp.max(jnp.abs(a - b))) / (float(jnp.max(jnp.abs(b))) + 1e-12)
        assert error < limit, (jax.tree_util.keystr(path), error)

    jax.tree_util.tree_map_with_path(compare, got, want)


def test_only_the_1x1_of_stride_1_is_a_product():
    x, pointwise, wide = (jnp.ones(s) for s in ((1, 4, 4, 3), (1, 1, 3, 2), (3, 3, 3, 2)))
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def text(kernel, strides):
        return str(jax.make_jaxpr(lambda k: ops.conv(x, k, strides, "SAME", **numbers))(kernel))

    assert "dot_general" in text(pointwise, (1, 1))
    assert "conv_general_dilated" in text(pointwise, (2, 2))
    assert "conv_general_dilated" in text(wide, (1, 1))
    with ops.plain():
        assert "conv_general_dilated" in text(pointwise, (1, 1))


def gradient_of_a_pool(stride: int = 2) -> str:
    """The program, as text; a function of its own each time, or jax would remember the first."""
    x = jnp.ones((1, 4, 4, 3))
    return str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(ops.max_pool(x, stride))))(x))


def chosen() -> list[str]:
    return [form for form in ops.FORMS if ops.hand_tuned(form)]


@pytest.mark.parametrize(
    ("backend", "forms"),
    [
        ("tpu", ["stride_1_pool"]),
        ("gpu", ["max_pool", "products", "filter_gradient", "vectors"]),
    ],
)
def test_other_backends_have_other_forms(monkeypatch, backend, forms):
    assert chosen() == CPU_FORMS
    with ops.tracing_for(backend):
        assert chosen() == forms
        assert ("select_and_scatter_add" in gradient_of_a_pool()) == ("max_pool" not in forms)
        assert "select_and_scatter_add" not in gradient_of_a_pool(stride=1)
    with ops.plain(), ops.tracing_for(backend):
        assert chosen() == []
        assert "select_and_scatter_add" in gradient_of_a_pool()
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert chosen() == forms
