"""Percentiles of chosen activations on one fixed batch, to see how distributions move (Fig. 1)."""

import difflib
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bn_jax.distributed import mesh
from bn_jax.errors import ConfigError
from bn_jax.experiment import programs
from bn_jax.experiment.build import Experiment, abstract_state
from bn_jax.step import TrainState
from bn_jax.workdir.lines import PERCENTILES


class RecordedActivations:
    """The activations that a run records, and the program that computes their percentiles.

    A path names a layer and what is recorded of it: `dense_2/input` is what the nonlinearity reads,
    `dense_2/pre_bn` what the BN reads. The batch consists of `record.activation_examples`
    training examples, the same at every step and on every device. The network runs in training
    mode, so a BN layer normalizes with the statistics of the batch's groups, as in a training step.

    The constructor raises ConfigError for a path that the model does not have.
    """

    def __init__(self, exp: Experiment):
        self.exp = exp
        self.paths = tuple(exp.config.record.activations)
        self.examples = exp.config.record.activation_examples
        self._program: Any = None
        self._images: jax.Array | None = None
        if self.paths:
            self._check_paths()

    def _check_paths(self) -> None:
        """Raises ConfigError for a path that the model does not have."""
        known = known_paths(self.exp, self.examples)
        for path in self.paths:
            if path not in known:
                close = difflib.get_close_matches(path, known, n=1, cutoff=0)
                raise ConfigError(
                    f"record.activations: {self.exp.config.name} has no activation {path!r}; "
                    f"the closest of its {len(known)} is {close[0]!r}"
                )

    def compile(self) -> None:
        """Compiles the program of `percentiles`, if paths are recorded; any thread may call it."""
        if not self.paths:
            return
        self._program = programs.compiled(
            "percentiles",
            self._percentiles,
            abstract_arguments(self.exp, self.examples),
            self.exp.config.to_dict(),
            jit=functools.partial(jax.jit, out_shardings=mesh.replicated(self.exp.mesh)),
            made_from=[self.paths, PERCENTILES],
        )

    def percentiles(self, state: TrainState) -> dict[str, dict[str, list[float]]]:
        """Returns, for each path, `p15`, `p50` and `p85`: lists with one value for each unit."""
        if self._program is None:
            self.compile()
        if self._images is None:
            self._images = fixed_images(self.exp, self.examples)

        values = jax.device_get(self._program(state.params, state.batch_stats, self._images))
        names = [f"p{percent}" for percent in PERCENTILES]
        found = {}
        for path in self.paths:  # jax has sorted the keys of `values`
            rounded = map(_rounded, values[path])
            found[path] = dict(zip(names, rounded, strict=True))
        return found

    def _percentiles(self, params, batch_stats, images) -> dict[str, jax.Array]:
        """Computes the percentiles [3, units] of each path."""
        found = activations(self.exp, params, batch_stats, images)
        return {path: percentiles(by_unit(found[path])) for path in self.paths}


def known_paths(exp: Experiment, examples: int) -> list[str]:
    """Returns the sorted paths of all activations that the model has."""
    arguments = abstract_arguments(exp, examples)
    _, _, images = arguments

    def trace() -> bytes:
        found = jax.eval_shape(functools.partial(activations, exp), *arguments)
        paths = [path for path in found if path.endswith(("/input", "/pre_bn"))]
        return json.dumps(paths).encode()

    about = ["activations", exp.config.to_dict(), images.shape]
    return json.loads(programs.kept(about, trace))


def abstract_arguments(exp: Experiment, examples: int) -> tuple[Any, Any, Any]:
    """Returns (params, batch_stats, images) as shapes with shardings, for compiling."""
    state = abstract_state(exp)
    everywhere = mesh.replicated(exp.mesh)
    shape = (examples, *exp.data.image_shape)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=everywhere)
    return state.params, state.batch_stats, images


def fixed_images(exp: Experiment, examples: int) -> jax.Array:
    """Returns the images on which activations are observed: uint8 [examples, H, W, C].

    They are always the same training examples of a run, and every device has all of them.
    """
    batches = exp.data.statistics(1, examples, slice(0, examples), seed=exp.config.seed)
    batch = next(batches)
    return mesh.put_replicated(exp.mesh, batch["image"])


def activations(
    exp: Experiment, params: Any, batch_stats: Any, images: jax.Array
) -> dict[str, jax.Array]:
    """Computes every activation [N, ..., units], by path, with the network in training mode."""
    _, updates = exp.model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        rngs={"dropout": jax.random.key(0)},
        mutable=["batch_stats", "activations"],
    )
    flat = traverse_util.flatten_dict(updates["activations"], sep="/")
    return {path: sown[0] for path, sown in flat.items()}


def by_unit(x: jax.Array) -> jax.Array:
    """Reshapes [N, ..., units] to float32 [values, units]."""
    return x.astype(jnp.float32).reshape(-1, x.shape[-1])


def percentiles(values: jax.Array) -> jax.Array:
    """Computes the PERCENTILES of each unit: [values, units] to [3, units]."""
    return jnp.percentile(values, jnp.array(PERCENTILES, jnp.float32), axis=0)


def _rounded(values: np.ndarray) -> list[float]:
    """Rounds to six significant digits, to keep the file small."""
    return [float(f"{v:.6g}") for v in values]
