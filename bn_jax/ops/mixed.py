"""Layers that compute in bfloat16, with float32 gradients of their parameters.

Flax casts a kernel to bfloat16 before the layer, so the kernel's gradient is in bfloat16, too: it
is rounded after the sum over a device's examples, and summed over devices in bfloat16. Here a layer
gets the float32 kernel, rounds it for the products with x, and sums the gradient in float32. If the
computation is as wide as the parameters (float32, float64), results equal Flax's bit for bit.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.sharding import PartitionSpec

from bn_jax.ops.forms import hand_tuned


def promote(*args: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """Casts (x, kernel, bias) as Flax's layers do, but does not narrow parameters to `dtype`.

    It is meant for a layer's `promote_dtype`. With a bias the layer's result is then wider than
    `dtype`.
    """
    x, kernel, bias = args
    if dtype is None or jnp.promote_types(kernel.dtype, dtype) == dtype:
        return promote_dtype(x, kernel, bias, dtype=dtype, inexact=inexact)
    return [x.astype(dtype), kernel, bias]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Any,
    padding: Any,
    groups: int,
    precision: Any,
) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [h, w, C/groups, features] in x's dtype.

    The kernel is rounded to x's dtype; the kernel's gradient has the kernel's own dtype.
    """
    return _convolve(x, kernel, strides, padding, groups, precision)


def _convolve(x, kernel, strides, padding, groups, precision):
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )


def _forward(x, kernel, *constants):
    y = _convolve(x, kernel, *constants)
    residuals = (x, kernel)
    return y, residuals


def _backward(strides, padding, groups, precision, residuals, dy):
    """Returns (dx, dkernel), each in the dtype of its value."""
    x, kernel = residuals
    constants = (strides, padding, groups, precision)

    def forward(x):
        return _convolve(x, kernel, *constants)

    transpose = jax.linear_transpose(forward, x)
    (dx,) = transpose(dy)

    if not hand_tuned("filter_gradient"):
        dkernel = _filter_gradient(x, dy, kernel, *constants, kernel.dtype)
        return dx, dkernel

    size = kernel.shape[:2]
    pointwise = size == (1, 1) and {*strides} == {1}
    if pointwise and groups == 1:
        # A product can have bfloat16 operands and a float32 result; cuDNN has no such convolution.
        channels = x.shape[-1]
        features = dy.shape[-1]
        rows = x.reshape(-1, channels)
        dy_rows = dy.reshape(-1, features)

        summed = ((0,), (0,))
        batched = ((), ())
        over_rows = (summed, batched)
        dkernel = lax.dot_general(
            rows,
            dy_rows,
            over_rows,
            precision=precision,
            preferred_element_type=kernel.dtype,
        )
        return dx, dkernel[None, None]

    # cuDNN sums in float32 and rounds the sum once to x's dtype. If a float32 result were asked for
    # instead, XLA would first write x and dy to memory in float32.
    def rounded(x, dy):
        dkernel = _filter_gradient(x, dy, kernel, *constants, x.dtype)
        return dkernel.astype(kernel.dtype)

    mesh = jax.typeof(x).sharding.mesh
    devices = jax.device_count() if mesh.empty else mesh.size

    # On one device, and inside shard_map, x and dy are those of this device.
    if devices == 1 or mesh.are_all_axes_manual:
        return dx, rounded(x, dy)

    # Without a mesh that is known, or if the batch cannot be split evenly, XLA splits the sum.
    if mesh.empty or len(x) % devices:
        dkernel = _filter_gradient(x, dy, kernel, *constants, kernel.dtype)
        return dx, dkernel

    # The sum over devices is in float32; XLA by itself would sum the rounded values.
    def of_all_devices(x, dy):
        return lax.psum(rounded(x, dy), mesh.axis_names)

    total = jax.shard_map(
        of_all_devices,
        mesh=mesh,
        in_specs=PartitionSpec(mesh.axis_names),
        out_specs=PartitionSpec(),
    )
    return dx, total(x, dy)


def _filter_gradient(x, dy, kernel, strides, padding, groups, precision, dtype):
    """Computes the kernel's gradient as the convolution of x and dy, with a result of `dtype`."""
    sizes = x.shape[1:3]
    windows = kernel.shape[:2]
    outputs = dy.shape[1:3]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(sizes, windows, strides, padding)

    edges = []
    for axis in range(2):
        before, _ = padding[axis]
        # So much padding at the end makes the result as large as the kernel; it may be negative.
        read = (outputs[axis] - 1) * strides[axis] + windows[axis]
        after = read - sizes[axis] - before
        edges.append((before, after))

    return lax.conv_general_dilated(
        x,
        dy,
        window_strides=(1, 1),
        padding=edges,
        rhs_dilation=strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        batch_group_count=groups,
        precision=precision,
        preferred_element_type=dtype,
    )


conv.defvjp(_forward, _backward)


def dot(
    x: jax.Array,
    kernel: jax.Array,
    dimension_numbers: Any,
    *,
    precision: Any = None,
) -> jax.Array:
    """Multiplies x [N, C] by kernel [C, features]; `flax.linen.Dense` calls it as `dot_general`.

    If the kernel's dtype differs from x's, it is rounded, and its gradient kept wide, as in `conv`.
    """
    if kernel.dtype == x.dtype:
        return lax.dot_general(x, kernel, dimension_numbers, precision=precision)

    # The rows become images of one pixel, [N, 1, 1, C].
    images = x[:, None, None]
    y = conv(
        images,
        kernel[None, None],
        (1, 1),  # strides
        "SAME",
        1,  # groups
        precision,
    )
    return y[:, 0, 0]


Conv = functools.partial(nn.Conv, promote_dtype=promote)  # with ops.conv for conv_general_dilated
Dense = functools.partial(nn.Dense, promote_dtype=promote, dot_general=dot)
