"""The network of section 4.1: fully connected sigmoid layers on binary images."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bn_jax.layers import DenseBN
from bn_jax.models.initializers import Gaussian, PooledInit
from bn_jax.ops import mixed


class Mlp(PooledInit):
    """A network with hidden layers `dense_0`, `dense_1`, ... and a linear `classifier` (4.1).

    Attributes:
      widths: units of the hidden layers.
      norm: as in `layers.DenseBN`, or None.
      kernel_init: of every layer, the classifier included ("small random Gaussian values").
      threshold: share of full intensity above which a pixel is 1.
      dropout: share of units dropped before the classifier.
      dtype: of the computation; parameters are float32.
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
        """Maps images [N, H, W, C] in 0..255 to logits [N, num_classes], float32 or wider.

        mask: bool [N]; rows that are False do not enter batch statistics.
        """
        x = (images > self.threshold * 255).astype(self.dtype)
        x = x.reshape(images.shape[0], -1)

        for i, width in enumerate(self.widths):
            layer = DenseBN(
                width,
                norm=self.norm,
                activation=self.activation,
                kernel_init=self.kernel_init,
                dtype=self.dtype,
                precision=self.precision,
                name=f"dense_{i}",
            )
            x = layer(x, train=train, mask=mask)

        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = mixed.Dense(
            self.num_classes,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            precision=self.precision,
            name="classifier",
        )(x)
        return logits.astype(jnp.promote_types(jnp.float32, self.dtype))
