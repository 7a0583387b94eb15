"""What of BN's gain does the initialization explain?

Networks with BN and without it start from initial weights of several sizes, and their steps to a
level of accuracy are compared.
"""

import math
from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from bn_jax.experiment.config import fields
from bn_jax.figures.curves import Reached, curve, ratio, reach
from bn_jax.figures.plotting import BLUE, GREY, subplots
from bn_jax.studies.frame import Part, Result, Results, Study, Table, arms, finals, percent
from bn_jax.uncertainty import Effect, bounded, written

GAINS = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the config's weights
LEVEL = 0.8  # of accuracy


def parts(config: ConfigDict) -> list[Part]:
    """Makes a part for every gain, with BN and without."""
    field = "model.init_std" if config.model.name == "mlp" else "model.init_scale"
    own = dict(fields(config))[field]
    found = []
    for arm in arms(config):
        for gain in GAINS:
            settings = (*arm.settings, f"{field}={own * gain}")
            found.append(Part(_part(arm.name, f"{gain:g}"), settings))
    return found


def _part(arm: str, gain: str) -> str:
    return f"{arm}/gain={gain}"


def steps_to(results: Iterable[Result], level: float) -> list[Reached]:
    """Finds when each run reaches the level, in steps of its own batch."""
    found = []
    for result in results:
        scale = result.run.config["batch_size"] / 32  # `curve` counts steps of 32 examples
        reached = reach(curve(result.run), level)
        assert isinstance(reached, Reached)  # the run is done or has diverged
        found.append(
            Reached(
                low=reached.low / scale,
                steps=reached.steps / scale,
                high=reached.high / scale,
            )
        )
    return found


def speed_up(results: Results, gain: str) -> Effect:
    """Divides the steps of the plain network by those with BN, paired by seed."""
    bn = results[_part("bn", gain)]
    plain = results[_part("plain", gain)]
    seeds = sorted(bn.keys() & plain.keys())
    ours = steps_to([bn[seed] for seed in seeds], LEVEL)
    theirs = steps_to([plain[seed] for seed in seeds], LEVEL)

    known = []
    for here, there in zip(ours, theirs, strict=True):
        times = ratio(there, here)
        if not isinstance(times, str):
            known.append(times)
    return bounded(known)


def gains(results: Results) -> list[str]:
    """Lists the gains of a study, as they are written in the names of its parts."""
    return list(dict.fromkeys(part.partition("/gain=")[2] for part in results))


def table(results: Results) -> Table:
    """Makes a table with a row for each gain."""
    rows = []
    for gain in gains(results):
        cells = [gain]
        for arm in ("bn", "plain"):
            seeds = results[_part(arm, gain)]
            reached = bounded(steps_to(seeds.values(), LEVEL))
            done = finals(seeds)
            cells.append(written(reached, ",.0f"))
            cells.append(percent(done) if done else "diverged")
        cells.append(written(speed_up(results, gain), ".2f", unit="x"))
        rows.append(cells)

    head = ["gain", "BN: steps", "BN: accuracy", "plain: steps", "plain: accuracy", "speed-up"]
    legend = (
        f"Steps to an accuracy of {100 * LEVEL:.0f}%, between the last evaluation below it and the "
        "first that has it; 'at least' where the run never has it. Gain: the initial weights by "
        "the config's. Speed-up: plain steps / steps with BN."
    )
    return Table(head, rows, legend)


def draw(results: Results) -> Figure:
    """Draws steps to the level against the gain; open triangles have not reached it."""
    figure, axes = subplots(figsize=(6.4, 4.2))
    for arm, colour, marker, line in (("bn", BLUE, "o", "-"), ("plain", GREY, "s", "--")):
        means = []
        for gain in gains(results):
            reached = steps_to(results[_part(arm, gain)].values(), LEVEL)
            means.append(bounded(reached).value)
            for one in reached:
                if one.high == math.inf:
                    never = {"fillstyle": "none", "markersize": 9}
                    axes.plot(float(gain), one.steps, "^", color=colour, **never)
                else:
                    axes.plot(float(gain), one.steps, marker, color=colour, markersize=5)

        x = np.array(gains(results), float)
        axes.plot(x, means, line, color=colour, label=arm)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("initial weights, times the config's")
    axes.set_ylabel(f"steps to {100 * LEVEL:.0f}% (triangle: not reached)")
    axes.legend(fontsize=8)
    return figure


STUDY = Study(
    name="init",
    question="What of BN's gain does the initialization explain?",
    follows="our own finding on initial weights (docs/experiments.md)",
    minutes="7",
    config="bn_x5:digits",
    sizes={
        "mlp": ("total_steps=2000", "steps_per_dispatch=50", "eval_every=50"),
        "inception": ("total_steps=500", "eval_every=25", "eval_early=0", "checkpoint_every=500"),
    },
    parts=parts,
    table=table,
    draw=draw,
)
