"""The full training step of Inception with BN, beside the same network in plain Flax and PyTorch.

    python -m benchmarks.step             # 224 px, batch 32, float32, CPU: some minutes on 2 cores
    python -m benchmarks.step --smoke     # tiny, 1 step, without PyTorch: that it runs, no figures

Plain Flax: flax.linen.BatchNorm, XLA's own pooling and convolutions, autodiff. PyTorch: eager
`pretrainedmodels.bninception` in default and in channels_last layout (skipped where it is not
installed). All sides start from the same weights and take the same batch of bytes; the losses of
the first steps are compared before anything is timed, the second of which depends on every
gradient. The sides are timed in turn, one step each, after warm-up. GEMM ceiling: float32 product
of 4096 x 4096, the best of three.
"""

import contextlib
import functools
import importlib.util
import pathlib
import time
from typing import Any

import numpy as np

from benchmarks import fair
from bn_jax.distributed.cpus import usable_cpus

GFLOP_AN_IMAGE = 11.96  # trained at 224 px, without the first layer's input gradient
RATE, MOMENTUM, L2, EPSILON = 0.0015, 0.9, 4e-5, 1e-5


def network(width: float, *, plain: bool, dtype: str = "float32", group_size: int | None = None):
    """Inception in Caffe's variant: this repository's, or for `plain` with Flax's own BN.

    group_size: examples that share statistics here; Flax's BN knows none.
    """
    import jax.numpy as jnp

    from benchmarks import plain_flax
    from bn_jax.layers import BatchNorm
    from bn_jax.models.inception import Inception

    if plain:
        options = {"momentum": 0.99}
        layer: Any = plain_flax.FlaxBatchNorm
    else:
        options = {"group_size": group_size}
        layer = BatchNorm
    norm = functools.partial(layer, epsilon=EPSILON, dtype=jnp.dtype(dtype), **options)
    return Inception(1000, width=width, variant="caffe", norm=norm, dtype=jnp.dtype(dtype))


def first_state(variables: Any, *, plain: bool) -> Any:
    """The training state that begins with these variables of this repository's network."""
    import jax

    from bn_jax import optim
    from bn_jax.layers import fresh_stats
    from bn_jax.step import TrainState

    params = jax.tree.map(jax.numpy.array, variables["params"])  # copies: they are donated
    stats = fresh_stats(variables["batch_stats"])
    if plain:  # Flax's statistics have no count of updates
        stats = without_count(stats)
    return TrainState(np.int32(0), params, stats, optim.init_velocity(params))


def hyper() -> Any:
    """Rate, decay, L2 and momentum, the same for all sides."""
    from bn_jax import optim

    return optim.Hyper(*map(np.float32, (RATE, 1.0, 1e7, L2, MOMENTUM)))


class Ours:
    """A jitted training step: this repository's, or the same network in plain Flax."""

    def __init__(
        self,
        variables: Any,
        batch: dict[str, np.ndarray],
        width: float,
        *,
        plain: bool = False,
    ):
        import jax

        from bn_jax import ops
        from bn_jax.step import train_step

        self.state = first_state(variables, plain=plain)
        self.rest = (batch, hyper(), np.uint32(1))
        model = network(width, plain=plain)
        function = jax.jit(functools.partial(train_step, model=model), donate_argnums=0)
        start = time.perf_counter()
        with ops.plain() if plain else contextlib.nullcontext():
            self.program = function.lower(self.state, *self.rest).compile()
        self.compile_seconds = time.perf_counter() - start
        self.temporary = self.program.memory_analysis().temp_size_in_bytes

    def step(self) -> float:
        """Takes one step and returns its cross-entropy."""
        self.state, metrics = self.program(self.state, *self.rest)
        return float(metrics["cross_entropy"])


def without_count(tree: Any) -> Any:
    """A batch_stats tree as flax.linen.BatchNorm has it."""
    if not isinstance(tree, dict):
        return tree
    return {name: without_count(child) for name, child in tree.items() if name != "count"}


def bninception(num_classes: int) -> Any:
    """The module of the package `pretrainedmodels`, with random weights; ImportError without it.

    Loaded by itself: the package's other networks need torchvision.
    """
    package = importlib.util.find_spec("pretrainedmodels")
    if package is None or not package.submodule_search_locations:
        raise ImportError("pretrainedmodels is not installed")
    path = pathlib.Path(package.submodule_search_locations[0]) / "models" / "bninception.py"
    spec = importlib.util.spec_from_file_location("bninception", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BNInception(num_classes)


class Torch:
    """`pretrainedmodels.bninception`, momentum SGD with weight decay.

    Args:
      torch: the package.
      tensors: the weights.
      batch: images and labels.
      channels_last: the layout of images and kernels.
      device: "cpu" or "cuda".
      amp: whether products are in bfloat16, by autocast.
      mode: of torch.compile; None runs the network eagerly.
    """

    def __init__(
        self,
        torch: Any,
        tensors: Any,
        batch: dict[str, np.ndarray],
        channels_last: bool,
        *,
        device: str = "cpu",
        amp: bool = False,
        mode: str | None = None,
    ):
        self.torch, self.channels_last = torch, channels_last
        self.device, self.amp = device, amp
        net = bninception(1000)
        net.load_state_dict(tensors)
        net.train().to(device)
        if channels_last:
            net.to(memory_format=torch.channels_last)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = EPSILON
        fused = True if device == "cuda" else None
        self.sgd = torch.optim.SGD(
            net.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=L2, fused=fused
        )
        self.module = net
        self.net = net if mode is None else torch.compile(net, mode=mode)
        self.images = torch.from_numpy(batch["image"]).to(device)
        self.labels = torch.from_numpy(batch["label"].astype(np.int64)).to(device)
        self.mean = torch.tensor([128.0, 117.0, 104.0], device=device)  # of R, G, B: Caffe's

    def advance(self) -> Any:
        """Begins one step and returns its cross-entropy, which a GPU may not have computed yet."""
        x = (self.images.float() - self.mean).flip(-1).permute(0, 3, 1, 2)
        layout = self.torch.channels_last if self.channels_last else self.torch.contiguous_format
        x = x.contiguous(memory_format=layout)
        with self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.amp):
            loss = self.torch.nn.functional.cross_entropy(self.net(x), self.labels)
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return loss.detach()

    def step(self) -> float:
        """Takes one step and returns its cross-entropy."""
        return float(self.advance())

    def restart(self, tensors: Any) -> None:
        """Goes back to these weights and to no velocity."""
        self.module.load_state_dict(tensors)
        self.sgd.state.clear()


def gemm_ceiling(n: int, repeats: int) -> float:
    """GFLOP/s of a float32 product of n x n matrices, the best of `repeats`."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((n, n), jnp.float32)
    product = jax.jit(jnp.dot)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / 1e9


def sizes(smoke: bool) -> tuple[int, float, int]:
    """Returns pixels of a side, the width of the network, and images of a batch."""
    if smoke:
        return 32, 1 / 16, 8
    return 224, 1.0, 32


def make_batch(size: int, images: int) -> dict[str, np.ndarray]:
    """A batch of random images of size x size pixels, none of which is missing."""
    random = np.random.default_rng(0)
    return {
        "image": random.integers(0, 256, (images, size, size, 3), dtype=np.uint8),
        "label": (np.arange(images) % 1000).astype(np.int32),
        "mask": np.ones(images, bool),
    }


def initial_variables(size: int, width: float) -> dict[str, Any]:
    """This repository's initial weights and statistics."""
    import jax

    from bn_jax.step import init_state

    model = network(width, plain=False)
    state = jax.jit(lambda: init_state(model, 0, (size, size, 3)))()
    return {"params": state.params, "batch_stats": state.batch_stats}


def make_sides(batch: dict[str, np.ndarray], size: int, width: float) -> dict[str, Any]:
    """All sides that can be had here, on one set of weights; PyTorch's network has one width."""
    import jax

    from bn_jax.step import init_state
    from bn_jax.weights import mapping

    model = network(width, plain=False)
    like = jax.eval_shape(lambda: init_state(model, 0, (size, size, 3)))
    try:
        import torch

        net = bninception(1000) if width == 1 else None
    except ImportError:
        net = None
    if net is None:
        variables = initial_variables(size, width)
        return {
            "bn_jax": Ours(variables, batch, width),
            "plain Flax": Ours(variables, batch, width, plain=True),
        }
    torch.set_num_threads(usable_cpus())
    tensors = net.state_dict()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    variables = mapping.caffe(arrays, {"params": like.params, "batch_stats": like.batch_stats})
    return {
        "bn_jax": Ours(variables, batch, width),
        "plain Flax": Ours(variables, batch, width, plain=True),
        "torch": Torch(torch, tensors, batch, False),
        "torch channels_last": Torch(torch, tensors, batch, True),
    }


def first_losses(sides: dict[str, Any], reference: str) -> dict[str, list[float]]:
    """Takes two steps on each side, compares the losses with those of `reference`, returns them."""
    losses = {name: [side.step(), side.step()] for name, side in sides.items()}
    first, second = losses[reference]
    for name, values in losses.items():
        # The same function of the same weights; then after a step along the gradient, in float32
        # through 69 layers, where Flax's variance is E[x^2] - E[x]^2.
        np.testing.assert_allclose(values[0], first, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(values[1], second, rtol=2e-3, err_msg=name)
    return losses


def main() -> None:
    """Measures and writes."""
    args = fair.arguments("benchmarks.step", __doc__)
    size, width, images = sizes(args.smoke)
    batch = make_batch(size, images)
    sides = make_sides(batch, size, width)
    losses = first_losses(sides, "bn_jax")

    steps = 1 if args.smoke else args.steps
    seconds = fair.interleave({name: side.step for name, side in sides.items()}, steps)
    results = fair.compare(seconds, "bn_jax")
    for result in results.values():
        result["gflops"] = GFLOP_AN_IMAGE * images / result["median"]  # nonsense in a smoke run

    ceiling = gemm_ceiling(512 if args.smoke else 4096, 3)
    jitted = {name: side for name, side in sides.items() if isinstance(side, Ours)}
    memory = {name: side.temporary for name, side in jitted.items()}
    record = {
        "image_size": size,
        "batch": images,
        "losses": losses,
        "sides": results,
        "gemm_gflops": ceiling,
        "share_of_ceiling": results["bn_jax"]["gflops"] / ceiling,
        "temporary_bytes": memory,
        "memory_ratio": memory["bn_jax"] / memory["plain Flax"],
        "compile_seconds": {name: side.compile_seconds for name, side in jitted.items()},
    }
    fair.write("step", record, smoke=args.smoke)


if __name__ == "__main__":
    main()
