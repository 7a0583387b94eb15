"""Arrays as statistic groups: the shapes of batch_norm.py, and the errors they can have."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


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
