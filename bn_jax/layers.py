"""Thin Flax (Linen) modules around `batch_norm`: BatchNorm, ConvBN, DenseBN and LRN.

Functions on whole networks follow: Algorithm 2's statistics (`population_stats`), trees of Flax's
statistics (`adopt_stats`, `flax_stats`), and folding (`fold_variables`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from bn_jax import batch_norm, ops
from bn_jax.ops import mixed


class BatchNorm(nn.Module):
    """`batch_norm.normalize` with `flax.linen.BatchNorm`'s arguments, defaults and leaf names.

    docs/batch_norm.md lists the differences. The parameters are `scale` and `bias`; `batch_stats`
    holds `mean` and `var`, all of the shape of the feature axes, and `count`, the number of
    updates. A tree without `count`, as Flax writes it, works too: it keeps its structure, and its
    statistics are treated as a converged moving average; `adopt_stats` gives it a count. `init`
    does not check `group_size`.

    Attributes:
      use_running_average: whether to normalize by `batch_stats` (inference, or frozen statistics)
        and not by the batch's statistics; set it here or in the call.
      axis: feature axes; the first other axis holds the examples.
      momentum: the share of the running estimate that an update keeps (PyTorch's is 1 minus this).
        It may be traced, as may epsilon.
      epsilon: added to the variance, in the unit of x squared.
      dtype: of the result; None promotes input and parameters, as Flax does.
      axis_name: the axis of `shard_map`, `pmap` or `vmap` over which the batch is split; `jit` with
        sharded arrays does not need it.
      axis_index_groups: must be None, else ValueError; use `group_size` under `jit` instead.
      use_fast_variance, force_float32_reductions: accepted without effect. The variance is always
        computed without cancellation, and statistics are float32 or wider.
      group_size: the number of consecutive examples of the global batch that share statistics;
        None: all share them.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable = nn.initializers.zeros
    scale_init: Callable = nn.initializers.ones
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    group_size: int | None = None

    @nn.compact
    def __call__(
        self,
        x,
        use_running_average: bool | None = None,
        *,
        mask=None,
        relu: bool = False,
    ):
        """Normalizes `x`; see `batch_norm.normalize` for mask, relu and the errors raised."""
        batch_norm.refuse_index_groups(self.axis_index_groups)
        frozen = nn.merge_param(
            "use_running_average",
            self.use_running_average,
            use_running_average,
        )
        train = not frozen and not self.is_initializing()

        axes = (self.axis,) if isinstance(self.axis, int) else tuple(self.axis)
        features = sorted({axis % x.ndim for axis in axes})
        shape = tuple(x.shape[axis] for axis in features)

        scale = None
        bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)

        # Statistics that come without a count were written by Flax: a converged moving average.
        loaded = self.has_variable("batch_stats", "mean")
        counted = not loaded or self.has_variable("batch_stats", "count")
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        count = None
        stats = batch_norm.Stats(mean.value, var.value, None)
        if counted:
            count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.float32)
            stats = stats._replace(count=count.value)

        dtype = self.dtype
        if dtype is None:
            params = [param for param in (scale, bias) if param is not None]
            dtype = jnp.result_type(x, *params)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.promote_types(x.dtype, dtype))

        y, stats = batch_norm.normalize(
            x,
            scale,
            bias,
            stats,
            train=train,
            group_size=self.group_size,
            mask=mask,
            axis=axes,
            epsilon=self.epsilon,
            momentum=self.momentum,
            relu=relu,
            axis_name=None if self.is_initializing() else self.axis_name,
        )
        if train:
            mean.value = stats.mean
            var.value = stats.var
            if count is not None and stats.count is not None:
                count.value = stats.count
        return y.astype(dtype)


class ConvBN(nn.Module):
    """Computes g(BN(W x)): convolution, normalization, nonlinearity, in the paper's order (3.2).

    BN replaces the bias of the convolution. Without `norm` the layer is g(W x + b).

    Attributes:
      norm: `norm(name="bn")` makes the normalization; None leaves it out.
      activation: the nonlinearity g.
      precision: of the convolution, as `lax.conv_general_dilated` takes it.
      (the others): as in `flax.linen.Conv`.

    If the collection `activations` is mutable, except in `init`, the layer records the input of the
    normalization as `pre_bn` and the input of the nonlinearity as `input`.
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
    precision: Any = None

    def setup(self):
        """Makes the submodules `conv` and `bn`."""
        self.conv = mixed.Conv(
            self.features,
            self.kernel_size,
            self.strides,
            padding=self.padding,
            feature_group_count=self.feature_group_count,
            use_bias=self.norm is None,
            dtype=self.dtype,
            precision=self.precision,
            kernel_init=self.kernel_init,
            conv_general_dilated=ops.conv,
        )
        self.bn = None if self.norm is None else self.norm(name="bn")

    def __call__(self, x, *, train: bool, mask=None):
        """Applies the layer to x [N, H, W, C]; mask: bool [N]. Returns [N, H', W', features]."""
        return _normalize_and_activate(self, self.conv(x), train, mask)

    def kernel(self):
        """Returns W, of shape [h, w, C / feature_group_count, features]."""
        return self.conv.variables["params"]["kernel"]

    def from_product(self, product, *, train: bool, mask=None):
        """Computes the output from the product W x [N, H', W', features] that the caller made."""
        if self.norm is None:
            product = product + self.conv.variables["params"]["bias"]
        return _normalize_and_activate(self, product, train, mask)


class DenseBN(nn.Module):
    """Computes g(BN(W x)) of a dense layer. Attributes and recorded activations: see `ConvBN`."""

    features: int
    norm: Callable | None = BatchNorm
    activation: Callable = nn.relu
    kernel_init: Callable = nn.initializers.glorot_normal()
    dtype: Any = None
    precision: Any = None

    def setup(self):
        """Makes the submodules `dense` and `bn`."""
        self.dense = mixed.Dense(
            self.features,
            use_bias=self.norm is None,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            precision=self.precision,
        )
        self.bn = None if self.norm is None else self.norm(name="bn")

    def __call__(self, x, *, train: bool, mask=None):
        """Applies the layer to x [N, inputs]; mask: bool [N]. Returns [N, features]."""
        return _normalize_and_activate(self, self.dense(x), train, mask)


def _normalize_and_activate(layer, u, train, mask):
    """Computes g(BN(u)) of a ConvBN or DenseBN from its linear part u; records the activations."""
    if layer.dtype is not None:
        u = u.astype(layer.dtype)  # a float32 bias has widened it
    recording = layer.is_mutable_collection("activations") and not layer.is_initializing()

    if layer.bn is not None:
        if recording:
            layer.sow("activations", "pre_bn", u)
        # Our BN can apply the ReLU itself, which saves memory, but then its input is not recorded.
        if isinstance(layer.bn, BatchNorm) and layer.activation is nn.relu and not recording:
            return layer.bn(u, use_running_average=not train, mask=mask, relu=True)
        u = layer.bn(u, use_running_average=not train, mask=mask)

    if recording:
        layer.sow("activations", "input", u)
    return layer.activation(u)


class LocalResponseNorm(nn.Module):
    """Computes x / (k + alpha/size * sum of x^2 over `size` neighbouring channels)**beta.

    The constants, and the division of alpha by the size, are those of BVLC Caffe's LRN layer and
    its models/bvlc_googlenet/train_val.prototxt. AlexNet, where the operation comes from (section
    3.3), has k = 2 and does not divide.
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    def __call__(self, x):
        """Normalizes x [..., channels]; windows at the first and last channels are smaller."""
        wide = jnp.promote_types(jnp.float32, x.dtype)
        square = jnp.square(x.astype(wide))

        ones = (1,) * (x.ndim - 1)
        window = (*ones, self.size)
        strides = (*ones, 1)
        total = lax.reduce_window(square, 0.0, lax.add, window, strides, "SAME")

        base = self.k + self.alpha / self.size * total
        y = x * lax.pow(base, -self.beta)
        return y.astype(x.dtype)


def fresh_stats(batch_stats):
    """Returns a tree before any update; one training-mode pass turns it into a batch's moments."""

    def fresh(stats):
        return batch_norm.init_stats(stats.mean.shape, stats.mean.dtype)

    return _map_layers(fresh, batch_stats)


def counted(batch_stats, times: int):
    """Multiplies the counts of a tree by `times`, for a batch that stands for so many batches."""
    if times == 1:
        return batch_stats

    def multiply(stats):
        return stats._replace(count=stats.count * times)

    return _map_layers(multiply, batch_stats)


def merge_stats(total, batch):
    """Averages two `batch_stats` trees by their counts: Algorithm 2 for all layers of a network.

        total = fresh_stats(batch_stats)
        for images in training_batches:  # each pass starts afresh, so it yields its batch's moments
            variables = {"params": params, "batch_stats": fresh_stats(batch_stats)}
            _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
            total = merge_stats(total, updates["batch_stats"])

    `total` is then the population's statistics, for inference and `fold_variables`.
    """
    return _map_layers(batch_norm.merge, total, batch)


def population_stats(
    apply: Callable,
    variables,
    batches: Iterable,
    *,
    examples: Callable | None = None,
):
    """Computes Algorithm 2 (lines 9 to 11), "precise BN", for a network of ours or of Flax.

        train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        variables["batch_stats"] = population_stats(jax.jit(train), variables, batches)

    Every batch is run through the network once in training mode and is weighted by its number of
    examples, so batches may differ in size. Sums are in float64. Several processes may each have
    batches of their own; then every process must call, and all get the same result.

    Layers without a `count`, such as Flax's, only return an updated moving average. The update is
    linear in the old value, so two passes, from statistics of 0 and of 1, determine the momentum
    and the batch's own moments. The variance is then the layer's, which in Flax is the biased one.

    Args:
      apply: (variables, batch) -> (anything, updates) with `updates["batch_stats"]`; for an NNX
        model (model, batch) -> anything.
      variables: hold `batch_stats`, whose values do not matter. Or an NNX model, which is left
        unchanged.
      batches: what `apply` takes, batch by batch.
      examples: maps a batch to the number of its valid examples. The default is the sum of
        `batch["mask"]` if there is one, else the length of the batch's first array.

    Returns:
      A tree like `variables["batch_stats"]`, with the number of batches as `count`; for an NNX
      model a state for `nnx.update(model, state)`.

    Raises:
      ValueError: there is no batch, or a layer's momentum is 1, so that its updates do not depend
        on the batch.
    """
    if not isinstance(variables, Mapping):
        return _population_of_nnx(apply, variables, batches, examples)

    stats = variables["batch_stats"]

    def update(batch, value):
        start = _map_leaves(lambda leaves: _filled(leaves, value), stats)
        _, updates = apply({**variables, "batch_stats": start}, batch)
        return updates["batch_stats"]

    return _population(update, stats, batches, examples or _examples)


def _population_of_nnx(apply, model, batches, examples):
    from flax import nnx

    state = nnx.state(model, nnx.BatchStat)
    kept = jax.tree.map(jnp.copy, nnx.to_pure_dict(state))

    def filled(values):
        new = nnx.state(model, nnx.BatchStat)
        nnx.replace_by_pure_dict(new, values)
        return new

    def update(batch, value):
        start = _map_leaves(lambda leaves: _filled(leaves, value), kept)
        nnx.update(model, filled(start))
        apply(model, batch)
        return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    try:
        found = _population(update, kept, batches, examples or _examples)
    finally:
        nnx.update(model, filled(kept))
    result = jax.tree.map(lambda x: x, nnx.state(model, nnx.BatchStat))
    nnx.replace_by_pure_dict(result, found)
    return result


def _filled(leaves, value):
    """Fills statistics with one value, and sets their count to 0."""
    found = {name: jnp.full_like(leaf, value) for name, leaf in leaves.items()}
    if "count" in leaves:
        found["count"] = jnp.zeros_like(leaves["count"])
    return found


def _population(update: Callable, stats, batches: Iterable, examples: Callable):
    """Averages what `update(batch, value)` returns: the tree after a pass that began at `value`."""
    layers = jax.tree.leaves(stats, is_leaf=_is_layer)
    structure: Any = jax.tree.structure(stats, is_leaf=_is_layer)
    two_passes = any("count" not in leaves for leaves in layers)

    # For each layer, the sums of: examples, means, variances, batches.
    sums: list[list[Any]] = [[0.0, 0.0, 0.0, 0.0] for _ in layers]
    for batch in batches:
        n = float(examples(batch))
        zero = structure.flatten_up_to(update(batch, 0))
        one = structure.flatten_up_to(update(batch, 1)) if two_passes else zero
        for total, low, high in zip(sums, zero, one, strict=True):
            mean, var, usable = _moments_of_update(_host(low), _host(high))
            weight = n * usable
            total[0] += weight
            total[1] = total[1] + weight * mean
            total[2] = total[2] + weight * var
            total[3] += usable

    if jax.process_count() > 1:
        of_processes = _gather_processes(sums, layers)
        sums = jax.tree.map(lambda part: np.sum(part, 0), of_processes)

    found = []
    for leaves, (weight, mean, var, number) in zip(layers, sums, strict=True):
        if weight == 0:
            raise ValueError("population_stats: no batch with two valid values; give at least one")
        new = {
            "mean": mean / weight,
            "var": var / weight,
            "count": number,
        }
        found.append({name: jnp.asarray(new[name], leaf.dtype) for name, leaf in leaves.items()})
    return jax.tree.unflatten(structure, found)


def _moments_of_update(low, high):
    """Computes a batch's mean, variance, usability (0 or 1) from updates of statistics 0 and 1."""
    if "count" in low:
        usable = float(low["count"] > 0)
        return low["mean"], low["var"], usable

    momentum = np.median(high["mean"] - low["mean"])
    if not momentum < 1 - 1e-6:
        raise ValueError(
            f"population_stats: a layer without count has momentum {momentum:g}, so its updates do "
            "not depend on the batch; build it with a momentum below 1"
        )
    share = 1 - momentum  # of the batch's moments in the update
    return low["mean"] / share, low["var"] / share, 1.0


def _host(leaves):
    """Copies statistics to the host as float64. They are replicated, so one device's are enough."""
    found = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array):
            leaf = leaf.addressable_data(0)
        found[name] = np.asarray(leaf, np.float64)
    return found


def _gather_processes(sums, layers):
    """Gathers the sums of all processes, each [processes, ...]; a process may have had no batch."""
    from jax.experimental import multihost_utils

    parts = []
    for (weight, mean, var, number), leaves in zip(sums, layers, strict=True):
        # Without a batch, mean and var are still the number 0.
        shape = leaves["mean"].shape
        mean = np.broadcast_to(mean, shape)
        var = np.broadcast_to(var, shape)
        parts.append([weight, mean, var, number])

    # They are sent as bytes, because jax would convert float64 to float32.
    def as_bytes(part):
        return np.array(part, np.float64).reshape(-1).view(np.uint8)

    def as_numbers(gathered, part):
        numbers = np.asarray(gathered).view(np.float64)
        return numbers.reshape(-1, *np.shape(part))

    raw = jax.tree.map(as_bytes, parts)
    gathered = multihost_utils.process_allgather(raw)
    return jax.tree.map(as_numbers, gathered, parts)


def _examples(batch) -> int:
    if isinstance(batch, Mapping) and "mask" in batch:
        return int(np.sum(batch["mask"]))
    return len(jax.tree.leaves(batch)[0])


def adopt_stats(batch_stats, count: float = batch_norm.CONVERGED):
    """Turns a tree of Flax's `batch_stats` into one of ours: every layer gets a `count` of updates.

    count: the number of updates that the estimate stands for. The default stands for a long moving
    average, in which every update has the weight 1 - momentum. Layers that have a count keep it.
    The values do not change, and Flax's variance is biased: m/(m-1) times smaller than ours.
    """

    def adopt(leaves):
        return {"count": jnp.full((), count, jnp.float32), **leaves}

    return _map_leaves(adopt, batch_stats)


def flax_stats(batch_stats):
    """Turns a tree of our `batch_stats` into Flax's: `mean` and `var`, and no `count`."""

    def without_count(leaves):
        return {"mean": leaves["mean"], "var": leaves["var"]}

    return _map_leaves(without_count, batch_stats)


def _map_layers(f, *trees):
    """Applies f to the Stats of every layer in trees of `batch_stats`."""

    def of_layer(*layers):
        stats = [_stats(leaves) for leaves in layers]
        return f(*stats)._asdict()

    return _map_leaves(of_layer, *trees)


def _map_leaves(f, *trees):
    """Applies f to the `mean`, `var` and `count` of every layer in trees of `batch_stats`."""
    return jax.tree.map(f, *trees, is_leaf=_is_layer)


def _is_layer(tree) -> bool:
    return isinstance(tree, Mapping) and "mean" in tree and "var" in tree


def _stats(leaves) -> batch_norm.Stats:
    return batch_norm.Stats(leaves["mean"], leaves["var"], leaves.get("count"))


def fold_variables(variables, *, epsilon: float):
    """Folds every `conv` + `bn` and `dense` + `bn` of a network (Alg. 2, line 12).

    Args:
      variables: `params` and `batch_stats`, preferably those of `population_stats`.
      epsilon: that of the network's BatchNorm layers.

    Returns:
      Variables of the same network built with `norm=None`, i.e. kernels and biases without BN.

    Raises:
      ValueError: a `bn` has no linear layer beside it, or several, or it is per activation.
    """
    params = traverse_util.flatten_dict(variables["params"])
    stats = traverse_util.flatten_dict(variables["batch_stats"])
    folded = {path: leaf for path, leaf in params.items() if "bn" not in path[:-1]}

    with_bn = set()
    for path in stats:
        *layer, module, _ = path
        if module == "bn":
            with_bn.add(tuple(layer))

    for layer in sorted(with_bn):
        linear = [name for name in ("conv", "dense") if (*layer, name, "kernel") in params]
        if len(linear) != 1:
            raise ValueError(
                f"fold_variables: /{'/'.join(layer)} has a bn beside {len(linear)} layers named "
                "conv or dense; it needs exactly 1"
            )

        product = (*layer, linear[0])
        bn = (*layer, "bn")
        kernel, bias = batch_norm.fold(
            params[*product, "kernel"],
            params.get((*product, "bias")),
            params.get((*bn, "scale")),
            params.get((*bn, "bias")),
            batch_norm.Stats(
                stats[*bn, "mean"],
                stats[*bn, "var"],
                stats.get((*bn, "count")),
            ),
            epsilon=epsilon,
        )
        folded[*product, "kernel"] = kernel
        folded[*product, "bias"] = bias

    return {"params": traverse_util.unflatten_dict(folded)}
