"""Times batch normalization, forward and backward, beside Flax's, plain autodiff and PyTorch's.

    python -m benchmarks.batch_norm [--smoke] [--repeats=N] [--threads=1]

Two cases a shape: BN alone, and "trained", BN + ReLU under a mask of examples (all valid), as a
step of training runs it; the peers apply ReLU after BN and have no mask.
All sides run in this process, in turn within every repeat, in float32, on one allocator: glibc's
malloc kept warm (no mmap, no trimming, one arena), for which the command starts itself anew.
Before the timing every side's results are compared with ours. PyTorch is optional. Output: one
JSON object a shape and case, with medians in milliseconds, ratios, and ours over the time of the 8
passes over memory that BN needs (forward reads x twice and writes y; backward reads x and dy twice
and writes dx), which is taken as that of 4 copies of x.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import time

MALLOC = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=20000000000:glibc.malloc.arena_max=1"
SHAPES = ((32, 112, 112, 64), (32, 28, 28, 192), (32, 7, 7, 1024))
SMOKE = ((8, 7, 7, 64),)


def sides(x, dy, trained):
    """Name -> function () -> (y, dx, dgamma, dbeta), all of the same BN with gamma 1 and beta 0.

    trained: with a ReLU after it, and ours with a mask.
    """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bn_jax import batch_norm

    features = x.shape[-1]
    gamma, beta = jnp.ones(features), jnp.zeros(features)
    stats = batch_norm.init_stats((features,))
    flax = nn.BatchNorm(use_running_average=False, momentum=0.9)

    def ours(x, gamma, beta, mask):
        options = {"relu": True, "mask": mask} if trained else {}
        return batch_norm.normalize(
            x, gamma, beta, stats, train=True, epsilon=1e-5, momentum=0.9, **options
        )

    def relu(y):
        return jnp.maximum(y, 0) if trained else y

    def flax_bn(x, gamma, beta, mask):
        variables = {
            "params": {"scale": gamma, "bias": beta},
            "batch_stats": {"mean": stats.mean, "var": stats.var},
        }
        y, updates = flax.apply(variables, x, mutable=["batch_stats"])
        return relu(y), updates

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

    found = {"bn_jax": both(ours), "flax": both(flax_bn), "autodiff": both(autodiff)}
    copy = jax.jit(lambda x: x * 2)
    found["copy"] = lambda: (jax.block_until_ready(copy(x)),)
    try:
        import torch
    except ImportError:
        return found
    for name, layout in (("torch_channels_last", 1), ("torch_default", 0)):
        found[name] = torch_side(torch, np.array(x), np.array(dy), bool(layout), trained)
    return found


def torch_side(torch, x, dy, channels_last, trained):
    """torch.nn.BatchNorm2d on the same numbers."""
    bn = torch.nn.BatchNorm2d(x.shape[-1])
    x, dy = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in (x, dy))
    if not channels_last:
        x, dy = x.contiguous(), dy.contiguous()
    x.requires_grad_(True)

    def run():
        x.grad = None
        bn.zero_grad()
        y = torch.relu(bn(x)) if trained else bn(x)
        y.backward(dy)
        results = (y.detach().permute(0, 2, 3, 1), x.grad.permute(0, 2, 3, 1))
        return (*results, bn.weight.grad, bn.bias.grad)

    return run


def measure(shape, repeats, trained):
    """One record: a shape, with BN alone or as trained."""
    import jax
    import numpy as np

    keys = jax.random.split(jax.random.key(0))
    x, dy = (jax.block_until_ready(jax.random.normal(k, shape)) for k in keys)
    runs = sides(x, dy, trained)
    want = [np.asarray(a) for a in runs["bn_jax"]()]
    for name, run in runs.items():
        got = [np.asarray(a) for a in run()]
        for a, b in zip(got, want, strict=False) if name != "copy" else ():
            # Sums of up to 4e5 float32 values: relative to the largest, 1e-4.
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), err_msg=name)
    times = {name: [] for name in runs}
    for i in range(repeats + 2):  # the first two warm the allocator
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(t) for name, t in times.items()}
    ours, floor = medians["bn_jax"], 4 * medians["copy"]  # a copy is 2 of the 8 passes
    ratios = {name: round(t / ours, 2) for name, t in medians.items()}
    return {
        "shape": shape,
        "case": "trained" if trained else "alone",
        "n": repeats,
        "median_ms": {name: round(t, 3) for name, t in medians.items()},
        "fastest_ms": {name: round(min(t), 3) for name, t in times.items()},
        "times_ours": ratios,
        "ours_over_8_pass_floor": round(ours / floor, 2),
    }


def main():
    """Starts anew with the warm allocator, then measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one small shape, a few seconds")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of every side")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use, the last ones")
    args = parser.parse_args()
    if os.environ.get("GLIBC_TUNABLES") != MALLOC:
        os.environ["GLIBC_TUNABLES"] = MALLOC
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.batch_norm", *sys.argv[1:]])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])
    import flax
    import jax

    record = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "threads": args.threads,
        "allocator": f"glibc malloc, {MALLOC}",
    }
    try:
        import torch

        torch.set_num_threads(args.threads)
        record["torch"] = torch.__version__
    except ImportError:
        record["torch"] = "not installed, skipped"
    print(json.dumps(record), flush=True)
    for shape in SMOKE if args.smoke else SHAPES:
        for trained in (False, True):
            repeats = 3 if args.smoke else args.repeats
            print(json.dumps(measure(shape, repeats, trained)), flush=True)


def processor():
    """The processor's name where Linux tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
