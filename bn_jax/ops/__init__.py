"""Hand-tuned forms of a few operations, which compute the same and are faster somewhere.

    form             plain                              hand-tuned                          runs on
    max_pool         reduce_window, select-and-scatter  keeps maxima's positions as uint8   CPU, GPU
    stride_1_pool    the same, for a stride of 1        finds the positions backward        TPU
    max_places       computed again from x              kept, behind a barrier              CPU
    conv_1x1         convolution                        matrix product (stride 1)           CPU
    kernel_gradient  gradient by YNNPACK                by Eigen (kernel_gradient.py)       CPU
    products         one convolution each               one product (models/inception.py)   CPU, GPU
                     average pool, then projection      projection, then average pool
    filter_gradient  convolution, float32 result        product, or rounded once (mixed.py) GPU
    vectors          a sum of squares for each array    one for forty arrays (vectors.py)   GPU

`FORMS` (forms.py) is the only place that says which form runs on which backend. On TPUs only a max
pool of stride 1 is ours, because the compilers of v6e and TPU7x (libtpu 0.0.50.1) end with an error
of their own at XLA's gradient of it in bfloat16.

On GPUs max pooling is ours because XLA's gradient adds with atomics, in an order that changes from
run to run, and if it must be deterministic, XLA sorts millions of keys instead. Filter gradients
are ours because cuDNN has no convolution of bfloat16 operands with a float32 result, so that XLA
writes both operands to memory in float32. In BN-x30 compiled for an H100 (bfloat16, batch 256), max
pooling moves 30 MB less for each image, and filter gradients and products together another 63 MB.
These bytes are counted in compiled programs; docs/performance.md says what was measured on a GPU.

`python -m benchmarks.step` compares the time of the forms, and of BN, with plain Flax;
results/bench/ has the figures. Two other forms were tried. The input gradient of a 3x3 convolution
as a convolution with the flipped kernel gained nothing, because XLA does the same. Weight gradients
as shifted products are faster than XLA's, but slower than Eigen's and need more memory.

Parameters do not depend on the form. The choice is made while tracing, from the default backend.
`with plain():` forces the plain forms, for comparisons. `with tracing_for("gpu"):` chooses the
forms of another backend, to compile a program for it on this machine.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from bn_jax.ops import kernel_gradient, mixed
from bn_jax.ops.forms import FORMS, backend, hand_tuned, plain, tracing_for

__all__ = [
    "FORMS",
    "backend",
    "conv",
    "hand_tuned",
    "max_pool",
    "max_pool_unpadded",
    "plain",
    "products",
    "tracing_for",
]


# `lax.dot_general` takes the axes of both operands that are summed over, and those of a batch. Axis
# 1 of rows [M, C] and axis 0 of a matrix [C, features] are summed over here.
_SUMMED = ((1,), (0,))
_BATCHED = ((), ())
_ROWS_TIMES_MATRIX = (_SUMMED, _BATCHED)


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Any,
    padding: Any,
    *,
    lhs_dilation: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [h, w, C/groups, features].

    It stands in for `lax.conv_general_dilated` and takes the arguments that `flax.linen.Conv` gives
    it (`conv_general_dilated=ops.conv`). On CPU a 1x1 convolution of stride 1 becomes a product
    [N*H*W, C] x [C, features], because XLA computes the weight gradient of the convolution more
    slowly. Larger kernels get the gradient of `kernel_gradient.conv`. If the kernel's dtype differs
    from x's, `mixed.conv` is used.
    """
    if kernel.dtype != x.dtype:
        return mixed.conv(
            x,
            kernel,
            strides,
            padding,
            feature_group_count,
            precision,
        )

    of_image = lhs_dilation or (1,)
    of_kernel = options.get("rhs_dilation") or (1,)
    dilated = {*of_image, *of_kernel} != {1}
    simple = feature_group_count == 1 and not dilated

    size = kernel.shape[:-2]
    pointwise = size == (1, 1) and {*strides} == {1}
    if simple and pointwise and hand_tuned("conv_1x1"):
        channels = x.shape[-1]
        rows = x.reshape(-1, channels)
        matrix = kernel[0, 0]
        y = lax.dot_general(
            rows,
            matrix,
            _ROWS_TIMES_MATRIX,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
        return y.reshape(*x.shape[:3], -1)

    usable = simple and preferred_element_type is None
    tuned = usable and hand_tuned("kernel_gradient")
    if tuned and kernel_gradient.pays(x, kernel, strides, padding):
        return kernel_gradient.conv(x, kernel, strides, padding, precision)

    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        lhs_dilation=lhs_dilation,
        feature_group_count=feature_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **options,
    )


def products(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    precision: Any = None,
) -> list[jax.Array]:
    """Convolves x [N, H, W, C] with several kernels [1, 1, C, features], in one product."""
    merged = jnp.concatenate(kernels, axis=-1)
    dtype = jnp.promote_types(merged.dtype, x.dtype)
    y = conv(
        x,
        merged.astype(dtype),
        strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )

    # The result is split where the features of one kernel end and those of the next begin.
    features = [kernel.shape[-1] for kernel in kernels]
    ends = list(itertools.accumulate(features))
    return jnp.split(y, ends[:-1], axis=-1)


def max_pool(x: jax.Array, stride: int) -> jax.Array:
    """Pools the maxima of 3x3 windows of x [N, H, W, C], padded as SAME.

    Returns [N, ceil(H/stride), ceil(W/stride), C]. If values of a window are equal, the first of
    them, row by row, receives the gradient, as in XLA.
    """
    if hand_tuned("max_pool"):
        return _max_pool(x, stride)
    if stride == 1 and hand_tuned("stride_1_pool"):
        return _stride_1_pool(x)
    return _plain_max_pool(x, stride)


def _plain_max_pool(x: jax.Array, stride: int) -> jax.Array:
    return nn.max_pool(
        x,
        window_shape=(3, 3),
        strides=(stride, stride),
        padding="SAME",
    )


def max_pool_unpadded(x: jax.Array) -> jax.Array:
    """Pools the maxima of 3x3 windows with stride 2 as Caffe does.

    x: [N, H, W, C]. Returns [N, floor(H/2), floor(W/2), C]. Windows start at the first pixel, and
    the last one may reach past the edge (torch's ceil_mode). For even H and W this equals SAME; for
    odd ones SAME also pads before the first pixel.
    """
    height, width = x.shape[1:3]
    odd_row = height % 2
    odd_column = width % 2

    # SAME pads an even size only behind the last pixel, so odd sizes are made even.
    if odd_row or odd_column:
        none = (0, 0)
        edges = (none, (0, odd_row), (0, odd_column), none)
        x = jnp.pad(x, edges, constant_values=-jnp.inf)

    y = max_pool(x, 2)
    return y[:, : height // 2, : width // 2]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, stride: int) -> jax.Array:
    y, _ = _max_and_place(x, stride)
    return y


def _max_pool_forward(x: jax.Array, stride: int):
    y, place = _max_and_place(x, stride)
    if hand_tuned("max_places"):
        # Without the barrier XLA for CPUs keeps the padded x, four bytes a value, in place of the
        # positions, and computes the positions again for every class of the backward pass. (So
        # does jaxlib 0.10.2 in any case: it drops the barrier before it fuses operations.)
        y, place = lax.optimization_barrier((y, place))
    return y, (place, x.shape)


def _max_pool_backward(stride: int, residuals, dy: jax.Array):
    """Sends each dy to the position of its maximum: dx is a sum over the windows of a value of x.

    Along one axis, the value at `position` is value k of window o = (position + low - k) / stride.
    Whether this is a whole number depends only on k and the position modulo the stride. So the
    stride x stride classes of positions are computed separately, in arrays of y's size, and then
    interleaved. (Nine dilated copies of x's size would also do. XLA compiles them to one loop when
    they stand alone, but to nine arrays in a whole network.)
    """
    place, shape = residuals
    examples, height, width, channels = shape
    rows, columns = _padding(height, width, stride)
    rows_before, _ = rows
    columns_before, _ = columns

    def sent(i: int, j: int, row: int, column: int) -> jax.Array:
        """Returns what this class of positions receives as value (i, j) of its windows."""
        is_maximum = place == 3 * i + j
        part = jnp.where(is_maximum, dy, 0)

        # The windows lie `down` rows and `right` columns further than this class of positions.
        down = (row + rows_before - i) // stride
        right = (column + columns_before - j) // stride
        none = (0, 0, 0)
        edges = [none, (-down, down, 0), (-right, right, 0), none]
        return lax.pad(part, jnp.zeros((), dy.dtype), edges)

    def received(row: int, column: int) -> jax.Array:
        """Sums the gradients of the class of positions that begins at (row, column)."""
        parts = []
        for i in range(3):
            if (row + rows_before - i) % stride != 0:
                continue
            for j in range(3):
                if (column + columns_before - j) % stride != 0:
                    continue
                parts.append(sent(i, j, row, column))
        return functools.reduce(jnp.add, parts)

    if stride == 1:
        return (received(0, 0),)

    # The classes are interleaved: first columns, then rows.
    lines = []
    for row in range(stride):
        classes = [received(row, column) for column in range(stride)]
        lines.append(jnp.stack(classes, axis=3))
    dx = jnp.stack(lines, axis=2)

    # There may be more rows and columns than x has, as every class has y's size.
    dx = dx.reshape(
        examples,
        stride * place.shape[1],
        stride * place.shape[2],
        channels,
    )
    return (dx[:, :height, :width],)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@jax.custom_vjp
def _stride_1_pool(x: jax.Array) -> jax.Array:
    """Pools with XLA's own operation; only the gradient is that of `_max_pool`.

    The positions are found in the backward pass and in float32, because TPU7x's compiler ends with
    an error where maxima in bfloat16 and positions come out of one loop.
    """
    return _plain_max_pool(x, 1)


def _stride_1_pool_forward(x: jax.Array):
    return _plain_max_pool(x, 1), x


def _stride_1_pool_backward(x: jax.Array, dy: jax.Array):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    _, place = _max_and_place(wide, 1)
    return _max_pool_backward(1, (place, x.shape), dy)


_stride_1_pool.defvjp(_stride_1_pool_forward, _stride_1_pool_backward)


def _max_and_place(x: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
    """Returns the maxima and, as uint8, which of the window's 9 values each of them is."""
    _, height, width, _ = x.shape
    rows, columns = _padding(height, width, stride)
    none = (0, 0)
    padded = jnp.pad(x, (none, rows, columns, none), constant_values=-jnp.inf)
    examples, padded_height, padded_width, channels = padded.shape

    def value(k: int) -> jax.Array:
        """Returns value k of all windows."""
        i, j = divmod(k, 3)
        below = 2 - i  # rows of a window after this one
        behind = 2 - j
        return lax.slice(
            padded,
            start_indices=(0, i, j, 0),
            limit_indices=(examples, padded_height - below, padded_width - behind, channels),
            strides=(1, stride, stride, 1),
        )

    best = value(0)
    place = jnp.zeros(best.shape, jnp.uint8)
    for k in range(1, 9):
        found = value(k)
        # A value that equals the best so far does not replace it: the first of them counts.
        place = jnp.where(found > best, jnp.uint8(k), place)
        best = jnp.maximum(found, best)
    return best, place


def _padding(height: int, width: int, stride: int) -> list[tuple[int, int]]:
    """Returns the SAME padding of 3x3 windows, before and after: that of rows and of columns."""
    return lax.padtype_to_pads((height, width), (3, 3), (stride, stride), "SAME")
