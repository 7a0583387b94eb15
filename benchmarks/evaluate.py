"""Images a second of inference, folded (Algorithm 2, line 12) and not; and 144 crops of a picture.

    python -m benchmarks.evaluate [--smoke] [--rounds=9] [--batch=32]

Inference has one crop of 224 px. Both sides are the same network with the same population
statistics, BN applied or folded into the convolutions. Their logits are compared first, and then
batches are timed in turn.

The 144 crops (section 4.2.3, from GoogLeNet) of a made-up JPEG of 500 x 375, as evaluation prepares
them, are timed in turn with 144 single crops, each of which decodes the picture. One thread.
"""

import argparse
import functools

import numpy as np

from benchmarks import fair
from benchmarks.input import made_up
from bn_jax.data import views


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="32 px, width 1/16, one round")
    parser.add_argument("--rounds", type=int, default=9, help="timed batches a side")
    parser.add_argument("--batch", type=int, default=32, help="images")
    args = parser.parse_args()
    fair.warm_allocator("benchmarks.evaluate")
    import jax

    from bn_jax import step
    from bn_jax.layers import BatchNorm, fold_variables
    from bn_jax.models.inception import Inception

    size, width, batch = (32, 1 / 16, 4) if args.smoke else (224, 1.0, args.batch)
    norm = functools.partial(BatchNorm, epsilon=1e-3)
    random = np.random.default_rng(0)
    model = Inception(1000, width=width, norm=norm)
    state = jax.jit(lambda: step.init_state(model, 0, (size, size, 3)))()
    images = random.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    # One training pass gives every layer statistics of its own.
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    key = {"dropout": jax.random.key(0)}
    variables["batch_stats"] = jax.jit(train)(variables, images, rngs=key)[1]["batch_stats"]
    folded = fold_variables(variables, epsilon=1e-3)
    plain = Inception(1000, width=width, norm=None)
    programs = {
        name: jax.jit(functools.partial(m.apply, train=False)).lower(v, images).compile()
        for name, m, v in (("folded", plain, folded), ("unfolded", model, variables))
    }
    logits = {n: np.asarray(p(folded if n == "folded" else variables, images))
              for n, p in programs.items()}  # fmt: skip
    largest = np.abs(logits["unfolded"]).max()
    np.testing.assert_allclose(logits["folded"], logits["unfolded"], atol=1e-4 * largest)
    sides = {
        "folded": lambda: programs["folded"](folded, images).block_until_ready(),
        "unfolded": lambda: programs["unfolded"](variables, images).block_until_ready(),
    }
    results = fair.compare(fair.interleave(sides, 1 if args.smoke else args.rounds), "folded")
    for result in results.values():
        result["images_per_second"] = batch / result["median"]
    record = {"image_size": size, "width": width, "batch": batch, "sides": results}
    record["views"] = {"seconds": many_crops(size, 1 if args.smoke else args.rounds)}
    fair.write("evaluate", record, smoke=args.smoke)


def many_crops(size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Times 144 crops of a picture, of `size` pixels, and 144 times a single crop of it."""
    (picture,) = made_up(1)

    def together():
        return views.of_file(picture, 144, size, True, [])

    def singly():
        return [views.of_file(picture, 1, size, True, []) for _ in range(144)]

    sides = {"144 crops": together, "144 single crops": singly}
    return fair.compare(fair.interleave(sides, rounds), "144 crops")


if __name__ == "__main__":
    main()
