"""Writes a network to a file: `python -m bn_jax.export --workdir=A --format=onnx --batch=any`.

The file holds the inference network of Algorithm 2 with population statistics; each BN is folded
into the layer before it. Preprocessing is included: the network takes uint8 images and returns
logits. The file is run and compared with the network before it is moved into place. The formats are
stablehlo (`jax.export`), onnx, safetensors (kernels and biases) and flax (params and batch_stats,
not folded).
"""

import pathlib

from bn_jax import errors
from bn_jax.distributed import cluster, startup
from bn_jax.errors import ConfigError
from bn_jax.evaluate import members
from bn_jax.weights import exporting, network
from bn_jax.weights.exporting import TOLERANCE, batch_size, export_run


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and exports a run's newest checkpoint, or that of a given step."""
    names = tuple(exporting.formats())
    parser = errors.Parser("python -m bn_jax.export", description=__doc__)
    parser.add_argument(
        "--workdir", required=True, type=pathlib.Path, help="a trained or imported run"
    )
    parser.add_argument("--format", required=True, choices=names)
    parser.add_argument(
        "--batch",
        "--batch_size",
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
    members.add_place(parser, batches=False)
    args = parser.parse_args(argv)
    cluster.require_one_process("bn_jax.export")
    kind = exporting.formats()[args.format]
    if args.out is not None and args.out.is_dir():
        raise ConfigError(f"--out={args.out} is a folder: name a file, NAME{kind.suffix}")
    if args.out is not None and args.out.suffix != kind.suffix:
        raise ConfigError(
            f"--out={args.out}: the name must end in {kind.suffix} for --format={args.format}"
        )
    exporting.require(args.format)
    startup.use_safe_sums()
    startup.use_compilation_cache()
    net = network.load(args.workdir, args.step, args.statistics, data_dir=args.data_dir)
    out = args.out or args.workdir / "export" / f"{net.config.name}{kind.suffix}"
    worst = export_run(net, args.format, args.batch, out)
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, {net.about['which']} checkpoint, step "
        f"{net.about['step']}, {net.statistics} statistics; run again, its logits differ by at "
        f"most {worst:.1e} of the largest (limit {TOLERANCE:g})"
    )
    print(f"{net.preprocessing()}; logits float32 [batch, {net.classes:,}]")
    if args.format == "stablehlo":
        print(exporting.stablehlo_label(net))


if __name__ == "__main__":
    errors.run_command(main)
