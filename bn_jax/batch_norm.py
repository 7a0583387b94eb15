"""Batch normalization as pure functions: state in, state out (Ioffe & Szegedy, arXiv 1502.03167).

Algorithm 1 is `normalize(..., train=True)`: a mini-batch is normalized by its own mean and biased variance. The mini-batch is a
*statistic group*: `group_size` consecutive examples of the global batch (the paper's worker batch of 32), wherever they are held.
Algorithm 2 is `merge` of single-batch statistics, then `normalize(..., train=False)` or, as one affine map, `fold`.

Statistics are kept in promote(float32, x.dtype) and taken about a shift, never as E[x^2] - E[x]^2.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Stats(NamedTuple):
    """Estimates of the population statistics, one value a feature (the shape of `scale`).

    After k updates from `init_stats`, `mean` and `var` are the weighted averages of the k batches' means and *unbiased* variances
    with weights proportional to momentum**(k - i): debiased, so right after one step. `count` is k (a float32 scalar);
    infinity means "converged", and every further update is the plain moving average.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def init_stats(shape, dtype=jnp.float32) -> Stats:
    """Statistics before the first update: those of a standard normal, with no weight at all."""
    return Stats(jnp.zeros(shape, dtype), jnp.ones(shape, dtype), jnp.zeros((), jnp.float32))


def normalize(
    x,
    scale,
    offset,
    stats: Stats,
    *,
    train: bool,
    group_size: int | None = None,
    mask=None,
    axis: int | tuple[int, ...] = -1,
    epsilon: float,
    momentum: float,
    relu: bool = False,
) -> tuple[jax.Array, Stats]:
    """Batch normalization of `x`: Algorithm 1 (`train`), or the inference map of Algorithm 2 from `stats`.

    Args:
      x: floating point, any rank. Its first axis that is not a feature axis holds the examples.
      scale, offset: gamma and beta, one value a feature, or None for 1 and 0.
      stats: running estimates, one value a feature; read if not `train`, updated if `train`.
      group_size: examples that share statistics; divides the batch. None: the whole (global) batch.
      mask: True where a value counts: [examples], or broadcastable to `x`. Masked values enter no statistic and no gradient and
        come out as 0. Ignored if not `train`.
      axis: feature axes. -1 is the convolutional form of section 3.2; every axis but the first is the per-activation form.
      epsilon: added to the variance, in units of x squared.
      momentum: share of the running estimate kept at an update, in [0, 1]; 1 averages all updates alike.
      relu: returns max(y, 0), without keeping y for the backward pass.

    Returns:
      y, of the shape and dtype of `x`, and the new statistics (`stats` itself if not `train`).

    Raises:
      TypeError: x is not floating point.
      ValueError: a shape, group or constant that cannot be used, named with its value and limit.
    """
    view = _View(x, axis, group_size if train else None)
    _check(x, view, scale, offset, stats, group_size, train, epsilon, momentum)
    gamma, beta = (p if p is None else jnp.reshape(p, view.feature_shape) for p in (scale, offset))
    x_G = jnp.reshape(x, view.shape)
    if not train:
        mean, var = (jnp.reshape(s, view.feature_shape) for s in stats[:2])
        y = _affine(x_G, mean, lax.rsqrt(var + epsilon), gamma, beta, None, relu)
        return jnp.reshape(y, x.shape), stats
    mask_G = None if mask is None else view.grouped_mask(mask)
    m = view.values_per_statistic(mask_G)
    gamma, beta = (p if p is None else _vary_like(x, p) for p in (gamma, beta))
    y, mean, var = _batch_norm(x_G, gamma, beta, mask_G, m, epsilon, view.axes, relu)
    stats = _update(stats, *_pool(mean, var, m, view), momentum)
    return jnp.reshape(y, x.shape), stats


class _View:
    """`x` with its batch axis split into [groups, examples of a group]; all shapes below are of this view."""

    def __init__(self, x, axis, group_size):
        axis = (axis,) if isinstance(axis, int) else tuple(axis)
        if not axis or any(not -x.ndim <= a < x.ndim for a in axis):
            raise ValueError(f"batch_norm: axis is {axis}, but x has the axes 0..{x.ndim - 1}")
        features = {a % x.ndim for a in axis}
        self.batch_axis = next((a for a in range(x.ndim) if a not in features), None)
        if self.batch_axis is None:
            raise ValueError(f"batch_norm: axis {axis} leaves none of the {x.ndim} axes of x for the examples")
        b, n = self.batch_axis, x.shape[self.batch_axis]
        size = n if group_size is None else group_size
        if size < 1 or n % size:
            raise ValueError(f"batch_norm: group_size is {size}, but must divide the batch of {n} examples")
        groups = n // size if size else 1
        self.x_shape = x.shape
        self.shape = (*x.shape[:b], groups, size, *x.shape[b + 1 :])
        features = {a + (a > b) for a in features}
        self.axes = tuple(a for a in range(x.ndim + 1) if a not in features and a != b)
        self.feature_shape = tuple(s if a in features else 1 for a, s in enumerate(self.shape))
        self.stats_shape = tuple(self.shape[a] for a in sorted(features))

    def grouped_mask(self, mask):
        mask = jnp.asarray(mask, bool)
        b = self.batch_axis
        if mask.ndim == 1:
            mask = jnp.reshape(mask, [-1 if a == b else 1 for a in range(len(self.x_shape))])
        mask = jnp.reshape(mask, (1,) * (len(self.x_shape) - mask.ndim) + mask.shape)
        if mask.ndim != len(self.x_shape) or any(s not in (1, t) for s, t in zip(mask.shape, self.x_shape, strict=True)):
            raise ValueError(f"batch_norm: mask has shape {mask.shape}, which does not broadcast to x, {self.x_shape}")
        if mask.shape[b] == 1:
            mask = jnp.broadcast_to(mask, (*mask.shape[:b], self.x_shape[b], *mask.shape[b + 1 :]))
        return jnp.reshape(mask, (*mask.shape[:b], *self.shape[b : b + 2], *mask.shape[b + 1 :]))

    def values_per_statistic(self, mask):
        """m, the number of values behind each statistic: a constant, or an array where a mask decides."""
        if mask is None:
            return math.prod(self.shape[a] for a in self.axes)
        repeats = math.prod(self.shape[a] for a in self.axes if mask.shape[a] == 1)
        return jnp.sum(mask, self.axes, keepdims=True, dtype=jnp.float32) * repeats


def _check(x, view, scale, offset, stats, group_size, train, epsilon, momentum):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"batch_norm: x has dtype {x.dtype}, but must be floating point")
    for name, p in (("scale", scale), ("offset", offset), ("stats.mean", stats.mean), ("stats.var", stats.var)):
        if p is not None and jnp.shape(p) != view.stats_shape:
            raise ValueError(f"batch_norm: {name} has shape {jnp.shape(p)}, but the features of x have {view.stats_shape}")
    if not epsilon >= 0 or not 0 <= momentum <= 1:
        raise ValueError(f"batch_norm: epsilon is {epsilon}, momentum {momentum}, but the limits are >= 0 and 0..1")
    values = math.prod(view.shape[a] for a in view.axes)
    if train and values < 2:
        raise ValueError(f"batch_norm: {values} value(s) a statistic in x of shape {x.shape} with group_size {group_size}, but training needs 2")


# Algorithm 1 and its backward pass. x is grouped: [groups, examples, ...] with statistics over `axes`.


def _moments(x, mask, m, axes):
    """Mean and biased variance (Alg. 1, lines 1 and 2), in two passes, the second about the rounded mean of the first."""
    x = _promote(x)
    m = jnp.maximum(m, 1)
    near = jnp.sum(x, axes, keepdims=True, where=mask) / m
    centered = x - near
    rest = jnp.sum(centered, axes, keepdims=True, where=mask) / m
    square = jnp.sum(jnp.square(centered), axes, keepdims=True, where=mask) / m
    return near + rest, jnp.maximum(square - jnp.square(rest), 0)


def _affine(x, mean, rstd, gamma, beta, mask, relu):
    """y = gamma * (x - mean) * rstd + beta (Alg. 1, lines 3 and 4), in the dtype of x."""
    y = (_promote(x) - mean) * (rstd if gamma is None else rstd * gamma)
    y = y if beta is None else y + beta
    y = jnp.maximum(y, 0) if relu else y
    return (y if mask is None else jnp.where(mask, y, 0)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _batch_norm(x, gamma, beta, mask, m, epsilon, axes, relu):
    """Algorithm 1: y, and the mean and biased variance of each group and feature."""
    return _forward(x, gamma, beta, mask, m, epsilon, axes, relu)[0]


def _forward(x, gamma, beta, mask, m, epsilon, axes, relu):
    mean, var = _moments(x, mask, m, axes)
    rstd = lax.rsqrt(var + epsilon)
    y = _affine(x, mean, rstd, gamma, beta, mask, relu)
    # x is kept, not x_hat: the convolution before holds x anyway, so this layer adds only two vectors.
    return (y, mean, var), (x, gamma, beta, mask, m, mean, rstd)


def _backward(epsilon, axes, relu, residuals, cotangents):
    """The paper's backward formulas (section 3), plus what flows in through mean and var themselves."""
    x, gamma, beta, mask, m, mean, rstd = residuals
    dy, mean_in, var_in = cotangents
    m = jnp.maximum(m, 1)
    centered = _promote(x) - mean
    dy = _promote(dy)
    if relu:
        dy = jnp.where(_affine(x, mean, rstd, gamma, beta, None, False) > 0, dy, 0)
    if mask is not None:
        dy, centered = jnp.where(mask, dy, 0), jnp.where(mask, centered, 0)
    sum_dy = jnp.sum(dy, axes, keepdims=True)
    sum_dy_xhat = jnp.sum(dy * centered, axes, keepdims=True) * rstd
    g = 1 if gamma is None else gamma
    dvar = -g * sum_dy_xhat * jnp.square(rstd) / 2 + var_in
    dmean = -g * sum_dy * rstd + mean_in  # the paper's second term, dvar * sum(-2(x - mean))/m, is zero
    dx = dy * (g * rstd) + centered * (2 / m * dvar) + dmean / m
    if mask is not None:
        dx = jnp.where(mask, dx, 0)
    like = lambda total, p: None if p is None else _sum_to(total, p).astype(p.dtype)
    return dx.astype(x.dtype), like(sum_dy_xhat, gamma), like(sum_dy, beta), None, None


_batch_norm.defvjp(_forward, _backward)


def _sum_to(total, like):
    """Sums the per-group totals to the shape of a parameter."""
    return jnp.sum(total, [a for a in range(total.ndim) if like.shape[a] != total.shape[a]], keepdims=True)


def _promote(x):
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def _vary_like(x, p):
    """Under shard_map, marks a replicated parameter as used by every shard, so that its gradient is summed over them."""
    missing = tuple(jax.typeof(x).manual_axis_type.varying - jax.typeof(p).manual_axis_type.varying)
    return lax.pcast(p, missing, to="varying") if missing else p


# Running estimates and Algorithm 2.


def _pool(mean, var, m, view):
    """Mean and unbiased variance over all groups, and whether there is one: groups of fewer than two values do not count."""
    m = jnp.broadcast_to(jnp.asarray(m, mean.dtype), mean.shape)
    m = jnp.where(m < 2, 0, m)
    total = lambda v: jnp.reshape(jnp.sum(v, view.batch_axis), view.stats_shape)
    weight, freedom = total(m), total(jnp.maximum(m - 1, 0))
    usable = freedom > 0
    return total(m * mean) / jnp.maximum(weight, 1), total(m * var) / jnp.maximum(freedom, 1), usable


def _update(stats, mean, var, usable, momentum):
    k = stats.count + 1
    # The weight of batch k that leaves the k batches weighted as momentum**(k - i), summing to one.
    weight = 1 / k if momentum == 1 else (1 - momentum) / -jnp.expm1(k * _log(momentum))
    weight = jnp.where(usable, weight, 0)
    step = lambda old, new: (old + weight * (new - old)).astype(old.dtype)
    return Stats(step(stats.mean, mean), step(stats.var, var), jnp.where(jnp.any(usable), k, stats.count))


def _log(momentum):
    return math.log(momentum) if momentum > 0 else -math.inf


def merge(a: Stats, b: Stats) -> Stats:
    """Average of two sets of statistics weighted by their counts: Algorithm 2, lines 10 and 11, as a stream.

    The statistics of one training batch are those that `normalize` returns from `init_stats`: m/(m-1) times its biased variance,
    count 1. Merging those of N batches, in any order, gives E[x] and Var[x] of Algorithm 2. A count of 0 adds nothing.
    """
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    return Stats(a.mean + share * (b.mean - a.mean), a.var + share * (b.var - a.var), count)


def fold(kernel, bias, scale, offset, stats: Stats, *, epsilon: float):
    """Turns a convolution or dense layer followed by BN in inference into one affine layer (Alg. 2, line 12).

    Args:
      kernel: [..., features]; bias, scale, offset: [features] or None; stats: of shape [features].

    Returns:
      The kernel and bias of the layer that gives the same outputs.

    Raises:
      ValueError: the statistics are not one value an output feature (the per-activation form of a convolution cannot be folded).
    """
    if jnp.shape(stats.mean) != kernel.shape[-1:]:
        raise ValueError(f"batch_norm.fold: statistics of shape {jnp.shape(stats.mean)} do not fit a kernel of shape {kernel.shape}")
    gain = lax.rsqrt(stats.var + epsilon) * (1 if scale is None else scale)
    shift = (0 if bias is None else bias) - stats.mean
    return kernel * gain, shift * gain + (0 if offset is None else offset)
