"""Does BN smooth the loss?

At kept steps of a training, the loss and its gradient are computed at points along the gradient, at
distances like those of a training step.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from bn_jax import step
from bn_jax.experiment.build import Experiment
from bn_jax.figures.plotting import BLUE, GREY, subplots
from bn_jax.studies.frame import Results, Study, Table, arms, kept_evenly, measurements, states
from bn_jax.uncertainty import quotient, written

TIMES = tuple(0.5 * 2 ** (k / 2) for k in range(7))  # 0.5 to 4: the range of Santurkar et al.

# What is compared, in the words of the table.
KINDS = {
    "range": "range of the loss, nats",
    "change": "largest change of the gradient",
    "smoothness": "effective smoothness",
}


def along_gradient(
    value_and_grad: Callable[[Any], tuple[Any, Any]], params: Any, rates: Sequence[float]
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
    losses = []
    changes = []
    for rate in rates:
        moved = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, gradient)
        value, there = value_and_grad(moved)
        difference = jax.tree.map(jnp.subtract, there, gradient)
        losses.append(float(value))
        changes.append(_norm(difference))
    steepest = [c / (rate * norm) for c, rate in zip(changes, rates, strict=True)] if norm else [0]
    return {
        "loss": float(loss),
        "norm": norm,
        "losses": losses,
        "changes": changes,
        "smoothness": max(steepest),
    }


def _norm(tree: Any) -> float:
    return math.sqrt(sum(float(jnp.vdot(leaf, leaf)) for leaf in jax.tree.leaves(tree)))


def measure(exp: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures `along_gradient` at the kept steps, for the loss without L2 on the next batch."""
    config = exp.config
    size = config.batch_size
    gradients = jax.jit(functools.partial(step.gradients, model=exp.model))
    rates = [config.learning_rate * times for times in TIMES]

    found = []
    for number, state in states(exp, workdir):
        batch = exp.data.train_batch(number, size, slice(0, size), config.seed)
        dropout = step.dropout_key(config.seed, number)

        def value_and_grad(params, state=state, batch=batch, dropout=dropout):
            grads, means, _ = gradients(params, state.batch_stats, batch, dropout)
            return means["loss"], grads

        found.append({"step": number, **along_gradient(value_and_grad, state.params, rates)})
    return {"rates": rates, "steps": found}


def series(measured: dict[str, Any], kind: str) -> np.ndarray:
    """Returns one of KINDS for each kept step, [steps]."""
    if kind == "smoothness":
        return np.array([one["smoothness"] for one in measured["steps"]], float)
    if kind == "change":
        return np.array([max(map(float, one["changes"])) for one in measured["steps"]])
    return np.array([np.ptp(np.array(one["losses"], float)) for one in measured["steps"]])


def typical(results: Results, arm: str, kind: str) -> dict[int, float]:
    """Returns {seed: median over the kept steps}, without the initial network."""
    found = measurements(results[arm])
    return {seed: float(np.median(series(m, kind)[1:])) for seed, m in found.items()}


def table(results: Results) -> Table:
    """Makes a table with a row for each of KINDS."""
    rows = []
    for kind, words in KINDS.items():
        bn = typical(results, "bn", kind)
        plain = typical(results, "plain", kind)
        means = [f"{np.mean(list(f.values())):.3g}" if f else "diverged" for f in (bn, plain)]
        rows.append([words, *means, written(quotient(plain, bn), ".3g", unit="x")])
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
            for axes, name in zip(panels, ("losses", "changes"), strict=False):
                values = np.array([one[name] for one in measured["steps"]], float)
                values = np.where(np.isfinite(values), values, np.nan)
                axes.fill_between(
                    steps, values.min(1), values.max(1), color=colour, alpha=0.3, label=label
                )
                axes.plot(steps, values.max(1), style, color=colour, markersize=3)
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
