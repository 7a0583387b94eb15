"""The network of section 4.1: fully connected sigmoid layers on binary images."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bn_jax import mixed
from bn_jax.models.init import Gaussian, PooledInit


class DenseBN(nn.Module):
    """g(BN(W u)) or, without `norm`, g(W u + b): BN goes before the nonlinearity and replaces b.

    norm: called as norm(name="bn")(x, use_running_average=..., mask=...), or None.
    precision: of the product, as `lax.dot_general` takes it.
    Recorded when the collection `activations` is mutable: `pre_bn` [N, features] (W u, only where
    there is BN) and `input` [N, features], the input of the nonlinearity.
    """

    features: int
    norm: Callable[..., Any] | None
    activation: Callable[[jax.Array], jax.Array]
    kernel_init: Any
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """[N, inputs] to [N, features]; mask: bool [N]."""
        x = mixed.Dense(
            self.features,
            use_bias=self.norm is None,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            precision=self.precision,
            name="dense",
        )(x)
        x = x.astype(self.dtype)  # a float32 bias widens it
        if self.norm is not None:
            self.sow("activations", "pre_bn", x)
            x = self.norm(name="bn")(x, use_running_average=not train, mask=mask)
        self.sow("activations", "input", x)
        return self.activation(x)


class Mlp(PooledInit):
    """Hidden layers `dense_0`, `dense_1`, ... and a linear `classifier` (4.1).

    widths: units of the hidden layers. threshold: share of full intensity above which a pixel is 1.
    kernel_init: of every layer, the classifier included ("small random Gaussian values").
    precision: of every product, as `lax.dot_general` takes it.
    """

    num_classes: int = 10
    widths: Sequence[int] = (100, 100, 100)
    norm: Callable[..., Any] | None = None
    activation: Callable[[jax.Array], jax.Array] = nn.sigmoid
    kernel_init: Any = Gaussian(std=0.1)
    threshold: float = 0.5
    dropout: float = 0.0
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Images [N, H, W, C] in 0..255 to logits [N, num_classes], float32 or wider.

        mask: bool [N]; rows that are False take no part in batch statistics.
        """
        x = (images > self.threshold * 255).astype(self.dtype).reshape(images.shape[0], -1)
        for i, width in enumerate(self.widths):
            x = DenseBN(
                width,
                self.norm,
                self.activation,
                self.kernel_init,
                self.dtype,
                self.precision,
                name=f"dense_{i}",
            )(x, train=train, mask=mask)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = mixed.Dense(
            self.num_classes,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            precision=self.precision,
            name="classifier",
        )(x)
        return logits.astype(jnp.promote_types(jnp.float32, self.dtype))
