"""The convolution of the networks: `layers.ConvBN` on the operations of `ops`."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from bn_jax import ops
from bn_jax.layers import BatchNorm, ConvBN


class Conv(ConvBN):
    """`layers.ConvBN`, same parameters and taps, with a choice of what computes the convolution.

    convolve: takes the arguments of `lax.conv_general_dilated`, returns W u.
    """

    convolve: Callable[..., jax.Array] = ops.conv

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """[N, H, W, C] to [N, H', W', features]; mask: bool [N]."""
        x = nn.Conv(
            self.features,
            self.kernel_size,
            self.strides,
            padding=self.padding,
            feature_group_count=self.feature_group_count,
            use_bias=self.norm is None,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            conv_general_dilated=self.convolve,
            name="conv",
        )(x)
        watched = self.is_mutable_collection("activations") and not self.is_initializing()
        if self.norm is not None:
            if watched:
                self.sow("activations", "pre_bn", x)
            norm = self.norm(name="bn")
            options: dict[str, Any] = {"use_running_average": not train, "mask": mask}
            if isinstance(norm, BatchNorm) and self.activation is nn.relu and not watched:
                return norm(x, **options, relu=True)  # one operation, which keeps less
            x = norm(x, **options)
        if watched:
            self.sow("activations", "input", x)
        return self.activation(x)
