"""A convolution whose kernel gradient XLA for CPUs gives to Eigen, and not to YNNPACK.

The gradient of a kernel is itself a convolution: of the image, with the examples as features and dy
as the kernel. jaxlib 0.10 has YNNPACK do convolutions, which is fast at forward passes and at the
gradients of inputs, but up to 7 times slower than Eigen at kernels as large as a map
(docs/performance.md). It takes no kernel taller than its image, so rows of zeros are put below dy.
The sums are the same ones. Another XLA that decides otherwise has a few zeros more to add.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NUMBERS = ("NHWC", "HWIO", "NHWC")
WASTE = 1.5  # a kernel that grows by more when filled up to whole strides is left to XLA

# Products in a gradient. With 3e6, as in the digits network, it takes up to 1.4 times as long.
LEAST = 1e7


class Axis(NamedTuple):
    """Height or width, in blocks of `stride` pixels.

    taps: of the kernel. blocks: of the image. ahead: blocks of zeros before these. edges: pixels to
    add at both ends (negative: to leave out) so that the image is whole blocks. out: of the result.
    """

    stride: int
    taps: int
    blocks: int
    ahead: int
    edges: tuple[int, int]
    out: int


def _axes(shape, kernel_shape, strides, padding) -> list[Axis]:
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(shape[1:3], kernel_shape[:2], strides, padding)
    axes = []
    for n, k, stride, (low, high) in zip(
        shape[1:3], kernel_shape[:2], strides, padding, strict=True
    ):
        out = (n + low + high - k) // stride + 1
        taps = -(-k // stride)
        ahead, first = divmod(low, stride)
        blocks = min(-(-(first + n) // stride), out + taps - 1 - ahead)
        edges = (first, blocks * stride - first - n)
        axes.append(Axis(stride, taps, blocks, ahead, edges, out))
    return axes


def pays(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> bool:
    """Whether `conv` takes these (x [N, H, W, C], kernel [h, w, C, features]) and gains by it.

    Not where dy, with its zeros, is larger than the image: XLA then exchanges the two, into a form
    for which it has no library at all.
    """
    if x.dtype not in (jnp.float32, jnp.float64) or x.ndim != 4:
        return False
    rows, columns = _axes(x.shape, kernel.shape, strides, padding)
    if x.shape[0] * rows.out * columns.out * kernel.size < LEAST:
        return False
    filled = rows.taps * rows.stride * columns.taps * columns.stride
    image = rows.blocks * (columns.out + columns.taps - 1)
    return filled < WASTE * kernel.shape[0] * kernel.shape[1] and _tall(rows) * columns.out <= image


def _tall(rows: Axis) -> int:
    """Height of dy with the zeros below it."""
    return max(rows.out, rows.blocks + 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, precision: Any) -> jax.Array:
    """The convolution of x [N, H, W, C] with kernel [h, w, C, features]."""
    return _convolve(x, kernel, strides, padding, precision)


def _convolve(x, kernel, strides, padding, precision):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=NUMBERS, precision=precision
    )


def _forward(x, kernel, *constants):
    return _convolve(x, kernel, *constants), (x, kernel)


def _backward(strides, padding, precision, residuals, dy):
    """dkernel[i, j]: the sum over examples and places of x, i and j further on, times dy.

    The pixels of a block become channels, and the kernel is filled up with zeros to whole blocks:
    what remains is the gradient of a convolution of stride 1.
    """
    x, kernel = residuals
    (dx,) = jax.linear_transpose(lambda x: _convolve(x, kernel, strides, padding, precision), x)(dy)
    rows, columns = _axes(x.shape, kernel.shape, strides, padding)
    examples = x.shape[0]
    channels = kernel.shape[2]
    features = kernel.shape[3]
    zero = jnp.zeros((), x.dtype)
    none = (0, 0, 0)

    x = lax.pad(x, zero, [none, (*rows.edges, 0), (*columns.edges, 0), none])
    x = x.reshape(examples, rows.blocks, rows.stride, columns.blocks, columns.stride, channels)
    x = x.transpose(2, 4, 5, 1, 3, 0).reshape(-1, rows.blocks, columns.blocks, examples)
    right = columns.out + columns.taps - 1 - columns.ahead - columns.blocks
    x = lax.pad(x, zero, [none, none, (columns.ahead, right, 0), none])
    dy = lax.pad(dy, zero, [none, (0, _tall(rows) - rows.out, 0), none, none])
    # Without the barrier XLA takes the columns of zeros into the convolution's own padding, and
    # then dy is the larger of the two (see `pays`).
    x, dy = lax.optimization_barrier((x, dy.transpose(1, 2, 0, 3)))
    below = rows.taps - 1 + _tall(rows) - rows.ahead - rows.blocks
    edges = [(rows.ahead, below), (0, 0)]
    dkernel = _convolve(x, dy, (1, 1), edges, precision)
    dkernel = dkernel.reshape(rows.stride, columns.stride, channels, rows.taps, columns.taps, -1)
    dkernel = dkernel.transpose(3, 0, 4, 1, 2, 5)
    dkernel = dkernel.reshape(
        rows.taps * rows.stride, columns.taps * columns.stride, channels, features
    )
    return dx, dkernel[: kernel.shape[0], : kernel.shape[1]]


conv.defvjp(_forward, _backward)
