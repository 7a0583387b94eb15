"""Small states that say which step they are of, and checkpoints of three of them."""

import pathlib

import jax.numpy as jnp
import numpy as np

from bn_jax.workdir.checkpoint import Checkpoints


def state_at(step: int) -> dict[str, jnp.ndarray]:
    """A state that says which step it is of."""
    rng = np.random.default_rng(step)
    return {
        "kernel": jnp.asarray(rng.normal(size=(16, 8)).astype(np.float32)),
        "mean": jnp.asarray(rng.normal(size=8).astype(np.float32)),
        "zero": jnp.zeros(64),  # all one byte: compresses to almost nothing
        "step": jnp.int32(step),
    }


def is_state_of(step: int, state: dict[str, jnp.ndarray]) -> bool:
    good = state_at(step)
    return all(np.asarray(state[k]).tobytes() == np.asarray(good[k]).tobytes() for k in good)


def open_checkpoints(directory: pathlib.Path) -> Checkpoints:
    return Checkpoints(directory, keep_last=3, keep_best=0)


def save_three(directory: pathlib.Path) -> pathlib.Path:
    """Three good steps, 10, 20 and 30, in `directory`."""
    with open_checkpoints(directory) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, state_at(step), meta={"step": step})
    return directory
