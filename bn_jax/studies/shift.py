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
from bn_jax.figures.plotting import subplots
from bn_jax.studies.frame import Results, Study, Table, arms, kept_evenly, measurements, states
from bn_jax.train import forward_order
from bn_jax.uncertainty import quotient, written

Flat = Mapping[str, Any]  # path of a parameter -> array


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
        one = np.concatenate([np.ravel(start[path]) for path in paths]).astype(np.float64)
        two = np.concatenate([np.ravel(there[path]) for path in paths]).astype(np.float64)
        norms = np.linalg.norm(one) * np.linalg.norm(two)
        cosine = float(one @ two / norms) if norms else 1.0
        found[layer] = Shift(float(np.linalg.norm(two - one)), cosine, float(np.linalg.norm(one)))
        current |= {path: after[path] for path in paths}
    return found


def measure(exp: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures the shifts of each step after a kept one, and spread and movement of activations."""
    config = exp.config
    size = config.batch_size
    layers = layers_in_order(forward_order(exp))
    gradients = jax.jit(functools.partial(step.gradients, model=exp.model))
    train_step = jax.jit(functools.partial(step.train_step, model=exp.model))

    by_step: list[dict[str, Any]] = []
    for number, state in states(exp, workdir):
        batch = exp.data.train_batch(number, size, slice(0, size), config.seed)
        dropout = step.dropout_key(config.seed, number)

        def gradient(flat, state=state, batch=batch, dropout=dropout):
            params = traverse_util.unflatten_dict(flat, sep="/")
            grads, _, _ = gradients(params, state.batch_stats, batch, dropout)
            return traverse_util.flatten_dict(jax.device_get(grads), sep="/")

        updated, _ = train_step(state, batch, exp.hyper, config.seed)
        before, after = (traverse_util.flatten_dict(s.params, sep="/") for s in (state, updated))
        found = shifts(gradient, before, after, layers)
        by_step.append({"step": number, "layers": {k: v._asdict() for k, v in found.items()}})

    numbers = [one["step"] for one in by_step]
    examples = config.record.activation_examples
    paths = known_paths(exp, examples)
    observer = Observer(exp, workdir, paths, examples=examples)
    shown = Shown(config.name, workdir, {k: observer.at(k)[0] for k in numbers})
    activations = {p: {"spread": spread(shown, p), "moved": moved(shown, p)} for p in paths}
    return {"steps": by_step, "activations": activations}


def maps(measured: Mapping[str, Any]) -> dict[str, tuple[list[str], np.ndarray]]:
    """Returns the maps that are drawn of a run: title -> (names of rows, values [rows, steps])."""
    names = list(measured["steps"][0]["layers"])
    cells = [[one["layers"][name] for one in measured["steps"]] for name in names]
    relative = [[float(c["distance"]) / max(float(c["norm"]), 1e-30) for c in row] for row in cells]
    angles = [[float(c["cosine"]) for c in row] for row in cells]
    inputs = [path for path in measured["activations"] if path.endswith("/input")]
    gone = [measured["activations"][path]["moved"] for path in inputs]
    return {
        "L2 of G' - G, by that of G": (names, np.array(relative)),
        "cosine of G and G'": (names, np.array(angles)),
        "distance that the median moved": (inputs, np.array(gone, float)),
    }


def typical(results: Results, arm: str) -> dict[str, dict[int, float]]:
    """Returns {what: {seed: median over layers and kept steps}}; the first layer has no shift."""
    found: dict[str, dict[int, float]] = {}
    for seed, measured in measurements(results[arm]).items():
        distances = [
            float(c["distance"])
            for one in measured["steps"]
            for c in list(one["layers"].values())[1:]
        ]
        found.setdefault("L2 of G' - G", {})[seed] = float(np.median(distances))
        for name, (_, values) in maps(measured).items():
            own = values if name.startswith("distance") else values[1:]
            found.setdefault(name, {})[seed] = float(np.median(own))
    return found


def table(results: Results) -> Table:
    """Makes a table with a row for every measure."""
    bn = typical(results, "bn")
    plain = typical(results, "plain")
    rows = []
    for name in bn or plain:
        means = [
            f"{np.mean(list(found[name].values())):.3g}" if name in found else "diverged"
            for found in (bn, plain)
        ]
        times = "-"
        if not name.startswith("cosine"):
            times = written(quotient(plain.get(name, {}), bn.get(name, {})), ".3g", unit="x")
        rows.append([name, *means, times])
    legend = (
        "Median over layers and kept steps. G: a layer's gradient; G': the same after all layers "
        "before it have taken the step that they take together. Distance that the median moved: "
        "of the inputs of nonlinearities, since step 0, in widths from the 15th to the 85th "
        "percentile."
    )
    return Table(["", "BN", "plain", "plain / BN"], rows, legend)


def draw(results: Results) -> Figure:
    """Draws maps of layers x steps of the first seed, BN above; each column has one scale."""
    shown = {arm: seeds[0].measured for arm, seeds in results.items() if seeds[0].measured}
    drawn = {arm: maps(measured) for arm, measured in shown.items()}
    rows = max(1, len(shown))
    figure, panels = subplots(rows, 3, figsize=(13, 3.6 * rows), squeeze=False)
    for row, arm in zip(panels, shown, strict=False):
        steps = [one["step"] for one in shown[arm]["steps"]]
        for axes, (title, (names, values)) in zip(row, drawn[arm].items(), strict=True):
            every = np.concatenate([found[title][1].ravel() for found in drawn.values()])
            image = axes.imshow(
                values,
                aspect="auto",
                interpolation="nearest",
                vmin=np.nanmin(every),
                vmax=np.nanmax(every),
            )
            figure.colorbar(image, ax=axes)
            few = np.unique(np.linspace(0, len(names) - 1, 12).round().astype(int))
            axes.set_yticks(few, [names[k] for k in few], fontsize=6)
            few = np.unique(np.linspace(0, len(steps) - 1, 5).round().astype(int))
            axes.set_xticks(few, [f"{steps[k]:,}" for k in few], fontsize=7)
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
