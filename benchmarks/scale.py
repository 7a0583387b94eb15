"""What one training step sends between devices, and what that costs at scale, without any of them.

    python -m benchmarks.scale             # Inception at 224 px on 8, 64, 512 virtual CPU devices
    python -m benchmarks.scale --devices=8@2    # with statistic groups over two devices
    python -m benchmarks.scale --smoke     # the MLP on 8 virtual devices, seconds
    python -m benchmarks.scale --devices= --topologies=v5e:2x4,v4:2x2x4 --out=FILE
    python -m benchmarks.scale --devices= --topologies=cuda:8 --out=FILE

The last two compile ahead of time for TPUs and for the H100s of one host. None need be there, but
libtpu (pip install 'jax[tpu]') or jax's CUDA plugin (`make cuda`) must be. --smoke with topologies
compiles for these instead of the virtual devices. The step is compiled, not run, with the forms of
`bn_jax.ops` for the backend, 32 examples and one statistic group a device, or, with @2 behind a
target, one for two devices: then statistics travel in every layer, and nothing is claimed.

Read from the compiled program: collectives by kind, their bytes, dtypes (for CPUs those of the
program as it is cut for the devices, too) and memory a device. A cost model (ring all-reduce) turns
bytes into weak scaling. Writes results/bench/scale.md, but for --smoke, and ends with 1 if a claim
does not hold.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Any, NamedTuple

from benchmarks import cost_model, cuda, fair, hlo

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "bench" / "scale.md"
EXAMPLES = 32  # a device: one statistic group
BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "pred": 1}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


class Collective(NamedTuple):
    """One collective of a compiled program: what a device hands in."""

    kind: str
    bytes: dict[str, int]  # by dtype


def collectives(text: str) -> list[Collective]:
    """The collectives in the text of a program's HLO, asynchronous ones once."""
    found = []
    for shape, kind in re.findall(rf"= (\(.*?\)|\S+) ({KINDS})(?:-start)?\(", text):
        if shape.startswith("(("):  # asynchronous, on GPUs: ((operands), results)
            shape = shape[2 : 2 + hlo.closing(shape[2:])]
        sizes: Counter[str] = Counter()
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
            count = 1
            for dim in filter(None, dims.split(",")):
                count *= int(dim)
            sizes[dtype] += BYTES[dtype] * count
        found.append(Collective(kind, dict(sizes)))
    return found


def compiled(lowered: Any, options: dict[str, Any]) -> tuple[Any, list[Collective]]:
    """The program, and the collectives of it as it is first cut for the devices.

    Later XLA merges these; and for CPUs it widens bfloat16, in which none could then be seen.
    """
    with tempfile.TemporaryDirectory(prefix="bn_jax_scale_") as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        dump["xla_dump_hlo_pass_re"] = "spmd-partition.*"
        program = lowered.compile(compiler_options=options | dump)
        [cut] = pathlib.Path(folder).glob("*.after_spmd-partitioning.*")
        return program, collectives(cut.read_text())


def place_of(target: str) -> tuple[str, int]:
    """A target without its end, and the devices that a statistic group lies on: "8@2" -> "8", 2."""
    place, _, across = target.partition("@")
    return place, int(across or 1)


def step_config(devices: int, across: int, args: argparse.Namespace):
    """BN-x30 in bfloat16, or the MLP: 32 examples a device, a group on `across` devices."""
    from ml_collections import ConfigDict

    from configs import bn_x30, mnist_bn

    config = ConfigDict((mnist_bn if args.smoke else bn_x30).get_config("synthetic").to_dict())
    config.batch_size = EXAMPLES * devices
    config.bn.group_size = EXAMPLES * across
    config.record.activation_examples = config.bn.group_size  # a multiple, as configs must have it
    config.steps_per_dispatch = 1
    config.record.activations = ()
    config.dtype = "bfloat16"
    if not args.smoke:
        config.image_size = args.image_size
        config.model.width = args.width
    return config.lock()


def backend_of(target: str) -> str:
    """The backend of a target: "8" is virtual CPU devices, "cuda:8" is GPUs, "v5e:2x4" is TPUs."""
    if ":" not in target:
        return "cpu"
    return "gpu" if target.startswith("cuda:") else "tpu"


def devices_of(target: str) -> list[Any]:
    """The devices to compile for. Of virtual CPU devices those of this process."""
    import jax
    from jax.experimental import topologies

    if backend_of(target) == "cpu":
        return jax.devices()
    if backend_of(target) == "gpu":
        return cuda.devices(int(target.partition(":")[2]))
    # v4 and v5p: the two cores of a chip are one device, as on Cloud TPU
    chip = {"chip_config_name": "megacore"} if target.startswith(("v4", "v5p")) else {}
    return list(topologies.get_topology_desc(target, "tpu", **chip).devices)


def require_compilers(targets: list[str]) -> None:
    """Exits with 2 and a line that says what is missing for one of the targets."""
    for target in targets:
        place, _ = place_of(target)
        backend = backend_of(place)
        missing = ""
        if backend == "tpu" and importlib.util.find_spec("libtpu") is None:
            missing = "libtpu is not installed (a TPU is not needed): pip install 'jax[tpu]'"
        if backend == "gpu":
            if not re.fullmatch(r"cuda:[1-9]\d*", place):
                missing = "write cuda:N for N H100s of one host"
            elif not cuda.installed():
                missing = cuda.MISSING
        if missing:
            print(f"benchmarks.scale: --topologies={target}: {missing}", file=sys.stderr)
            raise SystemExit(2)


def compile_here(target: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compiles the step for a number of CPU devices of this process, or for a topology."""
    import jax
    import numpy as np

    from bn_jax import ops, train
    from bn_jax.distributed import mesh
    from bn_jax.experiment import build

    place, across = place_of(target)
    backend = backend_of(place)
    versions = [f"jax {jax.__version__}", f"commit {fair.commit()}"]
    versions += [f"libtpu {importlib.metadata.version('libtpu')}"] if backend == "tpu" else []
    devices = devices_of(place)
    config = step_config(len(devices), across, args)
    exp = build.build(config)._replace(mesh=mesh.make(list(devices)))
    state = build.abstract_state(exp)
    batch = build.abstract_batch(exp, config.batch_size, train=False)
    hyper = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), np.float32), exp.hyper)
    start = time.perf_counter()
    function, jit = train.training_step(exp, 1)
    step = jit(function)
    platform = "cuda" if backend == "gpu" else backend
    with ops.tracing_for(backend):
        lowered = step.trace(state, batch, hyper, 0).lower(lowering_platforms=(platform,))
    if backend == "cpu":
        # Of the machine code nothing is read: HLO, and with it collectives and memory, stays.
        fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        program, cut = compiled(lowered, fast)
    else:
        program = lowered.compile()
        cut = []  # libtpu dumps nothing
    memory = program.memory_analysis()

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return {
        "target": {"cpu": "virtual CPU", "tpu": f"TPU {place}", "gpu": "H100"}[backend],
        "devices": len(devices),
        "across": across,
        "collectives": collectives(program.as_text()),
        "dtypes": sorted({dtype for c in cut for dtype in c.bytes}),
        "params": size(state.params),
        "statistics": size(state.batch_stats),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "compile_seconds": time.perf_counter() - start,
        "versions": ", ".join(versions),
    }


def compile_apart(target: str, args: argparse.Namespace) -> dict[str, Any]:
    """`compile_here` in a process of its own: the number of devices is fixed when jax starts."""
    env = dict(os.environ) | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    count = "1" if ":" in target else place_of(target)[0]
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    command = [sys.executable, "-m", "benchmarks.scale", f"--child={target}"]
    command += [f"--width={args.width}", f"--image_size={args.image_size}"]
    command += ["--smoke"] if args.smoke else []
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"compiling for {target} failed with {done.returncode}; see above")
    report = json.loads(done.stdout.splitlines()[-1])
    report["collectives"] = [Collective(*c) for c in report["collectives"]]
    return report


def payload(report: dict[str, Any]) -> int:
    """Bytes that a device hands to collectives in one step."""
    return sum(sum(c.bytes.values()) for c in report["collectives"])


def claims(report: dict[str, Any]) -> dict[str, bool]:
    """What must hold of a program whose groups lie on one device each, and whether it does."""
    if report["across"] > 1:
        return {}
    found, state = report["collectives"], report["params"] + report["statistics"]
    share = payload(report) / state
    dtypes = {*report["dtypes"], *(dtype for c in found for dtype in c.bytes)}
    return {
        "no collective but all-reduce: no activation is gathered": all(
            c.kind == "all-reduce" for c in found
        ),
        f"{len(found)} all-reduces, at most 2": len(found) <= 2,
        f"bytes are {share:.4f} of parameters + statistics, at most 1.01": share <= 1.01,
        f"sums are taken in {', '.join(sorted(dtypes))}, float32 alone": dtypes == {"f32"},
    }


def table(reports: list[dict[str, Any]]) -> str:
    """The reports as Markdown."""
    columns = ["for", "devices", "a group on", "collectives", "MB a step", "state"]
    columns += ["arguments, temporary", "compiled in"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in reports:
        kinds = Counter(c.kind for c in r["collectives"])
        shown = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none"
        lines.append(
            f"| {r['target']} | {r['devices']} | {r['across']} | {shown} | {payload(r) / 1e6:.3f} "
            f"| {(r['params'] + r['statistics']) / 1e6:.3f} "
            f"| {r['arguments'] / 1e6:.0f}, {r['temporary'] / 1e6:.0f} "
            f"| {r['compile_seconds']:.0f} s |"
        )
    return "\n".join(lines)


def origin_of_dtypes(reports: list[dict[str, Any]]) -> str:
    """Which program the dtypes of sums were read from."""
    targets = " ".join(r["target"] for r in reports)
    cpu = (
        "XLA for CPUs keeps more in memory than XLA for accelerators, and widens bfloat16 to"
        " float32: the dtypes of sums are those of the program before that, as it is first cut."
    )
    own = "For {} the dtypes of sums are those of the program that their own compiler leaves."
    found = [cpu] if "CPU" in targets else []
    found += [own.format(f"{name}s") for name in ("TPU", "H100") if name in targets]
    return " ".join(found)


def document(reports: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """results/bench/scale.md."""
    network = f"BN-x30 (width {args.width:g}) at {args.image_size} px in bfloat16"
    network = "the MLP of 4.1" if args.smoke else network
    intro = (
        f"Written by `python -m benchmarks.scale`. Compiled, not run: {network}, {EXAMPLES}"
        f" examples a device, statistic groups on one device or two; {reports[0]['versions']}."
        " State is parameters and statistics; it, arguments and temporary memory are MB (1e6 bytes)"
        " a device."
        f" {origin_of_dtypes(reports)}"
    )
    parts = ["# What a step sends between devices", intro, table(reports)]
    for r in reports:
        if r["across"] > 1:
            continue  # nothing is claimed
        parts.append(f"{r['target']}, {r['devices']} devices:")
        parts.append(
            "\n".join(f"* {'holds' if ok else 'DOES NOT HOLD'}: {c}" for c, ok in claims(r).items())
        )
    if args.width == 1 and args.image_size == 224 and not args.smoke:
        parts += ["## Weak scaling, by a model", cost_model.explanation()]
        parts.append(cost_model.table(payload(reports[0]), EXAMPLES))
        parts += ["## Evaluation's share of a run, by arithmetic", cost_model.evaluation_text()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Compiles for every target, prints and writes the document."""
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--devices", default="8,64,512,8@2", help="numbers of virtual CPU devices")
    parser.add_argument(
        "--topologies", default="", help="TPU slices (v5e:2x4,v4:2x2x4), H100s (cuda:8)"
    )
    parser.add_argument("--width", type=float, default=1.0, help="of the network (1)")
    parser.add_argument("--image_size", type=int, default=224, help="pixels (224)")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="document to write")
    parser.add_argument(
        "--smoke", action="store_true", help="the MLP, 8 virtual CPU devices; keeps nothing"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(compile_here(args.child, args)))
        return
    if args.smoke:
        args.devices = "" if args.topologies else "8,8@2"
    targets = [t for t in (args.devices + "," + args.topologies).split(",") if t]
    require_compilers(targets)
    reports = []
    for target in targets:
        reports.append(compile_apart(target, args))
        if not args.smoke:  # after each: the next may take an hour, and fail
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(document(reports, args))
    print(document(reports, args))
    if not all(ok for r in reports for ok in claims(r).values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
