"""Figures read recorded files only; their numbers against hand-made records."""

import json

import numpy as np
import pytest
from train_test import small

from bn_jax import figures, train
from bn_jax.errors import ConfigError
from configs import mnist, mnist_bn


def write_run(workdir, values, top1=(0.5, 0.9)):
    """A recorded run of one layer; values [T, 3, units] are its percentiles."""
    workdir.mkdir(parents=True)
    data = {"name": "digits", "split": "test", "description": "hand-made"}
    run = {"config": {"name": workdir.name}, "info": {"data": data}}
    (workdir / "run.json").write_text(json.dumps(run))
    lines = [
        {"step": 10 * t, "kind": "activation", "layer": "dense_2/input"}
        | {f"p{p}": list(map(float, row)) for p, row in zip((15, 50, 85), at, strict=True)}
        for t, at in enumerate(values)
    ]
    lines += [
        {"step": 10 * (k + 1), "kind": "eval", "top1": v, "top5": 1.0, "examples": 1000}
        for k, v in enumerate(top1)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_drift_is_the_range_over_the_spread(tmp_path):
    # unit 0 never moves; unit 1's percentiles all rise by 2, their distance stays 4
    values = np.array([[[-1, -2], [0, 0], [1, 2]], [[-1, 0], [0, 2], [1, 4]]], float)
    write_run(tmp_path / "a", values)
    curves = figures.percentiles(figures.read_run(tmp_path / "a"), "dense_2/input")
    np.testing.assert_allclose(figures.drift(curves), [[0, 0.5]] * 3)


def test_the_typical_unit_is_the_median_one():
    values = np.zeros((2, 3, 5))
    values[:, 0], values[:, 2] = -1, 1
    values[1, 1] = [4, 0, 2, 1, 3]  # drift of the medians
    assert figures.typical_unit(figures.Percentiles("x", np.arange(2), values)) == 2


def test_fig1_numbers_and_pictures(tmp_path, capsys):
    still = np.tile(np.array([[[-1.0] * 3, [0.0] * 3, [1.0] * 3]]), (4, 1, 1))
    moving = still + np.arange(4.0)[:, None, None]
    write_run(tmp_path / "mnist", moving, top1=(0.4, 0.8))
    write_run(tmp_path / "mnist_bn", still)
    paths = figures.draw_fig1(tmp_path, tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "fig1.json").read_text())
    assert numbers["without BN"]["drift"] == {"15": 1.5, "50": 1.5, "85": 1.5}
    assert numbers["with BN"]["layer_drift"] == {"15": 0.0, "50": 0.0, "85": 0.0}
    assert numbers["with BN"]["accuracy"] == 0.9 and numbers["without BN"]["steps"] == 20
    assert {p.name for p in paths} == {"fig1.png", "fig1.svg", "fig1.json"}
    assert (tmp_path / "out" / "fig1.png").read_bytes().startswith(b"\x89PNG")
    assert "| with BN | 20 | 90.00% of 1,000 |" in capsys.readouterr().out


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no recorded run"):
        figures.read_run(tmp_path)


@pytest.mark.parametrize("seed", [0])
def test_the_claim_of_fig1_on_a_shortened_run(tmp_path, seed):
    """Section 4.1: with BN the network is more accurate and its distributions are more stable."""
    numbers = {
        "total_steps": 2000,
        "eval_every": 500,
        "checkpoint_every": 2000,
        "steps_per_dispatch": 250,
        "batch_size": 64,
        "record.activation_every": 250,
        "seed": seed,
    }
    for name, root in (("mnist", mnist), ("mnist_bn", mnist_bn)):
        train.run(small(root, **numbers), tmp_path / name)
    result = figures.fig1_numbers(
        figures.read_run(tmp_path / "mnist"), figures.read_run(tmp_path / "mnist_bn")
    )
    without, with_bn = result["without BN"], result["with BN"]
    assert with_bn["examples"] == without["examples"] == 1000
    assert with_bn["accuracy"] > without["accuracy"]
    for percentile in ("15", "50", "85"):
        assert with_bn["layer_drift"][percentile] < without["layer_drift"][percentile]
