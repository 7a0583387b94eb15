"""Is internal covariate shift reduced?

The measure of Santurkar et al. is computed for every layer, and how far the distribution of its
activations has moved. The shift of a layer is the change of its gradient when all layers before it
take the step that they take together with it.
"""

import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from matplotlib.figure import Figure

from bn_jax import step
from bn_jax.activations import known_paths
from bn_jax.activations.measure import Observer
from bn_jax.experiment.build import Experiment
from bn_jax.figures.activations import Shown, moved, spread
from bn_jax.figures.plotting import evenly_spread, subplots
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
from bn_jax.train import forward_order
from bn_jax.uncertainty import quotient, written

Flat = Mapping[str, Any]  # path of a parameter -> array

# What is measured, in the words of table and picture.
DISTANCE = "L2 of G' - G"
RELATIVE = "L2 of G' - G, by that of G"
COSINE = "cosine of G and G'"
MOVED = "distance that the median moved"


class Shift(NamedTuple):
    """The shift of a layer. distance: |G' - G|. cosine: of the angle of G and G'. norm: |G|."""

    distance: float
    cosine: float
    norm: float


def layers_in_order(paths: Iterable[str]) -> dict[str, list[str]]:
    """Groups parameters by layer: inception_3a/1x1 has the kernel, bias, scale and offset."""
    layers: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split("/")[:-1]
        if parts[-1] in ("conv", "dense", "bn"):
            parts.pop()
        layers.setdefault("/".join(parts), []).append(path)
    return layers


def shifts(
    gradient: Callable[[Flat], Flat],
    before: Flat,
    after: Flat,
    layers: Mapping[str, Sequence[str]],
) -> dict[str, Shift]:
    """Computes the shift of every layer, in a step from the parameters `before` to `after`.

    gradient: of the loss, by parameter. layers: their parameters, in the order of the forward pass.
    G is a layer's gradient at `before`, G' its gradient with all layers before it at `after`.
    """
    start = gradient(before)
    there = start  # there are no layers before the first
    current = dict(before)
    found: dict[str, Shift] = {}
    for layer, paths in layers.items():
        if found:
            there = gradient(current)
        found[layer] = _shift(_vector(start, paths), _vector(there, paths))
        current |= {path: after[path] for path in paths}
    return found


def _vector(gradient: Flat, paths: Sequence[str]) -> np.ndarray:
    """Joins the gradients of a layer's parameters in one vector, in float64."""
    leaves = [np.ravel(gradient[path]) for path in paths]
    return np.concatenate(leaves).astype(np.float64)


def _shift(own: np.ndarray, there: np.ndarray) -> Shift:
    """Compares G with G', both vectors."""
    norm = float(np.linalg.norm(own))
    norms = norm * float(np.linalg.norm(there))
    cosine = 1.0
    if norms:
        cosine = float(own @ there / norms)
    distance = float(np.linalg.norm(there - own))
    return Shift(distance, cosine, norm)


def measure(exp: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures the shifts of each step after a kept one, and spread and movement of activations."""
    config = exp.config
    layers = layers_in_order(forward_order(exp))
    train_step = jax.jit(functools.partial(step.train_step, model=exp.model))

    steps: list[dict[str, Any]] = []
    for kept in losses(exp, workdir):

        def gradient(flat, kept=kept):
            params = traverse_util.unflatten_dict(flat, sep="/")
            _, grads = kept.value_and_grad(params)
            return traverse_util.flatten_dict(jax.device_get(grads), sep="/")

        updated, _ = train_step(kept.state, kept.batch, exp.hyper, config.seed)
        before = traverse_util.flatten_dict(kept.state.params, sep="/")
        after = traverse_util.flatten_dict(updated.params, sep="/")
        found = shifts(gradient, before, after, layers)

        by_layer = {layer: shift._asdict() for layer, shift in found.items()}
        steps.append({"step": kept.step, "layers": by_layer})

    examples = config.record.activation_examples
    paths = known_paths(exp, examples)
    observer = Observer(exp, workdir, paths, examples=examples)
    observed = {}
    for one in steps:
        number = one["step"]
        observed[number], _ = observer.at(number)

    shown = Shown(config.name, workdir, observed)
    activations = {}
    for path in paths:
        activations[path] = {"spread": spread(shown, path), "moved": moved(shown, path)}
    return {"steps": steps, "activations": activations}


def maps(measured: Mapping[str, Any]) -> dict[str, tuple[list[str], np.ndarray]]:
    """Returns the maps that are drawn of a run: title -> (names of rows, values [rows, steps])."""
    layers = list(measured["steps"][0]["layers"])
    distance = _map(measured, "distance")
    norm = np.maximum(_map(measured, "norm"), 1e-30)

    activations = measured["activations"]
    inputs = [path for path in activations if path.endswith("/input")]
    distances_moved = [activations[path]["moved"] for path in inputs]
    return {
        RELATIVE: (layers, distance / norm),
        COSINE: (layers, _map(measured, "cosine")),
        MOVED: (inputs, np.array(distances_moved, float)),
    }


def _map(measured: Mapping[str, Any], field: str) -> np.ndarray:
    """Returns a field of every Shift, [layers, steps]."""
    columns = []
    for one in measured["steps"]:
        columns.append([shift[field] for shift in one["layers"].values()])
    return np.array(columns, float).T


def typical(results: Results, arm: str) -> dict[str, dict[int, float]]:
    """Returns {what: {seed: median over layers and kept steps}}; the first layer has no shift."""
    found: dict[str, dict[int, float]] = {}
    for seed, measured in measurements(results[arm]).items():
        shown = {DISTANCE: _map(measured, "distance")}
        for name, (_, values) in maps(measured).items():
            shown[name] = values

        for name, values in shown.items():
            shifted = values if name == MOVED else values[1:]
            by_seed = found.setdefault(name, {})
            by_seed[seed] = float(np.median(shifted))
    return found


def table(results: Results) -> Table:
    """Makes a table with a row for every measure."""
    bn = typical(results, "bn")
    plain = typical(results, "plain")
    rows = []
    for name in bn or plain:
        of_bn = bn.get(name, {})
        of_plain = plain.get(name, {})
        times = "-"
        if name != COSINE:
            times = written(quotient(of_plain, of_bn), ".3g", unit="x")
        rows.append([name, mean_cell(of_bn), mean_cell(of_plain), times])

    legend = (
        "Median over layers and kept steps. G: a layer's gradient; G': the same after all layers "
        "before it have taken the step that they take together. Distance that the median moved: "
        "of the inputs of nonlinearities, since step 0, in widths from the 15th to the 85th "
        "percentile."
    )
    return Table(["", "BN", "plain", "plain / BN"], rows, legend)


def draw(results: Results) -> Figure:
    """Draws maps of layers x steps of the first seed, BN above; each column has one scale."""
    steps: dict[str, list[str]] = {}
    drawn: dict[str, dict[str, tuple[list[str], np.ndarray]]] = {}
    for arm, seeds in results.items():
        measured = seeds[0].measured
        if measured:
            steps[arm] = [f"{one['step']:,}" for one in measured["steps"]]
            drawn[arm] = maps(measured)

    rows = max(1, len(drawn))
    figure, panels = subplots(rows, 3, figsize=(13, 3.6 * rows), squeeze=False)
    for row, arm in zip(panels, drawn, strict=False):
        for axes, title in zip(row, drawn[arm], strict=True):
            names, values = drawn[arm][title]
            of_both = [found[title][1] for found in drawn.values()]
            image = axes.imshow(
                values,
                aspect="auto",
                interpolation="nearest",
                vmin=min(map(np.nanmin, of_both)),
                vmax=max(map(np.nanmax, of_both)),
            )
            figure.colorbar(image, ax=axes)

            layers = evenly_spread(len(names), 12)
            axes.set_yticks(layers, [names[k] for k in layers], fontsize=6)
            shown = evenly_spread(len(steps[arm]), 5)
            axes.set_xticks(shown, [steps[arm][k] for k in shown], fontsize=7)
            axes.set_title(f"{arm}: {title}", fontsize=9)
            axes.set_xlabel("step")
    return figure


STUDY = Study(
    name="shift",
    question="Is internal covariate shift reduced?",
    follows="Ioffe & Szegedy 2015; Santurkar et al. 2018 (arXiv:1805.11604), Definition 2.1",
    minutes="1",
    config="mnist_bn:digits",
    sizes={
        "mlp": (*kept_evenly(total=1500, every=100), "steps_per_dispatch=50"),
        "inception": kept_evenly(total=400, every=80),
    },
    parts=arms,
    table=table,
    draw=draw,
    measure=measure,
)
