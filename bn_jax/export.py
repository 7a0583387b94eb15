"""A trained network as a file: `python -m bn_jax.export --workdir=A --format=onnx --batch=any`.

What is written is the inference network of Algorithm 2 with population statistics, each BN folded
into the layer before it, and what it does to the pixels first: uint8 images in, logits out. The
file is run again and compared with the network before it is moved into place. Formats: stablehlo
(`jax.export`), onnx, safetensors (kernels and biases), flax (params and batch_stats, not folded).
"""

import argparse
import contextlib
import os
import pathlib

import jax
import numpy as np

from bn_jax import command, disk
from bn_jax import mesh as meshes
from bn_jax.errors import ConfigError, UserError
from bn_jax.weights import formats, network

TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order differ by some 1e-6


def largest_difference(got: np.ndarray, want: np.ndarray) -> float:
    """max |got - want| / max |want|; infinity if the shapes differ or a value is not finite."""
    if got.shape != want.shape or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    return float(np.abs(got - want).max() / np.abs(want).max())


def export(net: network.Network, name: str, batch: int | None, out: pathlib.Path) -> float:
    """Writes the network to `out` in one of the formats; returns the largest difference found.

    Raises UserError, and leaves no file, if what was written gives other logits than the network.
    """
    kind = formats.formats(net)[name]
    scratch = out.with_name(f".{out.name}.{os.getpid()}{kind.suffix}")
    data = kind.write(net, batch)
    try:
        with disk.reported(out, "cannot write"):
            out.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(data)
        sizes = (3, 1) if batch is None else (batch,)
        images = network.examples(net, sizes[0])
        want = np.asarray(jax.jit(net.logits)(images))
        worst = max(
            largest_difference(kind.run(scratch, images[:size]), want[:size]) for size in sizes
        )
        if not worst <= TOLERANCE:
            raise UserError(
                f"{out} is not written: run again as {name}, its logits differ from the network's "
                f"by {worst:.1e} of the largest one, the limit is {TOLERANCE:g}; please report it"
            )
        with disk.reported(out, "cannot write"):
            scratch.replace(out)
            disk.sync_directory(out.parent)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
    return worst


def batch_size(text: str) -> int | None:
    """'any' to None, else a positive number."""
    if text == "any":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'any' nor a number from 1 on")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    """Exports a run's newest checkpoint, or the one of a given step."""
    names = tuple(formats.formats())
    parser = argparse.ArgumentParser("python -m bn_jax.export", description=__doc__)
    parser.add_argument(
        "--workdir", required=True, type=pathlib.Path, help="a trained or imported run"
    )
    parser.add_argument("--format", required=True, choices=names)
    parser.add_argument(
        "--batch",
        type=batch_size,
        default="any",
        help="images a call takes: any, or a number (any)",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, help="file to write (WORKDIR/export/NAME.FORMAT)"
    )
    parser.add_argument("--step", type=int, help="checkpoint to export (the newest)")
    parser.add_argument(
        "--statistics",
        choices=("population", "running"),
        help="statistics of BN: Algorithm 2 over fixed training batches, or the moving average "
        "(population; of imported weights running, their own)",
    )
    args = parser.parse_args(argv)
    kind = formats.formats()[args.format]
    if args.out is not None and args.out.is_dir():
        raise ConfigError(f"--out={args.out} is a folder: name a file, NAME{kind.suffix}")
    if args.out is not None and args.out.suffix != kind.suffix:
        raise ConfigError(
            f"--out={args.out}: a file of --format={args.format} ends in {kind.suffix}"
        )
    formats.require(args.format)
    meshes.use_compilation_cache()
    net = network.load(args.workdir, args.step, args.statistics)
    out = args.out or args.workdir / "export" / f"{net.config.name}{kind.suffix}"
    worst = export(net, args.format, args.batch, out)
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, step {net.about['step']}, {net.statistics} "
        f"statistics; run again, its logits differ by at most {worst:.1e} of the largest "
        f"(limit {TOLERANCE:g})"
    )
    print(f"{net.preprocessing()}; logits float32 [batch, {net.classes:,}]")


if __name__ == "__main__":
    command.run(main)
