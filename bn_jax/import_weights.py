"""Makes a run from other weights: `python -m bn_jax.import_weights --from=FILE ...`.

FILE is .safetensors, .npz or .msgpack; docs/weights.md says how to make one. The command writes a
workdir with a config and a checkpoint at step 0. bn_jax.evaluate, predict and export use it like
that of a trained run. Nothing is unpickled, and nothing is written unless every tensor fits.
"""

import argparse
import pathlib

import jax
from ml_collections import ConfigDict

from bn_jax import errors
from bn_jax.distributed import cluster
from bn_jax.errors import ConfigError
from bn_jax.experiment.config import check, load
from bn_jax.weights import tensor_files
from bn_jax.weights.importing import (
    DEFAULT_CONFIG,
    VARIANTS,
    published,
    recorded_config,
    variables,
    write,
)
from bn_jax.weights.mapping import common_prefix


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and imports a file."""
    parser = errors.Parser("python -m bn_jax.import_weights", description=__doc__)
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
    cluster.require_one_process("bn_jax.import_weights")
    empty = args.workdir.is_dir() and not any(args.workdir.iterdir())
    if args.workdir.exists() and not empty:
        raise ConfigError(f"{args.workdir} exists already: choose another --workdir, or delete it")
    if args.background == "keep" and args.variant != "slim":
        raise ConfigError(f"--background=keep is for --variant=slim, not {args.variant}")
    file = tensor_files.read(args.file)
    config = _config(args, file)
    check(config)
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
    prefix = common_prefix(file.tensors)
    if prefix:
        print(f"every name in the file began with {prefix!r}, which was removed")
    print(f"next: python -m bn_jax.predict --workdir={args.workdir} --statistics=running IMAGE...")


def _names(path: pathlib.Path | None, classes: int) -> list[str]:
    """Reads the lines of --classes; returns [] without it, and classes then only have numbers.

    A byte order mark and empty lines at the end, which editors leave, are ignored.
    """
    if path is None:
        return []
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --classes={path}: {error}") from None
    if len(names) != classes:
        raise ConfigError(
            f"--classes={path} has {len(names)} lines, but the network has {classes} classes"
        )
    return names


def _config(args: argparse.Namespace, file: tensor_files.TensorFile) -> ConfigDict:
    if args.variant == "flax" and args.config is None:
        config = recorded_config(args.file, file)
    else:
        config = load(args.config or DEFAULT_CONFIG)
        if args.variant != "flax":
            config = published(args.variant, config)
    config = config.copy_and_resolve_references().unlock()
    config.record.tensorboard = False  # there is nothing to draw
    if args.data_dir is not None:
        config.data.dir = args.data_dir
    return config.lock()


if __name__ == "__main__":
    errors.run_command(main)
