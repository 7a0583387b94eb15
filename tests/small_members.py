"""Members of an ensemble in a second: the MLP with BN on the digits, not trained."""

import json
import pathlib

import jax
from train_test import small

from bn_jax import experiment
from bn_jax.checkpoint import Checkpoints


def save_member(workdir: pathlib.Path, seed: int, **changes) -> pathlib.Path:
    """A workdir as training leaves it, with the initial weights of a seed as step 10."""
    config = small(seed=seed, eval_batch_size=256, **changes)
    exp = experiment.build(config)
    state = jax.jit(lambda: experiment.initial_state(exp))()
    workdir.mkdir(parents=True)
    info = {"config": config.to_dict(), "info": experiment.describe(exp)}
    (workdir / "run.json").write_text(json.dumps(info))
    with Checkpoints(workdir / "checkpoints", keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(10, state)
    return workdir
