"""The full training step of Inception with BN, beside the same network in plain Flax.

    python -m benchmarks.step             # 224 px, batch 32, float32; minutes on 2 CPU cores
    python -m benchmarks.step --smoke     # seconds of steps, tiny: that it runs, no figures

Plain Flax means flax.linen.BatchNorm, XLA's own pooling and convolutions, and autodiff. Both sides
start from the same weights, and their losses are compared first; steps are interleaved in one
process, after one warm-up each. Not here yet: PyTorch, and other devices than jax's default one.
"""

import argparse
import functools
import platform
import statistics
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bn_jax import ops, optim, step
from bn_jax.layers import BatchNorm
from bn_jax.models.inception import Inception

GFLOP_AN_IMAGE = 11.96  # trained at 224 px, without the first layer's input gradient


def gemm_ceiling(n: int, repeats: int) -> float:
    """GFLOP/s of a float32 product of n x n matrices, the best of `repeats`."""
    a = jnp.ones((n, n), jnp.float32)
    product = jax.jit(jnp.dot)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / 1e9


class FlaxBatchNorm(nn.BatchNorm):
    """Flax's, without the mask: a mask of examples does not broadcast there, and none is False."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        """As flax.linen.BatchNorm."""
        del mask
        return super().__call__(x, use_running_average)


class Side:
    """One compiled training step with its state."""

    def __init__(self, name: str, norm, plain: bool, args: argparse.Namespace, initial):
        self.name, self.seconds = name, []
        model = Inception(1000, width=args.width, variant="caffe", norm=norm)
        self.state, images, hyper = initial
        self.state = jax.tree.map(jnp.copy, self.state)  # it is donated
        if plain:  # Flax's statistics have no count of updates
            self.state = self.state._replace(batch_stats=without_count(self.state.batch_stats))
        n = len(images)
        batch = {"image": images, "label": np.arange(n) % 1000, "mask": np.ones(n, bool)}
        self.rest = (batch, hyper, jax.random.key(1))
        function = functools.partial(step.train_step, model=model)
        start = time.perf_counter()
        if plain:
            with ops.plain():
                lowered = jax.jit(function, donate_argnums=0).lower(self.state, *self.rest)
        else:
            lowered = jax.jit(function, donate_argnums=0).lower(self.state, *self.rest)
        self.program = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.temporary = self.program.memory_analysis().temp_size_in_bytes

    def step(self) -> float:
        """Takes one step and returns its loss."""
        start = time.perf_counter()
        self.state, metrics = self.program(self.state, *self.rest)
        loss = float(metrics["loss"])
        self.seconds.append(time.perf_counter() - start)
        return loss


def without_count(tree):
    """A batch_stats tree as flax.linen.BatchNorm has it."""
    if not isinstance(tree, dict):
        return tree
    return {name: without_count(child) for name, child in tree.items() if name != "count"}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="28 px, width 1/16, 2 steps")
    parser.add_argument("--steps", type=int, default=9, help="timed steps a side")
    args = parser.parse_args()
    size, batch = (28, 8) if args.smoke else (224, 32)
    args.width = 1 / 16 if args.smoke else 1.0
    steps = 2 if args.smoke else args.steps

    ours = functools.partial(BatchNorm, epsilon=1e-3)
    theirs = functools.partial(FlaxBatchNorm, epsilon=1e-3, momentum=0.99)
    model = Inception(1000, width=args.width, variant="caffe", norm=ours)
    state = jax.jit(lambda: step.init_state(model, 0, (size, size, 3)))()
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    hyper = optim.Hyper(*(np.float32(x) for x in (0.0015, 0.96, 1e7, 2e-4, 0.9)))
    initial = (state, images, hyper)
    sides = [Side("bn_jax", ours, False, args, initial)]
    sides.append(Side("plain Flax", theirs, True, args, initial))

    losses = [side.step() for side in sides]  # the warm-up, and the check
    # Float32 rounding through 69 layers; Flax takes its variance as E[x^2] - E[x]^2.
    np.testing.assert_allclose(losses, losses[0], rtol=1e-3)
    for _ in range(steps):
        for side in sides:
            side.step()
    device = jax.devices()[0]
    print(
        f"{platform.machine()}, {device.device_kind}; jax {jax.__version__}, "
        f"flax {flax.__version__}; glibc malloc unless LD_PRELOAD says otherwise"
    )
    print(f"{size} px, batch {batch}, float32, n={steps}; losses {losses}")
    for side in sides:
        seconds = statistics.median(side.seconds[1:])
        ratio = statistics.median(
            b / a for a, b in zip(side.seconds[1:], sides[-1].seconds[1:], strict=True)
        )
        rate = "" if args.smoke else f", {GFLOP_AN_IMAGE * batch / seconds:.0f} GFLOP/s"
        print(
            f"{side.name:10s} median {seconds:.3f} s a step{rate}, {ratio:.2f}x plain Flax, "
            f"{side.temporary / 2**20:.0f} MiB temporary, compiled in {side.compile_seconds:.0f} s"
        )
    print(f"GEMM ceiling {gemm_ceiling(256 if args.smoke else 4096, 3):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
