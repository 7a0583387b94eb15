"""Builds from a config what a run is made of: mesh, data, model and the optimizer's numbers."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bn_jax import models, optim, step
from bn_jax.data import pipeline
from bn_jax.distributed import mesh
from bn_jax.distributed.mesh import along_batch, put_replicated, replicated
from bn_jax.errors import CheckpointError, ConfigError
from bn_jax.experiment import programs
from bn_jax.experiment.config import check, check_data, settled
from bn_jax.workdir import guard
from bn_jax.workdir.checkpoint import Checkpoints
from bn_jax.workdir.reader import require_record


class Experiment(NamedTuple):
    """What a run is made of, built once from the config."""

    config: ConfigDict
    mesh: Mesh
    data: Any
    model: nn.Module
    hyper: optim.Hyper


class Recorded(NamedTuple):
    """A data set as run.json describes it, in place of the set (`bn_jax.data.pipeline.Data`)."""

    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    split: str
    description: str
    num_eval: int


def for_devices(config: ConfigDict, devices: int) -> ConfigDict:
    """Returns the config of a run on `devices` devices: it sets the batch of the scale `pod`.

    Counts of steps are divided so that the number of examples seen stays the same (configs/
    inception.py, `_pod`).
    """
    if not config.batch_per_device or config.batch_size < 1:  # the latter is refused later
        return config

    config = ConfigDict(config.to_dict())
    batch_size = config.batch_per_device * devices
    factor = batch_size / config.batch_size

    def fewer(steps: int) -> int:
        return max(1, round(steps / factor))

    for name in ("total_steps", "eval_every", "checkpoint_every", "log_every"):
        config[name] = fewer(config[name])
    if config.eval_early:
        config.eval_early = fewer(config.eval_early)
    config.record.activation_every = fewer(config.record.activation_every)

    config.batch_size = batch_size
    config.eval_batch_size = max(config.eval_batch_size, batch_size)
    config.batch_per_device = 0  # what run.json holds is the run's own batch, on any machine
    return config.lock()


def build(config: ConfigDict, *, training: bool = True) -> Experiment:
    """Builds all of a run except its state. Raises ConfigError before anything is compiled.

    training: False if a trained network is only evaluated.
    """
    # The devices come first: at scale `pod` they decide the batch, which is then checked once.
    # Processes that evaluate divide the examples, and each has its own devices.
    devices = mesh.make(None if training else jax.local_devices())
    config = for_devices(config, devices.size)
    check(config, list(devices.devices.flat), training=training)

    if training:
        data = pipeline.open_data(config)
        check_data(config, data)
    else:
        data = _open_again(config)
    return assemble(settled(config, data.num_train), devices, data)


def _open_again(config: ConfigDict) -> pipeline.Data:
    """Opens the data set of a trained network; if it is absent, the error names --data_dir."""
    try:
        return pipeline.open_data(config)
    except ConfigError as error:
        if config.data.name in ("digits", "synthetic"):  # these lie nowhere
            raise
        raise ConfigError(f"{error}; if the data have moved, give --data_dir=DIR") from None


def assemble(config: ConfigDict, devices: Mesh, data: Any) -> Experiment:
    """Makes an experiment on this data set, or on what run.json says of it (`Recorded`)."""
    model = models.build(config, data.num_classes)
    return Experiment(config, devices, data, model, optim.Hyper.from_config(config))


def from_workdir(workdir: pathlib.Path, data_dir: str | None = None) -> Experiment:
    """Builds the experiment of a run from its run.json, for evaluation on any number of devices.

    data_dir: where its data set lies now, if that is not where the run found it.

    The evaluated split is the set's own; of runs with `data.holdout` and without `eval_test`, which
    do not score that split, it is the held-out training examples.

    Raises ConfigError if the run or its data set is missing, or if `data_dir` has another set.
    """
    config, recorded = _read_run(workdir, data_dir)
    exp = build(config, training=False)
    # Of imported weights info.data describes where the weights come from, not a data set.
    imported = "imported" in require_record(workdir)["info"]
    if data_dir is not None and not imported:
        now = describe(exp)["data"]
        if "digest" in recorded:
            now["digest"] = exp.data.digest()
        guard.require_same_data(workdir, recorded, now)
    if config.eval_test:
        exp = exp._replace(data=exp.data.tested())
    return exp


def without_data(workdir: pathlib.Path, data_dir: str | None = None) -> Experiment:
    """Builds a run's experiment with `Recorded` data, for prediction without the data set.

    A run that has not recorded the classes and the images' shape opens its data set.
    """
    config, recorded = _read_run(workdir, data_dir)
    if "image_shape" not in recorded:
        return from_workdir(workdir, data_dir)

    check(config)
    classes = recorded["classes"]
    names = recorded["class_names"] or _numbers(classes)
    data = Recorded(
        num_classes=classes,
        class_names=tuple(names),
        image_shape=tuple(recorded["image_shape"]),
        split=recorded["split"],
        description=recorded["description"],
        num_eval=recorded["eval_examples"],
    )
    return assemble(config, mesh.make(jax.local_devices()), data)


def with_data(exp: Experiment, workdir: pathlib.Path) -> Experiment:
    """Returns the experiment with its data set, opened if need be. Raises ConfigError."""
    if not isinstance(exp.data, Recorded):
        return exp
    place = exp.config.data.dir
    moved = place != require_record(workdir)["config"]["data"]["dir"]
    return from_workdir(workdir, place if moved else None)


def _read_run(
    workdir: pathlib.Path, data_dir: str | None = None
) -> tuple[ConfigDict, dict[str, Any]]:
    """Reads run.json: returns the config, with `data_dir` if given, and the data's description."""
    run = require_record(workdir)
    if "data" not in run["info"]:
        raise ConfigError(f"{workdir}/run.json does not say what data the run had: restore it")
    config = ConfigDict(run["config"])
    if data_dir is not None:
        config.data.dir = data_dir
    return config.lock(), run["info"]["data"]


def abstract_state(exp: Experiment) -> step.TrainState:
    """Returns the state's shapes, dtypes and shardings; nothing is computed."""
    everywhere = replicated(exp.mesh)
    shapes = _shapes(exp.model, exp.data.image_shape)
    return jax.tree.map(lambda leaf: leaf.update(sharding=everywhere), shapes)


@functools.lru_cache(maxsize=8)
def _shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> step.TrainState:
    """Traces the initial state, which takes seconds for a deep network."""
    return jax.eval_shape(lambda: step.init_state(model, 0, image_shape))


def abstract_batch(exp: Experiment, size: int, *, train: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of a global batch of `size` examples."""
    rows = along_batch(exp.mesh)

    def rows_of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=rows)

    batch = {
        "image": rows_of(exp.data.image_shape, np.uint8),
        "label": rows_of((), np.int32),
    }
    if not train or exp.data.masked:
        batch["mask"] = rows_of((), np.bool_)
    return batch


def initial_state(exp: Experiment, seed: jax.typing.ArrayLike | None = None) -> step.TrainState:
    """Makes the state before the first step, from the config's seed or this one; for `jax.jit`."""
    seed = exp.config.seed if seed is None else seed
    return step.init_state(exp.model, seed, exp.data.image_shape)


def create_state(exp: Experiment) -> step.TrainState:
    """Makes `initial_state` on the devices. All seeds share one program."""
    seed = put_replicated(exp.mesh, np.uint32(exp.config.seed))
    program = programs.compiled(
        "initial",
        functools.partial(initial_state, exp),
        (seed,),
        exp.config.to_dict(),
        jit=functools.partial(jax.jit, out_shardings=replicated(exp.mesh)),
        made_from=[exp.data.image_shape, exp.data.num_classes],
    )
    return program(seed)


def restore(
    exp: Experiment, workdir: pathlib.Path, at_step: int | None = None
) -> tuple[int, step.TrainState]:
    """Restores (step, state) from a run's newest checkpoint, or from `at_step`; CheckpointError."""
    checkpoints = Checkpoints(workdir / "checkpoints", keep_last=1, keep_best=0, read_only=True)
    found = checkpoints.restore(abstract_state(exp), at_step)
    if found is None:
        raise CheckpointError(
            f"{checkpoints.directory} has no checkpoint yet: train until the first one is saved"
        )
    number, state, _ = found
    return number, state


def state_at(exp: Experiment, workdir: pathlib.Path, at_step: int) -> step.TrainState:
    """Returns a run's state after `at_step`; 0 is the initial one. Raises as `restore` does."""
    if at_step == 0:
        return create_state(exp)
    _, state = restore(exp, workdir, at_step)
    return state


def describe(exp: Experiment) -> dict[str, Any]:
    """Returns what run.json records of the data and the devices."""
    names = list(exp.data.class_names)
    if names == _numbers(exp.data.num_classes):
        names = []  # the classes only have numbers
    data = {
        "name": exp.config.data.name,
        "split": exp.data.split,
        "description": exp.data.description,
        "train_examples": exp.data.num_train,
        "eval_examples": exp.data.num_eval,
        "image_shape": list(exp.data.image_shape),
        "classes": exp.data.num_classes,
        "class_names": names,
    }
    return {"data": data, "mesh": mesh.describe(exp.mesh)}


def _numbers(classes: int) -> list[str]:
    """Returns the names of classes that only have numbers."""
    return [str(number) for number in range(classes)]
