"""Draws one run: its accuracy, and the percentiles of one activation."""

import pathlib

from bn_jax.errors import ConfigError
from bn_jax.figures.fig1 import percentiles, plot_percentiles, typical_unit
from bn_jax.figures.plotting import BLUE, ORANGE, plot_accuracy, save, subplots
from bn_jax.workdir.reader import read_run


def draw_run(workdir: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Draws a run's accuracy and, if recorded, the percentiles of one layer; returns the files."""
    run = read_run(workdir)
    layers = list(dict.fromkeys(line["layer"] for line in run.lines["activation"]))
    inputs = [layer for layer in layers if layer.endswith("/input")] or layers
    panels = bool(run.lines["eval"]) + bool(inputs)
    if not panels:
        raise ConfigError(f"{workdir} has no evaluation yet: let it run to its first one")
    figure, all_axes = subplots(1, panels, figsize=(5.2 * panels, 3.6), squeeze=False)
    axes = iter(all_axes[0])
    if run.lines["eval"]:
        panel = next(axes)
        plot_accuracy(panel, run, BLUE, run.config["name"])
        last = run.lines["eval"][-1]
        panel.set_title(f"{run.data['split']}: {100 * last['top1']:.1f}% of {last['examples']:,}")
    if inputs:
        panel = next(axes)
        curves = percentiles(run, inputs[-1])
        plot_percentiles(panel, curves, typical_unit(curves), ORANGE)
        panel.set_title(f"{{15, 50, 85}}th percentiles, {curves.layer}", fontsize=9)
    figure.suptitle(f"{run.config['name']} on {run.data['name']}", fontsize=10)
    return save(figure, out, "run")
