"""Algorithm 1 line by line in numpy, and bn_jax's beside it: what the batch_norm tests share."""

import functools

import jax
import numpy as np

from bn_jax import batch_norm

normalize = functools.partial(batch_norm.normalize, epsilon=1e-3, momentum=0.9)
# Float32 results differ from float64 by rounding (6e-8 relative) grown by sums of some 100 values.
TOLERANCE = 2e-6


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(2, 3, shape)


def paper(x, gamma, beta, dy, epsilon):
    """Algorithm 1 and its backward pass, line by line, for one group; x is [m, features]."""
    m = len(x)
    mean, var = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    x_hat = (x - mean) / np.sqrt(var + epsilon)
    dx_hat = dy * gamma
    dvar = (dx_hat * (x - mean)).sum(0) * -0.5 * (var + epsilon) ** -1.5
    dmean = -dx_hat.sum(0) / np.sqrt(var + epsilon) + dvar * (-2 * (x - mean)).sum(0) / m
    dx = dx_hat / np.sqrt(var + epsilon) + dvar * 2 * (x - mean) / m + dmean / m
    return gamma * x_hat + beta, dx, (dy * x_hat).sum(0), dy.sum(0)


def ours(x, gamma, beta, dy, *, wrap=lambda f: f, **options):
    """The same four results, by normalize and its gradient, and the new statistics.

    wrap: a transformation of the function that is differentiated.
    """
    features = np.shape(gamma)
    stats = batch_norm.init_stats(features, np.promote_types(np.float32, x.dtype))

    def f(x, gamma, beta):
        return normalize(x, gamma, beta, stats, train=True, **options)

    def both(x, gamma, beta, dy):
        y, vjp, stats = jax.vjp(wrap(f), x, gamma, beta, has_aux=True)
        return (y, *vjp(dy)), stats

    return jax.jit(both)(x, gamma, beta, dy)
