"""Stop, resume, equal bits: does a run with `deterministic=True` repeat itself to the last bit?

    python -m benchmarks.gpu_check.bits FOLDER            # takes all steps, saves the state halfway
    python -m benchmarks.gpu_check.bits FOLDER --resume   # another process, from there to the end

The second process prints one line of JSON: how many of the state's arrays are equal. The network is
the small one of smoke runs (small.py), an eighth as wide as Inception, on random images of 32 px.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.gpu_check import small
from bn_jax import train
from bn_jax.distributed import startup
from bn_jax.experiment import build
from bn_jax.workdir.checkpoint import Checkpoints
from configs import bn_x30

STEPS = 4


def config(width: float) -> ConfigDict:
    """A small network on random images."""
    found = bn_x30.get_config("synthetic")
    settings = {
        "image_size": 32,
        "model.width": width,
        "total_steps": STEPS,
        "record.activations": (),
        "deterministic": True,
    }
    found.update_from_flattened_dict(settings)
    return found


def steps(exp: build.Experiment, state: Any, first: int, last: int) -> Any:
    """The state after the steps from `first` to `last`, as training takes them."""
    prepared = train.Prepared(exp, first, 1, lambda: None)
    program = prepared.program()
    batches = prepared.batches()
    for _ in range(first, last):
        state, _ = program(state, *next(batches), *prepared.rest)
    return state


def main() -> None:
    """Takes the steps, or the second half of them."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check.bits", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="narrower still")
    args = parser.parse_args()
    small.make_shallow()
    startup.make_gpus_deterministic()
    startup.use_compilation_cache(deterministic=True)
    exp = build.build(config(1 / 32 if args.smoke else 1 / 8))
    with Checkpoints(args.folder / "checkpoints", keep_last=2, keep_best=0) as checkpoints:
        if not args.resume:
            half = steps(exp, build.create_state(exp), 0, STEPS // 2)
            checkpoints.save(STEPS // 2, half, metric=None, meta={})
            checkpoints.wait()
            whole = steps(exp, half, STEPS // 2, STEPS)
            np.savez(args.folder / "whole.npz", *jax.tree.leaves(jax.device_get(whole)))
            return

        found = checkpoints.restore(build.abstract_state(exp))
        assert found is not None, "no checkpoint: run it without --resume before"
        again = steps(exp, found[1], STEPS // 2, STEPS)

    leaves = jax.tree.leaves(jax.device_get(again))
    with np.load(args.folder / "whole.npz") as arrays:
        pairs = zip(leaves, arrays.values(), strict=True)
        equal = sum(np.array_equal(a, b) for a, b in pairs)
    print(json.dumps({"arrays": len(leaves), "equal": equal}))


if __name__ == "__main__":
    main()
