"""Draws one run: its accuracy, and the percentiles of one activation."""

import pathlib

from bn_jax.errors import ConfigError
from bn_jax.figures.fig1 import percentiles, plot_percentiles, typical_unit
from bn_jax.figures.plotting import BLUE, ORANGE, plot_accuracy, save, subplots
from bn_jax.workdir.reader import Run, read_run


def draw_run(workdir: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Draws a run's accuracy and, if recorded, the percentiles of one layer; returns the files."""
    run = read_run(workdir)
    name = run.config["name"]
    layer = _last_layer(run)
    evaluations = run.lines["eval"]
    panels = bool(evaluations) + bool(layer)
    if not panels:
        raise ConfigError(f"{workdir} has no evaluation yet: let it run to its first one")

    figure, axes = subplots(1, panels, figsize=(5.2 * panels, 3.6), squeeze=False)
    if evaluations:
        panel = axes[0, 0]
        last = evaluations[-1]
        share = f"{100 * last['top1']:.1f}% of {last['examples']:,}"
        plot_accuracy(panel, run, BLUE, name)
        panel.set_title(f"{run.data['split']}: {share}")

    if layer:
        panel = axes[0, -1]
        curves = percentiles(run, layer)
        plot_percentiles(panel, curves, typical_unit(curves), ORANGE)
        panel.set_title(f"{{15, 50, 85}}th percentiles, {layer}", fontsize=9)

    figure.suptitle(f"{name} on {run.data['name']}", fontsize=10)
    return save(figure, out, "run")


def _last_layer(run: Run) -> str:
    """Returns the last recorded input of a nonlinearity, else the last layer, or ''."""
    layers = list(dict.fromkeys(line["layer"] for line in run.lines["activation"]))
    inputs = [layer for layer in layers if layer.endswith("/input")]
    shown = inputs or layers
    if not shown:
        return ""
    return shown[-1]
