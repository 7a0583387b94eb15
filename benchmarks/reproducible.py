"""What the same bits on any number of devices cost: the reproducible step beside the ordinary one.

    python -m benchmarks.reproducible           # BN-x30 on the digits, batch 256; 1 and 8 devices
    python -m benchmarks.reproducible --smoke   # tiny, 1 and 2 devices: that it runs, no figures

Virtual CPU devices in one process, so all share one pool of threads (the most devices, or the
cores if there are more). Both kinds start from the same weights and see the same batches; steps are
interleaved after one warm-up each; the compilation cache is off. Compilation is given in CPU time,
steps in both, because cores may be shared. The states are compared between the numbers of devices:
by hash (reproducible), by largest difference as a share of a parameter's largest value (ordinary).
"""

import argparse
import hashlib
import os
import platform
import statistics
import time
from typing import Any


def digest(tree: Any) -> str:
    """A hash of all arrays of a tree of host arrays."""
    import jax
    import numpy as np

    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


def difference(a: Any, b: Any) -> float:
    """Largest difference of two trees of parameters, as a share of a leaf's largest value."""
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(x - y)) / max(np.max(np.abs(x)), 1e-30)) for x, y in pairs)


class Side:
    """One kind of step on some devices, compiled, with its state."""

    def __init__(self, exp: Any, batches: list, reproducible: bool):
        import jax
        import numpy as np
        from ml_collections import ConfigDict

        from bn_jax import train
        from bn_jax.distributed import mesh
        from bn_jax.experiment import build

        config = ConfigDict(exp.config.to_dict())
        config.reproducible = reproducible
        exp = exp._replace(config=config)
        everywhere = mesh.replicated(exp.mesh)
        init = jax.jit(lambda: build.initial_state(exp), out_shardings=everywhere)
        self.state, self.seconds = init(), []  # wall and CPU seconds of every step
        self.batches = [mesh.put_batch(exp.mesh, b, config.batch_size) for b in batches]
        self.rest = mesh.put_replicated(exp.mesh, (exp.hyper, np.uint32(config.seed)))
        start = time.process_time()
        self.program = train.compile_step(exp, 1, self.state, self.batches[0], *self.rest)
        self.compile_seconds = time.process_time() - start

    def step(self) -> None:
        """Takes a step with the next batch."""
        import jax

        batch = self.batches[len(self.seconds)]
        wall, cpu = time.perf_counter(), time.process_time()
        self.state, _ = self.program(self.state, batch, *self.rest)
        jax.block_until_ready(self.state)
        self.seconds.append((time.perf_counter() - wall, time.process_time() - cpu))

    def params(self) -> Any:
        """The parameters on the host."""
        import jax

        return jax.device_get(self.state.params)


def main() -> None:
    """Prints one table, row by row."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reproducible", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--smoke", action="store_true", help="width 1/16, batch 8, 1 step")
    parser.add_argument("--devices", default="1,8", help="numbers of virtual devices")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind")
    args = parser.parse_args()
    counts = [1, 2] if args.smoke else [int(n) for n in args.devices.split(",")]
    flags = f"--xla_force_host_platform_device_count={max(counts)}"  # read when jax starts
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    import jax
    from absl import flags as absl_flags

    from bn_jax.distributed import mesh
    from bn_jax.experiment import build
    from configs import bn_x30

    absl_flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    config = bn_x30.get_config("digits")
    config.batch_size = 256
    if args.smoke:
        changes = {"model.width": 1 / 16, "batch_size": 8, "bn.group_size": 4}
        config.update_from_flattened_dict(changes | {"record.activation_examples": 8})
    steps = 1 if args.smoke else args.steps
    exp = build.build(config.lock())
    size = config.batch_size
    batches = [exp.data.train_batch(k, size, slice(0, size), 0) for k in range(steps + 1)]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"jax {jax.__version__}; {config.name}:digits, width {config.model.width}, batch {size}, "
        f"groups of {config.bn.group_size}, float32, n={steps}\n"
    )
    print(
        "| devices | kind | wall s a step | CPU s a step | CPU s to compile | state, or difference "
        "to the first row's after 1 step and after all |\n|---|---|---|---|---|---|"
    )
    first: list[Any] = []
    for count in counts:
        here = exp._replace(mesh=mesh.make(jax.devices()[:count]))
        sides = [Side(here, batches, kind) for kind in (False, True)]
        for side in sides:
            side.step()  # warm-up
        trained = [sides[0].params()]
        for _ in range(steps):
            for side in sides:
                side.step()
        trained.append(sides[0].params())
        first = first or trained
        apart = [difference(a, b) for a, b in zip(first, trained, strict=True)]
        ends = f"{apart[0]:.1e}, {apart[1]:.1e}", digest(jax.device_get(sides[1].state))[:16]
        for kind, side, end in zip(("ordinary", "reproducible"), sides, ends, strict=True):
            wall, cpu = (
                statistics.median(column) for column in zip(*side.seconds[1:], strict=True)
            )
            compiled = side.compile_seconds
            print(f"| {count} | {kind} | {wall:.2f} | {cpu:.2f} | {compiled:.0f} | {end} |")
        pairs = list(zip(*(side.seconds[1:] for side in sides), strict=True))
        ratios = [statistics.median(b[k] / a[k] for a, b in pairs) for k in (0, 1)]
        print(f"| {count} | ratio | {ratios[0]:.2f} | {ratios[1]:.2f} | | |", flush=True)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
