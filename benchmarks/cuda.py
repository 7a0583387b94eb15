"""The training step, compiled for an NVIDIA H100 that is not there: what it launches and moves.

    make cuda                                           # its environment, and a first program
    python -m benchmarks.cuda                           # BN-x30, 224 px, bfloat16, batch 32
    python -m benchmarks.cuda --batch=256 --json=FILE   # a minute or two, 2 to 3 GB
    python -m benchmarks.cuda --ops=tuned --flags=--xla_gpu_deterministic_ops=true
    python -m benchmarks.cuda --smoke                   # the MLP, seconds

No GPU and no driver are needed, but jax's CUDA plugin is (pip install 'jax[cuda13]', Python 3.12).
The step is the one that training runs, with the forms that `bn_jax.ops` chooses for GPUs. --ops and
--filter_gradients show what other forms would give. Figures are of one device of --devices.

The program is not the one of a real GPU to the last kernel. Nothing is autotuned: cuDNN and Triton
take default algorithms, and cuDNN's scratch memory counts as 0 bytes, so a GPU needs more temporary
memory. Bytes are counted from the HLO, operands and results of every kernel; caches are not known
to it. No time can be had. "CublasLtBackend cannot enumerate configs in deviceless mode" is said of
a product that only cuBLAS takes: --flags=--xla_gpu_enable_triton_gemm=false gets past it.
`benchmarks.cuda_page` makes the table of results/bench/cuda.md.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import sys
import time
from typing import Any

from benchmarks import fair, hlo
from bn_jax import errors

ROOT = pathlib.Path(__file__).resolve().parent.parent
H100 = pathlib.Path(__file__).with_name("h100.textproto")
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
MISSING = (
    "jax's CUDA plugin is not installed (a GPU is not needed): pip install 'jax[cuda13]' on Python"
    " 3.12 or later, or run `make cuda`, which makes an environment for it"
)


def installed() -> bool:
    """Whether jax's CUDA plugin can be imported here."""
    return any(importlib.util.find_spec(name) for name in PLUGINS)


def devices(count: int) -> list[Any]:
    """So many H100s of one host, to compile for. Needs JAX_PLATFORMS=cpu before jax is imported.

    Otherwise the plugin asks the driver for its version, and is not registered where there is none.
    """
    from jax.experimental import topologies

    target = {"target_config": H100.read_text(), "topology": f"1x1x{count}"}
    return list(topologies.get_topology_desc(platform="cuda", **target).devices)


def training_config(args: argparse.Namespace) -> Any:
    """The named config with this batch, these groups and this number format, nothing recorded.

    Raises ConfigError.
    """
    from bn_jax.experiment.config import read

    fields = {
        "batch_size": args.batch,
        "bn.group_size": args.group,
        "dtype": args.dtype,
        "steps_per_dispatch": 1,
        "record.activations": (),
    }
    return read(args.config, [f"{field}={value}" for field, value in fields.items()])


def round_filter_gradients() -> None:
    """Lets filter gradients be convolutions in bfloat16, cast to the kernel's dtype afterwards."""
    from bn_jax.ops import mixed

    usual = mixed._backward

    def backward(strides, padding, groups, precision, residuals, dy):
        x, kernel = residuals
        narrow = (x, kernel.astype(x.dtype))
        dx, dkernel = usual(strides, padding, groups, precision, narrow, dy)
        return dx, dkernel.astype(kernel.dtype)

    mixed.conv.defvjp(mixed._forward, backward)


def compiled(args: argparse.Namespace) -> tuple[Any, float]:
    """The training step for the H100s, and the seconds that XLA took."""
    import jax
    import numpy as np

    from bn_jax import ops, train
    from bn_jax.distributed import mesh
    from bn_jax.experiment import build

    exp = build.build(training_config(args))
    exp = exp._replace(mesh=mesh.make(devices(args.devices)))
    state = build.abstract_state(exp)
    batch = build.abstract_batch(exp, args.batch, train=True)
    hyper = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), np.float32), exp.hyper)
    if args.filter_gradients == "bfloat16":
        round_filter_gradients()

    function, jit = train.training_step(exp, 1)
    step = jit(function)
    forms = {"gpu": ops.tracing_for("gpu"), "plain": ops.plain(), "tuned": ops.tracing_for("cpu")}
    with forms[args.ops]:
        lowered = step.trace(state, batch, hyper, 0).lower(lowering_platforms=("cuda",))
    start = time.perf_counter()
    program = lowered.compile()
    return program, time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles the program; everything that is known of it, as --json writes it."""
    import jax

    program, seconds = compiled(args)
    text = program.as_text()
    if args.hlo:
        args.hlo.write_text(text)
    memory = program.memory_analysis()
    asked = ("config", "batch", "dtype", "group", "devices", "ops", "filter_gradients")
    return {
        **{name: getattr(args, name) for name in asked},
        "flags": os.environ["XLA_FLAGS"],
        "jax": jax.__version__,
        "commit": fair.commit(),
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        **hlo.summary(text, args.batch // args.devices),
    }


def table(record: dict[str, Any]) -> str:
    """The record as text."""
    network = ", ".join(str(record[name]) for name in ("config", "dtype", "ops"))
    versions = f"jax {record['jax']}, commit {record['commit']}, {record['flags']}"
    moved = record["bytes_an_image"] / 1e6
    touched = record["touched_an_image"] / 1e6
    lines = [
        f"{record['devices']} x H100, compiled, not run: {network}",
        f"batch {record['batch']}, groups of {record['group']}",
        f"filter gradients in {record['filter_gradients']}",
        f"{versions}, compiled in {record['compile_seconds']} s",
        "",
        f"{record['kernels']:,} kernels, {record['copies']:,} of them copies",
        f"{moved:.1f} MB an image, {touched:.1f} of them touched",
        f"{record['temporary_bytes'] / 1e9:.2f} GB of temporary memory",
        "",
        "kernels   MB an image   kind",
    ]
    for kind, found in record["kinds"].items():
        lines.append(f"{found['kernels']:7,} {found['bytes_an_image'] / 1e6:13.1f}   {kind}")
    lines += ["", "convolutions"]
    lines += [f"{count:7,}   {name}" for name, count in record["convolutions"].items()]
    lines += ["", "MB an image   the largest items, and their layers"]
    for item in record["largest"]:
        times = f" x {item['times']}" if item["times"] > 1 else ""
        where = f"{item['name']}{times}   {item['layer']}"
        lines.append(f"{item['bytes_an_image'] / 1e6:11.1f}   {where}")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with 2 for what cannot be compiled."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="bn_x30:synthetic", help="NAME:SCALE (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="examples, of all devices (32)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--group", type=int, default=32, help="examples of a statistic group (32)")
    parser.add_argument("--devices", type=int, default=1, help="H100s of one host (1)")
    parser.add_argument("--flags", default="", help="more XLA_FLAGS")
    parser.add_argument(
        "--ops",
        default="gpu",
        choices=["gpu", "plain", "tuned"],
        help="forms of operations: those of GPUs (the default), XLA's own, those of CPUs",
    )
    parser.add_argument(
        "--filter_gradients",
        default="float32",
        choices=["float32", "bfloat16"],
        help="what convolutions in bfloat16 add up their kernels' gradients in (float32)",
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    parser.add_argument("--hlo", type=pathlib.Path, help="file for the optimised HLO")
    parser.add_argument("--smoke", action="store_true", help="the MLP, seconds")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.config = "mnist_bn:synthetic"
    if args.devices < 1 or args.batch < 1 or args.batch % args.devices:
        parser.error(f"--batch={args.batch} is not a multiple of --devices={args.devices}")
    return args


def main() -> None:
    """Compiles one program, prints its figures and writes them."""
    args = parse()
    if not installed():
        print(f"benchmarks.cuda: {MISSING}", file=sys.stderr)
        raise SystemExit(2)
    os.environ["JAX_PLATFORMS"] = "cpu"  # CUDA is only compiled for
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {args.flags}".strip()
    record = measure(args)
    print(table(record))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    errors.run_command(main)
