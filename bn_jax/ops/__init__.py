"""Hand-tuned forms of a few operations: exact, each kept because it is faster somewhere.

    form             plain                              hand-tuned                          runs on
    max_pool         reduce_window, select-and-scatter  keeps the maxima's places as uint8  CPU, GPU
    conv_1x1         convolution                        matrix product (stride 1)           CPU
    kernel_gradient  gradient by YNNPACK                by Eigen (kernel_gradient.py)       CPU
    products         one convolution each               one product (models/inception.py)   CPU, GPU
                     average pool, then projection      projection, then average pool
    filter_gradient  convolution, float32 result        product, or rounded once (mixed.py) GPU
    vectors          a sum of squares for each array    one for forty arrays (vectors.py)   GPU

`FORMS` (forms.py) is the one place that says which form runs on which backend; on a TPU all are
plain. On GPUs max pooling is ours because XLA's gradient adds with atomics, in an order that
changes from run to run, and where it must not, it sorts millions of keys. Filter gradients are ours
because cuDNN has no convolution of bfloat16 operands with a float32 result, so that XLA writes both
operands to memory in float32. Of BN-x30 in bfloat16, batch 256, compiled for an H100, max pooling
moves 30 MB an image less, filter gradients and products together another 63. Nothing was measured
on a GPU or a TPU.

`python -m benchmarks.step` times the forms, with BN, beside plain Flax; results/bench/ has the
figures. Tried and left out, because no gain was seen: the input gradient of a 3x3 as a convolution
with the flipped kernel (it is that in XLA). Weight gradients as shifted products gain too, but less
than Eigen's convolutions, and take more memory.

Parameters do not depend on the form. The choice is made while tracing, from the default backend.
`with plain():` forces the plain forms, for comparisons. `with tracing_for("gpu"):` chooses the
forms of another backend, for a program that is compiled for it here.
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
    """`lax.conv_general_dilated` for x [N, H, W, C] and kernel [h, w, C/groups, features].

    Takes its arguments as `flax.linen.Conv` gives them (`conv_general_dilated=ops.conv`). A 1x1
    convolution of stride 1 becomes a product [N*H*W, C] x [C, features]: XLA's CPU convolution
    computes the weight gradient of such a layer more slowly than the product. Larger kernels get
    the gradient of `kernel_gradient.conv`. A kernel that is wider than x is left to `mixed.conv`.
    """
    if kernel.dtype != x.dtype:
        return mixed.conv(x, kernel, strides, padding, feature_group_count, precision)
    dilations = {*(lhs_dilation or (1,)), *(options.get("rhs_dilation") or (1,))}
    simple = feature_group_count == 1 and dilations == {1}
    pointwise = simple and kernel.shape[:-2] == (1, 1) and {*strides} == {1}
    if pointwise and hand_tuned("conv_1x1"):
        y = lax.dot_general(
            x.reshape(-1, x.shape[-1]),
            kernel[0, 0],
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
        return y.reshape(*x.shape[:3], -1)
    simple = simple and preferred_element_type is None and hand_tuned("kernel_gradient")
    if simple and kernel_gradient.pays(x, kernel, strides, padding):
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


def products(x: jax.Array, kernels: Sequence[jax.Array], precision: Any = None) -> list[jax.Array]:
    """1x1 convolutions of one x [N, H, W, C] with kernels [1, 1, C, features], as one product."""
    merged = jnp.concatenate(kernels, axis=-1)
    merged = merged.astype(jnp.promote_types(merged.dtype, x.dtype))
    numbers = ("NHWC", "HWIO", "NHWC")
    y = conv(x, merged, (1, 1), "SAME", dimension_numbers=numbers, precision=precision)
    ends = itertools.accumulate(kernel.shape[-1] for kernel in kernels)
    return jnp.split(y, list(ends)[:-1], axis=-1)


def max_pool(x: jax.Array, stride: int) -> jax.Array:
    """3x3 max pooling of x [N, H, W, C], padded as SAME: [N, ceil(H/stride), ceil(W/stride), C].

    Of equal values the first of a window, row by row, takes the gradient, as in XLA's.
    """
    if hand_tuned("max_pool"):
        return _max_pool(x, stride)
    return nn.max_pool(x, (3, 3), (stride, stride), "SAME")


def max_pool_unpadded(x: jax.Array) -> jax.Array:
    """3x3 max pooling of stride 2 as Caffe has it: [N, H, W, C] to [N, floor(H/2), floor(W/2), C].

    Windows start at the first pixel, and the last one may reach past the edge (torch's ceil_mode).
    That is SAME where H and W are even; where they are odd, SAME pads before the first pixel too.
    """
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        edges = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
        x = jnp.pad(x, edges, constant_values=-jnp.inf)
    return max_pool(x, 2)[:, : height // 2, : width // 2]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, stride: int) -> jax.Array:
    return _max_and_place(x, stride)[0]


def _max_pool_forward(x: jax.Array, stride: int):
    y, place = _max_and_place(x, stride)
    return y, (place, x.shape)


def _max_pool_backward(stride: int, residuals, dy: jax.Array):
    """Each dy goes to its place, as a sum over the windows that a value of x lies in.

    A value lies in window o as its value k, o = (position + low - k) / stride: which k divide
    depends on the position modulo the stride only. Those stride x stride classes of positions are
    computed apart, in arrays of y's size, and interleaved. (Nine dilated copies of x's size, as
    written at first, are one loop when compiled alone, but nine arrays in a whole network.)
    """
    place, shape = residuals
    low = [_padding(n, stride)[0] for n in shape[1:3]]
    cells = [-(-n // stride) for n in shape[1:3]]

    def sent(i: int, j: int, position: tuple[int, int]) -> jax.Array:
        """What value (i, j) of its windows sends to the class of positions."""
        edges = [(0, 0, 0)]
        for k, at, start in zip((i, j), position, low, strict=True):
            shift = (at + start - k) // stride
            edges.append((-shift, shift, 0))
        part = jnp.where(place == 3 * i + j, dy, 0)
        return lax.pad(part, jnp.zeros((), dy.dtype), [*edges, (0, 0, 0)])

    def received(row: int, column: int) -> jax.Array:
        rows, columns = (
            [k for k in range(3) if (at + start - k) % stride == 0]
            for at, start in zip((row, column), low, strict=True)
        )
        parts = [sent(i, j, (row, column)) for i in rows for j in columns]
        return functools.reduce(jnp.add, parts)

    if stride == 1:
        return (received(0, 0),)
    lines = [jnp.stack([received(i, j) for j in range(stride)], 3) for i in range(stride)]
    dx = jnp.stack(lines, 2).reshape(shape[0], *(stride * n for n in cells), shape[3])
    return (dx[:, : shape[1], : shape[2]],)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _max_and_place(x: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
    """The maxima and, as uint8, which of the 9 values of the window each of them is."""
    edges = [_padding(n, stride) for n in x.shape[1:3]]
    padded = jnp.pad(x, ((0, 0), *edges, (0, 0)), constant_values=-jnp.inf)
    height, width = (-(-n // stride) for n in x.shape[1:3])
    best = place = None
    for k in range(9):
        i, j = divmod(k, 3)
        stop = (x.shape[0], i + stride * (height - 1) + 1, j + stride * (width - 1) + 1, x.shape[3])
        value = lax.slice(padded, (0, i, j, 0), stop, (1, stride, stride, 1))
        if best is None or place is None:
            best = value
            place = jnp.zeros(value.shape, jnp.uint8)
        else:
            place = jnp.where(value > best, jnp.uint8(k), place)
            best = jnp.maximum(value, best)
    assert best is not None and place is not None
    return best, place


def _padding(size: int, stride: int) -> tuple[int, int]:
    """SAME padding of a window of 3, before and after."""
    total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
    return total // 2, total - total // 2
