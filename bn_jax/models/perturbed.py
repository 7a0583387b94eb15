"""BN whose statistics are wrong on purpose, or frozen: for the study `noise`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bn_jax.layers import BatchNorm


class PerturbedBatchNorm(BatchNorm):
    """`BatchNorm` with noise in its statistics, and with an end of its use of batches.

    Attributes:
      noise: in training, the mean that is subtracted is wrong by `noise` times a standard normal
        number, in standard deviations, and so is the logarithm of the standard deviation, by
        another number. Both are drawn for every feature and step, from the random stream `noise`.
        If that is not given, as for population statistics, there is no noise. The running estimate
        is not affected.
      freeze_after: after so many updates of the running estimate, training normalizes by it, as
        inference does, and it is no longer updated. 0: never.
    """

    noise: float = 0.0
    freeze_after: int = 0

    def __call__(
        self, x, use_running_average: bool | None = None, *, mask=None, relu: bool = False
    ):
        """Normalizes `x`; see `BatchNorm`. Without `use_running_average` it trains."""
        if use_running_average or self.is_initializing():
            return super().__call__(x, use_running_average, mask=mask, relu=relu)

        y = self._train(x, mask)
        if self.noise and self.has_rng("noise"):
            y = self._disturbed(y)
        if relu:
            y = nn.relu(y)
        return y if mask is None else jnp.where(_rows(mask, y), y, 0)

    def _train(self, x, mask):
        """Normalizes in training mode, until the statistics are frozen."""
        if not self.freeze_after:
            return super().__call__(x, False, mask=mask)
        names = ("mean", "var", "count")
        before: dict[str, Any] = {name: self.get_variable("batch_stats", name) for name in names}
        held = super().__call__(x, True, mask=mask)
        y = super().__call__(x, False, mask=mask)

        over = before["count"] >= self.freeze_after
        for name, value in before.items():
            after: Any = self.get_variable("batch_stats", name)
            self.put_variable("batch_stats", name, jnp.where(over, value, after))
        return jnp.where(over, held, y)

    def _disturbed(self, y):
        """Turns y = scale * x_hat + bias into the result of BN with other statistics.

        These move and stretch x_hat.
        """
        keys = jax.random.split(self.make_rng("noise"))
        params = self.variables.get("params", {})
        scale = params.get("scale", jnp.ones(y.shape[-1]))
        bias = params.get("bias", jnp.zeros(y.shape[-1]))
        shift, stretch = (jax.random.normal(key, y.shape[-1:], jnp.float32) for key in keys)

        stretch = jnp.exp(self.noise * stretch)
        moved = (y - bias) * stretch - scale * self.noise * shift * stretch + bias
        return moved.astype(y.dtype)


def _rows(mask, y):
    """Reshapes a mask [examples] to y's rank; a mask that can be broadcast to y stays as it is."""
    return mask.reshape(mask.shape + (1,) * (y.ndim - mask.ndim)) if mask.ndim == 1 else mask
