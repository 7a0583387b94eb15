"""Batch normalization as pure functions: state in, state out (Ioffe & Szegedy, arXiv 1502.03167).

Algorithm 1 is `normalize(..., train=True)`: a mini-batch is normalized by its own mean and biased
variance. The mini-batch is a *statistic group*: `group_size` consecutive examples of the global
batch (the paper's worker batch of 32), whichever devices hold them. Algorithm 2 is `population` of
the batches' statistics, followed by `normalize(..., train=False)` or, as one affine layer, `fold`.
Statistics are computed in promote(float32, x.dtype), from deviations from a value near the mean:
E[x^2] - E[x]^2 would lose the variance of data far from 0.

Reading order: the interface; the layout of x in groups; Algorithm 1 and its derivatives; running
estimates and Algorithm 2.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.export import is_symbolic_dim
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

CONVERGED = 1e9
"""The `count` given to an estimate that is already a long moving average, e.g. from PyTorch."""


class Stats(NamedTuple):
    """Estimates of the population's statistics, with one value for each feature.

    After k updates from `init_stats`, `mean` and `var` are weighted averages of the k batches'
    means and *unbiased* variances. Batch i has a weight proportional to momentum**(k - i), so the
    estimates are unbiased from the first step on. `count` is k, a float32 scalar. If `count` is
    None, the estimate is treated as a converged moving average, as other libraries keep it: every
    update has the weight 1 - momentum.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array | None  # type: ignore[assignment]  # not tuple.count


def init_stats(shape, dtype=jnp.float32) -> Stats:
    """Returns statistics before any update: mean 0, variance 1, count 0.

    The first update replaces them entirely. shape: that of the features, e.g. (channels,).
    """
    return Stats(
        mean=jnp.zeros(shape, dtype),
        var=jnp.ones(shape, dtype),
        count=jnp.zeros((), jnp.float32),
    )


def normalize(
    x: jax.Array,
    scale: jax.Array | None,
    offset: jax.Array | None,
    stats: Stats,
    *,
    train: bool,
    group_size: int | None = None,
    mask: jax.Array | None = None,
    axis: int | Sequence[int] = -1,
    epsilon: jax.typing.ArrayLike,
    momentum: jax.typing.ArrayLike,
    relu: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, Stats]:
    """Normalizes x by Algorithm 1 (`train=True`), or by `stats` as Algorithm 2's inference network.

    Args:
      x: floating point, of any rank; its first axis that is not a feature axis holds the examples.
      scale, offset: gamma and beta, with one value for each feature, or None for 1 and 0.
      stats: running estimates, with one value for each feature; inference reads them, training
        updates them.
      group_size: the number of consecutive examples that share statistics; it must divide the
        batch. None: all examples of the global batch share them.
      mask: True where a value counts; of shape [examples], or broadcastable to x. Whatever the
        other values are, they do not enter statistics or gradients, and their results are 0, in
        inference too.
      axis: feature axes. -1 is the convolutional form (section 3.2); all axes but the first are the
        per-activation form.
      epsilon: added to the variance, in the unit of x squared. It may be traced.
      momentum: the share of the running estimate that an update keeps; 1 gives all batches the same
        weight. It may be traced (a schedule).
      relu: whether to return max(y, 0) instead of y; the backward pass then needs no copy of y.
      axis_name: the axis (or axes) of `shard_map`, `pmap` or `vmap` over which the batch is split.
        With `group_size=None` the whole batch over that axis is one group. A `group_size` must
        divide the local batch; then only the running estimates are averaged over the axis.

    Returns:
      y, of x's shape and dtype, and the statistics, which are updated if `train` and keep their
      structure and dtypes. A group with fewer than two valid values is normalized by the statistics
      that it has, and does not change the running estimates.

    Raises:
      TypeError: x is not floating point, or `stats` to be updated are narrower than float32.
      ValueError: a shape, group or constant cannot be used; the message gives value and limit.

    Warns once in a process if the installed jaxlib computes some sums wrongly on CPUs.
    """
    _warn_of_wrong_sums()

    layout = _layout(x, axis, train, group_size, axis_name, relu)
    _check(
        x,
        layout,
        train,
        scale=scale,
        offset=offset,
        mean=stats.mean,
        var=stats.var,
    )
    _check_numbers(epsilon, momentum)
    if train:
        _check_precision(stats)
    if mask is not None:
        mask = _check_mask(x, mask, layout)

    def run(*inputs):
        return _normalize(*inputs, train=train, layout=layout)

    arrays = (x, scale, offset, stats, mask, epsilon, momentum)

    explicit = _explicit_axes(x)
    if explicit:
        # A group that lies on several devices has a layout that Explicit shardings cannot express.
        # So XLA chooses the shardings inside, as it does for Auto axes.
        sharding = functools.partial(_explicit_sharding, x)
        outputs = jax.tree.map(sharding, (x, stats))
        run = jax.sharding.auto_axes(run, axes=explicit, out_sharding=outputs)
        arrays = jax.tree.map(jnp.asarray, arrays)
    return run(*arrays)


def _normalize(
    x,
    scale,
    offset,
    stats,
    mask,
    epsilon,
    momentum,
    *,
    train,
    layout,
):
    """Does the work of `normalize`, whose arguments have been checked."""
    dtype = _wide(x.dtype)

    gamma = None
    beta = None
    if scale is not None:
        gamma = jnp.reshape(scale, layout.features)
    if offset is not None:
        beta = jnp.reshape(offset, layout.features)
    x_G = jnp.reshape(x, layout.shape)

    if not train:
        running_mean = jnp.reshape(stats.mean, layout.features).astype(dtype)
        running_var = jnp.reshape(stats.var, layout.features).astype(dtype)
        rstd = lax.rsqrt(running_var + _as(epsilon, dtype))
        y = _affine(x_G, running_mean, rstd, gamma, beta, mask, layout.relu)
        return jnp.reshape(y, x.shape), stats

    gamma = _vary_like(x, gamma)
    beta = _vary_like(x, beta)
    m = None if mask is None else _counts(mask, layout)
    y, mean, var = _batch_norm(
        x_G,
        gamma,
        beta,
        mask,
        m,
        _as(epsilon, dtype),
        layout,
    )
    mean, var, usable = _pool(mean, var, m, layout)

    y = jnp.reshape(y, x.shape)
    updated = _update(stats, mean, var, usable, momentum)
    return y, updated


# The layout of x in groups, and the checks of arguments.


class _Layout(NamedTuple):
    """How x is split: the examples' axis becomes [parts, examples of a part]. All is static.

    A part is a statistic group. If one group holds the whole batch, a part is a block of the batch,
    and the statistics of the blocks are merged: each device computes those of its own blocks.
    """

    shape: tuple[int, ...]
    parts: int  # the axis of the parts
    axes: tuple[int, ...]  # the axes of a part's statistics; the axis of its examples comes first
    features: tuple[int, ...]  # the shape of a parameter: 1 except on the feature axes
    stats_shape: tuple[int, ...]
    merged: bool  # whether the parts are blocks of one group
    axis_name: str | tuple[str, ...] | None
    relu: bool

    @property
    def over(self) -> tuple[int, ...]:
        """The axes of x over which the statistics of a group are taken."""
        if self.merged:
            return (self.parts, *self.axes)
        return self.axes

    @property
    def values(self) -> int:
        """The number of values behind a part's statistic, if there is no mask."""
        return math.prod(self.shape[a] for a in self.axes)

    @property
    def between_devices(self) -> bool:
        """Whether a group has parts on all devices of `axis_name`."""
        return self.merged and self.axis_name is not None

    @property
    def group_values(self) -> int:
        """The number of values behind a group's statistic, if there is no mask."""
        values = self.values
        if self.merged:
            values = values * self.shape[self.parts]
        if self.between_devices:
            values = values * lax.axis_size(self.axis_name)
        return values


def _layout(x, axis, train, group_size, axis_name, relu) -> _Layout:
    """Splits the examples, the first axis of x that is not a feature axis, into parts.

    Raises ValueError if `axis` does not name axes of x or leaves none for the examples, or if
    `group_size` (None: one group) does not divide the number of examples.
    """
    # The axes of x, and which of them hold features.
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    features = {a % x.ndim for a in axes if -x.ndim <= a < x.ndim}
    rest = [a for a in range(x.ndim) if a not in features]
    if len(features) != len(axes) or not features or not rest:
        raise ValueError(
            f"batch_norm: feature axes are {axis}, but x of shape {x.shape} has axes up to "
            f"{x.ndim - 1}; name each at most once, and leave one for the examples"
        )

    b = rest[0]  # the axis of the examples
    n = x.shape[b]
    if train and group_size is not None:
        parts = _groups(n, group_size)
    elif train and axis_name is None:
        parts = _blocks(n, x)
    else:
        parts = 1

    # The axes behind that of the examples move by one.
    shape = (*x.shape[:b], parts, n // parts, *x.shape[b + 1 :])
    moved = {a + 1 if a > b else a for a in features}

    summed = []
    parameter = []
    for a, size in enumerate(shape):
        if a in moved:
            parameter.append(size)
            continue
        parameter.append(1)
        if a != b:
            summed.append(a)

    return _Layout(
        shape=shape,
        parts=b,
        axes=tuple(summed),
        features=tuple(parameter),
        stats_shape=tuple(shape[a] for a in sorted(moved)),
        merged=train and group_size is None,
        axis_name=axis_name,
        relu=relu,
    )


def _blocks(n, x) -> int:
    """Returns the number of blocks into which a batch of n examples is cut that is one group.

    It is a multiple of the number of devices, so that each device has blocks of its own. Any number
    of devices that divides 8 gives 8 blocks, so that the result does not depend on it. The devices
    are those of the mesh on which x is known to lie (Explicit axes, `jax.set_mesh`), or else all.
    If x lies on fewer devices, and their number does not divide that of the blocks, XLA moves
    examples between devices.
    """
    if is_symbolic_dim(n) or n == 0:
        return 1
    mesh = jax.typeof(x).sharding.mesh
    devices = jax.device_count() if mesh.empty else mesh.size
    return math.gcd(n, math.lcm(8, devices))


def _groups(n, group_size: int) -> int:
    """Returns the number of groups in a batch of n examples."""
    if group_size >= 1 and not is_symbolic_dim(n) and n == 0:
        return 1  # `_check` raises the error for an empty batch
    try:
        if group_size >= 1 and n % group_size == 0:
            return n // group_size
    except jax.errors.ConcretizationTypeError:
        raise
    except Exception as error:  # a symbolic n: jax.export's error class is not public
        raise ValueError(
            f"batch_norm: group_size is {group_size}, but it cannot be known whether it divides a "
            f"batch of {n} examples; write the batch as '{group_size}*{n}'"
        ) from error
    raise ValueError(
        f"batch_norm: group_size is {group_size}, but must divide the batch of {n} examples; "
        "under shard_map, pmap or vmap that is the local batch, and larger groups need jit"
    )


def _check(x, layout: _Layout, train: bool, **per_feature) -> None:
    """Checks x and the parameters of its features.

    Raises TypeError if x is not floating point. Raises ValueError if a parameter does not have the
    shape of the features, or, in training, if x is empty or a statistic has fewer than two values.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"batch_norm: x has dtype {x.dtype}, but must be floating point")

    for name, value in per_feature.items():
        if value is None:
            continue
        shape = jnp.shape(value)
        if shape != layout.stats_shape:
            raise ValueError(
                f"batch_norm: {name} has shape {shape}, but the features of x "
                f"{x.shape} have {layout.stats_shape}"
            )

    if not train:
        return
    if 0 in x.shape:
        raise ValueError(f"batch_norm: x of shape {x.shape} is empty; training needs values")

    m = layout.group_values
    if not is_symbolic_dim(m) and m < 2:
        raise ValueError(
            f"batch_norm: each statistic has {m} value (x {x.shape}, groups of "
            f"{layout.shape[layout.axes[0]]}), but training needs at least 2"
        )


def refuse_index_groups(groups) -> None:
    """Raises ValueError for the `axis_index_groups` of Flax's layers, which ours do not support."""
    if groups is not None:
        raise ValueError(
            f"BatchNorm: axis_index_groups={groups} is not supported; set group_size to the number "
            "of examples that share statistics, and run the layer under jit"
        )


def _check_numbers(epsilon, momentum) -> None:
    """Raises ValueError for constants out of range; traced values cannot be checked."""
    # NaN is refused, too: it compares as false with everything.
    allowed = True
    if not isinstance(epsilon, jax.core.Tracer):
        allowed = bool(epsilon >= 0)
    if allowed and not isinstance(momentum, jax.core.Tracer):
        allowed = bool(0 <= momentum <= 1)

    if not allowed:
        raise ValueError(f"batch_norm: {epsilon=} must be >= 0, and {momentum=} within 0..1")


def _check_precision(stats: Stats) -> None:
    """Raises TypeError for statistics in which small updates would be lost."""
    for name, value in stats._asdict().items():
        if value is None:
            continue
        if _wide(value.dtype) != value.dtype:
            raise TypeError(
                f"batch_norm: the running {name} has dtype {value.dtype}, in which updates are "
                "lost; training needs float32: cast `params` only, and leave `batch_stats` as is"
            )


# jaxlib 0.10.2, the last one for Python 3.11, silently computes some sums over rows wrongly on CPUs
# (jax issue 39103). With this flag XLA does not pass sums to the library at fault.
SAFE_SUMS = "--xla_cpu_experimental_ynn_fusion_type=-reduce"


def sums_may_be_wrong() -> bool:
    """Whether this jaxlib computes some sums on CPUs wrongly and XLA_FLAGS does not prevent it."""
    major, minor = jaxlib.__version__.split(".")[:2]
    if (int(major), int(minor)) >= (0, 11):
        return False

    # The flag counts as set, whatever its value is.
    option, _, _ = SAFE_SUMS.partition("=")
    return option not in os.environ.get("XLA_FLAGS", "")


@functools.cache  # one warning in a process, whatever the filter of warnings
def _warn_of_wrong_sums() -> None:
    """Warns users of this module who have not set the flag; the commands set it themselves."""
    if sums_may_be_wrong() and jax.default_backend() == "cpu":
        warnings.warn(
            f"bn_jax: jaxlib {jaxlib.__version__} computes some sums over rows wrongly on CPUs "
            f"(jax issue 39103): set XLA_FLAGS={SAFE_SUMS} before jax starts, or use Python >= "
            "3.12 and jax >= 0.11.2",
            stacklevel=3,  # where normalize is called
        )


def _check_mask(x, mask, layout: _Layout):
    """Reshapes the mask to the axes of the layout; it has all examples, and may be 1 elsewhere.

    mask: bool [examples], or broadcastable to x. Raises ValueError if it is neither.
    """
    mask = jnp.asarray(mask, bool)
    b = layout.parts
    examples = x.shape[b]

    # [examples] becomes [1, ..., examples, ..., 1], of the rank of x.
    if mask.ndim == 1 and mask.shape[0] == examples:
        shape = [1] * x.ndim
        shape[b] = examples
        mask = jnp.reshape(mask, shape)

    # A mask of lower rank gets axes of size 1 in front, as in NumPy's broadcasting.
    missing = x.ndim - mask.ndim
    full = (1,) * missing + mask.shape
    fits = missing >= 0
    if fits:
        pairs = zip(full, x.shape, strict=True)
        fits = all(size in (1, size_of_x) for size, size_of_x in pairs)
    if not fits:
        raise ValueError(
            f"batch_norm: mask has shape {mask.shape}, but must have ({examples},) or "
            f"broadcast to x, {x.shape}"
        )

    before = full[:b]
    behind = full[b + 1 :]
    mask = jnp.reshape(mask, full)
    mask = jnp.broadcast_to(mask, (*before, examples, *behind))

    parts, examples_of_part = layout.shape[b : b + 2]
    return jnp.reshape(mask, (*before, parts, examples_of_part, *behind))


# Algorithm 1. Here x is [..., parts, examples of a part, ...]; statistics keep every axis.


def _batch_norm_forward(x, gamma, beta, mask, m, epsilon, layout: _Layout):
    """Computes Algorithm 1: y, and the mean and biased variance of every group and feature.

    m: the number of values behind each statistic, as `_counts` gives it; None if there is no mask.
    """
    mean, rest, var = _moments(x, mask, m, layout)

    if layout.merged:
        merged = _merge_parts(mean, rest, var, m, layout)
        # Without a barrier XLA on CPU merges the parts again for every value of y.
        mean, var = lax.optimization_barrier(merged)

    rstd = lax.rsqrt(var + epsilon)
    y = _affine(x, mean, rstd, gamma, beta, mask, layout.relu)
    return y, mean, var


def _moments(x, mask, m, layout: _Layout):
    """Computes mean, its rounding error, and biased variance of every part (Alg. 1, lines 1 and 2).

    The sums are of deviations from `near`, the mean of a sample of the values. For any data,
    (mean - near)^2 is at most variance * (number of values / size of the sample), which bounds the
    cancellation. The mean of a constant feature is exactly its value.
    """
    dtype = _wide(x.dtype)
    if m is None:
        m = _number(layout.values, dtype)
    else:
        at_least_one = jnp.maximum(m.part, 1)
        m = at_least_one.astype(dtype)

    near, near_too = _near(x, mask, layout)
    x = _promote(x)
    first = _masked_sum(x - near, mask, layout) / m
    squares = jnp.square(x - near_too)
    second = _masked_sum(squares, mask, layout) / m
    var = jnp.maximum(second - jnp.square(first), 0)

    # It is rounded by one bit, so that everything that reads the mean sees one value: a fused
    # multiply-add would see another one than the sums do.
    form = jnp.finfo(dtype)
    first = lax.reduce_precision(first, form.nexp, form.nmant - 1)
    mean = near + first
    rest = first - (mean - near)
    return mean, rest, var


def _near(x, mask, layout: _Layout):
    """Returns a value near the mean of every part, under two names (see `_mean_of_sample`).

    On NVIDIA GPUs a sample costs a kernel in every layer, and its mean often another one. 16-bit
    values have a single value as their sample there: an odd one moves the variance by no more than
    the number of values times 2^-24, and such data are rounded to 2^-8 or 2^-11 themselves.
    """
    sampled = functools.partial(_mean_of_sample, mask=mask, layout=layout)
    narrow = jnp.finfo(x.dtype).bits <= 16
    if narrow and _masks_examples(mask, layout):
        one = functools.partial(_one_value, mask=mask, layout=layout)
        return lax.platform_dependent(x, cuda=one, default=sampled)
    return sampled(x)


def _one_value(x, mask, layout: _Layout):
    """Takes the value in the middle of the first valid example of every part; 0 if it has none."""
    examples, *others = layout.axes
    for a in others:
        x = lax.slice_in_dim(x, x.shape[a] // 2, x.shape[a] // 2 + 1, axis=a)

    if mask is None:
        x = lax.slice_in_dim(x, 0, 1, axis=examples)
    else:
        first = jnp.argmax(mask, examples, keepdims=True)
        x = jnp.take_along_axis(x, first, examples, mode="promise_in_bounds")
        some = jnp.any(mask, examples, keepdims=True)
        x = jnp.where(some, x, 0)

    x = _promote(x)
    return x, x


def _mean_of_sample(x, mask, layout: _Layout):
    """Computes the mean of `_sample`."""
    x = _promote(x)
    sample, valid = _sample(x, mask, layout)
    total = jnp.sum(sample, layout.axes, keepdims=True, where=valid)
    near = total / _count(sample.shape, valid, layout.axes, x.dtype)

    # It is rounded to 16 bits: otherwise a fused multiply-add would see another value than the sums
    # do.
    near = lax.reduce_precision(near, jnp.finfo(near.dtype).nexp, 16)

    # One value gets two names: else XLA on CPU writes x - near to memory because two sums share it.
    near, near_too = lax.optimization_barrier((near, near))
    return near, near_too


def _masks_examples(mask, layout: _Layout) -> bool:
    """Whether a value counts or not by its example alone, or there is no mask."""
    if mask is None:
        return True
    behind = mask.shape[layout.axes[0] + 1 :]
    return not any(size > 1 for size in behind)


# jaxlib 0.10 with SAFE_SUMS adds numbers one after the other; a sum in two stages rounds less.
_SUMS_IN_TURN = jax.__version_info__ < (0, 11)


def _masked_sum(values, mask, layout: _Layout):
    """Sums the valid values. If whole examples are masked, it selects among sums of examples.

    XLA on CPU writes selected arrays to memory, and the sums are smaller than the values.
    """
    examples, *others = layout.axes
    if mask is None or not _masks_examples(mask, layout):
        if others and _SUMS_IN_TURN:
            of_examples = jnp.sum(values, others, keepdims=True, where=mask)
            of_examples = lax.optimization_barrier(of_examples)
            return jnp.sum(of_examples, examples, keepdims=True)
        return jnp.sum(values, layout.axes, keepdims=True, where=mask)

    if others:
        values = jnp.sum(values, others, keepdims=True)
    return jnp.sum(values, examples, keepdims=True, where=mask)


def _sample(x, mask, layout: _Layout):
    """Takes about a thirtieth of each part's values, whose mean is near the part's; and their mask.

    They come from at least an eighth of the examples, so that a single odd example does little. If
    there is a mask, they come from the examples with the most valid values. With a mask that varies
    over features, a sample may hold no valid value of some feature: then all of x is returned.
    """
    examples, *others = layout.axes
    n = x.shape[examples]
    few = -(-n // 8)

    if mask is not None:
        feature_axes = [a for a, size in enumerate(layout.features) if size > 1]
        if any(mask.shape[a] > 1 for a in feature_axes):
            return x, mask

    if others and not is_symbolic_dim(n):
        height = others[0]
        if mask is None or mask.shape[height] == 1:
            # A few rows of each example are taken, so that the sample is a thirtieth of the part.
            rows = x.shape[height] // (32 * few // n)
            x = lax.slice_in_dim(x, 0, jax.core.max_dim(rows, 1), axis=height)

    if mask is None:
        return lax.slice_in_dim(x, 0, few, axis=examples), None

    counts = jnp.sum(mask, others, keepdims=True, dtype=jnp.float32)
    order = jnp.argsort(-counts, examples, stable=True)
    index = lax.slice_in_dim(order, 0, few, axis=examples)
    x = jnp.take_along_axis(x, index, examples)
    mask = jnp.take_along_axis(mask, index, examples)
    return x, mask


def _merge_parts(mean, rest, var, m, layout: _Layout):
    """Computes the whole's mean and variance from those of its parts (Chan et al. 1983).

    One sum sends the means of all parts to all devices; every part has a place of its own in it.
    XLA combines it with the other sums here, because none depends on another's result. `rest` is
    the rounding error of the parts' means: a mean of 1e4 standard deviations is rounded to 5e-4 of
    one, and without `rest` that would change the variance.
    """
    axis = layout.parts
    dtype = mean.dtype
    means = _gather(mean, layout)
    if m is None:
        part = 1
        parts = 1
        whole = means.shape[axis]
        top = means
    else:
        part = m.part.astype(dtype)
        parts = m.parts.astype(dtype)
        whole = jnp.maximum(m.whole, 1).astype(dtype)
        top = jnp.where(parts > 0, means, -jnp.finfo(dtype).max)

    squares = _sum_parts(part * (var + jnp.square(rest)), layout)
    lost = _sum_parts(part * rest, layout) / whole
    product = _sum_parts(part * rest * mean, layout) / whole

    # Deviations are taken from one of the means, so that the mean of a constant is exact.
    near = jnp.max(top, axis, keepdims=True)
    if m is not None:
        near = jnp.where(m.whole > 0, near, 0)
    offset = means - near
    shift = jnp.sum(parts * offset, axis, keepdims=True) / whole
    deviations = jnp.square(offset - shift)
    between = jnp.sum(parts * deviations, axis, keepdims=True)

    # `correction` is what the rounding errors of the means contribute to the variance.
    uncorrected = (squares + between) / whole
    correction = 2 * (product - (near + shift) * lost)
    var = uncorrected + correction
    mean = near + (shift + lost)
    return mean, jnp.maximum(var, 0)


def _gather(value, layout: _Layout):
    """Gathers one value from each part: afterwards every device has those of all devices."""
    axis = layout.parts
    if layout.axis_name is None:
        n = value.shape[axis]
        if n == 1:
            return value

        # Each part writes into a place of its own, and the sum over the parts sends all to all.
        value = jnp.expand_dims(value, axis)
        rows = lax.broadcasted_iota(jnp.int32, (n, n), dimension=0)
        columns = lax.broadcasted_iota(jnp.int32, (n, n), dimension=1)
        mine = rows == columns
        others = [a for a in range(value.ndim) if a not in (axis, axis + 1)]
        mine = jnp.expand_dims(mine, others)
        placed = jnp.where(mine, value, 0)
        return jnp.sum(placed, axis + 1)

    n = lax.axis_size(layout.axis_name)
    shape = [1] * value.ndim
    shape[axis] = n
    places = lax.broadcasted_iota(jnp.int32, tuple(shape), axis)
    mine = places == lax.axis_index(layout.axis_name)
    placed = jnp.where(mine, value, 0)
    return lax.psum(placed, layout.axis_name)


def _sum_parts(value, layout: _Layout):
    """Sums over the parts of all devices."""
    total = jnp.sum(value, layout.parts, keepdims=True)
    if layout.axis_name is None:
        return total
    return lax.psum(total, layout.axis_name)


class _Counts(NamedTuple):
    """The numbers of valid values behind the statistics of masked data: float32, all axes kept."""

    part: jax.Array  # behind each part of this device
    parts: jax.Array  # behind each part that is merged, of all devices
    whole: jax.Array  # behind each group


def _counts(mask, layout: _Layout) -> _Counts:
    part = _masked_count(layout.shape, mask, layout.axes)
    if not layout.merged:
        return _Counts(part, part, part)
    parts = _gather(part, layout)
    whole = jnp.sum(parts, layout.parts, keepdims=True)
    return _Counts(part, parts, whole)


def _masked_count(shape, mask, axes):
    """Returns the number of valid values along `axes` of an array of this shape."""
    # A mask of size 1 along an axis counts once for each place of that axis.
    repeats = math.prod(shape[a] for a in axes if mask.shape[a] == 1)
    valid = jnp.sum(mask, axes, keepdims=True, dtype=jnp.float32)
    return valid * _number(repeats, jnp.float32)


def _count(shape, mask, axes, dtype):
    """Returns the number of values that enter a sum over `axes`, at least 1."""
    if mask is None:
        size = math.prod(shape[a] for a in axes)
        return _number(size, dtype)
    valid = _masked_count(shape, mask, axes)
    return jnp.maximum(valid, 1).astype(dtype)


def _whole(m, layout: _Layout, dtype):
    """Returns the number of values behind the statistics of a group, at least 1."""
    if m is not None:
        return jnp.maximum(m.whole, 1).astype(dtype)
    return _number(layout.group_values, dtype)


def _number(value, dtype):
    """Makes a size a number to compute with: a constant, unless it is symbolic (jax.export)."""
    if is_symbolic_dim(value):
        return jnp.asarray(value).astype(dtype)
    return value


def _affine(x, mean, rstd, gamma, beta, mask, relu):
    """Returns y = gamma * (x - mean) * rstd + beta (Alg. 1, lines 3 and 4), in x's dtype."""
    centered = _promote(x) - mean
    gain = rstd
    if gamma is not None:
        gain = rstd * gamma.astype(rstd.dtype)

    y = centered * gain
    if beta is not None:
        y = y + beta.astype(y.dtype)
    if relu:
        y = jnp.maximum(y, 0)
    if mask is not None:
        y = jnp.where(mask, y, 0)
    return y.astype(x.dtype)


def _wide(dtype):
    return jnp.promote_types(jnp.float32, dtype)


def _promote(x):
    return x.astype(_wide(x.dtype))


def _as(number, dtype):
    """Casts an array to that dtype; a Python number stays as it is."""
    return number.astype(dtype) if hasattr(number, "astype") else number


# Derivatives. JAX obtains a reverse derivative by transposing the forward one. Both are written
# out here: `_tangents` for jvp, jacfwd, linearize and the outer half of a hessian, and its
# transpose `_cotangents`, the paper's backward pass, which needs less memory than JAX's transpose
# of `_tangents`. A primitive joins the two, because JAX has no other way to give both: `custom_vjp`
# does not support forward mode, and `linear_call` does not support vmap.


_batch_norm = jax.custom_jvp(_batch_norm_forward, nondiff_argnums=(6,))


@functools.partial(_batch_norm.defjvp, symbolic_zeros=True)
def _batch_norm_jvp(layout, primals, tangents):
    x, gamma, beta, mask, m, epsilon = primals
    y, mean, var = _batch_norm(*primals, layout)
    rstd = lax.rsqrt(var + epsilon)

    # x is kept and not x_hat: the layer before holds x anyway, so this one adds two vectors only.
    known = _Known(x, mean, rstd, gamma, beta, mask, m)
    given = [None if isinstance(t, SymbolicZero) else t for t in tangents]
    dx, dgamma, dbeta, _, _, depsilon = given
    moved = _linear(known, (dx, dgamma, dbeta, depsilon), layout)
    return (y, mean, var), moved


class _Known(NamedTuple):
    """The values that a derivative needs besides the tangents or cotangents."""

    x: jax.Array
    mean: jax.Array
    rstd: jax.Array
    gamma: jax.Array | None
    beta: jax.Array | None
    mask: jax.Array | None
    m: _Counts | None


def _tangents(known: _Known, inputs, layout: _Layout):
    """Maps tangents of x, gamma, beta, epsilon (None: zero) linearly to those of y, mean, var."""
    x, mean, rstd, gamma, beta, mask, m = known
    dx, dgamma, dbeta, depsilon = inputs
    m = _whole(m, layout, mean.dtype)
    centered = _promote(x) - mean
    dx = jnp.zeros_like(centered) if dx is None else _promote(dx)
    if mask is not None:
        centered = jnp.where(mask, centered, 0)
        dx = jnp.where(mask, dx, 0)

    dmean = _sum_values(dx, layout) / m
    dvar = 2 * _sum_values(dx * centered, layout) / m
    under_root = dvar if depsilon is None else dvar + depsilon  # the change of var + epsilon
    drstd = -under_root * rstd * rstd * rstd / 2

    gain = rstd
    dgain = drstd
    if gamma is not None:
        gamma = gamma.astype(rstd.dtype)
        gain = rstd * gamma
        dgain = drstd * gamma
        if dgamma is not None:
            dgain = dgain + rstd * dgamma.astype(rstd.dtype)

    dy = (dx - dmean) * gain + centered * dgain
    if dbeta is not None:
        dy = dy + dbeta.astype(dy.dtype)
    if layout.relu:
        positive = _affine(x, mean, rstd, gamma, beta, None, False) > 0
        dy = jnp.where(positive, dy, 0)
    if mask is not None:
        dy = jnp.where(mask, dy, 0)
    return dy.astype(x.dtype), dmean, dvar


def _cotangents(known: _Known, outputs, layout: _Layout):
    """Computes the paper's gradients (section 3), plus those that enter through mean and var."""
    x, mean, rstd, gamma, beta, mask, m = known
    dy, mean_in, var_in = outputs
    m = _whole(m, layout, mean.dtype)
    g = 1 if gamma is None else gamma.astype(rstd.dtype)

    if layout.between_devices and not _varying(x):
        # Without vma types every device has its own loss, and the gradient is that of their sum.
        mean_in, var_in = lax.psum((mean_in, var_in), layout.axis_name)

    def read(after):
        # Each pass computes x - mean anew, after `after` is known. Otherwise XLA on CPU, which
        # drops optimization_barrier, keeps x - mean of the forward pass: a second copy of x.
        late = _after(after, mean)
        keep = mask
        if layout.relu:
            # As in `_moments`, one value has two names: else XLA on CPU writes x - late to memory.
            late, late_too = lax.optimization_barrier((late, late))
            positive = _affine(x, late_too, rstd, gamma, beta, None, False) > 0
            keep = positive if mask is None else positive & mask

        dy_in = _promote(dy)
        if keep is not None:
            dy_in = jnp.where(keep, dy_in, 0)
        centered = _promote(x) - late
        if mask is not None:
            centered = jnp.where(mask, centered, 0)
        return dy_in, centered

    # Each part waits for its own first value of dy, so that no device waits for another.
    first_of_each = [slice(None)] * dy.ndim
    for a in layout.axes:
        first_of_each[a] = slice(1)
    dy_in, centered = read(dy[tuple(first_of_each)])

    sum_dy, sum_product = _two_sums(dy_in, dy_in * centered, layout)
    sum_dy_xhat = sum_product * rstd
    dgamma = _sum_like(gamma, sum_dy_xhat)
    dbeta = _sum_like(beta, sum_dy)
    if layout.between_devices:
        sum_dy, sum_dy_xhat = lax.psum((sum_dy, sum_dy_xhat), layout.axis_name)

    dvar_y = -g * sum_dy_xhat * jnp.square(rstd) / 2
    dvar = dvar_y + var_in
    dmean = -g * sum_dy * rstd + mean_in  # the term dvar * sum(-2(x - mean))/m of the paper is 0

    dy_again, centered = read(sum_dy)
    if layout.relu:
        # For the sums, XLA on CPU has written `dy_in` to memory; elsewhere dy is read again.
        dy_in = lax.platform_dependent(dy_in, dy_again, cpu=_first, default=_second)
    else:
        dy_in = dy_again

    dx = dy_in * (g * rstd) + centered * (2 * dvar / m) + dmean / m
    if mask is not None:
        dx = jnp.where(mask, dx, 0)
    dx = dx.astype(x.dtype)

    depsilon = jnp.sum(dvar_y)
    return dx, dgamma, dbeta, depsilon


def _first(first, _):
    """Returns the first of two arrays: a branch of `lax.platform_dependent`, as `_second` is."""
    return first


def _second(_, second):
    return second


def _sum_values(value, layout: _Layout):
    """Sums over all values of a group."""
    value = jnp.sum(value, layout.over, keepdims=True)
    if layout.between_devices:
        value = lax.psum(value, layout.axis_name)
    return value


def _sum_like(p, total):
    """Returns the gradient of a parameter, from the totals of the groups."""
    if p is None:
        return None
    groups = tuple(a for a in range(p.ndim) if p.shape[a] != total.shape[a])
    total = jnp.sum(total, groups, keepdims=True)
    return total.astype(p.dtype)


def _two_sums(a, b, layout: _Layout):
    """Sums each of two arrays over the values of a group, on this device."""
    together = functools.partial(_sums_together, layout=layout)
    apart = functools.partial(_sums_apart, layout=layout)
    return lax.platform_dependent(a, b, cuda=together, default=apart)


def _sums_apart(a, b, layout: _Layout):
    sum_a = jnp.sum(a, layout.over, keepdims=True)
    sum_b = jnp.sum(b, layout.over, keepdims=True)
    return sum_a, sum_b


def _sums_together(a, b, layout: _Layout):
    """Computes both sums in one operation.

    For two separate sums XLA on GPUs makes two kernels for the last stage, and for some shapes it
    first writes the mask of the ReLU to memory.
    """
    # XLA splits a sum of 6,272 values (32 maps of 14 x 14) into two stages, but not one of 1,568,
    # whose operands it writes to memory first. So short sums are split into two stages here.
    short = not is_symbolic_dim(layout.values) and layout.values < 4096
    stages = [layout.axes]
    if short and len(layout.axes) > 1:
        examples, *others = layout.axes
        stages = [tuple(others), (examples,)]

    zero = jnp.zeros((), a.dtype)
    sums: tuple[jax.Array, ...] = (a, b)
    for axes in stages:
        sums = lax.reduce(sums, (zero, zero), _add_pairs, axes)
        sums = tuple(jnp.expand_dims(value, axes) for value in sums)
    if layout.merged:
        sums = tuple(jnp.sum(value, layout.parts, keepdims=True) for value in sums)

    # dgamma and dbeta are sums over these sums: without a barrier XLA adds up the examples again.
    return tuple(lax.optimization_barrier(sums))


def _add_pairs(left, right):
    a = left[0] + right[0]
    b = left[1] + right[1]
    return a, b


def _after(known, value):
    """Returns `value` such that no compiler can compute with it before `known`."""
    shape = jnp.broadcast_shapes(known.shape, value.shape)

    def chosen(known, value):
        never = (known != known) & (known == known)  # false even for NaN
        return jnp.where(never, 0, value)

    def behind_barrier(known, value):
        # XLA for GPUs keeps the barrier until kernels are made; `where` would be one more kernel.
        _, late = lax.optimization_barrier((known, value))
        late = _vary_like(known, late)
        return jnp.broadcast_to(late, shape)

    return lax.platform_dependent(known, value, cuda=behind_barrier, default=chosen)


_linear_p = Primitive("batch_norm_tangents")
_linear_p.multiple_results = True


def _linear(known: _Known, inputs, layout: _Layout):
    """Computes `_tangents`, as a primitive whose transpose is `_cotangents`."""
    leaves, known_tree = jax.tree.flatten(known)
    given, inputs_tree = jax.tree.flatten(inputs)
    present = [value is not None for value in inputs]
    n = len(leaves)

    def forward(*args):
        known = jax.tree.unflatten(known_tree, args[:n])
        inputs = jax.tree.unflatten(inputs_tree, args[n:])
        return _tangents(known, inputs, layout)

    def transpose(*args):
        known = jax.tree.unflatten(known_tree, args[:n])
        found = _cotangents(known, args[n:], layout)
        return [value for value, there in zip(found, present, strict=True) if there]

    names = layout.axis_name or ()
    if isinstance(names, str):
        names = (names,)
    outputs = _linear_p.bind(
        *leaves,
        *given,
        forward=forward,
        transpose=transpose,
        known=n,
        names=tuple(names),
    )
    return tuple(outputs)


def _linear_run(*args, forward: Callable, **_):
    return list(forward(*args))


def _linear_avals(x, mean, *_, **__):
    return [x, mean, mean]


def _linear_jvp(primals, tangents, *, forward, known, **params):
    bind = functools.partial(_linear_p.bind, forward=forward, known=known, **params)

    # It is linear in its inputs: if only these move, the derivative is the primitive itself.
    if all(type(t) is ad.Zero for t in tangents[:known]):
        inputs = [ad.instantiate_zeros(t) for t in tangents[known:]]
        outputs = bind(*primals)
        moved = bind(*primals[:known], *inputs)
        return outputs, moved

    # Otherwise jax differentiates `_tangents`, by the arguments that move.
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def along(*some):
        args = list(primals)
        for i, value in zip(moving, some, strict=True):
            args[i] = value
        return list(forward(*args))

    values = [primals[i] for i in moving]
    directions = [tangents[i] for i in moving]
    return jax.jvp(along, values, directions)


def _linear_transpose(cotangents, *args, transpose, known, **_):
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    found = transpose(*args[:known], *cotangents)

    # Only the inputs are linear; nothing is returned for the known values.
    results = [None] * known
    for argument, cotangent in zip(args[known:], found, strict=True):
        wanted = ad.is_undefined_primal(argument)
        results.append(cotangent if wanted else None)
    return results


def _linear_batch(mapped, args, dims, *, forward, transpose, known, names):
    unmapped = all(d is None for d in dims)
    if unmapped and mapped.name not in names:
        found = _linear_p.bind(
            *args,
            forward=forward,
            transpose=transpose,
            known=known,
            names=names,
        )
        return found, [None] * len(found)

    # x, mean and all inputs get the axis.
    args = list(args)
    dims = list(dims)
    for i in (0, 1, *range(known, len(args))):
        args[i] = batching.bdim_at_front(args[i], dims[i], mapped.size)
        dims[i] = 0

    vmap = functools.partial(
        jax.vmap,
        axis_name=mapped.name,
        axis_size=mapped.size,
    )
    found = _linear_p.bind(
        *args,
        forward=vmap(forward, in_axes=tuple(dims)),
        transpose=vmap(transpose, in_axes=(*dims[:known], 0, 0, 0)),
        known=known,
        names=names,
    )
    return found, [0] * len(found)


_linear_p.def_impl(_linear_run)
_linear_p.def_abstract_eval(_linear_avals)
ad.primitive_jvps[_linear_p] = _linear_jvp
ad.primitive_transposes[_linear_p] = _linear_transpose
batching.fancy_primitive_batchers[_linear_p] = _linear_batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_linear_run, multiple_results=True))


# How values lie on devices.


def _varying(x) -> frozenset[str]:
    """Returns the axes of a shard_map over which x is known to vary (if it has check_vma=True)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _vary_like(x, p):
    """Marks a parameter as used by each shard of a shard_map, so that its gradients are summed."""
    if p is None:
        return None
    missing = _varying(x) - _varying(p)
    if not missing:
        return p
    return lax.pcast(p, tuple(missing), to="varying")


def _explicit_axes(x) -> tuple[str, ...]:
    """Returns the axes of x's mesh that have explicit types."""
    mesh = jax.typeof(x).sharding.mesh

    names = []
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind == AxisType.Explicit:
            names.append(name)
    return tuple(names)


def _explicit_sharding(x, value) -> NamedSharding:
    """Returns the sharding of a value used with x: replicated on x's mesh if it has none yet."""
    found = jax.typeof(value).sharding
    if found.mesh.empty:
        mesh = jax.typeof(x).sharding.mesh
        return NamedSharding(mesh, PartitionSpec())
    return found


# Running estimates, and Algorithm 2.


def _pool(mean, var, m, layout: _Layout):
    """Averages mean and unbiased variance over the groups that have at least two values.

    Returns (mean, var, whether there was such a group), each of the features' shape.
    """
    # No sum over groups waits for another, so XLA can combine those of all layers in one message.
    axis = layout.parts
    dtype = mean.dtype
    full = _whole(None, layout, dtype)
    m = full if m is None else m.whole.astype(dtype)
    groups = [1] * mean.ndim
    groups[axis] = mean.shape[axis]
    m = m * jnp.ones(groups, dtype)

    # A group's weight is the share of its values that are valid, and 0 if it has fewer than two.
    # Its unbiased variance has one degree of freedom less than it has values.
    weight = jnp.where(m < 2, 0, m / full)
    values = jnp.sum(weight, axis, keepdims=True)
    of_variance = jnp.maximum(weight - 1 / full, 0)
    freedom = jnp.sum(of_variance, axis, keepdims=True)
    squares = jnp.sum(weight * var, axis, keepdims=True)

    # The mean of a group that is alone stays as it is, to the last digit.
    spread = layout.axis_name is not None and not layout.merged
    alone = mean.shape[axis] == 1 and not spread
    total = mean
    if not alone:
        total = jnp.sum(weight * mean, axis, keepdims=True)
    if spread:
        values = _vary_like(mean, values)
        freedom = _vary_like(mean, freedom)
        sums = (total, squares, values, freedom)
        total, squares, values, freedom = lax.psum(sums, layout.axis_name)
    if not alone:
        total = total / jnp.where(values > 0, values, 1)

    var = squares / jnp.where(freedom > 0, freedom, 1)
    usable = jnp.broadcast_to(freedom > 0, var.shape)
    found = (total, var, usable)
    return tuple(jnp.reshape(v, layout.stats_shape) for v in found)


def _update(stats: Stats, mean, var, usable, momentum) -> Stats:
    """Applies update k, with the weight that makes batch i's share proportional to momentum**(k-i).

    If `usable` is False, nothing changes.
    """
    if stats.count is None:
        count = None
        weight = _as(1 - momentum, mean.dtype)
        weight = jnp.where(usable, weight, 0)
    else:
        count = lax.stop_gradient(stats.count)
        k = (count + 1).astype(mean.dtype)
        first = k == 1
        weight = jnp.where(first, 1, _weight(k, momentum))
        weight = jnp.where(usable, weight, 0)

        # Above 2^24 adding 1 does not change a float32: then the next larger float32 is taken.
        most = jnp.full_like(count, jnp.finfo(count.dtype).max)
        more = jnp.maximum(count + 1, jnp.nextafter(count, most))
        count = jnp.where(jnp.any(usable), more, count)

    return Stats(
        mean=_toward(stats.mean, mean, weight),
        var=_toward(stats.var, var, weight),
        count=count,
    )


def _weight(k, momentum):
    """Returns the weight (1 - momentum) / (1 - momentum**k); at momentum 1 its limit, 1/k."""
    if isinstance(momentum, int | float):
        if momentum == 1:
            return 1 / k
        if momentum == 0:
            return jnp.ones_like(k)
        # expm1 is exact where momentum is near 1.
        return (1 - momentum) / -jnp.expm1(k * math.log(momentum))

    # If momentum is traced, 0.5 takes the place of 0 and 1, for which this formula or its
    # derivative is not finite.
    momentum = jnp.asarray(momentum).astype(k.dtype)
    inside = (momentum > 0) & (momentum < 1)
    safe = jnp.where(inside, momentum, 0.5)
    weight = (1 - safe) / -jnp.expm1(k * jnp.log(safe))
    at_the_ends = jnp.where(momentum == 1, 1 / k, 1)
    return jnp.where(inside, weight, at_the_ends)


def _toward(old, new, weight):
    """Moves an estimate to a new value by the share `weight`; 1 gives exactly that value."""
    wide = old.astype(new.dtype)
    moved = (1 - weight) * wide + weight * new
    return moved.astype(old.dtype)


def merge(a: Stats, b: Stats) -> Stats:
    """Averages two statistics, weighted by their counts. A count of 0 adds nothing.

    Both must have the same shape. Raises ValueError if one has no count, hence no known weight.
    """
    if a.count is None or b.count is None:
        raise ValueError(
            "batch_norm.merge: count is None, so the weight is unknown; set a count on both"
        )
    count = a.count + b.count
    dtype = a.mean.dtype
    share = b.count.astype(dtype) / jnp.maximum(count, 1).astype(dtype)
    return Stats(
        mean=_toward(a.mean, b.mean, share),
        var=_toward(a.var, b.var, share),
        count=count,
    )


def population(batches: Iterable[Stats]) -> Stats:
    """Computes E[x] and Var[x] of Algorithm 2 (lines 10, 11) from training batches' statistics.

    `batches` holds one `Stats` for each batch, as `normalize(..., train=True)` makes it out of
    `init_stats`: the batch's mean, m/(m-1) times its biased variance, and a count of 1. All have
    one shape; there must be at least one. For a stream of batches, call `merge` on each.
    """
    return functools.reduce(merge, batches)


def fold(kernel, bias, scale, offset, stats: Stats, *, epsilon: float):
    """Merges a linear layer and the inference BN after it into one layer (Alg. 2, line 12).

    kernel: [..., features]; bias, scale, offset: [features] or None; stats: of shape [features].
    Returns the new kernel, [..., features], and bias, [features]. Raises ValueError if there is not
    one statistic for each output feature, as in the per-activation form.
    """
    if jnp.shape(stats.mean) != kernel.shape[-1:]:
        raise ValueError(
            f"batch_norm.fold: statistics have shape {jnp.shape(stats.mean)}, but must have "
            f"{kernel.shape[-1:]}, as the kernel's shape is {kernel.shape}"
        )
    gamma = 1 if scale is None else scale
    gain = lax.rsqrt(stats.var + epsilon) * gamma

    before = 0 if bias is None else bias
    shift = (before - stats.mean) * gain
    if offset is not None:
        shift = shift + offset

    return kernel * gain, shift
