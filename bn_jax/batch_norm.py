"""Batch normalization as pure functions: state in, state out (Ioffe & Szegedy, arXiv 1502.03167).

Algorithm 1 is `normalize(..., train=True)`: a mini-batch is normalized by its own mean and biased
variance. The mini-batch is a *statistic group*: `group_size` consecutive examples of the global
batch (the paper's worker batch of 32), on whatever devices they are. Algorithm 2 is `population` of
the batches' statistics, then `normalize(..., train=False)` or, as one affine layer, `fold`.
Statistics are in promote(float32, x.dtype), about a shift, never E[x^2] - E[x]^2.

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
"""The `count` of an estimate that is taken over as a long moving average, e.g. from PyTorch."""


class Stats(NamedTuple):
    """Estimates of the population's statistics, one value a feature.

    After k updates from `init_stats`, `mean` and `var` are weighted averages of the k batches'
    means and *unbiased* variances, with weights in the ratio momentum**(k - i): right from the
    first step. `count` is k (float32). Without a count (None) the estimate is a moving average that
    has converged, as other libraries keep it: every update has the weight 1 - momentum.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array | None  # type: ignore[assignment]  # not tuple.count


def init_stats(shape, dtype=jnp.float32) -> Stats:
    """Before the first update: mean 0 and variance 1, which that update replaces entirely."""
    return Stats(jnp.zeros(shape, dtype), jnp.ones(shape, dtype), jnp.zeros((), jnp.float32))


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
    """Algorithm 1 (`train`), or the inference network of Algorithm 2, which reads `stats`.

    Args:
      x: floating point, of any rank; its first axis that is no feature axis holds the examples.
      scale, offset: gamma and beta, one value a feature, or None for 1 and 0.
      stats: running estimates, one value a feature: read if not `train`, updated if `train`.
      group_size: examples that share statistics; divides the batch. None: all (the global batch).
      mask: True where a value counts, [examples] or broadcastable to x. Other values enter no
        statistic and no gradient, whatever they are, and come out as 0, in inference too.
      axis: feature axes. -1 is the convolutional form (section 3.2), all but 0 the per-activation.
      epsilon: added to the variance, in the unit of x squared. May be traced.
      momentum: share of the running estimate that an update keeps; 1 averages all batches alike.
        May be traced (a schedule).
      relu: give max(y, 0), in a backward pass that needs no copy of y.
      axis_name: the axis (or axes) of `shard_map`, `pmap` or `vmap` that shares out the batch. With
        `group_size=None` a group is then the batch over that axis; with a `group_size`, which must
        divide the local batch, only the running estimates are averaged over it.

    Returns:
      y, of x's shape and dtype, and the statistics, new if `train`, with the structure and dtypes
      of `stats`. A group of fewer than two valid values is normalized with what it has and does not
      change them.

    Raises:
      TypeError: x is not floating point, or `stats` to be updated are narrower than float32.
      ValueError: a shape, group or constant that cannot be used, named with its limit.

    Warns, once in a process, if this jaxlib computes some sums on CPUs wrongly.
    """
    _warn_of_wrong_sums()
    layout = _layout(x, axis, train, group_size, axis_name, relu)
    _check(x, layout, train, scale=scale, offset=offset, mean=stats.mean, var=stats.var)
    _check_numbers(epsilon, momentum)
    if train:
        _check_precision(stats)
    if mask is not None:
        mask = _check_mask(x, mask, layout)

    def run(x, scale, offset, stats, mask, epsilon, momentum):
        return _normalize(x, scale, offset, stats, mask, epsilon, momentum, train, layout)

    arrays = (x, scale, offset, stats, mask, epsilon, momentum)
    explicit = _explicit_axes(x)
    if explicit:
        # Which device holds what of a group cannot be written as an Explicit sharding where a group
        # lies on several devices: XLA decides it here, too, as it does for Auto axes.
        outputs = jax.tree.map(functools.partial(_explicit_sharding, x), (x, stats))
        run = jax.sharding.auto_axes(run, axes=explicit, out_sharding=outputs)
        arrays = jax.tree.map(jnp.asarray, arrays)
    return run(*arrays)


def _normalize(x, scale, offset, stats, mask, epsilon, momentum, train, layout):
    """`normalize` of arguments that are checked."""
    gamma = None if scale is None else jnp.reshape(scale, layout.features)
    beta = None if offset is None else jnp.reshape(offset, layout.features)
    x_G = jnp.reshape(x, layout.shape)
    if not train:
        dtype = _wide(x.dtype)
        running_mean = jnp.reshape(stats.mean, layout.features).astype(dtype)
        running_var = jnp.reshape(stats.var, layout.features).astype(dtype)
        rstd = lax.rsqrt(running_var + _as(epsilon, dtype))
        y = _affine(x_G, running_mean, rstd, gamma, beta, mask, layout.relu)
        return jnp.reshape(y, x.shape), stats

    gamma = _vary_like(x, gamma)
    beta = _vary_like(x, beta)
    m = None if mask is None else _counts(mask, layout)
    y, mean, var = _batch_norm(x_G, gamma, beta, mask, m, _as(epsilon, _wide(x.dtype)), layout)
    mean, var, usable = _pool(mean, var, m, layout)
    return jnp.reshape(y, x.shape), _update(stats, mean, var, usable, momentum)


# The layout of x in groups, and what is refused.


class _Layout(NamedTuple):
    """x with the axis of its examples split into [parts, examples of a part]; all of it is static.

    A part is a statistic group. Where one group holds the whole batch, a part is a block of it, and
    the blocks' statistics are merged: a device computes those of its blocks by itself.
    """

    shape: tuple[int, ...]
    parts: int  # the axis
    axes: tuple[int, ...]  # over which a part's statistics are taken, that of its examples first
    features: tuple[int, ...]  # shape of a parameter: 1 but on the feature axes
    stats_shape: tuple[int, ...]
    merged: bool  # the parts are blocks of one group
    axis_name: str | tuple[str, ...] | None
    relu: bool

    @property
    def over(self) -> tuple[int, ...]:
        """The axes of x over which the statistics of a group are taken."""
        return (self.parts, *self.axes) if self.merged else self.axes

    @property
    def values(self) -> int:
        """Values behind the statistic of a part, where there is no mask."""
        return math.prod(self.shape[a] for a in self.axes)


def _layout(x, axis, train, group_size, axis_name, relu) -> _Layout:
    """Raises ValueError if `axis` names no axis of x or leaves none for the examples (the first
    axis that is no feature axis), or if `group_size` (None: one group) does not divide them.
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    features = {a % x.ndim for a in axes if -x.ndim <= a < x.ndim}
    rest = [a for a in range(x.ndim) if a not in features]
    if len(features) != len(axes) or not features or not rest:
        raise ValueError(
            f"batch_norm: feature axes are {axis}, but x of shape {x.shape} has axes up to "
            f"{x.ndim - 1}, each to be named once, and one must be left for the examples"
        )
    b = rest[0]
    n = x.shape[b]
    if not train or group_size is None:
        parts = _blocks(n, x) if train and axis_name is None else 1
    else:
        parts = _groups(n, group_size)
    shape = (*x.shape[:b], parts, n // parts, *x.shape[b + 1 :])
    split = {a + (a > b) for a in features}
    return _Layout(
        shape=shape,
        parts=b,
        axes=tuple(a for a in range(x.ndim + 1) if a not in split and a != b),
        features=tuple(s if a in split else 1 for a, s in enumerate(shape)),
        stats_shape=tuple(shape[a] for a in sorted(split)),
        merged=train and group_size is None,
        axis_name=axis_name,
        relu=relu,
    )


def _blocks(n, x) -> int:
    """Blocks of a batch of n examples that is one group: as many as devices may share it out.

    8 whatever the number of devices, where it divides 8, so that the result does not depend on it.
    The devices are those of the mesh that x is known to lie on (Explicit axes, `jax.set_mesh`), or
    else all. On a part of them that divides neither number, XLA moves examples between devices.
    """
    if is_symbolic_dim(n) or n == 0:
        return 1
    mesh = jax.typeof(x).sharding.mesh
    devices = jax.device_count() if mesh.empty else mesh.size
    return math.gcd(n, math.lcm(8, devices))


def _groups(n, group_size: int) -> int:
    """Groups of a batch of n examples."""
    if group_size >= 1 and not is_symbolic_dim(n) and n == 0:
        return 1  # refused later, as empty
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
        "under shard_map, pmap or vmap that is the local one, and larger groups need jit"
    )


def _check(x, layout: _Layout, train: bool, **per_feature) -> None:
    """Raises TypeError if x is not floating point, ValueError if a parameter has not the shape
    of the features and, in training, if x is empty or has fewer than two values a statistic.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"batch_norm: x has dtype {x.dtype}, but must be floating point")
    for name, value in per_feature.items():
        if value is not None and jnp.shape(value) != layout.stats_shape:
            raise ValueError(
                f"batch_norm: {name} has shape {jnp.shape(value)}, but the features of x "
                f"{x.shape} have {layout.stats_shape}"
            )
    if not train:
        return
    if 0 in x.shape:
        raise ValueError(f"batch_norm: x of shape {x.shape} is empty; training needs values")
    m = layout.values * (layout.shape[layout.parts] if layout.merged else 1)
    if layout.merged and layout.axis_name is not None:
        m = m * lax.axis_size(layout.axis_name)
    if not is_symbolic_dim(m) and m < 2:
        raise ValueError(
            f"batch_norm: {m} value a statistic (x {x.shape}, groups of "
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
    """Raises ValueError for constants out of range; of traced values nothing is known."""
    known = [not isinstance(value, jax.core.Tracer) for value in (epsilon, momentum)]
    if (known[0] and not epsilon >= 0) or (known[1] and not 0 <= momentum <= 1):
        raise ValueError(f"batch_norm: {epsilon=} must be >= 0, and {momentum=} within 0..1")


def _check_precision(stats: Stats) -> None:
    """Raises TypeError for statistics in which small updates would be lost."""
    for name, value in stats._asdict().items():
        if value is not None and _wide(value.dtype) != value.dtype:
            raise TypeError(
                f"batch_norm: the running {name} has dtype {value.dtype}, in which updates are "
                "lost; training needs float32: cast `params` only, and leave `batch_stats` as is"
            )


# jaxlib 0.10.2, the last one for Python 3.11, computes some sums over rows wrongly on CPUs, without
# a word (jax issue 39103). This flag keeps sums from the library that does so.
SAFE_SUMS = "--xla_cpu_experimental_ynn_fusion_type=-reduce"


def sums_may_be_wrong() -> bool:
    """Whether this jaxlib computes some sums on CPUs wrongly and XLA_FLAGS does not mend it."""
    release = tuple(map(int, jaxlib.__version__.split(".")[:2]))
    option = SAFE_SUMS.partition("=")[0]
    return release < (0, 11) and option not in os.environ.get("XLA_FLAGS", "")


@functools.cache  # one warning in a process, whatever the filter of warnings
def _warn_of_wrong_sums() -> None:
    """The commands set the flag themselves; whoever uses this module sets it, or is told here."""
    if sums_may_be_wrong() and jax.default_backend() == "cpu":
        warnings.warn(
            f"bn_jax: jaxlib {jaxlib.__version__} computes some sums over rows wrongly on CPUs "
            f"(jax issue 39103): set XLA_FLAGS={SAFE_SUMS} before jax starts, or use Python >= "
            "3.12 and jax >= 0.11.2",
            stacklevel=3,  # where normalize is called
        )


def _check_mask(x, mask, layout: _Layout):
    """The mask with the axes of the layout, broadcastable to it but for the examples.

    mask: bool [examples], or broadcastable to x. Raises ValueError if it is neither.
    """
    mask = jnp.asarray(mask, bool)
    b = layout.parts
    if mask.ndim == 1 and mask.shape[0] == x.shape[b]:
        mask = jnp.reshape(mask, [x.shape[b] if a == b else 1 for a in range(x.ndim)])
    full = (1,) * (x.ndim - mask.ndim) + mask.shape
    if len(full) > x.ndim or any(s not in (1, t) for s, t in zip(full, x.shape, strict=True)):
        raise ValueError(
            f"batch_norm: mask has shape {mask.shape}, but must have ({x.shape[b]},) or "
            f"broadcast to x, {x.shape}"
        )
    mask = jnp.broadcast_to(jnp.reshape(mask, full), (*full[:b], x.shape[b], *full[b + 1 :]))
    return jnp.reshape(mask, (*full[:b], *layout.shape[b : b + 2], *full[b + 1 :]))


# Algorithm 1. Here x is [..., parts, examples of a part, ...]; statistics keep every axis.


def _batch_norm_forward(x, gamma, beta, mask, m, epsilon, layout: _Layout):
    """Algorithm 1: y, and the mean and biased variance of every group and feature.

    m: values behind each statistic, as `_counts` gives them; None: all.
    """
    mean, rest, var = _moments(x, mask, m, layout)
    if layout.merged:
        mean, var = _merge_parts(mean, rest, var, m, layout)
    y = _affine(x, mean, lax.rsqrt(var + epsilon), gamma, beta, mask, layout.relu)
    return y, mean, var


def _moments(x, mask, m, layout: _Layout):
    """Mean, what its rounding left, and biased variance of every part (Alg. 1, lines 1 and 2).

    They are taken about the mean of a sample of the values. For any data at all, (mean - near)^2
    is at most variance * values / values of the sample, which bounds the cancellation. A constant
    feature's mean is exactly its value.
    """
    axes = layout.axes
    x = _promote(x)
    m = _number(layout.values, x.dtype) if m is None else jnp.maximum(m.part, 1).astype(x.dtype)
    sample, valid = _sample(x, mask, layout)
    near = jnp.sum(sample, axes, keepdims=True, where=valid)
    near = near / _count(sample.shape, valid, axes, x.dtype)
    # Rounded to 16 bits: a fused multiply-add would see another value here than the sums see.
    form = jnp.finfo(near.dtype)
    near = lax.reduce_precision(near, form.nexp, 16)
    # Two names for one value: else XLA on CPU writes x - near to memory because two sums share it.
    near, near_too = lax.optimization_barrier((near, near))
    first = _masked_sum(x - near, mask, axes) / m
    second = _masked_sum(jnp.square(x - near_too), mask, axes) / m
    var = jnp.maximum(second - jnp.square(first), 0)
    # A bit less than it has, for the same reason: all see one mean.
    first = lax.reduce_precision(first, form.nexp, form.nmant - 1)
    mean = near + first
    return mean, first - (mean - near), var


# jaxlib 0.10 with SAFE_SUMS adds up one number after the other: in two stages less is lost.
_SUMS_IN_TURN = jax.__version_info__ < (0, 11)


def _masked_sum(values, mask, axes):
    """Sum of the valid values; where whole examples are masked, of the sums of these examples.

    XLA on CPU writes what it selects to memory: the sums are smaller than the values.
    """
    examples, *others = axes
    if mask is None or any(mask.shape[a] > 1 for a in range(mask.ndim) if a > examples):
        if others and _SUMS_IN_TURN:
            values = lax.optimization_barrier(jnp.sum(values, others, keepdims=True, where=mask))
            return jnp.sum(values, examples, keepdims=True)
        return jnp.sum(values, axes, keepdims=True, where=mask)
    if others:
        values = jnp.sum(values, others, keepdims=True)
    return jnp.sum(values, examples, keepdims=True, where=mask)


def _sample(x, mask, layout: _Layout):
    """Values of each part whose mean is near its mean, and their mask: about a thirtieth of them.

    They come from an eighth of the examples at least, so that one of these may be anything; of
    masked examples from those with the most valid values. A mask that varies over features may
    leave a feature without a value in any such sample: then all of x is taken.
    """
    examples, *others = layout.axes
    n = x.shape[examples]
    few = -(-n // 8)
    per_feature = [a for a, size in enumerate(layout.features) if size > 1]
    if mask is not None and any(mask.shape[a] > 1 for a in per_feature):
        return x, mask
    if others and not is_symbolic_dim(n) and (mask is None or mask.shape[others[0]] == 1):
        # Of each example a few rows, so that all is about a thirtieth of the part.
        rows = x.shape[others[0]] // (32 * few // n)
        x = lax.slice_in_dim(x, 0, max(rows, 1), axis=others[0])
    if mask is None:
        return lax.slice_in_dim(x, 0, few, axis=examples), None
    counts = jnp.sum(mask, others, keepdims=True, dtype=jnp.float32)
    order = jnp.argsort(-counts, examples, stable=True)
    index = lax.slice_in_dim(order, 0, few, axis=examples)
    x = jnp.take_along_axis(x, index, examples)
    return x, jnp.take_along_axis(mask, index, examples)


def _merge_parts(mean, rest, var, m, layout: _Layout):
    """Mean and variance of the whole from those of its parts (Chan, Golub & LeVeque 1983).

    The means of all parts are sent to all devices by one sum, in which every part has a place of
    its own. XLA combines it with the other sums here, as none depends on another's result. `rest`
    is what the parts' means lost when they were rounded: a mean of 1e4 deviations is known to 5e-4
    of them only, and without it the variance would show that.
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

    # About one of the means, so that the mean of a constant is exact.
    near = jnp.max(top, axis, keepdims=True)
    if m is not None:
        near = jnp.where(m.whole > 0, near, 0)
    offset = means - near
    shift = jnp.sum(parts * offset, axis, keepdims=True) / whole
    between = jnp.sum(parts * jnp.square(offset - shift), axis, keepdims=True)
    var = (squares + between) / whole + 2 * (product - (near + shift) * lost)
    return near + (shift + lost), jnp.maximum(var, 0)


def _gather(value, layout: _Layout):
    """One value a part to the values of all parts, over all devices, on every device."""
    axis = layout.parts
    if layout.axis_name is None:
        n = value.shape[axis]
        if n == 1:
            return value
        value = jnp.expand_dims(value, axis)
        mine = lax.broadcasted_iota(jnp.int32, (n, n), 0) == lax.broadcasted_iota(
            jnp.int32, (n, n), 1
        )
        mine = jnp.expand_dims(mine, [a for a in range(value.ndim) if a not in (axis, axis + 1)])
        return jnp.sum(jnp.where(mine, value, 0), axis + 1)
    n = lax.axis_size(layout.axis_name)
    places = tuple(n if a == axis else 1 for a in range(value.ndim))
    mine = lax.broadcasted_iota(jnp.int32, places, axis) == lax.axis_index(layout.axis_name)
    return lax.psum(jnp.where(mine, value, 0), layout.axis_name)


def _sum_parts(value, layout: _Layout):
    """Sum over the parts of all devices."""
    value = jnp.sum(value, layout.parts, keepdims=True)
    return value if layout.axis_name is None else lax.psum(value, layout.axis_name)


class _Counts(NamedTuple):
    """Numbers of valid values behind the statistics of masked data, float32, all axes kept."""

    part: jax.Array
    parts: jax.Array  # of all parts that are merged, over all devices
    whole: jax.Array  # of a group


def _counts(mask, layout: _Layout) -> _Counts:
    part = _masked_count(layout.shape, mask, layout.axes)
    if not layout.merged:
        return _Counts(part, part, part)
    parts = _gather(part, layout)
    return _Counts(part, parts, jnp.sum(parts, layout.parts, keepdims=True))


def _masked_count(shape, mask, axes):
    repeats = math.prod(shape[a] for a in axes if mask.shape[a] == 1)
    return jnp.sum(mask, axes, keepdims=True, dtype=jnp.float32) * _number(repeats, jnp.float32)


def _count(shape, mask, axes, dtype):
    """At least 1: values that a sum over `axes` has."""
    if mask is None:
        return _number(math.prod(shape[a] for a in axes), dtype)
    return jnp.maximum(_masked_count(shape, mask, axes), 1).astype(dtype)


def _whole(m, layout: _Layout, dtype):
    """At least 1: values behind the statistics of a group."""
    if m is not None:
        return jnp.maximum(m.whole, 1).astype(dtype)
    values = layout.values * (layout.shape[layout.parts] if layout.merged else 1)
    if layout.merged and layout.axis_name is not None:
        values = values * lax.axis_size(layout.axis_name)
    return _number(values, dtype)


def _number(value, dtype):
    """A size as a number to compute with: a constant, unless it is symbolic (jax.export)."""
    return jnp.asarray(value).astype(dtype) if is_symbolic_dim(value) else value


def _affine(x, mean, rstd, gamma, beta, mask, relu):
    """y = gamma * (x - mean) * rstd + beta (Alg. 1, lines 3 and 4), in x's dtype."""
    y = (_promote(x) - mean) * (rstd if gamma is None else rstd * gamma.astype(rstd.dtype))
    y = y if beta is None else y + beta.astype(y.dtype)
    y = jnp.maximum(y, 0) if relu else y
    return (y if mask is None else jnp.where(mask, y, 0)).astype(x.dtype)


def _wide(dtype):
    return jnp.promote_types(jnp.float32, dtype)


def _promote(x):
    return x.astype(_wide(x.dtype))


def _as(number, dtype):
    """An array in that dtype; a Python number as it is."""
    return number.astype(dtype) if hasattr(number, "astype") else number


# Derivatives. JAX takes a reverse derivative as the transpose of the forward one. Both are written
# out here: `_tangents` for jvp, jacfwd, linearize and the outer half of a hessian, and its
# transpose `_cotangents`, the paper's backward pass, which needs less memory than what JAX would
# make of the first. A primitive joins the two, as JAX has no other way to give both: `custom_vjp`
# refuses forward mode, and `linear_call` refuses vmap.


_batch_norm = jax.custom_jvp(_batch_norm_forward, nondiff_argnums=(6,))


@functools.partial(_batch_norm.defjvp, symbolic_zeros=True)
def _batch_norm_jvp(layout, primals, tangents):
    x, gamma, beta, mask, m, epsilon = primals
    y, mean, var = _batch_norm(*primals, layout)
    rstd = lax.rsqrt(var + epsilon)
    # x is kept and not x_hat: the layer before holds x anyway, so this one adds two vectors only.
    known = _Known(x, mean, rstd, gamma, beta, mask, m)
    dx, dgamma, dbeta, _, _, depsilon = (
        None if isinstance(t, SymbolicZero) else t for t in tangents
    )
    return (y, mean, var), _linear(known, (dx, dgamma, dbeta, depsilon), layout)


class _Known(NamedTuple):
    """What a derivative depends on besides the tangents or cotangents."""

    x: jax.Array
    mean: jax.Array
    rstd: jax.Array
    gamma: jax.Array | None
    beta: jax.Array | None
    mask: jax.Array | None
    m: _Counts | None


def _tangents(known: _Known, inputs, layout: _Layout):
    """Tangents of y, mean and var, linear in those of x, gamma, beta, epsilon (None: zero)."""
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
    drstd = -(dvar if depsilon is None else dvar + depsilon) * rstd * rstd * rstd / 2
    gain = rstd
    dgain = drstd
    if gamma is not None:
        gamma = gamma.astype(rstd.dtype)
        gain = rstd * gamma
        dgain = drstd * gamma
        if dgamma is not None:
            dgain = dgain + rstd * dgamma.astype(rstd.dtype)
    dy = (dx - dmean) * gain + centered * dgain
    dy = dy if dbeta is None else dy + dbeta.astype(dy.dtype)
    if layout.relu:
        dy = jnp.where(_affine(x, mean, rstd, gamma, beta, None, False) > 0, dy, 0)
    dy = dy if mask is None else jnp.where(mask, dy, 0)
    return dy.astype(x.dtype), dmean, dvar


def _cotangents(known: _Known, outputs, layout: _Layout):
    """The paper's formulas (section 3), plus what comes in through mean and var themselves."""
    x, mean, rstd, gamma, beta, mask, m = known
    dy, mean_in, var_in = outputs
    m = _whole(m, layout, mean.dtype)
    g = 1 if gamma is None else gamma.astype(rstd.dtype)
    if layout.axis_name is not None and layout.merged and not _varying(x):
        # Without vma types every device has its own loss, and the sum of all is differentiated.
        mean_in, var_in = lax.psum((mean_in, var_in), layout.axis_name)

    def read(after):
        # Each pass computes x - mean anew, after `after` is known. Otherwise XLA on CPU, which
        # drops optimization_barrier, keeps that of the forward pass: a second copy of x until here.
        late = _after(after, mean)
        keep = mask
        if layout.relu:
            # Two names for one value, as in `_moments`: else XLA on CPU writes x - late to memory.
            late, late_too = lax.optimization_barrier((late, late))
            positive = _affine(x, late_too, rstd, gamma, beta, None, False) > 0
            keep = positive if mask is None else positive & mask
        dy_in = _promote(dy) if keep is None else jnp.where(keep, _promote(dy), 0)
        centered = _promote(x) - late
        return dy_in, centered if mask is None else jnp.where(mask, centered, 0)

    # Of each part its own first value, so that no device waits for another.
    dy_in, centered = read(
        dy[tuple(slice(1 if a in layout.axes else None) for a in range(dy.ndim))]
    )
    sum_dy, sum_product = _two_sums(dy_in, dy_in * centered, layout)
    sum_dy_xhat = sum_product * rstd
    dgamma = _sum_like(gamma, sum_dy_xhat)
    dbeta = _sum_like(beta, sum_dy)
    if layout.axis_name is not None and layout.merged:
        sum_dy, sum_dy_xhat = lax.psum((sum_dy, sum_dy_xhat), layout.axis_name)
    dvar_y = -g * sum_dy_xhat * jnp.square(rstd) / 2
    dvar = dvar_y + var_in
    dmean = -g * sum_dy * rstd + mean_in  # the term dvar * sum(-2(x - mean))/m of the paper is 0
    dy_again, centered = read(sum_dy)
    if layout.relu:
        # XLA on CPU has written the first to memory, for its sums; elsewhere dy is read again.
        dy_in = lax.platform_dependent(dy_in, dy_again, cpu=_first, default=_second)
    else:
        dy_in = dy_again
    dx = dy_in * (g * rstd) + centered * (2 * dvar / m) + dmean / m
    dx = (dx if mask is None else jnp.where(mask, dx, 0)).astype(x.dtype)
    return dx, dgamma, dbeta, jnp.sum(dvar_y)


def _first(first, _):
    return first


def _second(_, second):
    return second


def _sum_values(value, layout: _Layout):
    """Sum over all values of a group."""
    value = jnp.sum(value, layout.over, keepdims=True)
    if layout.axis_name is None or not layout.merged:
        return value
    return lax.psum(value, layout.axis_name)


def _sum_like(p, total):
    """Gradient of a parameter from the totals of the groups."""
    if p is None:
        return None
    groups = tuple(a for a in range(p.ndim) if p.shape[a] != total.shape[a])
    return jnp.sum(total, groups, keepdims=True).astype(p.dtype)


def _two_sums(a, b, layout: _Layout):
    """Sums of two arrays over the values of a group, on this device."""
    together = functools.partial(_sums_together, layout=layout)
    apart = functools.partial(_sums_apart, layout=layout)
    return lax.platform_dependent(a, b, cuda=together, default=apart)


def _sums_apart(a, b, layout: _Layout):
    return tuple(jnp.sum(value, layout.over, keepdims=True) for value in (a, b))


def _sums_together(a, b, layout: _Layout):
    """The sums as one operation. Of two, XLA for GPUs makes two kernels for the last stage of the
    sums, and for some shapes it first writes to memory where the ReLU is positive.
    """
    # XLA makes two stages of a sum of 6,272 values (32 maps of 14 x 14), but not of one of 1,568.
    # What it has only one stage for, it writes to memory first.
    stages = [layout.axes]
    if not is_symbolic_dim(layout.values) and layout.values < 4096 and len(layout.axes) > 1:
        stages = [layout.axes[1:], layout.axes[:1]]

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
    return left[0] + right[0], left[1] + right[1]


def _after(known, value):
    """value, in a way that no compiler can compute before `known`."""
    shape = jnp.broadcast_shapes(known.shape, value.shape)

    def chosen(known, value):
        return jnp.where((known != known) & (known == known), 0, value)  # never both, NaN included

    def behind_barrier(known, value):
        # XLA for GPUs drops the barrier only when kernels are made; a choice is a kernel more.
        late = lax.optimization_barrier((known, value))[1]
        return jnp.broadcast_to(_vary_like(known, late), shape)

    return lax.platform_dependent(known, value, cuda=behind_barrier, default=chosen)


_linear_p = Primitive("batch_norm_tangents")
_linear_p.multiple_results = True


def _linear(known: _Known, inputs, layout: _Layout):
    """`_tangents`, with `_cotangents` as its transpose."""
    leaves, known_tree = jax.tree.flatten(known)
    given, inputs_tree = jax.tree.flatten(inputs)
    present = [value is not None for value in inputs]
    n = len(leaves)

    def forward(*args):
        known = jax.tree.unflatten(known_tree, args[:n])
        return _tangents(known, jax.tree.unflatten(inputs_tree, args[n:]), layout)

    def transpose(*args):
        known = jax.tree.unflatten(known_tree, args[:n])
        found = _cotangents(known, args[n:], layout)
        return [value for value, there in zip(found, present, strict=True) if there]

    names = layout.axis_name
    names = (names,) if isinstance(names, str) else tuple(names or ())
    params = {"forward": forward, "transpose": transpose, "known": n, "names": names}
    return tuple(_linear_p.bind(*leaves, *given, **params))


def _linear_run(*args, forward: Callable, **_):
    return list(forward(*args))


def _linear_avals(x, mean, *_, **__):
    return [x, mean, mean]


def _linear_jvp(primals, tangents, *, forward, known, **params):
    bind = functools.partial(_linear_p.bind, forward=forward, known=known, **params)
    if all(type(t) is ad.Zero for t in tangents[:known]):
        inputs = [ad.instantiate_zeros(t) for t in tangents[known:]]
        return bind(*primals), bind(*primals[:known], *inputs)
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def along(*some):
        args = list(primals)
        for i, value in zip(moving, some, strict=True):
            args[i] = value
        return list(forward(*args))

    return jax.jvp(along, [primals[i] for i in moving], [tangents[i] for i in moving])


def _linear_transpose(cotangents, *args, transpose, known, **_):
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    found = transpose(*args[:known], *cotangents)
    wanted = [ad.is_undefined_primal(a) for a in args[known:]]
    return [None] * known + [ct if w else None for ct, w in zip(found, wanted, strict=True)]


def _linear_batch(mapped, args, dims, *, forward, transpose, known, names):
    if all(d is None for d in dims) and mapped.name not in names:
        bind = functools.partial(_linear_p.bind, forward=forward, transpose=transpose)
        found = bind(*args, known=known, names=names)
        return found, [None] * len(found)
    args = list(args)
    dims = list(dims)
    for i in (0, 1, *range(known, len(args))):  # x, mean and all inputs get the axis
        args[i] = batching.bdim_at_front(args[i], dims[i], mapped.size)
        dims[i] = 0
    vmap = functools.partial(jax.vmap, axis_name=mapped.name, axis_size=mapped.size)
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


# Devices.


def _varying(x) -> frozenset[str]:
    """The axes of a shard_map over which x is known to vary (with its check_vma)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _vary_like(x, p):
    """Under shard_map, marks a replicated parameter as used by each shard: gradients are summed."""
    if p is None:
        return None
    missing = _varying(x) - _varying(p)
    return lax.pcast(p, tuple(missing), to="varying") if missing else p


def _explicit_axes(x) -> tuple[str, ...]:
    """The axes of x's mesh that have explicit types."""
    mesh = jax.typeof(x).sharding.mesh
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind == AxisType.Explicit)


def _explicit_sharding(x, value) -> NamedSharding:
    """The sharding of a value beside x: replicated if it has none yet."""
    found = jax.typeof(value).sharding
    return (
        NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()) if found.mesh.empty else found
    )


# Running estimates, and Algorithm 2.


def _pool(mean, var, m, layout: _Layout):
    """Mean, unbiased variance and usability over all groups that have at least two values."""
    # No sum over groups waits for another: all layers' can travel between devices together.
    axis = layout.parts
    dtype = mean.dtype
    full = _whole(None, layout, dtype)
    m = full if m is None else m.whole.astype(dtype)
    m = m * jnp.ones([n if a == axis else 1 for a, n in enumerate(mean.shape)], dtype)
    weight = jnp.where(m < 2, 0, m / full)
    values = jnp.sum(weight, axis, keepdims=True)
    freedom = jnp.sum(jnp.maximum(weight - 1 / full, 0), axis, keepdims=True)
    total = mean
    squares = jnp.sum(weight * var, axis, keepdims=True)
    spread = layout.axis_name is not None and not layout.merged
    alone = mean.shape[axis] == 1 and not spread
    if not alone:  # else the mean stays as it is, to the last digit
        total = jnp.sum(weight * mean, axis, keepdims=True)
    if spread:
        found = total, squares, *(_vary_like(mean, v) for v in (values, freedom))
        total, squares, values, freedom = lax.psum(found, layout.axis_name)
    if not alone:
        total = total / jnp.where(values > 0, values, 1)
    var = squares / jnp.where(freedom > 0, freedom, 1)
    found = total, var, jnp.broadcast_to(freedom > 0, var.shape)
    return tuple(jnp.reshape(v, layout.stats_shape) for v in found)


def _update(stats: Stats, mean, var, usable, momentum) -> Stats:
    """Update k with the weight that leaves batch i the share momentum**(k - i) of the whole."""
    if stats.count is None:
        weight = jnp.where(usable, _as(1 - momentum, mean.dtype), 0)
        count = None
    else:
        count = lax.stop_gradient(stats.count)
        k = (count + 1).astype(mean.dtype)
        weight = jnp.where(usable, jnp.where(k == 1, 1, _weight(k, momentum)), 0)
        # Above 2^24 adding 1 changes no float32: then the next one is taken, in steps of 2 or more.
        most = jnp.full_like(count, jnp.finfo(count.dtype).max)
        more = jnp.maximum(count + 1, jnp.nextafter(count, most))
        count = jnp.where(jnp.any(usable), more, count)
    return Stats(_toward(stats.mean, mean, weight), _toward(stats.var, var, weight), count)


def _weight(k, momentum):
    """(1 - momentum) / (1 - momentum**k), and at momentum 1 its limit, the plain average's 1/k."""
    if isinstance(momentum, int | float):
        if momentum == 1:
            return 1 / k
        if momentum == 0:
            return jnp.ones_like(k)
        # expm1 is exact where momentum is near 1.
        return (1 - momentum) / -jnp.expm1(k * math.log(momentum))
    momentum = jnp.asarray(momentum).astype(k.dtype)
    inside = (momentum > 0) & (momentum < 1)
    safe = jnp.where(inside, momentum, 0.5)
    weight = (1 - safe) / -jnp.expm1(k * jnp.log(safe))
    return jnp.where(inside, weight, jnp.where(momentum == 1, 1 / k, 1))


def _toward(old, new, weight):
    wide = old.astype(new.dtype)
    return ((1 - weight) * wide + weight * new).astype(old.dtype)  # exactly new at weight 1


def merge(a: Stats, b: Stats) -> Stats:
    """The average of two statistics, weighted by their counts. A count of 0 adds nothing.

    Raises ValueError for statistics without a count, whose weight is not known.
    """
    if a.count is None or b.count is None:
        raise ValueError("batch_norm.merge: statistics without a count have no weight: give one")
    count = a.count + b.count
    dtype = a.mean.dtype
    share = b.count.astype(dtype) / jnp.maximum(count, 1).astype(dtype)
    return Stats(_toward(a.mean, b.mean, share), _toward(a.var, b.var, share), count)


def population(batches: Iterable[Stats]) -> Stats:
    """E[x] and Var[x] of Algorithm 2, lines 10 and 11, from the statistics of training batches.

    Those of one batch are what `normalize(..., train=True)` makes of `init_stats`: its mean,
    m/(m-1) times its biased variance, a count of 1. A stream calls `merge` batch by batch.
    """
    return functools.reduce(merge, batches)


def fold(kernel, bias, scale, offset, stats: Stats, *, epsilon: float):
    """A linear layer and the inference BN after it as one layer (Alg. 2, line 12): kernel and bias.

    kernel: [..., features]; bias, scale, offset: [features] or None; stats: of shape [features].
    Raises ValueError if the statistics are not per output feature (a per-activation form is not).
    """
    if jnp.shape(stats.mean) != kernel.shape[-1:]:
        raise ValueError(
            f"batch_norm.fold: statistics have shape {jnp.shape(stats.mean)}, not the "
            f"{kernel.shape[-1:]} of a kernel of shape {kernel.shape}"
        )
    gain = lax.rsqrt(stats.var + epsilon) * (1 if scale is None else scale)
    shift = ((0 if bias is None else bias) - stats.mean) * gain
    return kernel * gain, shift if offset is None else shift + offset
