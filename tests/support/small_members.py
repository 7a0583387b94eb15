"""Members of an ensemble in a second: the MLP with BN on the digits, not trained."""

import json
import pathlib

import jax

from bn_jax import step
from bn_jax.experiment import build
from bn_jax.workdir.checkpoint import Checkpoints
from tests.train_test import small


def save_member(workdir: pathlib.Path, seed: int, **changes) -> pathlib.Path:
    """A workdir as training leaves it, with the initial weights of a seed as step 10."""
    config = small(seed=seed, eval_batch_size=256, **changes)
    exp = build.build(config)
    # The seed is an argument, so that members share a program.
    state = jax.jit(lambda k: step.init_state(exp.model, k, exp.data.image_shape))(seed)
    workdir.mkdir(parents=True)
    info = {
        "config": exp.config.to_dict(),
        "info": build.describe(exp),
        "status": "done",
        "results": {},
        "source": {"commit": "0123456789abcdef"},
        "hardware": {"devices": 8, "device_kind": "cpu"},
    }
    (workdir / "run.json").write_text(json.dumps(info))
    line = {"step": 10, "kind": "eval", "top1": 0.1, "top5": 0.5, "examples": 1000}
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with Checkpoints(workdir / "checkpoints", keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(10, state)
    return workdir
