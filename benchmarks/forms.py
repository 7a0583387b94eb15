"""The training step with all hand-tuned forms of `bn_jax/ops`, and without each of them.

    python -m benchmarks.forms [--smoke] [--steps=9]

The network, batch and hyper-parameters are those of `benchmarks.step`; all programs start from the
same weights, and their first two losses are compared. They take turns, a step each. The time is
the process's CPU time, of all its threads, so that the figures stand beside other work.
"""

import time
from unittest import mock

from benchmarks import fair, step
from bn_jax.ops.forms import FORMS, backend


def main() -> None:
    """Measures and writes."""
    args = fair.arguments("benchmarks.forms", __doc__)
    size, width, images = step.sizes(args.smoke)
    batch = step.make_batch(size, images)
    variables = step.initial_variables(size, width)

    sides = {"all forms": step.Ours(variables, batch, width)}
    for form, backends in FORMS.items():
        if backend() in backends:
            with mock.patch.dict(FORMS, {form: ()}):
                sides[f"without {form}"] = step.Ours(variables, batch, width)
    step.first_losses(sides, "all forms")

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
