"""Makes a run from the weights of another implementation."""

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bn_jax import models, optim, step
from bn_jax.errors import ConfigError
from bn_jax.weights import mapping, tensor_files
from bn_jax.workdir import files, recorder
from bn_jax.workdir.checkpoint import Checkpoints
from bn_jax.workdir.reader import completed

VARIANTS = {
    "caffe": "bninception of Caffe, as in Cadene's pretrained-models.pytorch",
    "slim": "inception_v2 of TF-slim",
    "flax": "our own names, as flax.serialization or bn_jax.export write them",
}
DEFAULT_CONFIG = "configs/bn_baseline.py"


def recorded_config(path: pathlib.Path, file: tensor_files.TensorFile) -> ConfigDict:
    """Reads the config that `bn_jax.export` wrote into a file. Raises ConfigError without one."""
    if "config" not in file.metadata:
        raise ConfigError(
            f"{path} does not say which network it is from: give --config=configs/NAME.py[:SCALE], "
            "the experiment that made it"
        )
    try:
        return ConfigDict(completed(json.loads(file.metadata["config"]))).lock()
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: its config is damaged ({error}); give --config") from None


def published(variant: str, config: ConfigDict) -> ConfigDict:
    """Sets the fields of a config that the published network of a variant determines."""
    config = config.copy_and_resolve_references().unlock()
    config.name = f"imported_{variant}"
    config.norm = "batch_norm"
    config.activation = "relu"
    config.lrn = False
    config.dtype = "float32"
    config.model.variant = variant
    config.model.width = 1.0
    config.model.aux = False
    config.bn.epsilon = mapping.EPSILON[variant]
    config.bn.per_activation = ()
    return config.lock()


def variables(
    file: tensor_files.TensorFile, variant: str, config: ConfigDict, *, background: bool
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Returns `params` and `batch_stats` from a file's tensors, and the images' shape [H, W, C].

    The arrays keep the file's precision. Raises ConfigError that names the first tensors that do
    not fit, and says how many there are.
    """
    bias = {
        "caffe": "last_linear.bias",
        "slim": f"{mapping.SLIM_LOGITS}/biases",
        "flax": "params/classifier/bias",
    }[variant]
    dropped = variant == "slim" and not background
    tensors = mapping.Source(file.tensors).tensors
    classes = mapping.num_classes(tensors, bias, 1000 + dropped) - dropped

    channels = _channels(file, config) if variant == "flax" else 3
    shape = (config.image_size, config.image_size, channels)
    like = jax.eval_shape(lambda: step.init_state(models.build(config, classes), 0, shape))
    tree = {"params": like.params, "batch_stats": like.batch_stats}
    if variant == "caffe":
        return mapping.caffe(tensors, tree), shape
    if variant == "slim":
        return mapping.slim(tensors, tree, background=background), shape
    return mapping.flax(tensors, tree), shape


def _channels(file: tensor_files.TensorFile, config: ConfigDict) -> int:
    """Finds the channels of the images from the first layer's kernel; 3 if that is absent."""
    for name, per_channel in (
        ("params/conv1_7x7_depthwise/kernel", lambda shape: shape[-1] // 8),
        ("params/conv1_7x7/conv/kernel", lambda shape: shape[-2]),
        ("params/dense_0/dense/kernel", lambda shape: shape[0] // config.image_size**2),
    ):
        if name in file.tensors and file.tensors[name].ndim >= 2:
            return max(1, per_channel(file.tensors[name].shape))
    return 3


def write(
    workdir: pathlib.Path,
    config: ConfigDict,
    found: dict[str, Any],
    shape: tuple[int, int, int],
    origin: dict[str, Any],
    names: list[str],
) -> None:
    """Writes run.json and a checkpoint at step 0; the workdir appears when both are whole.

    Raises DiskError, and ConfigError if the workdir cannot be made.
    """
    params, batch_stats = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float32), (found["params"], found["batch_stats"])
    )
    opt_state = jax.device_get(optim.init_velocity(params))
    state = step.TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state)
    data = {
        "name": config.data.name,
        "split": "validation",
        "description": f"weights imported from {origin['file']}, not trained here",
        "train_examples": 0,
        "eval_examples": 0,
        "image_shape": list(shape),
        "classes": int(params["classifier"]["bias"].size),
        "class_names": names,
    }
    workdir = workdir.absolute()
    scratch = workdir.with_name(f".{workdir.name}.importing")
    shutil.rmtree(scratch, ignore_errors=True)
    info = {"data": data, "imported": origin}
    try:
        with recorder.open_workdir(scratch, config.to_dict(), **info) as records:
            records.begin(0)
            with Checkpoints(scratch / "checkpoints", keep_last=1, keep_best=0) as checkpoints:
                checkpoints.save(0, state, meta={"scores": {}, "imported": origin})
            records.finish("done")
        with files.reported(workdir, "cannot write"):
            scratch.rename(workdir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
