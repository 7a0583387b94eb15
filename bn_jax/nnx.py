"""BatchNorm for Flax NNX: `from bn_jax.nnx import BatchNorm` instead of `flax.nnx.BatchNorm`."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from bn_jax import batch_norm

_ZEROS = nnx.initializers.zeros_init()
_ONES = nnx.initializers.ones_init()


class BatchNorm(nnx.Module):
    """`batch_norm.normalize` with `flax.nnx.BatchNorm`'s constructor, attributes and behaviour.

    docs/batch_norm.md lists the differences. `scale` and `bias` are `nnx.Param`; `mean`, `var` and
    `count`, the number of updates, are `nnx.BatchStat`. `train()` and `eval()` set
    `use_running_average`, as does the call.

    Args:
      num_features: size of the feature axis, or, if `axis` names several, their sizes.
      axis: feature axes; the first other axis holds the examples.
      momentum: the share of the running estimate that an update keeps (PyTorch's is 1 minus this).
        It may be traced, as may epsilon.
      axis_index_groups: must be None, else ValueError; use `group_size` under `jit` instead.
      use_fast_variance: accepted without effect; the variance is always computed without
        cancellation.
      promote_dtype: as in Flax, but mean and var stay float32, whatever it makes of them.
      group_size: the number of consecutive examples of the global batch that share statistics;
        None: all share them.
      (the others): as in Flax.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Callable = _ZEROS,
        scale_init: Callable = _ONES,
        axis_name: str | tuple[str, ...] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        group_size: int | None = None,
    ):
        batch_norm.refuse_index_groups(axis_index_groups)
        shape = (num_features,) if isinstance(num_features, int) else tuple(num_features)
        fresh = batch_norm.init_stats(shape)
        self.mean = nnx.BatchStat(fresh.mean)
        self.var = nnx.BatchStat(fresh.var)
        self.count = nnx.BatchStat(fresh.count)

        # In Flax's order, so that one seed gives both layers the same parameters.
        self.scale: nnx.Param | None = nnx.data(None)
        if use_scale:
            self.scale = nnx.Param(scale_init(rngs.params(), shape, param_dtype), **scale_metadata)
        self.bias: nnx.Param | None = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), shape, param_dtype), **bias_metadata)

        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.group_size = group_size

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        relu: bool = False,
    ) -> jax.Array:
        """Normalizes `x`; see `batch_norm.normalize` for mask, relu and the errors raised."""
        frozen = self.use_running_average if use_running_average is None else use_running_average
        if frozen is None:
            raise ValueError(
                "BatchNorm: use_running_average is None; set it in the constructor or in the call, "
                "or call train() or eval() on the model"
            )
        stats = batch_norm.Stats(self.mean[...], self.var[...], self.count[...])
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        if jnp.issubdtype(x.dtype, jnp.floating):
            values = (x, stats.mean.astype(x.dtype), stats.var.astype(x.dtype), scale, bias)
            x, _, _, scale, bias = self.promote_dtype(values, dtype=self.dtype)
        y, stats = batch_norm.normalize(
            x,
            scale,
            bias,
            stats,
            train=not frozen,
            group_size=self.group_size,
            mask=mask,
            axis=self.axis,
            epsilon=self.epsilon,
            momentum=self.momentum,
            relu=relu,
            axis_name=self.axis_name,
        )
        if not frozen:
            # The estimates are state, which is not differentiated.
            self.mean[...] = jax.lax.stop_gradient(stats.mean)
            self.var[...] = jax.lax.stop_gradient(stats.var)
            self.count[...] = jax.lax.stop_gradient(stats.count)
        return y

    def set_view(self, use_running_average: bool | None = None):
        """Sets `use_running_average`; `nnx.view` calls it, as it does Flax's."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


def adopt_stats(model: nnx.Module, count: float = batch_norm.CONVERGED) -> None:
    """Marks the statistics of every `BatchNorm` in a model as a long moving average.

    It is meant for a model whose `mean` and `var` come from a Flax, Haiku or torch model. Otherwise
    the next update would count as the first one and replace them. count: see
    `bn_jax.layers.adopt_stats`.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.count[...] = jnp.full_like(module.count[...], count)
