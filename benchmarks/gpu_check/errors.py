"""Operations and a training step on this device against float64 on a CPU, in every precision.

    python -m benchmarks.gpu_check.errors FILE    # a JSON list: what, error, tolerance

An error is |x - reference| / |reference|, in Euclidean norms over all values. TOLERANCE says what
the formats allow. float32 at `highest` sums in another order, and convolutions on a GPU may
transform their operands (Winograd), which costs a digit. TF32 rounds every operand to 11 bits
(5e-4 relative at most), bfloat16 to 8 bits (4e-3 at most), results too; a product of random numbers
averages these, so that its error is below one rounding. In bfloat16 parameters stay float32, as in
training. The network has 4 layers one after the other, forward and backward, and BN takes away most
of what its gradient gets: 25 roundings are allowed (on a CPU bfloat16 needs 11, float32 below 1).
"""

import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bn_jax import batch_norm, layers, ops, optim, step
from bn_jax.ops import mixed

PRECISIONS = (("float32", "highest"), ("float32", "default"), ("bfloat16", "default"))
TOLERANCE = {
    ("float32", "highest"): 1e-5,
    ("float32", "default"): 1e-3,  # TF32 on an NVIDIA GPU
    ("bfloat16", "default"): 4e-3,
}
NETWORK = 25  # times the tolerance of one operation


class Network(nn.Module):
    """A small network of every kind of layer that Inception has."""

    dtype: Any
    precision: Any

    @nn.compact
    def __call__(self, images, *, train: bool, mask=None):
        """Images uint8 [N, H, W, C] to logits [N, 5]."""
        wide = jnp.promote_types(jnp.float32, self.dtype)
        norm = functools.partial(layers.BatchNorm, group_size=8, dtype=self.dtype)
        conv = functools.partial(layers.ConvBN, norm=norm, dtype=self.dtype)
        x = ((images.astype(wide) - 127.5) / 127.5).astype(self.dtype)
        x = conv(16, (3, 3), strides=(2, 2), name="one")(x, train=train, mask=mask)
        x = ops.max_pool(x, 2)
        x = conv(24, (1, 1), name="two")(x, train=train, mask=mask)
        x = conv(24, (3, 3), name="three")(x, train=train, mask=mask)
        x = nn.avg_pool(x, (3, 3), (1, 1), "SAME").astype(self.dtype)
        x = jnp.mean(x, axis=(1, 2))
        logits = mixed.Dense(5, dtype=self.dtype, name="classifier")(x)
        return logits.astype(wide)


def random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal numbers in float64."""
    return np.random.default_rng(seed).normal(size=shape)


def with_gradients(function: Callable[..., jax.Array], *arguments: jax.Array) -> list[jax.Array]:
    """The result, and the gradients of its product with fixed random numbers."""
    y, pullback = jax.vjp(function, *arguments)
    return [y, *pullback(jnp.asarray(random(y.shape, 9), y.dtype))]


def convolution(kernel: tuple[int, ...], strides: int) -> tuple[Callable, list[np.ndarray]]:
    """A convolution of 16 images of 14 x 14 and its arguments."""

    def function(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return ops.conv(x, w, (strides, strides), "SAME", dimension_numbers=numbers)

    return function, [random((16, 14, 14, kernel[2]), 0), random(kernel, 1)]


def normalization() -> tuple[Callable, list[np.ndarray]]:
    """Batch normalization with ReLU in groups of 8, of values whose mean is 3."""

    def function(x, gamma, beta):
        wide = jnp.promote_types(jnp.float32, x.dtype)
        stats = batch_norm.init_stats((24,), wide)
        return batch_norm.normalize(
            x,
            gamma.astype(wide),
            beta.astype(wide),
            stats,
            train=True,
            group_size=8,
            epsilon=1e-3,
            momentum=0.99,
            relu=True,
        )[0]

    return function, [random((16, 7, 7, 24), 0) + 3, random((24,), 1), random((24,), 2)]


def pooling(stride: int, form: Callable) -> tuple[Callable, list[np.ndarray]]:
    """Max pooling in one of its forms."""
    return functools.partial(form, stride=stride), [random((8, 14, 14, 16), 0)]


def library_pool(x: jax.Array, stride: int) -> jax.Array:
    """Max pooling by XLA's own operations and their gradient."""
    return nn.max_pool(x, (3, 3), (stride, stride), "SAME")


def dense() -> tuple[Callable, list[np.ndarray]]:
    """A dense layer as `mixed.Dense` computes it."""

    def function(x, w):
        return mixed.dot(x, w, (((1,), (0,)), ((), ())))

    return function, [random((64, 96), 0), random((96, 40), 1)]


def operations() -> dict[str, tuple[Callable, list[np.ndarray]]]:
    """What is compared, by name: a function and its arguments in float64."""
    return {
        "convolution 3x3": convolution((3, 3, 24, 32), 1),
        "convolution 3x3, stride 2": convolution((3, 3, 24, 32), 2),
        "convolution 1x1": convolution((1, 1, 48, 32), 1),
        "dense": dense(),
        "batch normalization": normalization(),
        "max pooling, XLA's": pooling(2, library_pool),
        "max pooling, ours, stride 1": pooling(1, ops._max_pool),
        "max pooling, ours, stride 2": pooling(2, ops._max_pool),
    }


def training_step(dtype: Any, precision: Any) -> list[np.ndarray]:
    """Loss, all gradients (as velocities) and all statistics after a step of the small network."""
    network = Network(dtype, precision)
    shapes = jax.eval_shape(lambda: step.init_state(network, 0, (16, 16, 3)))
    wide = np.float64 if dtype == jnp.float64 else np.float32

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan_in = max(9, leaf.size // max(leaf.shape[-1], 1)) if leaf.shape else 1
        return (random(leaf.shape, leaf.size) / fan_in**0.5).astype(wide)

    params = jax.tree.map(fill, shapes.params)
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, wide), shapes.batch_stats)
    velocity = optax.TraceState(trace=jax.tree.map(np.zeros_like, params))
    state = step.TrainState(np.int32(0), params, fresh, velocity)
    numbers = np.random.default_rng(0)
    batch = {
        "image": numbers.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8),
        "label": (np.arange(16) % 5).astype(np.int32),
    }
    hyper = optim.Hyper(*map(wide, (0.1, 1.0, 1e7, 1e-4, 0.9)))
    function = jax.jit(functools.partial(step.train_step, model=network))
    after, metrics = function(state, batch, hyper, np.uint32(0))
    trees = (metrics["cross_entropy"], after.opt_state, after.batch_stats)
    leaves = [jax.tree.leaves(jax.device_get(tree)) for tree in trees]
    return [np.concatenate([np.ravel(leaf) for leaf in found]) for found in leaves]


def relative_error(found: list[Any], reference: list[Any]) -> float:
    """|found - reference| / |reference| over all arrays of a result; the largest of them."""
    errors = []
    for x, y in zip(found, reference, strict=True):
        wide = np.asarray(x, np.float64)
        errors.append(float(np.linalg.norm(wide - y) / (np.linalg.norm(y) or 1.0)))
    return max(errors, key=lambda error: (not np.isfinite(error), error))


def compare() -> Iterator[dict[str, Any]]:
    """A row for each operation and precision."""
    cpu = jax.devices("cpu")[0]
    for name, (function, arguments) in operations().items():
        for dtype, precision in PRECISIONS:
            rounded = rounded_arguments(arguments, dtype)
            with jax.enable_x64(True), jax.default_device(cpu):
                exact = [jnp.asarray(np.asarray(x, np.float64)) for x in rounded]
                reference = jax.device_get(with_gradients(function, *exact))
            with jax.default_matmul_precision(precision):
                found = jax.jit(functools.partial(with_gradients, function))(*rounded)
            error = relative_error(jax.device_get(found), reference)
            yield row(name, dtype, precision, error, 1)

    with jax.enable_x64(True), jax.default_device(cpu):
        reference = training_step(jnp.float64, None)
    for dtype, precision in PRECISIONS:
        with jax.default_matmul_precision(precision):
            found = training_step(jnp.dtype(dtype), None)
        error = relative_error(found, reference)
        yield row("training step", dtype, precision, error, NETWORK)


def rounded_arguments(arguments: list[np.ndarray], dtype: str) -> list[np.ndarray]:
    """The input in this number format; the parameters after it have its precision, in float32."""
    narrow = [np.asarray(jnp.asarray(x, dtype)) for x in arguments]
    return [narrow[0], *(x.astype(np.float32) for x in narrow[1:])]


def row(name: str, dtype: str, precision: str, error: float, factor: float) -> dict[str, Any]:
    """One comparison as it is recorded."""
    tolerance = factor * TOLERANCE[dtype, precision]
    return {
        "what": name,
        "dtype": dtype,
        "precision": precision,
        "error": error,
        "tolerance": tolerance,
        "passed": bool(error <= tolerance),
    }


def main() -> None:
    """Compares, and writes after every row what is known so far."""
    file = pathlib.Path(sys.argv[1])
    rows = []
    for found in compare():
        rows.append(found)
        file.write_text(json.dumps(rows, indent=1) + "\n")
        print(found, flush=True)


if __name__ == "__main__":
    main()
