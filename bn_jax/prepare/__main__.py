"""Prepares and checks data: `python -m bn_jax.prepare COMMAND --help`."""

import argparse

from bn_jax import errors
from bn_jax.distributed import cluster
from bn_jax.distributed.cpus import usable_cpus


def main() -> None:
    """Reads the command line and runs one of the commands."""
    parser = errors.Parser(prog="python -m bn_jax.prepare", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    imagenet = commands.add_parser(
        "imagenet", help="ILSVRC2012 -> TFDS' imagenet2012 (ArrayRecord), without TensorFlow"
    )
    source = imagenet.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        help="folder (or a file in it) of the two tars, of class folders train/nXXXXXXXX and val, "
        "of Kaggle's ILSVRC/Data/CLS-LOC, or of parquet files",
    )
    source.add_argument("--tars", dest="source", help="the same as --from")
    imagenet.add_argument("--data_dir", required=True, help="TFDS data_dir to write to (140 GiB)")
    imagenet.add_argument(
        "--partial", action="store_true", help="accept a source that lacks images"
    )
    imagenet.add_argument("--threads", type=int, default=usable_cpus(), help="shards at a time")
    imagenet.set_defaults(run=run_imagenet)

    mnist = commands.add_parser("mnist", help="finds or downloads MNIST's four files")
    mnist.add_argument("--data_dir", help="where they are or go (default: bn_jax's cache)")
    mnist.set_defaults(run=run_mnist)

    tiny40 = commands.add_parser(
        "tiny40", help="tiny-imagenet-200.zip -> a folder of 40 classes, for runs on a CPU"
    )
    tiny40.add_argument(
        "--from", dest="source", required=True, metavar="ZIP", help="tiny-imagenet-200.zip"
    )
    tiny40.add_argument("--out", default="tiny40", help="folder to make (tiny40)")
    tiny40.add_argument(
        "--other", action="store_true", help="accept other pictures than the published runs had"
    )
    tiny40.set_defaults(run=run_tiny40)

    check = commands.add_parser("check", help="reads and decodes a whole data set; a verdict")
    check.add_argument("dir", help="TFDS data_dir or version folder, or a folder of pictures")
    check.add_argument("--name", default="imagenet2012", help="which TFDS set of the data_dir")
    check.add_argument("--threads", type=int, default=usable_cpus(), help="decoding threads")
    check.set_defaults(run=run_check)

    sheet = commands.add_parser("sheet", help="draws distortions of a picture as a contact sheet")
    sheet.add_argument("image", help="a picture, or digits for one of the embedded digits")
    sheet.add_argument("--out", default="distortions.png", help="PNG to write")
    sheet.add_argument("--strengths", default="0,0.25,0.5,1", help="rows: data.distortion values")
    sheet.add_argument("--size", type=int, default=160, help="pixels of each picture")
    sheet.add_argument("--seed", type=int, default=0, help="of the draws")
    sheet.set_defaults(run=run_sheet)

    options = parser.parse_args()
    cluster.require_one_process("bn_jax.prepare")
    options.run(options)


def run_imagenet(options: argparse.Namespace) -> None:
    """Prepares ImageNet."""
    from bn_jax.prepare.imagenet import build

    folder = build(
        errors.expand_path(options.source),
        errors.expand_path(options.data_dir),
        partial=options.partial,
        threads=options.threads,
    )
    print(f"ready: {folder}\ntrain with --config.data.dir={options.data_dir}")


def run_mnist(options: argparse.Namespace) -> None:
    """Prints the folder of MNIST, after downloading it if it is absent."""
    from bn_jax.prepare.mnist import locate

    print(locate(errors.expand_path(options.data_dir) if options.data_dir else None))


def run_tiny40(options: argparse.Namespace) -> None:
    """Prepares 40 classes of Tiny-ImageNet."""
    from bn_jax.prepare.tiny40 import build

    folder = errors.expand_path(options.out)
    build(errors.expand_path(options.source), folder, other=options.other)
    print(f"train with --config=NAME:tiny40 --config.data.dir={options.out}")


def run_check(options: argparse.Namespace) -> None:
    """Checks a data set."""
    from bn_jax.prepare.check import check

    check(errors.expand_path(options.dir), options.name, threads=options.threads)


def run_sheet(options: argparse.Namespace) -> None:
    """Draws a contact sheet."""
    from bn_jax.prepare.sheet import draw

    strengths = [float(s) for s in options.strengths.split(",")]
    print(draw(options.image, options.out, strengths, size=options.size, seed=options.seed))


if __name__ == "__main__":
    errors.run_command(main)
