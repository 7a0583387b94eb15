"""Studies in seconds: small dense networks, which are trained in this process."""

import pathlib

import pytest

from bn_jax import train
from bn_jax.errors import DivergedError
from bn_jax.experiment import members
from bn_jax.studies import STUDIES, frame

# Two hidden layers of 8 units, 20 steps of 64, kept every 10.
SMALL = (
    *("model.widths=(8,8)", "batch_size=64", "bn.group_size=32", "learning_rate=0.1"),
    *("total_steps=20", "steps_per_dispatch=5", "eval_every=10", "log_every=10"),
    *("checkpoint_every=10", "keep_every=10", "statistics_batches=4"),
    *("record.activations=()", "record.activation_examples=64", "record.tensorboard=False"),
)


def train_here(found, jobs) -> None:
    """In place of `members.run`: no processes."""
    for member in found:
        if members.status(member) in members.FINISHED:
            continue
        try:
            train.run(member.config, member.workdir)
        except DivergedError as error:
            assert "diverged" in str(error)


def run_study(
    name: str,
    workdir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    *settings: str,
    config: str = "mnist_bn:digits",
    seeds: int = 1,
) -> str:
    """The text of the table of a small study."""
    monkeypatch.setattr(members, "run", train_here)
    study = STUDIES[name]
    paths = frame.run(study, workdir, config, [*SMALL, *settings], seeds)
    assert [path.name for path in paths] == [f"{name}.md", f"{name}.png", f"{name}.svg"]
    assert all(path.stat().st_size > 0 for path in paths)
    return paths[0].read_text()


def cells(text: str) -> dict[str, list[str]]:
    """The table's rows by their first cell."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}
