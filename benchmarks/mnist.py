"""Fig. 1's two networks, 50,000 steps of 60, beside a PyTorch eager loop.

    python -m benchmarks.mnist [--smoke] [--steps=50000] [--threads=1]

Ours is the trainer's own program: 250 steps in one dispatch on the resident data set, order of
examples included. PyTorch's is the loop its users write, on the binary images held in memory. Both
start from the same weights and see the same batches, and their losses are compared first. Blocks of
2,500 steps are timed in turn. The images are random ones of MNIST's shape and number: what they
show does not change the time.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import fair

BLOCK = 2_500  # steps of one turn
LOSSES = 20  # steps whose losses are compared


class Ours:
    """The trainer's compiled steps of one experiment."""

    def __init__(self, config: Any):
        from bn_jax import train
        from bn_jax.experiment import build
        from bn_jax.step import init_state

        self.exp = build.build(config)
        self.config = config
        self.state = init_state(self.exp.model, config.seed, self.exp.data.image_shape)
        self.fed = train.feed(self.exp, 0, config.steps_per_dispatch)
        rest = (self.exp.hyper, np.int32(config.seed))
        first = next(self.fed)
        k = config.steps_per_dispatch
        self.program = train.compile_step(self.exp, k, self.state, *first, *rest)
        self.first, self.rest = first, rest

    def weights(self) -> Any:
        """Initial parameters as NumPy arrays."""
        import jax

        return jax.tree.map(np.array, self.state.params)

    def losses(self) -> np.ndarray:
        """Cross-entropy of the first dispatch's steps."""
        self.state, metrics = self.program(self.state, *self.first, *self.rest)
        return np.asarray(metrics["cross_entropy"])

    def block(self, steps: int) -> Callable[[], None]:
        """A turn: `steps` further steps, metrics fetched."""

        def run() -> None:
            for _ in range(steps // self.config.steps_per_dispatch):
                self.state, metrics = self.program(self.state, *next(self.fed), *self.rest)
                np.asarray(metrics["loss"])

        return run


class Torch:
    """The same network and batches as a PyTorch user writes them."""

    def __init__(self, torch: Any, ours: Ours, rate: float, bn: bool, epsilon: float):
        self.torch, data = torch, ours.exp.data
        images, labels = data.resident()
        binary = (images > 0.5 * 255).reshape(len(images), -1).astype(np.float32)
        self.images, self.labels = torch.from_numpy(binary), torch.from_numpy(labels.astype("i8"))
        layers: list[Any] = []
        params = ours.weights()
        for i in range(3):
            dense = params[f"dense_{i}"]
            layers.append(self.linear(dense["dense"]))
            if bn:
                layers.append(torch.nn.BatchNorm1d(100, eps=epsilon))
            layers.append(torch.nn.Sigmoid())
        layers.append(self.linear(params["classifier"]))
        self.net = torch.nn.Sequential(*layers)
        self.sgd = torch.optim.SGD(self.net.parameters(), lr=rate)
        self.order: Callable[[int], np.ndarray] = lambda k: data.train_indices(k, 60, seed=0)
        self.at = 0

    def linear(self, weights: Any) -> Any:
        """A dense layer with these weights."""
        kernel = weights["kernel"]
        layer = self.torch.nn.Linear(*kernel.shape, bias="bias" in weights)
        with self.torch.no_grad():
            layer.weight.copy_(self.torch.from_numpy(kernel.T.copy()))
            if "bias" in weights:
                layer.bias.copy_(self.torch.from_numpy(weights["bias"]))
        return layer

    def step(self, index: Any) -> Any:
        """One step; the loss, not fetched."""
        logits = self.net(self.images[index])
        loss = self.torch.nn.functional.cross_entropy(logits, self.labels[index])
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return loss.detach()

    def losses(self, n: int) -> np.ndarray:
        """Losses of the first `n` steps, on our batches."""
        order = [self.torch.from_numpy(self.order(k).astype("i8")) for k in range(n)]
        return np.array([float(self.step(index)) for index in order])

    def block(self, steps: int) -> Callable[[], None]:
        """A turn: `steps` further steps on random batches, the loss fetched every 250."""

        def run() -> None:
            order = self.torch.randperm(len(self.images))
            per_epoch = len(order) // 60
            for k in range(steps):
                at = 60 * (k % per_epoch)
                if at == 0:
                    order = self.torch.randperm(len(self.images))
                loss = self.step(order[at : at + 60])
                if k % 250 == 249:
                    float(loss)

        return run


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="500 steps: that it runs, no figures")
    parser.add_argument("--steps", type=int, default=50_000, help="steps of each network")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use, the last ones")
    args = parser.parse_args()
    fair.warm_allocator("benchmarks.mnist")
    fair.use_threads(args.threads)
    block = 250 if args.smoke else BLOCK
    turns = 2 if args.smoke else args.steps // BLOCK
    from configs import mnist, mnist_bn

    try:
        import torch

        torch.set_num_threads(args.threads)
    except ImportError:
        torch = None
    sides, record = {}, {}
    for name, root in (("without BN", mnist), ("with BN", mnist_bn)):
        config = root.get_config("synthetic").unlock()
        config.total_steps = (turns + 3) * block
        ours = Ours(config)
        sides[f"bn_jax, {name}"] = ours.block(block)
        if torch is None:
            continue
        bn, epsilon = config.norm != "none", config.bn.epsilon
        peer = Torch(torch, ours, config.learning_rate, bn, epsilon)
        want, got = ours.losses()[:LOSSES], peer.losses(LOSSES)
        # Float32 through 20 steps of a smooth network: relative to the loss, about 2.3.
        np.testing.assert_allclose(got, want, rtol=1e-4)
        sides[f"torch, {name}"] = peer.block(block)
    seconds = fair.interleave(sides, turns)
    total = {
        side: [
            sum(t) for t in zip(*(v for k, v in seconds.items() if k.startswith(side)), strict=True)
        ]
        for side in ("bn_jax", "torch")
    }
    record["block_steps"], record["steps"] = block, turns * block
    record["sides"] = {k: fair.compare(seconds, f"bn_jax, {k.split(', ')[1]}")[k] for k in seconds}
    record["both"] = fair.compare({k: v for k, v in total.items() if v}, "bn_jax")
    record["seconds_in_all"] = {k: sum(v) for k, v in total.items() if v}
    fair.write("mnist", record, smoke=args.smoke)


if __name__ == "__main__":
    main()
