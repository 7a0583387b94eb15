"""Draws initial weights: Gaussian numbers, for the whole network at once.

XLA compiles the random number generator again for every kernel that it fills. With `PooledInit` it
compiles the generator once.
"""

import contextvars
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

INITS = ("auto", "he", "glorot", "glorot_relu")  # values of `model.init`

# What "auto" stands for, by the nonlinearity.
BY_ACTIVATION = {"relu": "glorot_relu", "sigmoid": "glorot"}

_pooled: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("pooled", default=None)


class Gaussian(NamedTuple):
    """An initializer that draws normal numbers, not truncated, of mean 0.

    The standard deviation is `std` if given, else `gain` times that of the rule: "glorot",
    sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010); "glorot_relu", sqrt(2) times that,
    because a ReLU halves the variance; or "he", sqrt(2 / fan_in), which keeps the variance from
    ReLU to ReLU (He et al. 2015, arXiv:1502.01852). The paper does not say how its networks are
    initialized.
    """

    gain: float = 1.0
    std: float | None = None
    rule: str = "glorot"

    def __call__(
        self, key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        """Draws a kernel [..., inputs, outputs]; `out_sharding`, which Flax passes, is not used."""
        std = self._std(shape) if self.std is None else self.std

        sizes = _pooled.get()
        if sizes is not None:
            sizes.append(math.prod(shape))
            return jnp.full(shape, std, dtype)  # see `PooledInit`
        return std * jax.random.normal(key, shape, dtype)

    def _std(self, shape: Any) -> float:
        """Returns `gain` times the rule's standard deviation for kernels [..., inputs, outputs]."""
        window = math.prod(shape[:-2])
        fan_in = window * shape[-2]
        fan_out = window * shape[-1]
        variance = {
            "glorot": 2 / (fan_in + fan_out),
            "glorot_relu": 4 / (fan_in + fan_out),
            "he": 2 / fan_in,
        }
        return self.gain * math.sqrt(variance[self.rule])


class PooledInit(nn.Module):
    """A module whose kernels all have `Gaussian` initializers and are taken from one draw.

    Networks whose kernels have the same shapes (with and without BN, say) get the same kernels from
    the same key.
    """

    @nn.nowrap
    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Initializes as `nn.Module.init`. `jax.jit` makes it faster: it omits the forward pass."""
        key = rngs["params"] if isinstance(rngs, dict) else rngs

        # First every kernel is filled with its standard deviation, and its size is noted.
        sizes: list[int] = []
        token = _pooled.set(sizes)
        try:
            variables = super().init(rngs, *args, **kwargs)
        finally:
            _pooled.reset(token)

        flat = traverse_util.flatten_dict(variables["params"])
        kernels = [path for path in sorted(flat) if path[-1] == "kernel"]
        if sum(flat[path].size for path in kernels) != sum(sizes):
            raise TypeError(f"{type(self).__name__} has a kernel whose initializer is not Gaussian")

        # Then each is multiplied by its share of the draw.
        noise = jax.random.normal(key, (sum(sizes),))
        start = 0
        for path in kernels:
            std = flat[path]
            flat[path] = std * noise[start : start + std.size].reshape(std.shape).astype(std.dtype)
            start += std.size
        return {**variables, "params": traverse_util.unflatten_dict(flat)}
