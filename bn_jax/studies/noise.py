"""Is it the noise, or its absence?

BN with statistics that are wrong at every step, and BN that is frozen for the last steps, are
compared with BN and with the plain network.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from bn_jax.experiment.build import Experiment, restore
from bn_jax.experiment.evaluator import Evaluator
from bn_jax.figures.curves import curve, mean_curve
from bn_jax.figures.plotting import BLUE, GREY, ORANGE, SKY, VERMILION, subplots
from bn_jax.studies.frame import (
    Part,
    Result,
    Results,
    Study,
    Table,
    arms,
    divergences,
    finals,
    measurements,
    percent,
)
from bn_jax.uncertainty import difference, written

NOISES = (0.3, 1.0)  # standard deviations
FROZEN = 0.2  # share of the steps that are taken with frozen statistics

COLOURS = (BLUE, GREY, ORANGE, VERMILION, SKY)
STYLES = ("o-", "s--", "^-.", "v:", "D-")


def parts(config: ConfigDict) -> list[Part]:
    """Makes parts for BN, the plain network, BN with two strengths of noise, and frozen BN."""
    after = round((1 - FROZEN) * config.total_steps)
    found = arms(config)
    for noise in NOISES:
        found.append(Part(f"noise={noise:g}", ("norm=batch_norm", f"bn.noise={noise}")))
    found.append(Part("frozen", ("norm=batch_norm", f"bn.freeze_after={after}")))
    return found


def measure(exp: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures accuracy (a share) with the running statistics, with which frozen BN trains."""
    _, state = restore(exp, workdir)
    scores = Evaluator(exp).scores(state.params, state.batch_stats)
    return {"running": scores["top1"]}


def trained(seeds: Mapping[int, Result]) -> dict[int, float]:
    """Returns {seed: mean training cross-entropy of the last tenth of the recorded steps}."""
    found = {}
    for seed, (run, _) in seeds.items():
        if run.status == "done":
            losses = [float(line["cross_entropy"]) for line in run.lines["train"]]
            tenth = max(1, len(losses) // 10)
            found[seed] = float(np.mean(losses[-tenth:]))
    return found


def table(results: Results) -> Table:
    """Makes a table with a row for each network."""
    plain_bn = finals(results["bn"])
    rows = []
    for part, seeds in results.items():
        shares = finals(seeds)
        if not shares:
            rows.append([part, "; ".join(divergences(seeds)), "-", "-", "-"])
            continue

        against = "-"
        if part != "bn":
            effect = difference(shares, plain_bn)
            against = written(effect, ".2f", factor=100, sign=True)
        measured = measurements(seeds)
        running = {seed: own["running"] for seed, own in measured.items()}
        loss = np.mean(list(trained(seeds).values()))
        rows.append([part, percent(shares), against, percent(running), f"{loss:.3f}"])

    head = ["network", "accuracy", "less BN's, points", "with running statistics", "training loss"]
    legend = (
        "Accuracy of the last evaluation, with population statistics (noise is for training "
        "alone), and with the running statistics, which the frozen network trains with. Training "
        "loss: cross-entropy in nats, mean of the last tenth of the records. noise: in standard "
        f"deviations of every feature. frozen: for the last {100 * FROZEN:.0f}% of the steps."
    )
    return Table(head, rows, legend)


def draw(results: Results) -> Figure:
    """Draws accuracy against steps: the mean over seeds, with their range."""
    figure, axes = subplots(figsize=(6.8, 4.4))
    for (part, seeds), colour, style in zip(results.items(), COLOURS, STYLES, strict=True):
        done = [run for run, _ in seeds.values() if run.status == "done"]
        if not done:
            continue

        steps, mean, low, high = mean_curve([curve(run) for run in done])
        steps = steps * 32 / done[0].config["batch_size"]  # of the run's own batch
        axes.plot(steps, 100 * mean, style, color=colour, label=part, markersize=3)
        axes.fill_between(steps, 100 * low, 100 * high, color=colour, alpha=0.15)
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy (%)")
    axes.legend(fontsize=8)
    return figure


STUDY = Study(
    name="noise",
    question="Is it the noise?",
    follows="Santurkar et al. 2018 (arXiv:1805.11604), Fig. 1; Wu & Johnson 2021 (FrozenBN)",
    minutes="1",
    config="mnist_bn:digits",
    sizes={
        "mlp": ("total_steps=1500", "steps_per_dispatch=50", "eval_every=100", "log_every=50"),
        "inception": ("total_steps=400", "eval_every=50", "eval_early=0", "checkpoint_every=400"),
    },
    parts=parts,
    table=table,
    draw=draw,
    measure=measure,
)
