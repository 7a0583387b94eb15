"""Batch normalization as pure functions: state in, state out (Ioffe & Szegedy, arXiv 1502.03167).

Algorithm 1 is `normalize(..., train=True)`: a mini-batch is normalized by its own mean and biased
variance. The mini-batch is a *statistic group*: `group_size` consecutive examples of the global
batch (the paper's worker batch of 32), on whatever devices they are. Algorithm 2 is `population` of
the batches' statistics, then `normalize(..., train=False)` or, as one affine layer, `fold`.
Statistics are in promote(float32, x.dtype), about a shift, never E[x^2] - E[x]^2.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Stats(NamedTuple):
    """Estimates of the population's statistics, one value a feature.

    After k updates from `init_stats`, `mean` and `var` are weighted averages of the k batches'
    means and *unbiased* variances, with weights in the ratio momentum**(k - i): right from the
    first step. `count` is k (float32); at infinity ("converged") updates are the plain average.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # not tuple.count


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
    axis: int | tuple[int, ...] = -1,
    epsilon: float,
    momentum: float,
    relu: bool = False,
) -> tuple[jax.Array, Stats]:
    """Algorithm 1 (`train`), or the inference network of Algorithm 2, which reads `stats`.

    Args:
      x: floating point, of any rank; its first axis that is no feature axis holds the examples.
      scale, offset: gamma and beta, one value a feature, or None for 1 and 0.
      stats: running estimates, one value a feature: read if not `train`, updated if `train`.
      group_size: examples that share statistics; divides the batch. None: all (the global batch).
      mask: True where a value counts, [examples] or broadcastable to x; for training only. Other
        values enter no statistic and no gradient, whatever they are, and come out as 0.
      axis: feature axes. -1 is the convolutional form (section 3.2), all but 0 the per-activation.
      epsilon: added to the variance, in the unit of x squared.
      momentum: share of the running estimate that an update keeps; 1 averages all batches alike.
      relu: give max(y, 0), in a backward pass that needs no copy of y.

    Returns:
      y, of x's shape and dtype, and the statistics, new if `train`. A group of fewer than two valid
      values is normalized with what it has and does not change them.

    Raises:
      TypeError: x is not floating point.
      ValueError: a shape, group or constant that cannot be used, named with its limit.
    """
    view = View(x, axis, group_size if train else None)
    view.check(train, scale=scale, offset=offset, mean=stats.mean, var=stats.var)
    if not epsilon >= 0 or not 0 <= momentum <= 1:
        raise ValueError(f"batch_norm: {epsilon=} must be >= 0, and {momentum=} within 0..1")
    gamma, beta, running_mean, running_var = map(view.per_feature, (scale, offset, *stats[:2]))
    x_G = jnp.reshape(x, view.shape)
    if not train:
        rstd = lax.rsqrt(running_var + epsilon)
        y = _affine(x_G, running_mean, rstd, gamma, beta, None, relu)
        return jnp.reshape(y, x.shape), stats
    mask = None if mask is None else view.mask(mask)
    m = count(view.shape, mask, view.axes)
    gamma, beta = vary_like(x, gamma), vary_like(x, beta)
    y, mean, var = _batch_norm(x_G, gamma, beta, mask, m, epsilon, view.axes, relu)
    mean, var, usable = _pool(mean, var, m, view)
    return jnp.reshape(y, x.shape), _update(stats, mean, var, usable, momentum)


# Algorithm 1. Here x is [..., groups, examples of a group, ...]; statistics are over `axes`, whose
# first holds the examples, and keep every axis; m is the number of values behind a statistic.


def _moments(x, mask, m, axes):
    """Mean and biased variance (Alg. 1, lines 1 and 2), as moments about a value near the mean.

    That value is about the mean of one example: (mean - near)^2 <= var * examples for any data
    bounds the cancellation, and a constant feature's mean is exactly its value.
    """
    x, m = _promote(x), jnp.maximum(m, 1)
    example, valid = fullest_example(x, mask, axes)
    near = jnp.sum(example, axes, keepdims=True, where=valid)
    near = near / jnp.maximum(count(example.shape, valid, axes), 1)
    # Rounded to 16 bits: a fused multiply-add would see another value here than the sums see.
    near = lax.reduce_precision(near, jnp.finfo(near.dtype).nexp, 16)
    # Two names for one value: else XLA on CPU writes x - near to memory because two sums share it.
    near, near_too = lax.optimization_barrier((near, near))
    first = jnp.sum(x - near, axes, keepdims=True, where=mask) / m
    second = jnp.sum(jnp.square(x - near_too), axes, keepdims=True, where=mask) / m
    return near + first, jnp.maximum(second - jnp.square(first), 0)


def _affine(x, mean, rstd, gamma, beta, mask, relu):
    """y = gamma * (x - mean) * rstd + beta (Alg. 1, lines 3 and 4), in x's dtype."""
    y = (_promote(x) - mean) * (rstd if gamma is None else rstd * gamma)
    y = y if beta is None else y + beta
    y = jnp.maximum(y, 0) if relu else y
    return (y if mask is None else jnp.where(mask, y, 0)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _batch_norm(x, gamma, beta, mask, m, epsilon, axes, relu):
    """Algorithm 1: y, and the mean and biased variance of every group and feature."""
    return _forward(x, gamma, beta, mask, m, epsilon, axes, relu)[0]


def _forward(x, gamma, beta, mask, m, epsilon, axes, relu):
    mean, var = _moments(x, mask, m, axes)
    rstd = lax.rsqrt(var + epsilon)
    y = _affine(x, mean, rstd, gamma, beta, mask, relu)
    # x is kept and not x_hat: the layer before holds x anyway, so this one adds two vectors only.
    return (y, mean, var), (x, gamma, beta, mask, m, mean, rstd)


def _backward(epsilon, axes, relu, residuals, cotangents):
    """The paper's formulas (section 3), plus what comes in through mean and var themselves."""
    x, gamma, beta, mask, m, mean, rstd = residuals
    dy, mean_in, var_in = cotangents
    m, g = jnp.maximum(m, 1), 1 if gamma is None else gamma

    def read(known):
        # Each pass computes x - mean anew, after `known`. Otherwise XLA on CPU, which drops
        # optimization_barrier, keeps that of the forward pass: a second copy of x until here.
        late = _after(known, mean)
        keep = mask
        if relu:
            positive = _affine(x, late, rstd, gamma, beta, None, False) > 0
            keep = positive if mask is None else positive & mask
        dy_in = _promote(dy) if keep is None else jnp.where(keep, _promote(dy), 0)
        centered = _promote(x) - late
        return dy_in, centered if mask is None else jnp.where(mask, centered, 0)

    dy_in, centered = read(dy[tuple(slice(1 if a in axes else None) for a in range(dy.ndim))])
    sum_dy = jnp.sum(dy_in, axes, keepdims=True)
    sum_dy_xhat = jnp.sum(dy_in * centered, axes, keepdims=True) * rstd
    dvar = -g * sum_dy_xhat * jnp.square(rstd) / 2 + var_in
    dmean = -g * sum_dy * rstd + mean_in  # the term dvar * sum(-2(x - mean))/m of the paper is 0
    dy_in, centered = read(sum_dy)
    dx = dy_in * (g * rstd) + centered * (2 * dvar / m) + dmean / m
    dx = (dx if mask is None else jnp.where(mask, dx, 0)).astype(x.dtype)
    return dx, _sum_like(gamma, sum_dy_xhat), _sum_like(beta, sum_dy), None, None


_batch_norm.defvjp(_forward, _backward)


def _sum_like(p, total):
    """Gradient of a parameter from the totals of the groups."""
    if p is None:
        return None
    groups = tuple(a for a in range(p.ndim) if p.shape[a] != total.shape[a])
    return jnp.sum(total, groups, keepdims=True).astype(p.dtype)


def _after(known, value):
    """value, in a way that no compiler can compute before `known`."""
    return jnp.where((known != known) & (known == known), 0, value)  # never both, NaN included


def _promote(x):
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


# Running estimates, and Algorithm 2.


def _pool(mean, var, m, view):
    """Mean, unbiased variance and usability over all groups that have at least two values."""
    # No sum over groups waits for another: all layers' can travel between devices together.
    full, axis = count(view.shape, None, view.axes), view.group_axis
    m = m * jnp.ones([n if a == axis else 1 for a, n in enumerate(view.shape)], mean.dtype)
    weight = jnp.where(m < 2, 0, m / full)
    values = jnp.sum(weight, axis, keepdims=True)
    freedom = jnp.sum(jnp.maximum(weight - 1 / full, 0), axis, keepdims=True)
    if m.shape[axis] > 1:  # else the mean stays as it is, to the last digit
        mean = jnp.sum(weight * mean, axis, keepdims=True) / jnp.where(values > 0, values, 1)
    var = jnp.sum(weight * var, axis, keepdims=True) / jnp.where(freedom > 0, freedom, 1)
    found = mean, var, jnp.broadcast_to(freedom > 0, var.shape)
    return tuple(jnp.reshape(v, view.stats_shape) for v in found)


def _update(stats, mean, var, usable, momentum):
    """Update k with the weight that leaves batch i the share momentum**(k - i) of the whole."""
    k = (stats.count + 1).astype(stats.mean.dtype)
    log = math.log(momentum) if momentum > 0 else -math.inf
    # expm1 is exact where momentum is near 1; at 1 itself the limit is the plain average.
    weight = (1 - momentum) / -jnp.expm1(k * log) if momentum < 1 else 1 / k
    weight = jnp.where(usable, jnp.where(k == 1, 1, weight), 0)
    count = stats.count + jnp.any(usable)
    return Stats(_toward(stats.mean, mean, weight), _toward(stats.var, var, weight), count)


def _toward(old, new, weight):
    return ((1 - weight) * old + weight * new).astype(old.dtype)  # exactly new at weight 1


def merge(a: Stats, b: Stats) -> Stats:
    """The average of two statistics, weighted by their finite counts. A count of 0 adds nothing."""
    count = a.count + b.count
    share = b.count.astype(a.mean.dtype) / jnp.maximum(count, 1)
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


# Arrays as statistic groups: the shapes of batch_norm.py, and the errors they can have.


class View:
    """x with the axis of its examples split into [groups, examples of a group].

    Raises ValueError if `axis` names no axis of x or leaves none for the examples (the first axis
    that is no feature axis), or if `group_size` (None: one group) does not divide the examples.
    """

    def __init__(self, x: jax.Array, axis: int | tuple[int, ...], group_size: int | None):
        self.x = x
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        features = {a % x.ndim for a in axes if -x.ndim <= a < x.ndim}
        rest = [a for a in range(x.ndim) if a not in features]
        if len(features) != len(axes) or not features or not rest:
            raise ValueError(
                f"batch_norm: feature axes are {axis}, but x of shape {x.shape} has axes up to "
                f"{x.ndim - 1}, each to be named once, and one must be left for the examples"
            )
        self.group_axis = b = rest[0]
        n = x.shape[b]
        size = n if group_size is None else group_size
        if n and (size < 1 or n % size):
            raise ValueError(
                f"batch_norm: group_size is {size}, but must divide the batch of {n} examples"
            )
        groups = n // size if n else 1
        self.shape = (*x.shape[:b], groups, size, *x.shape[b + 1 :])
        split = {a + (a > b) for a in features}
        self.axes = tuple(a for a in range(x.ndim + 1) if a not in split and a != b)
        self.feature_shape = tuple(s if a in split else 1 for a, s in enumerate(self.shape))
        self.stats_shape = tuple(self.shape[a] for a in sorted(split))

    def check(self, train: bool, **per_feature: jax.Array | None) -> None:
        """Raises TypeError if x is not floating point, ValueError if a parameter has not the shape
        of the features and, in training, if x is empty or has fewer than two values a statistic.
        """
        x = self.x
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"batch_norm: x has dtype {x.dtype}, but must be floating point")
        for name, value in per_feature.items():
            if value is not None and jnp.shape(value) != self.stats_shape:
                raise ValueError(
                    f"batch_norm: {name} has shape {jnp.shape(value)}, but the features of x "
                    f"{x.shape} have {self.stats_shape}"
                )
        if not train:
            return
        if x.size == 0:
            raise ValueError(f"batch_norm: x of shape {x.shape} is empty; training needs values")
        if (m := count(self.shape, None, self.axes)) < 2:
            raise ValueError(
                f"batch_norm: {m} value a statistic (x {x.shape}, groups of "
                f"{self.shape[self.group_axis + 1]}), but training needs at least 2"
            )

    def per_feature(self, value: Any) -> Any:
        """One value a feature, with as many axes as this view."""
        return None if value is None else jnp.reshape(value, self.feature_shape)

    def mask(self, mask: jax.Array) -> jax.Array:
        """The mask with as many axes as this view, broadcastable to it but for the examples.

        mask: bool [examples], or broadcastable to x. Raises ValueError if it is neither.
        """
        mask, x, b = jnp.asarray(mask, bool), self.x, self.group_axis
        if mask.shape == (x.shape[b],):
            mask = jnp.reshape(mask, [-1 if a == b else 1 for a in range(x.ndim)])
        full = (1,) * (x.ndim - mask.ndim) + mask.shape
        if len(full) > x.ndim or any(s not in (1, t) for s, t in zip(full, x.shape, strict=True)):
            raise ValueError(
                f"batch_norm: mask has shape {mask.shape}, but must have ({x.shape[b]},) or "
                f"broadcast to x, {x.shape}"
            )
        mask = jnp.broadcast_to(jnp.reshape(mask, full), (*full[:b], x.shape[b], *full[b + 1 :]))
        return jnp.reshape(mask, (*full[:b], *self.shape[b : b + 2], *full[b + 1 :]))


def count(shape: tuple[int, ...], mask: jax.Array | None, axes: tuple[int, ...]) -> int | jax.Array:
    """Values a statistic over `axes` has: a constant, or with a mask float32, all axes kept."""
    if mask is None:
        return math.prod(shape[a] for a in axes)
    repeats = math.prod(shape[a] for a in axes if mask.shape[a] == 1)
    return jnp.sum(mask, axes, keepdims=True, dtype=jnp.float32) * repeats


def fullest_example(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]):
    """Of each group the example with the most valid values, and the mask of that example.

    axes: the axes of the statistic, that of a group's examples first, which here gets length 1.
    """
    examples = axes[0]
    if mask is None:
        return lax.slice_in_dim(x, 0, 1, axis=examples), None
    others = [a for a in range(x.ndim) if a not in (examples, examples - 1)]
    index = jnp.argmax(jnp.sum(mask, others, keepdims=True), examples, keepdims=True)
    return jnp.take_along_axis(x, index, examples), jnp.take_along_axis(mask, index, examples)


def vary_like(x, p):
    """Under shard_map, marks a replicated parameter as used by each shard: gradients are summed."""
    if p is None:
        return None
    missing = jax.typeof(x).manual_axis_type.varying - jax.typeof(p).manual_axis_type.varying
    return lax.pcast(p, tuple(missing), to="varying") if missing else p
