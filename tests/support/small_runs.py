"""A recorder as a trainer uses it, with numbers that are a function of the step."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from bn_jax.workdir.recorder import Recorder

CONFIG = {
    "learning_rate": 0.045,
    "total_steps": 20,
    "model": {"width": 0.125, "sizes": (1, 2)},
    "record": {"tensorboard": False},
}


def open_run(folder: pathlib.Path, **changes: Any) -> Recorder:
    arguments = {
        "config": CONFIG,
        "info": {"note": "test"},
        "total_steps": 20,
        "tensorboard": False,
        "is_main": True,
    }
    return Recorder(folder, **(arguments | changes))


def train(recorder: Recorder, first: int, last: int) -> None:
    """Records as a trainer does, with numbers that are a function of the step."""
    for step in range(first, last + 1):
        if step % 2 == 0:
            recorder.write("train", step, loss=np.float32(1) / np.float32(step), rate=0.1 * step)
        if step % 5 == 0:
            recorder.write("eval", step, top1=jnp.float32(step) / 7, top5=0.5, examples=1000)


def read_json(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())
