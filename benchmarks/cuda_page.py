"""The table of programs that `benchmarks.cuda` compiles: results/bench/cuda.md and cuda.json.

    python -m benchmarks.cuda_page                           # all: a minute or two for each
    python -m benchmarks.cuda_page bfloat16_256 float32_32   # these; the others stay as they were

A program that cannot be compiled without a device (see `benchmarks.cuda`) is compiled again with
--xla_gpu_enable_triton_gemm=false, and the page says so.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import cuda, fair

RECORDS = fair.RESULTS / "cuda.json"
PAGE = fair.RESULTS / "cuda.md"
DEVICELESS = "cannot enumerate configs in deviceless mode"
WITHOUT_TRITON = "--xla_gpu_enable_triton_gemm=false"
FILTERS = "--filter_gradients=bfloat16"
DETERMINISTIC = "--flags=--xla_gpu_deterministic_ops=true"
PROGRAMS = {
    "bfloat16_32": ["--batch=32"],
    "bfloat16_256": ["--batch=256"],
    "bfloat16_32_deterministic": ["--batch=32", DETERMINISTIC],
    "bfloat16_32_filters": ["--batch=32", FILTERS],
    "bfloat16_256_filters": ["--batch=256", FILTERS],
    "float32_32": ["--batch=32", "--dtype=float32"],
    "float32_256": ["--batch=256", "--dtype=float32"],
    "bfloat16_32_plain": ["--batch=32", "--ops=plain"],
    "bfloat16_256_plain": ["--batch=256", "--ops=plain"],
    "bfloat16_32_plain_deterministic": ["--batch=32", "--ops=plain", DETERMINISTIC],
    "float32_32_plain": ["--batch=32", "--ops=plain", "--dtype=float32"],
    "float32_256_plain": ["--batch=256", "--ops=plain", "--dtype=float32"],
    "bfloat16_32_tuned_filters": ["--batch=32", "--ops=tuned", FILTERS],
}
DETAILED = "bfloat16_256"  # the program whose convolutions and largest items the page lists


def record(arguments: list[str]) -> dict[str, Any]:
    """The figures of one program, compiled in a process of its own. Raises SystemExit."""
    with tempfile.TemporaryDirectory(prefix="bn_jax_cuda_") as folder:
        out = pathlib.Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.cuda", f"--json={out}", *arguments]
        done = subprocess.run(command, cwd=cuda.ROOT, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return json.loads(out.read_text())
        if DEVICELESS in done.stderr and WITHOUT_TRITON not in " ".join(arguments):
            return record(without_triton(arguments))
        print(done.stderr, file=sys.stderr)
        raise SystemExit(done.returncode)


def without_triton(arguments: list[str]) -> list[str]:
    """The arguments, with the flag that lets cuBLAS take no product added to those of XLA."""
    flags = [a.removeprefix("--flags=") for a in arguments if a.startswith("--flags=")]
    others = [a for a in arguments if not a.startswith("--flags=")]
    return [*others, f"--flags={' '.join([*flags, WITHOUT_TRITON])}"]


def page(records: dict[str, dict[str, Any]]) -> str:
    """The page, with "not run" for every program without a record."""
    made = sorted({f"jax {r['jax']}, commit {r['commit']}" for r in records.values()})
    needed = [name for name, r in records.items() if WITHOUT_TRITON in r["flags"]]
    programs = ", ".join(needed) or "none"
    parts = [
        "# The training step, compiled for an H100",
        f"""\
Written by `python -m benchmarks.cuda_page`. Every figure is of a compiled program: no GPU was
there, and nothing was measured. BN-x30 at 224 px, one device, groups of 32; {"; ".join(made)}.""",
        """\
Kernels are the instructions of the optimised HLO that are not parameters, constants, tuples, tuple
elements or bitcasts. What is inside `while`, `call` and `conditional` counts as often as it runs.
MB (1e6 bytes) an image are operands and results of the same instructions, without the scratch
memory of convolutions. Of an operand of which a kernel reads only slices, such as one branch's part
of a product that several share, they count the whole; "touched" counts the slices. Nothing was
autotuned, and cuDNN's scratch counts as 0 bytes. A GPU therefore needs more temporary memory than
the table says.""",
        table(records),
        """\
Programs have the forms that `bn_jax.ops` chooses for GPUs, unless they are named otherwise: `plain`
is all of XLA's own forms (`--ops=plain`), `tuned` is all forms that CPUs use (`--ops=tuned`),
`filters` is filter gradients as bfloat16 convolutions (`--filter_gradients=bfloat16`).
`deterministic` is `--xla_gpu_deterministic_ops=true`. A sort counts as one kernel here; a GPU runs
several for it.""",
        f"Programs that needed `{WITHOUT_TRITON}` to be compiled without a device: {programs}.",
    ]
    if DETAILED in records:
        parts += details(records[DETAILED])
    return "\n\n".join(parts) + "\n"


def table(records: dict[str, dict[str, Any]]) -> str:
    """A row for every program."""
    lines = [
        "| program | kernels | copies | sorts | temporary, GB | MB an image | touched | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in PROGRAMS:
        if name not in records:
            lines.append(f"| {name} | not run | | | | | | |")
            continue
        found = records[name]
        kinds = found["kinds"].items()
        sorts = sum(kind["kernels"] for words, kind in kinds if words.endswith("sort"))
        moved = found["bytes_an_image"] / 1e6
        touched = found.get("touched_an_image")  # older records have none
        shown = f"{touched / 1e6:.1f}" if touched else "not counted"
        lines.append(
            f"| {name} | {found['kernels']:,} | {found['copies']:,} | {sorts} "
            f"| {found['temporary_bytes'] / 1e9:.2f} | {moved:.1f} | {shown} "
            f"| {found['commit'][:7]} |"
        )
    return "\n".join(lines)


def details(found: dict[str, Any]) -> list[str]:
    """Kinds of kernels, convolutions and the largest items of one program."""
    kinds = ["| kind | kernels | MB an image |", "|---|---|---|"]
    for kind, counted in found["kinds"].items():
        moved = counted["bytes_an_image"] / 1e6
        kinds.append(f"| `{kind}` | {counted['kernels']:,} | {moved:.1f} |")

    convolutions = ["| convolutions, by type and layout | number |", "|---|---|"]
    convolutions += [f"| `{name}` | {count} |" for name, count in found["convolutions"].items()]

    largest = ["| item | MB an image | layer |", "|---|---|---|"]
    for item in found["largest"]:
        moved = item["bytes_an_image"] / 1e6
        largest.append(f"| `{item['name']}` | {moved:.2f} | {item['layer']} |")
    title = f"## {DETAILED}: kinds, convolutions and the twenty largest items"
    return [title, *("\n".join(lines) for lines in (kinds, convolutions, largest))]


def main() -> None:
    """Compiles the programs and writes the page after each."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cuda_page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=", ".join(PROGRAMS))
    args = parser.parse_args()
    if unknown := set(args.programs) - set(PROGRAMS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(PROGRAMS)}")
    if not cuda.installed():
        print(f"benchmarks.cuda_page: {cuda.MISSING}", file=sys.stderr)
        raise SystemExit(2)

    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    for name in args.programs or PROGRAMS:
        records[name] = record(PROGRAMS[name])
        records = {known: records[known] for known in PROGRAMS if known in records}
        RECORDS.write_text(json.dumps(records, indent=1) + "\n")
        PAGE.write_text(page(records))


if __name__ == "__main__":
    main()
