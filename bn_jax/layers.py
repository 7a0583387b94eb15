"""Thin Flax (Linen) modules around the pure functions: BatchNorm, ConvBN, LocalResponseNorm."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bn_jax import batch_norm


class BatchNorm(nn.Module):
    """Batch normalization with the arguments, leaf names and defaults of `flax.linen.BatchNorm`; docs/batch_norm.md has the differences.

    Parameters `scale` and `bias`, and in `batch_stats` `mean`, `var` and `count` (number of updates), all of the shape of the feature
    axes. A tree without `count`, as Flax writes it, loads as it is and counts as converged. `init` checks no group.

    Attributes:
      use_running_average: normalize with `batch_stats` (inference, frozen statistics) instead of the batch; here or in the call.
      axis: feature axes; the first other axis holds the examples.
      momentum: share of the running estimate kept at an update (Flax's convention; PyTorch's is one minus it).
      epsilon: added to the variance.
      dtype: of the result; None promotes input and parameters, as Flax does.
      group_size: examples that share statistics, by their place in the global batch. None: all.
    """

    use_running_average: bool | None = None
    axis: int | tuple[int, ...] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable = nn.initializers.zeros
    scale_init: Callable = nn.initializers.ones
    group_size: int | None = None

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, *, mask=None, relu: bool = False):
        """Normalizes `x`; see `batch_norm.normalize` for mask, relu and the errors raised."""
        frozen = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        shape = tuple(x.shape[a] for a in sorted({a % x.ndim for a in axes}))
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        # Statistics that come without a count are somebody's converged moving average.
        loaded = self.has_variable("batch_stats", "mean") and not self.has_variable("batch_stats", "count")
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if loaded and not self.is_mutable_collection("batch_stats"):
            count = None
        else:
            count = self.variable("batch_stats", "count", jnp.full, (), jnp.inf if loaded else 0.0, jnp.float32)
        stats = batch_norm.Stats(mean.value, var.value, jnp.float32(jnp.inf) if count is None else count.value)

        params = [p for p in (scale, bias) if p is not None]
        dtype = jnp.result_type(x, *params) if self.dtype is None else self.dtype
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.promote_types(x.dtype, dtype))
        train = not frozen and not self.is_initializing()
        y, stats = batch_norm.normalize(
            x,
            scale,
            bias,
            stats,
            train=train,
            group_size=self.group_size,
            mask=mask,
            axis=self.axis,
            epsilon=self.epsilon,
            momentum=self.momentum,
            relu=relu,
        )
        if train:
            mean.value, var.value = stats.mean, stats.var
            if count is not None:
                count.value = stats.count
        return y.astype(dtype)


class ConvBN(nn.Module):
    """Convolution, normalization, nonlinearity, in the paper's order (section 3.2: BN on Wu, which then has no bias).

    `norm(name="bn")` makes the normalization, None leaves it out and gives the convolution (`conv`) a bias. What goes into the
    normalization and into the nonlinearity is sown into `activations` as `pre_bn` and `input` where that collection is mutable.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    norm: Callable | None = BatchNorm
    activation: Callable = nn.relu
    kernel_init: Callable = nn.initializers.glorot_normal()
    padding: Any = "SAME"
    dtype: Any = None
    feature_group_count: int = 1

    @nn.compact
    def __call__(self, x, *, train: bool, mask=None):
        """x: [N, H, W, C]; mask: bool [N]. Returns [N, H', W', features]."""
        x = nn.Conv(
            self.features,
            self.kernel_size,
            self.strides,
            padding=self.padding,
            feature_group_count=self.feature_group_count,
            use_bias=self.norm is None,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="conv",
        )(x)
        watched = self.is_mutable_collection("activations") and not self.is_initializing()
        if self.norm is None:
            if watched:
                self.sow("activations", "input", x)
            return self.activation(x)
        if watched:
            self.sow("activations", "pre_bn", x)
        bn = self.norm(name="bn")
        if isinstance(bn, BatchNorm) and self.activation is nn.relu and not watched:
            return bn(x, use_running_average=not train, mask=mask, relu=True)
        x = bn(x, use_running_average=not train, mask=mask)
        if watched:
            self.sow("activations", "input", x)
        return self.activation(x)


class LocalResponseNorm(nn.Module):
    """x / (k + alpha/size * sum of x^2 over `size` neighbouring channels)**beta, across channels.

    The constants and the division of alpha by the size are those of BVLC Caffe's `bvlc_googlenet/train_val.prototxt` and its LRN
    layer; AlexNet (section 3.3), where the operation comes from, has k = 2 and does not divide.
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    def __call__(self, x):
        """x: [..., channels]; the result has its shape and dtype. Windows at the edge hold fewer channels."""
        window = (1,) * (x.ndim - 1) + (self.size,)
        square = jnp.square(x.astype(jnp.promote_types(jnp.float32, x.dtype)))
        total = lax.reduce_window(square, 0.0, lax.add, window, (1,) * x.ndim, "SAME")
        return (x * lax.pow(self.k + self.alpha / self.size * total, -self.beta)).astype(x.dtype)


def fresh_stats(batch_stats):
    """`batch_stats` of every layer as before the first update: what one training-mode pass turns into that batch's moments."""
    return _map_layers(lambda s: batch_norm.init_stats(s.mean.shape, s.mean.dtype), batch_stats)


def merge_stats(total, batch):
    """Algorithm 2 for all layers: `batch_norm.merge` of two `batch_stats` trees. See docs/batch_norm.md, "Algorithm 2"."""
    return _map_layers(batch_norm.merge, total, batch)


def _map_layers(f, *trees):
    if "mean" in trees[0] and "var" in trees[0]:
        converged = jnp.float32(jnp.inf)
        stats = (batch_norm.Stats(t["mean"], t["var"], t["count"] if "count" in t else converged) for t in trees)
        return f(*stats)._asdict()
    return {name: _map_layers(f, *(t[name] for t in trees)) for name in trees[0]}


def fold_variables(variables, *, epsilon: float):
    """Folds every `conv` + `bn` and `dense` + `bn` of a network's variables (Alg. 2, line 12).

    Returns `{"params": ...}` for the same network built with `norm=None`: each folded layer has a kernel and a bias and no BN.
    `variables` holds `params` and `batch_stats`, best the population's; `epsilon` is that of its BatchNorm layers.
    """
    return {"params": _fold_tree(variables["params"], variables["batch_stats"], epsilon, "")}


def _fold_tree(params, stats, epsilon, path):
    out = {}
    for name, child in params.items():
        if name == "bn":
            continue
        here = stats[name] if name in stats else {}
        out[name] = _fold_tree(child, here, epsilon, f"{path}/{name}") if hasattr(child, "items") else child
    if "bn" in stats:
        names = [n for n in ("conv", "dense") if n in out]
        if len(names) != 1:
            raise ValueError(f"fold_variables: {path or '/'} has a bn but {len(names)} layers named conv or dense, limit 1")
        layer, s = out[names[0]], stats["bn"]
        bn = params["bn"] if "bn" in params else {}
        part = lambda tree, leaf: tree[leaf] if leaf in tree else None
        kernel, bias = batch_norm.fold(
            layer["kernel"],
            part(layer, "bias"),
            part(bn, "scale"),
            part(bn, "bias"),
            batch_norm.Stats(s["mean"], s["var"], jnp.float32(jnp.inf)),
            epsilon=epsilon,
        )
        out[names[0]] = {**layer, "kernel": kernel, "bias": bias}
    return out
