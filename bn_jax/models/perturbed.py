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
        self,
        x,
        use_running_average: bool | None = None,
        *,
        mask=None,
        relu: bool = False,
    ):
        """Normalizes `x`; see `BatchNorm`. Without `use_running_average` it trains."""
        if use_running_average or self.is_initializing():
            return super().__call__(
                x,
                use_running_average,
                mask=mask,
                relu=relu,
            )

        y = self._train(x, mask)

        if self.noise and self.has_rng("noise"):
            y = self._disturbed(y)

        # The noise moves the zeros of ReLU and mask, so both come after it.
        if relu:
            y = nn.relu(y)
        if mask is None:
            return y
        valid = _rows(mask, y)
        return jnp.where(valid, y, 0)

    def _train(self, x, mask):
        """Normalizes in training mode, until the statistics are frozen."""
        if not self.freeze_after:
            return super().__call__(x, False, mask=mask)

        before: dict[str, Any] = {}
        for name in ("mean", "var", "count"):
            before[name] = self.get_variable("batch_stats", name)

        # The number of updates is known only when the program runs, so it computes both results.
        by_estimate = super().__call__(x, True, mask=mask)
        by_batch = super().__call__(x, False, mask=mask)

        # Training has just updated the estimate; if it is frozen, the old one is put back.
        frozen = before["count"] >= self.freeze_after
        for name, value in before.items():
            updated: Any = self.get_variable("batch_stats", name)
            kept = jnp.where(frozen, value, updated)
            self.put_variable("batch_stats", name, kept)

        return jnp.where(frozen, by_estimate, by_batch)

    def _disturbed(self, y):
        """Turns y = scale * x_hat + bias into the result of BN with other statistics.

        These move and stretch x_hat.
        """
        keys = jax.random.split(self.make_rng("noise"))
        features = y.shape[-1:]

        params = self.variables.get("params", {})
        scale = params.get("scale", jnp.ones(features))
        bias = params.get("bias", jnp.zeros(features))

        shift_key, stretch_key = keys
        shift = jax.random.normal(shift_key, features, jnp.float32)
        stretch = jax.random.normal(stretch_key, features, jnp.float32)
        stretch = jnp.exp(self.noise * stretch)

        # y without its bias is scale * x_hat, so the shift of x_hat is multiplied by the scale.
        stretched = (y - bias) * stretch
        offset = scale * self.noise * shift * stretch
        disturbed = stretched - offset + bias
        return disturbed.astype(y.dtype)


def _rows(mask, y):
    """Reshapes a mask [examples] to y's rank; a mask that can be broadcast to y stays as it is."""
    if mask.ndim != 1:
        return mask
    ones = [1] * (y.ndim - 1)
    return mask.reshape(-1, *ones)
