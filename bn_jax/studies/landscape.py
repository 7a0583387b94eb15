"""Does BN smooth the loss?

At kept steps of a training, the loss and its gradient are computed at points along the gradient, at
distances like those of a training step.
"""

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from bn_jax.experiment.build import Experiment
from bn_jax.figures.plotting import BLUE, GREY, subplots
from bn_jax.studies.frame import (
    Results,
    Study,
    Table,
    arms,
    kept_evenly,
    losses,
    mean_cell,
    measurements,
)
from bn_jax.uncertainty import quotient, written

TIMES = tuple(0.5 * 2 ** (k / 2) for k in range(7))  # 0.5 to 4: the range of Santurkar et al.

# What is compared, in the words of the table.
KINDS = {
    "range": "range of the loss, nats",
    "change": "largest change of the gradient",
    "smoothness": "effective smoothness",
}


def along_gradient(
    value_and_grad: Callable[[Any], tuple[Any, Any]],
    params: Any,
    rates: Sequence[float],
) -> dict[str, Any]:
    """Computes loss and gradient at params - rate * gradient, for each of the rates.

    Args:
      value_and_grad: params -> (loss, gradient of the same structure).

    Returns:
      loss: at params. norm: of the gradient at params. losses: [rates]. changes: [rates], the norm
      of the gradient minus that at params. smoothness: the largest change / distance moved, which
      for a quadratic loss is at most its largest eigenvalue.
    """
    loss, gradient = value_and_grad(params)
    norm = _norm(gradient)

    values = []
    changes = []
    smoothness = 0.0
    for rate in rates:
        moved = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, gradient)
        value, there = value_and_grad(moved)
        values.append(float(value))

        difference = jax.tree.map(jnp.subtract, there, gradient)
        change = _norm(difference)
        changes.append(change)
        if norm:
            distance = rate * norm
            smoothness = np.maximum(smoothness, change / distance)  # keeps NaN, which max may not

    return {
        "loss": float(loss),
        "norm": norm,
        "losses": values,
        "changes": changes,
        "smoothness": float(smoothness),
    }


def _norm(tree: Any) -> float:
    squares = [float(jnp.vdot(leaf, leaf)) for leaf in jax.tree.leaves(tree)]
    return math.sqrt(sum(squares))


def measure(exp: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures `along_gradient` at the kept steps, for the loss without L2 on the next batch."""
    rates = [exp.config.learning_rate * times for times in TIMES]
    found = []
    for kept in losses(exp, workdir):
        measured = along_gradient(kept.value_and_grad, kept.state.params, rates)
        found.append({"step": kept.step, **measured})
    return {"rates": rates, "steps": found}


def series(measured: dict[str, Any], kind: str) -> np.ndarray:
    """Returns one of KINDS for each kept step, [steps]."""
    steps = measured["steps"]
    if kind == "smoothness":
        return np.array([one["smoothness"] for one in steps], float)
    if kind == "change":
        return np.array([np.max(np.array(one["changes"], float)) for one in steps])
    return np.array([np.ptp(np.array(one["losses"], float)) for one in steps])


def typical(results: Results, arm: str, kind: str) -> dict[int, float]:
    """Returns {seed: median over the kept steps}, without the initial network."""
    found = {}
    for seed, measured in measurements(results[arm]).items():
        trained = series(measured, kind)[1:]
        found[seed] = float(np.median(trained))
    return found


def table(results: Results) -> Table:
    """Makes a table with a row for each of KINDS."""
    rows = []
    for kind, words in KINDS.items():
        bn = typical(results, "bn", kind)
        plain = typical(results, "plain", kind)
        times = written(quotient(plain, bn), ".3g", unit="x")
        rows.append([words, mean_cell(bn), mean_cell(plain), times])

    legend = (
        f"Along the gradient at {TIMES[0]:g} to {TIMES[-1]:g} times the learning rate, the same "
        "for both networks; median over the kept steps after the first. Effective smoothness: "
        "the largest change of the gradient (L2) by the distance moved."
    )
    return Table(["", "BN", "plain", "plain / BN"], rows, legend)


def draw(results: Results) -> Figure:
    """Draws bands of the loss and of the gradient's changes, and the smoothness, against steps."""
    figure, panels = subplots(1, 3, figsize=(13, 3.8))
    for arm, colour, style in (("plain", GREY, "s--"), ("bn", BLUE, "o-")):
        for seed, measured in measurements(results.get(arm, {})).items():
            steps = [one["step"] for one in measured["steps"]]
            label = None if seed else arm

            for axes, name in ((panels[0], "losses"), (panels[1], "changes")):
                values = np.array([one[name] for one in measured["steps"]], float)
                values = np.where(np.isfinite(values), values, np.nan)
                low = values.min(axis=1)
                high = values.max(axis=1)
                axes.fill_between(steps, low, high, color=colour, alpha=0.3, label=label)
                axes.plot(steps, high, style, color=colour, markersize=3)

            smoothness = series(measured, "smoothness")
            panels[2].plot(steps, smoothness, style, color=colour, label=label, markersize=3)

    titles = ("loss along the gradient, nats", "change of the gradient, L2", "effective smoothness")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


STUDY = Study(
    name="landscape",
    question="Does BN smooth the loss?",
    follows="Santurkar et al. 2018 (arXiv:1805.11604), Fig. 4",
    minutes="1",
    config="mnist_bn:digits",
    sizes={
        "mlp": (*kept_evenly(total=1500, every=100), "steps_per_dispatch=50"),
        "inception": kept_evenly(total=400, every=40),
    },
    parts=arms,
    table=table,
    draw=draw,
    measure=measure,
)
