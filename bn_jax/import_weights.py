"""Weights of other implementations as a run: `python -m bn_jax.import_weights --from=FILE ...`.

FILE is .safetensors, .npz or .msgpack; docs/weights.md says how to make one. What is written is a
workdir with a config and a checkpoint at step 0, which evaluate, predict and export take as they
take a trained one. Nothing is unpickled, and nothing is written unless every tensor fits.
"""

import argparse
import importlib.util
import json
import pathlib
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bn_jax import command, disk, listing, models, optim, record, step, validate
from bn_jax.checkpoint import Checkpoints
from bn_jax.errors import ConfigError
from bn_jax.weights import mapping, tensor_files
from bn_jax.workdir import completed

VARIANTS = {
    "caffe": "bninception of Caffe, as in Cadene's pretrained-models.pytorch",
    "slim": "inception_v2 of TF-slim",
    "flax": "our own names, as flax.serialization or bn_jax.export write them",
}
DEFAULT_CONFIG = "configs/bn_baseline.py"


def load_config(name: str) -> ConfigDict:
    """The config of configs/NAME.py[:SCALE]; runs that file. Raises ConfigError."""
    path, _, scale = (
        listing.resolve([f"--config={name}"])[0].removeprefix("--config=").partition(":")
    )
    if "configs" not in sys.modules and str(listing.folder().parent) not in sys.path:
        sys.path.append(str(listing.folder().parent))
    spec = importlib.util.spec_from_file_location("bn_jax_experiment", path)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(scale) if scale else module.get_config()
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{name}: {error}") from None


def recorded_config(path: pathlib.Path, file: tensor_files.TensorFile) -> ConfigDict:
    """The config that `bn_jax.export` writes into a file. Raises ConfigError if there is none."""
    if "config" not in file.metadata:
        raise ConfigError(
            f"{path} does not say what network it is of: give --config=configs/NAME.py[:SCALE], "
            "the experiment that made it"
        )
    try:
        return ConfigDict(completed(json.loads(file.metadata["config"]))).lock()
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: its config is damaged ({error}); give --config") from None


def published(variant: str, config: ConfigDict) -> ConfigDict:
    """The config with what the published network of a variant fixes."""
    config = config.copy_and_resolve_references().unlock()
    config.name = f"imported_{variant}"
    config.norm, config.activation, config.lrn, config.dtype = (
        "batch_norm",
        "relu",
        False,
        "float32",
    )
    config.model.variant, config.model.width, config.model.aux = variant, 1.0, False
    config.bn.epsilon, config.bn.per_activation = mapping.EPSILON[variant], ()
    return config.lock()


def variables(
    file: tensor_files.TensorFile, variant: str, config: ConfigDict, *, background: bool
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """`params` and `batch_stats` from a file's tensors, in their own precision, and the shape of
    the images they are for.

    Raises ConfigError naming every tensor that does not fit.
    """
    size, bias = (
        config.image_size,
        {
            "caffe": "last_linear.bias",
            "slim": f"{mapping.SLIM_LOGITS}/biases",
            "flax": "params/classifier/bias",
        }[variant],
    )
    dropped = variant == "slim" and not background
    classes = mapping.num_classes(file.tensors, bias, 1000 + dropped) - dropped
    shape = (size, size, _channels(file, config) if variant == "flax" else 3)
    like = jax.eval_shape(lambda: step.init_state(models.build(config, classes), 0, shape))
    tree = {"params": like.params, "batch_stats": like.batch_stats}
    if variant == "caffe":
        return mapping.caffe(file.tensors, tree), shape
    if variant == "slim":
        return mapping.slim(file.tensors, tree, background=background), shape
    return mapping.flax(file.tensors, tree), shape


def _channels(file: tensor_files.TensorFile, config: ConfigDict) -> int:
    """Channels of the images, from the first layer's kernel; 3 where there is none."""
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

    Raises DiskError, and ConfigError where the workdir cannot be made.
    """
    params, batch_stats = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float32), (found["params"], found["batch_stats"])
    )
    opt_state = jax.device_get(optim.momentum_sgd().init(params))
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
        with record.open_workdir(scratch, config.to_dict(), **info) as records:
            records.begin(0)
            with Checkpoints(scratch / "checkpoints", keep_last=1, keep_best=0) as checkpoints:
                checkpoints.save(0, state, meta={"scores": {}, "imported": origin})
            records.finish("done")
        with disk.reported(workdir, "cannot write"):
            scratch.rename(workdir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    """Imports a file."""
    parser = argparse.ArgumentParser("python -m bn_jax.import_weights", description=__doc__)
    parser.add_argument("--from", required=True, dest="file", type=pathlib.Path, metavar="FILE")
    parser.add_argument(
        "--variant",
        required=True,
        choices=tuple(VARIANTS),
        help="whose weights they are: " + "; ".join(f"{k}: {v}" for k, v in VARIANTS.items()),
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="to be made")
    parser.add_argument(
        "--config",
        help="experiment of the new run, configs/NAME.py[:SCALE]; for caffe and slim "
        f"{DEFAULT_CONFIG} with the network's own fields, for flax what the file says",
    )
    parser.add_argument(
        "--background",
        choices=("drop", "keep"),
        default="drop",
        help="slim's class 0: left out, so that class k is ImageNet's k, or kept (drop)",
    )
    parser.add_argument(
        "--classes", type=pathlib.Path, metavar="TXT", help="names of the classes, one a line"
    )
    parser.add_argument("--data_dir", help="config.data.dir of the new run, for evaluate")
    args = parser.parse_args(argv)
    if args.workdir.exists() and not (args.workdir.is_dir() and not any(args.workdir.iterdir())):
        raise ConfigError(f"{args.workdir} exists already: choose another --workdir, or delete it")
    if args.background == "keep" and args.variant != "slim":
        raise ConfigError(f"--background=keep is for --variant=slim, not {args.variant}")
    file = tensor_files.read(args.file)
    config = _config(args, file)
    validate.check(config)
    found, shape = variables(file, args.variant, config, background=args.background == "keep")
    origin = {
        "file": args.file.name,
        "sha256": file.sha256,
        "variant": args.variant,
        "background": args.background if args.variant == "slim" else "none",
    }
    classes = found["params"]["classifier"]["bias"].size
    write(args.workdir, config, found, shape, origin, _names(args.classes, classes))
    count = sum(leaf.size for leaf in jax.tree.leaves(found["params"]))
    print(
        f"{args.workdir}: {count:,} parameters, {classes:,} classes, images "
        f"{' x '.join(map(str, shape))}, from {args.file} (sha256 {file.sha256})"
    )
    print(f"next: python -m bn_jax.predict --workdir={args.workdir} --statistics=running IMAGE...")


def _names(path: pathlib.Path | None, classes: int) -> list[str]:
    """The lines of --classes; [] without it, and classes are then their numbers."""
    if path is None:
        return []
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --classes={path}: {error}") from None
    if len(names) != classes:
        raise ConfigError(f"--classes={path} has {len(names)} lines, the network {classes} classes")
    return names


def _config(args: argparse.Namespace, file: tensor_files.TensorFile) -> ConfigDict:
    if args.variant == "flax" and args.config is None:
        config = recorded_config(args.file, file)
    else:
        config = load_config(args.config or DEFAULT_CONFIG)
        if args.variant != "flax":
            config = published(args.variant, config)
    config = config.copy_and_resolve_references().unlock()
    config.record.tensorboard = False  # there is nothing to draw
    if args.data_dir is not None:
        config.data.dir = args.data_dir
    return config.lock()


if __name__ == "__main__":
    command.run(main)
