"""Memory and time of the whole training step, beside the same network with Flax's BN and autodiff.

    python -m benchmarks.memory            # 224 px, batch 32, and the digits; minutes
    python -m benchmarks.memory --smoke    # a toy network, no file

Sides differ in the normalization layer alone: pools and convolutions are ours. Memory is what XLA
says of the compiled program (`memory_analysis`, temporaries), with options as training has them
and, on CPU (not for the digits), with the scheduler asked for least memory; sides compared are
compiled alike.
Steps are interleaved, as trained: without that option.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks import fair
from bn_jax import models, optim
from bn_jax.layers import BatchNorm, ConvBN
from bn_jax.step import init_state, train_step
from configs import bn_x30

LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
SETTINGS = {
    "imagenet": {"pixels": 224, "channels": 3, "batch": 32, "classes": 1000},
    "digits": {"pixels": 28, "channels": 1, "batch": 32, "classes": 10},
}


class FlaxBatchNorm(nn.BatchNorm):
    """Flax's, without the mask: a mask of examples does not broadcast there, and none is False."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        """As flax.linen.BatchNorm."""
        del mask
        return super().__call__(x, use_running_average)


flax_norm = functools.partial(FlaxBatchNorm, momentum=0.99, epsilon=1e-3)


class Tower(nn.Module):
    """Eight 3x3 convolutions, each with BN and ReLU: seconds to compile, for tests."""

    norm: Any = functools.partial(BatchNorm, epsilon=1e-3)

    @nn.compact
    def __call__(self, images, *, train, mask=None):
        """[N, H, W, C] to logits [N, 10]."""
        x = images.astype(jnp.float32) / 255
        for i in range(8):
            conv = ConvBN(16, (3, 3), norm=self.norm, name=f"conv_{i}")
            x = conv(x, train=train, mask=mask)
        return nn.Dense(10)(jnp.mean(x, (1, 2)))


class Program(NamedTuple):
    """A compiled training step, its temporaries in bytes, and the seconds its compilation took."""

    step: Any
    temporary: int
    compile_seconds: float


def compile_step(model, pixels: int, channels: int, batch: int, options=None) -> Program:
    """Compiles `step.train_step` of a network for images of one shape; nothing runs."""

    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    state = jax.eval_shape(lambda: init_state(model, 0, (pixels, pixels, channels)))
    examples = {
        "image": shape(batch, pixels, pixels, channels, dtype=jnp.uint8),
        "label": shape(batch, dtype=jnp.int32),
        "mask": shape(batch, dtype=jnp.bool_),
    }
    hyper = optim.Hyper(*(shape() for _ in range(5)))
    start = time.perf_counter()
    lowered = jax.jit(functools.partial(train_step, model=model), donate_argnums=0).lower(
        state, examples, hyper, shape(dtype=np.uint32)
    )
    program = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - start
    return Program(program, program.memory_analysis().temp_size_in_bytes, seconds)


def runner(program: Program, model, pixels: int, channels: int, batch: int, classes: int):
    """A function () -> loss that takes one step; every side starts from the same weights."""
    state = jax.jit(lambda: init_state(model, 0, (pixels, pixels, channels)))()
    rng = np.random.default_rng(0)
    examples = {
        "image": rng.integers(0, 256, (batch, pixels, pixels, channels), dtype=np.uint8),
        "label": rng.integers(0, classes, batch, dtype=np.int32),
        "mask": np.ones(batch, bool),
    }
    hyper = optim.Hyper(*(np.float32(x) for x in (0.0015, 0.96, 1e7, 2e-4, 0.9)))

    def take() -> float:
        nonlocal state
        state, metrics = program.step(state, examples, hyper, np.uint32(0))
        return float(metrics["loss"])

    return take


def measure(name: str, sides: dict[str, Any], shape: dict[str, int], n: int) -> dict[str, Any]:
    """One record: memory of the sides, compiled alike, and their steps in turn."""
    classes = shape["classes"]
    image = {k: v for k, v in shape.items() if k != "classes"}
    programs = {side: compile_step(model, **image) for side, model in sides.items()}
    found: dict[str, Any] = {"network": name, **shape, "dtype": "float32"}
    found["as_trained"] = memory(programs)
    if jax.default_backend() == "cpu" and name != "bn_x30:digits":
        least = {s: compile_step(m, **image, options=LEAST_MEMORY) for s, m in sides.items()}
        found["ordered_for_memory"] = memory(least)
    runs = {s: runner(programs[s], m, **image, classes=classes) for s, m in sides.items()}
    losses = {side: run() for side, run in runs.items()}
    # Float32 rounding through 69 layers; Flax takes its variance as E[x^2] - E[x]^2.
    np.testing.assert_allclose(list(losses.values()), losses["bn_jax"], rtol=1e-3)
    found["step_seconds"] = fair.compare(fair.interleave(runs, n), "bn_jax")
    return found


def memory(programs: dict[str, Program]) -> dict[str, Any]:
    """Temporaries in MiB, their ratio to Flax's, and seconds of compilation, by side."""
    reference = programs["flax"].temporary
    return {
        side: {
            "temporaries_MiB": round(program.temporary / 2**20, 1),
            "of_flax": round(program.temporary / reference, 3),
            "compile_seconds": round(program.compile_seconds, 1),
        }
        for side, program in programs.items()
    }


def main() -> None:
    """Measures, prints and keeps results/bench/MACHINE/memory.json."""
    args = fair.arguments("benchmarks.memory", __doc__)
    if args.smoke:
        shape = {"pixels": 16, "channels": 1, "batch": 8, "classes": 10}
        towers = {"bn_jax": Tower(), "flax": Tower(flax_norm)}
        networks = [measure("tower", towers, shape, 3)]
        fair.write("memory", {"networks": networks}, smoke=True)
        return

    networks = []
    for scale, shape in SETTINGS.items():
        model = models.build(bn_x30.get_config(scale), shape["classes"])
        sides = {"bn_jax": model, "flax": model.clone(norm=flax_norm)}
        steps = args.steps if scale == "imagenet" else 20 * args.steps
        networks.append(measure(f"bn_x30:{scale}", sides, shape, steps))
        fair.write("memory", {"networks": networks}, smoke=False)  # what is measured is kept


if __name__ == "__main__":
    main()
