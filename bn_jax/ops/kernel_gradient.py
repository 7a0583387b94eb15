"""A convolution whose kernel gradient is computed on CPU by Eigen instead of YNNPACK.

The gradient of a kernel is itself a convolution, whose image is x, with the examples as its
channels, and whose kernel is dy. jaxlib gives convolutions to YNNPACK from 0.10 on. It is fast at
forward passes and at the gradients of inputs, but up to 7 times slower than Eigen if the kernel is
as large as the map (docs/performance.md). XLA does not use YNNPACK for a kernel that is taller than
its image, so rows of zeros are added below dy. They do not change the sums. If another version of
XLA decides by another rule, the result is still right, and the zeros only cost a little time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NUMBERS = ("NHWC", "HWIO", "NHWC")

# A kernel is padded to a multiple of the stride. If that makes it larger by more than this factor,
# XLA's own gradient is used.
WASTE = 1.5

# If a gradient has fewer multiplications than this, XLA's own is used. At 3e6, as in the digits
# network, Eigen takes up to 1.4 times as long.
LEAST = 1e7


class Axis(NamedTuple):
    """The height or width of a convolution, in blocks of `stride` pixels.

    Attributes:
      stride: pixels in a block.
      kernel: blocks that the kernel covers.
      blocks: blocks of the image.
      ahead: blocks of zeros before those of the image.
      edges: pixels to add at both ends, so that the image has whole blocks (if negative: to crop).
      out: positions in the result.
    """

    stride: int
    kernel: int
    blocks: int
    ahead: int
    edges: tuple[int, int]
    out: int

    @property
    def filled(self) -> int:
        """The pixels of the kernel, padded to whole blocks."""
        return self.kernel * self.stride

    @property
    def reach(self) -> int:
        """The number of blocks that the kernel passes over."""
        return self.out + self.kernel - 1


def _axes(shape, kernel_shape, strides, padding) -> list[Axis]:
    """Describes the two axes of a convolution of an image [N, H, W, C]."""
    sizes = shape[1:3]
    windows = kernel_shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(sizes, windows, strides, padding)

    axes = []
    for size, window, stride, edges in zip(sizes, windows, strides, padding, strict=True):
        low, high = edges
        padded = low + size + high
        out = (padded - window) // stride + 1
        kernel = -(-window // stride)  # rounded up

        # Whole blocks of padding come first, and what remains is added to the image.
        ahead, first = divmod(low, stride)

        # Blocks behind the last position of the kernel are not read.
        present = -(-(first + size) // stride)  # rounded up
        read = out + kernel - 1 - ahead
        blocks = min(present, read)
        last = blocks * stride - first - size

        axis = Axis(
            stride=stride,
            kernel=kernel,
            blocks=blocks,
            ahead=ahead,
            edges=(first, last),
            out=out,
        )
        axes.append(axis)
    return axes


def _tall(rows: Axis) -> int:
    """Returns the height of dy with the zeros below it."""
    return max(rows.out, rows.blocks + 1)


def pays(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> bool:
    """Whether `conv` accepts x [N, H, W, C] and kernel [h, w, C, features], and is faster on them.

    It is slower if dy, with its zeros, is larger than the image: XLA then exchanges the two, and
    uses no library for the result.
    """
    if x.ndim != 4:
        return False
    if x.dtype not in (jnp.float32, jnp.float64):
        return False

    rows, columns = _axes(x.shape, kernel.shape, strides, padding)

    examples = x.shape[0]
    products = examples * rows.out * columns.out * kernel.size
    if products < LEAST:
        return False

    height, width = kernel.shape[:2]
    filled = rows.filled * columns.filled
    if filled >= WASTE * height * width:
        return False

    gradient = _tall(rows) * columns.out
    image = rows.blocks * columns.reach
    return gradient <= image


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Any,
    padding: Any,
    precision: Any,
) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [h, w, C, features]: returns [N, H', W', features]."""
    return _convolve(x, kernel, strides, padding, precision)


def _convolve(x, kernel, strides, padding, precision):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=NUMBERS,
        precision=precision,
    )


def _forward(x, kernel, *constants):
    y = _convolve(x, kernel, *constants)
    residuals = (x, kernel)
    return y, residuals


def _backward(strides, padding, precision, residuals, dy):
    """Returns (dx, dkernel).

    dkernel[i, j] is the sum over examples and positions of dy times the x that lies i and j pixels
    further. Here the pixels of a block become channels, and the kernel is padded with zeros to
    whole blocks, so that only the gradient of a convolution of stride 1 is needed.
    """
    x, kernel = residuals

    def forward(x):
        return _convolve(x, kernel, strides, padding, precision)

    transpose = jax.linear_transpose(forward, x)
    (dx,) = transpose(dy)

    rows, columns = _axes(x.shape, kernel.shape, strides, padding)
    image = _image(x, rows, columns)
    gradient = _gradient(dy, rows)

    # Without the barrier XLA makes the columns of zeros the convolution's own padding. The image is
    # then smaller than dy, and XLA exchanges the two (see `pays`).
    image, gradient = lax.optimization_barrier((image, gradient))

    # With zeros above and below the image the result has `rows.kernel` rows. `_image` has already
    # added the zeros at its sides.
    padded = rows.kernel - 1 + _tall(rows)
    below = padded - rows.ahead - rows.blocks
    blocks = _convolve(
        image,
        gradient,
        strides=(1, 1),
        padding=[(rows.ahead, below), (0, 0)],
        precision=precision,
    )
    dkernel = _kernel(blocks, kernel.shape, rows, columns)
    return dx, dkernel


def _image(x, rows: Axis, columns: Axis):
    """Makes x the image of the gradient's convolution: [stride * stride * C, blocks, blocks, N]."""
    examples, _, _, channels = x.shape
    zero = jnp.zeros((), x.dtype)

    # The image is padded or cropped to whole blocks. `lax.pad` takes (before, after, between).
    none = (0, 0, 0)
    height = (*rows.edges, 0)
    width = (*columns.edges, 0)
    x = lax.pad(x, zero, [none, height, width, none])

    # Each axis is split into blocks and the pixels of a block; these become channels.
    x = x.reshape(
        examples,
        rows.blocks,
        rows.stride,
        columns.blocks,
        columns.stride,
        channels,
    )
    x = x.transpose(2, 4, 5, 1, 3, 0)
    x = x.reshape(-1, rows.blocks, columns.blocks, examples)

    right = columns.reach - columns.ahead - columns.blocks
    sides = (columns.ahead, right, 0)
    return lax.pad(x, zero, [none, none, sides, none])


def _gradient(dy, rows: Axis):
    """Makes dy the kernel of the gradient's convolution, zeros below it: [h, w, N, features]."""
    zero = jnp.zeros((), dy.dtype)
    none = (0, 0, 0)
    below = _tall(rows) - rows.out
    height = (0, below, 0)
    dy = lax.pad(dy, zero, [none, height, none, none])
    return dy.transpose(1, 2, 0, 3)


def _kernel(blocks, shape, rows: Axis, columns: Axis):
    """Reorders the convolution's result by blocks to the kernel's gradient [h, w, C, features]."""
    height, width, channels, features = shape
    blocks = blocks.reshape(
        rows.stride,
        columns.stride,
        channels,
        rows.kernel,
        columns.kernel,
        features,
    )
    blocks = blocks.transpose(3, 0, 4, 1, 2, 5)
    filled = blocks.reshape(
        rows.filled,
        columns.filled,
        channels,
        features,
    )

    # The zeros that filled up the kernel to whole blocks are cut off.
    return filled[:height, :width]


conv.defvjp(_forward, _backward)
