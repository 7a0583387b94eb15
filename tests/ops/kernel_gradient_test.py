"""Kernel gradients by another convolution equal XLA's, in float64, and reach a library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import ops
from bn_jax.ops import kernel_gradient
from tests.ops.ops_test import float64, random  # noqa: F401 (a fixture of every test)


def _run(function, arguments):
    out, pullback = jax.vjp(function, *arguments)
    return out, pullback(random(out.shape, 9))


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "padding"),
    [
        ((9, 7), (3, 3), (1, 1), "SAME"),
        ((1, 1), (3, 3), (1, 1), "SAME"),
        ((8, 9), (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((8, 8), (7, 7), (2, 2), ((3, 3), (3, 3))),
        ((5, 12), (7, 7), (2, 2), "SAME"),
        ((9, 7), (3, 2), (1, 3), ((0, 2), (1, 0))),
        ((9, 8), (1, 1), (2, 2), "VALID"),  # leaves pixels out
    ],
)
def test_kernel_gradient(size, kernel, strides, padding):
    """Right for any sizes and strides, also where it is not used."""
    x, kernel = random((2, *size, 3)), random((*kernel, 3, 4), 1)

    def plain(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)

    def ours(x, kernel):
        return kernel_gradient.conv(x, kernel, strides, padding, None)

    want, want_grads = jax.jit(lambda *args: _run(plain, args))(x, kernel)
    got, grads = jax.jit(lambda *args: _run(ours, args))(x, kernel)
    np.testing.assert_array_equal(got, want)
    # Sums of at most 2 * 9 * 7 terms of size 1, in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), grads, want_grads
    )


@pytest.mark.parametrize(
    ("size", "channels", "kernel", "stride"),
    [(7, 32, 3, 1), (2, 8, 3, 1), (56, 3, 7, 2)],
)
def test_kernel_gradient_is_left_to_a_library(size, channels, kernel, stride):
    """XLA has but a naive loop, 50 times slower, for the reversed windows of exchanged operands."""
    shapes = [(4, size, size, channels), (kernel, kernel, channels, 32)]
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    strides, padding = (stride, stride), ((kernel // 2,) * 2,) * 2

    def total(w, x):
        return jnp.sum(kernel_gradient.conv(x, w, strides, padding, None))

    text = jax.jit(jax.grad(total)).lower(w, x).compile().as_text()
    assert text.count(" convolution(") == 1  # the gradient's alone
    assert "rhs_reversal" not in text


@pytest.mark.parametrize(
    ("size", "strides", "options", "used"),
    [
        (28, (1, 1), {}, True),
        (7, (1, 1), {}, False),  # small
        (28, (2, 2), {}, False),  # 4x4 in blocks of 2
        (28, (1, 1), {"rhs_dilation": (2, 2)}, False),
    ],
)
def test_which_kernels_have_a_gradient_of_their_own(size, strides, options, used):
    x, kernel = (jnp.ones(s, jnp.float32) for s in ((4, size, size, 16), (3, 3, 16, 64)))
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}

    def text():
        return str(jax.make_jaxpr(lambda k: ops.conv(x, k, strides, "SAME", **numbers))(kernel))

    assert ("custom_vjp" in text()) == used
    with ops.plain():
        assert "custom_vjp" not in text()
