"""Percentiles of chosen activations on one fixed batch (Fig. 1b,c): how distributions move."""

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

    A path names a layer and what is recorded of it: `dense_2/input` is what enters the nonlinearity
    of dense_2, `dense_2/pre_bn` what enters its BN. The batch is `record.activation_examples`
    training examples, the same at every step and on every device. The network runs in training
    mode, so a BN layer normalizes with the statistics of the batch's groups, as in a training step.

    Raises ConfigError at construction for a path that the model does not have, before compiling.
    """

    def __init__(self, exp: Experiment):
        self.exp = exp
        self.paths = tuple(exp.config.record.activations)
        self._program: Any = None
        self._images: jax.Array | None = None

        known = self._known() if self.paths else []
        for path in self.paths:
            if path not in known:
                close = difflib.get_close_matches(path, known, n=1, cutoff=0)
                raise ConfigError(
                    f"record.activations: {exp.config.name} has no activation {path!r}; "
                    f"the closest of its {len(known)} is {close[0]!r}"
                )

    def compile(self) -> None:
        """Compiles what `percentiles` runs, if anything; may be called from another thread."""
        if not self.paths:
            return
        self._program = programs.compiled(
            "percentiles",
            self._percentiles,
            self._abstract_arguments(),
            self.exp.config.to_dict(),
            jit=functools.partial(jax.jit, out_shardings=mesh.replicated(self.exp.mesh)),
            made_from=[self.paths, PERCENTILES],
        )

    def percentiles(self, state: TrainState) -> dict[str, dict[str, list[float]]]:
        """Percentiles by path: `p15`, `p50`, `p85`, each one value a unit (channel)."""
        exp = self.exp
        if self._program is None:
            self.compile()
        if self._images is None:
            n = exp.config.record.activation_examples
            batch = next(exp.data.statistics(1, n, slice(0, n), seed=exp.config.seed))
            self._images = mesh.put_replicated(exp.mesh, batch["image"])

        values = jax.device_get(self._program(state.params, state.batch_stats, self._images))
        return {
            path: {f"p{p}": _rounded(v) for p, v in zip(PERCENTILES, values[path], strict=True)}
            for path in self.paths
        }

    def _known(self) -> list[str]:
        """Paths of all activations that the model has."""
        arguments = self._abstract_arguments()
        config = self.exp.config.to_dict()

        def trace() -> bytes:
            paths = jax.eval_shape(self._all, *arguments)
            ends = ("/input", "/pre_bn")
            return json.dumps([path for path in paths if path.endswith(ends)]).encode()

        return json.loads(programs.kept(["activations", config, arguments[2].shape], trace))

    def _abstract_arguments(self) -> tuple[Any, Any, Any]:
        """Shapes and shardings of params, batch_stats and images."""
        state = abstract_state(self.exp)
        shape = (self.exp.config.record.activation_examples, *self.exp.data.image_shape)
        everywhere = mesh.replicated(self.exp.mesh)
        images = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=everywhere)
        return state.params, state.batch_stats, images

    def _all(self, params: Any, batch_stats: Any, images: jax.Array) -> dict[str, jax.Array]:
        """Every activation [N, ..., units] by path."""
        _, updates = self.exp.model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats", "activations"],
        )
        flat = traverse_util.flatten_dict(updates["activations"], sep="/")
        return {path: sown[0] for path, sown in flat.items()}

    def _percentiles(self, params, batch_stats, images) -> dict[str, jax.Array]:
        """Percentiles [3, units] by path."""
        activations = self._all(params, batch_stats, images)

        def of_units(x: jax.Array) -> jax.Array:
            values = x.astype(jnp.float32).reshape(-1, x.shape[-1])
            return jnp.percentile(values, jnp.array(PERCENTILES, jnp.float32), axis=0)

        return {path: of_units(activations[path]) for path in self.paths}


def _rounded(values: np.ndarray) -> list[float]:
    """Six significant digits, to keep the file small."""
    return [float(f"{v:.6g}") for v in values]
