"""Times batch normalization, forward and backward: Flax's two, plain autodiff and PyTorch's.

    python -m benchmarks.batch_norm [--smoke] [--repeats=N] [--threads=1]

Each shape has three cases: BN alone; "relu", BN + ReLU, as in a step on a set that lies in memory;
"mask", BN + ReLU under a mask of examples (all valid), as on a set that is streamed. In the last,
Flax's two get the mask as well; plain autodiff and PyTorch have none, and run as in "relu".
All sides run in this process, in turn within every repeat, in float32, on one allocator: glibc's
malloc kept warm (no mmap, no trimming, one arena), for which the command starts itself anew.
Before the timing every side's results are compared with ours. PyTorch is optional. Kept as
results/bench/MACHINE/batch_norm.json: n, medians and fastest in seconds, the median of the paired
ratios to ours, and ours over the time of the 8 passes over memory that BN needs (forward reads x
twice and writes y; backward reads x and dy twice and writes dx), taken as that of 4 copies of x.
"""

import argparse

from benchmarks import fair

SHAPES = ((32, 112, 112, 64), (32, 28, 28, 192), (32, 7, 7, 1024))
SMOKE = ((8, 7, 7, 64),)


CASES = ("alone", "relu", "mask")


def sides(x, dy, case):
    """Name -> function () -> (y, dx, dgamma, dbeta), all of the same BN with gamma 1 and beta 0."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from bn_jax import batch_norm

    features = x.shape[-1]
    gamma, beta = jnp.ones(features), jnp.zeros(features)
    stats = batch_norm.init_stats((features,))
    flax = nn.BatchNorm(use_running_average=False, momentum=0.9)

    def ours(x, gamma, beta, mask):
        options = {"relu": case != "alone", "mask": mask if case == "mask" else None}
        return batch_norm.normalize(
            x, gamma, beta, stats, train=True, epsilon=1e-5, momentum=0.9, **options
        )

    def flax_mask(mask):
        return mask.reshape(-1, *[1] * (x.ndim - 1)) if case == "mask" else None

    def relu(y):
        return y if case == "alone" else jnp.maximum(y, 0)

    def flax_bn(x, gamma, beta, mask):
        variables = {
            "params": {"scale": gamma, "bias": beta},
            "batch_stats": {"mean": stats.mean, "var": stats.var},
        }
        y, updates = flax.apply(variables, x, mask=flax_mask(mask), mutable=["batch_stats"])
        return relu(y), updates

    graph, state = nnx.split(nnx.BatchNorm(features, momentum=0.9, rngs=nnx.Rngs(0)))

    def flax_nnx(x, gamma, beta, mask):
        layer = nnx.merge(graph, state, copy=True)
        layer.scale[...], layer.bias[...] = gamma, beta
        y = layer(x, mask=flax_mask(mask))
        return relu(y), (layer.mean[...], layer.var[...])

    def autodiff(x, gamma, beta, mask):
        mean = jnp.mean(x, (0, 1, 2))
        var = jnp.mean(jnp.square(x - mean), (0, 1, 2))
        y = (x - mean) * (jax.lax.rsqrt(var + 1e-5) * gamma) + beta
        return relu(y), (0.9 * stats.mean + 0.1 * mean, 0.9 * stats.var + 0.1 * var)

    def both(f):
        @jax.jit
        def run(x, gamma, beta, mask, dy):
            y, vjp, new = jax.vjp(lambda *a: f(*a, mask), x, gamma, beta, has_aux=True)
            return (y, *vjp(dy)), new

        mask = jnp.ones(len(x), bool)  # an argument: a constant would be optimized away
        return lambda: jax.block_until_ready(run(x, gamma, beta, mask, dy))[0]

    found = {"bn_jax": both(ours), "flax": both(flax_bn), "flax_nnx": both(flax_nnx)}
    found["autodiff"] = both(autodiff)
    copy = jax.jit(lambda x: x * 2)
    found["copy"] = lambda: (jax.block_until_ready(copy(x)),)
    try:
        import torch
    except ImportError:
        return found
    for name, layout in (("torch_channels_last", 1), ("torch_default", 0)):
        found[name] = torch_side(torch, np.array(x), np.array(dy), bool(layout), case)
    return found


def torch_side(torch, x, dy, channels_last, case):
    """torch.nn.BatchNorm2d on the same numbers."""
    bn = torch.nn.BatchNorm2d(x.shape[-1])
    x, dy = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in (x, dy))
    if not channels_last:
        x, dy = x.contiguous(), dy.contiguous()
    x.requires_grad_(True)

    def run():
        x.grad = None
        bn.zero_grad()
        y = bn(x) if case == "alone" else torch.relu(bn(x))
        y.backward(dy)
        results = (y.detach().permute(0, 2, 3, 1), x.grad.permute(0, 2, 3, 1))
        return (*results, bn.weight.grad, bn.bias.grad)

    return run


def measure(shape, repeats, case):
    """One record: a shape in one of the cases."""
    import jax
    import numpy as np

    keys = jax.random.split(jax.random.key(0))
    x, dy = (jax.block_until_ready(jax.random.normal(k, shape)) for k in keys)
    runs = sides(x, dy, case)
    want = [np.asarray(a) for a in runs["bn_jax"]()]
    for name, run in runs.items():
        got = [np.asarray(a) for a in run()]
        for a, b in zip(got, want, strict=False) if name != "copy" else ():
            # Sums of up to 4e5 float32 values: relative to the largest, 1e-4.
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), err_msg=name)
    found = fair.compare(fair.interleave(runs, repeats, warmup=2), "bn_jax")
    floor = 4 * found["copy"]["median"]  # a copy is 2 of the 8 passes
    return {
        "shape": shape,
        "case": case,
        "MiB_of_8_passes": round(8 * x.nbytes / 2**20, 1),
        "ours_over_8_passes": round(found["bn_jax"]["median"] / floor, 2),
        "seconds": found,
    }


def main():
    """Starts anew with the warm allocator, then measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one small shape, a few seconds")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of every side")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use, the last ones")
    args = parser.parse_args()
    fair.warm_allocator("benchmarks.batch_norm")
    fair.use_threads(args.threads)
    try:
        import torch

        torch.set_num_threads(args.threads)
    except ImportError:
        print("PyTorch is not installed and is left out")
    repeats, shapes = (3, SMOKE) if args.smoke else (args.repeats, SHAPES)
    cases = [measure(shape, repeats, case) for shape in shapes for case in CASES]
    fair.write("batch_norm", {"cases": cases}, smoke=args.smoke)


if __name__ == "__main__":
    main()
