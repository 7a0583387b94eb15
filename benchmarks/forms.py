"""The training step with all hand-tuned forms of `bn_jax/ops`, and without each of them.

    python -m benchmarks.forms [--smoke] [--steps=9]

The network, batch and hyper-parameters are those of `benchmarks.step`; all programs start from the
same weights, and their first two losses are compared. They take turns, a step each. The time is
the process's CPU time, of all its threads, so that the figures stand beside other work.
"""

import argparse
import time
from unittest import mock

import numpy as np

from benchmarks import fair, step
from bn_jax.ops.forms import FORMS, backend


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="32 px, width 1/16, 1 step")
    parser.add_argument("--steps", type=int, default=9, help="timed steps a program")
    args = parser.parse_args()
    fair.warm_allocator("benchmarks.forms")
    size, width, images = (32, 1 / 16, 8) if args.smoke else (224, 1.0, 32)
    batch = step.make_batch(size, images)
    variables = step.initial_variables(size, width)

    sides = {"all forms": step.Ours(variables, batch, width, False)}
    for form, backends in FORMS.items():
        if backend() in backends:
            with mock.patch.dict(FORMS, {form: ()}):
                sides[f"without {form}"] = step.Ours(variables, batch, width, False)

    losses = {name: [side.step(), side.step()] for name, side in sides.items()}
    first, second = losses["all forms"]
    for name, values in losses.items():
        # The same function of the same weights; then after a step along the gradient, as in `step`.
        np.testing.assert_allclose(values[0], first, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(values[1], second, rtol=2e-3, err_msg=name)

    seconds = fair.interleave(
        {name: side.step for name, side in sides.items()},
        1 if args.smoke else args.steps,
        warmup=0,  # the two steps before have done that
        clock=time.process_time,
    )
    record = {
        "clock": "CPU seconds of the process",
        "image_size": size,
        "batch": images,
        "sides": fair.compare(seconds, "all forms"),
        "temporary_bytes": {name: side.temporary for name, side in sides.items()},
    }
    fair.write("forms", record, smoke=args.smoke)


if __name__ == "__main__":
    main()
