"""The table of results/bench: `python -m benchmarks.report` after `make bench`.

Reads results/bench/MACHINE/*.json, as the benchmarks leave them, and writes
results/bench/MACHINE.md. A row without a record says "not run".
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks import fair, input

GROUPS = ("sides", "seconds", "step_seconds", "cases", "networks")  # names that say nothing


class Row(NamedTuple):
    """A goal: what is measured, against what, in which record, from which figure on it is met."""

    what: str
    against: str
    record: str
    read: Callable[[Mapping[str, Any]], float]
    unit: str
    goal: float
    moonshot: float | None = None
    smaller: bool = False  # whether smaller is better


def _side(group: str, name: str, figure: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda record: record[group][name][figure]


ROWS = (
    Row("step, 224 px, batch 32, float32, CPU", "plain Flax", "step",
        _side("sides", "plain Flax", "ratio"), "x", 2.0),
    Row("", "torch eager, default layout", "step", _side("sides", "torch", "ratio"), "x", 1.0, 1.2),
    Row("", "torch eager, channels_last", "step",
        _side("sides", "torch channels_last", "ratio"), "x", 1.0, 1.2),
    Row("", "share of the GEMM ceiling", "step",
        lambda r: 100 * r["share_of_ceiling"], "%", 80, 90),
    Row("step memory, XLA's temporary bytes", "plain Flax", "step",
        lambda r: r["memory_ratio"], "x", 0.6, 0.5, True),
    Row("mnist: Fig. 1, both networks, one thread", "torch eager loop", "mnist",
        _side("both", "torch", "ratio"), "x", 2.7, 3.5),
    Row("startup to the first step, cold cache", "plain Flax script, cold", "startup",
        _side("cold", "plain Flax, cold", "ratio"), "x", 1.1, 1.5),
    Row("startup, warm cache", "plain Flax script, cold", "startup",
        _side("ours warm, script cold", "plain Flax, cold", "ratio"), "x", 2.0),
    Row("startup, warm cache, in all", "seconds", "startup",
        _side("warm", "bn_jax, warm", "median"), " s", 5.0, 4.0, True),
    Row("evaluate: folded, one crop", "unfolded", "evaluate",
        _side("sides", "unfolded", "ratio"), "x", 1.2, 1.4),
    Row("144 crops of a picture, one thread", "144 single crops", "evaluate",
        lambda r: r["views"]["seconds"]["144 single crops"]["ratio"], "x", 3.0),
    Row("input, images a CPU-second", "tf.data, crops of the same sizes", "input",
        _side("sides", input.TF_DATA, "ratio"), "x", 1.1, 1.2),
    Row("", "bare decode, crop and resize", "input",
        _side("sides", input.BARE, "ratio"), "x", 0.95, 1.0),
    Row("step on a GPU, bfloat16", "torch channels_last AMP", "step_gpu",
        _side("sides", "torch channels_last AMP", "ratio"), "x", 1.2, 1.5),
    Row("", "torch.compile", "step_gpu", _side("sides", "torch.compile", "ratio"), "x", 1.0, 1.2),
    Row("", "plain Flax", "step_gpu", _side("sides", "plain Flax", "ratio"), "x", 1.3, 1.6),
)  # fmt: skip


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: every goal with what was measured."""
    lines = ["| what | against | measured | goal | moonshot | |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        try:
            value = row.read(records[row.record])
        except KeyError:
            measured, said = "not run", ""
        else:
            measured = f"{value:.3g}{row.unit}"
            goals = [g for g in (row.goal, row.moonshot) if g is not None]
            met = sum(value <= g if row.smaller else value >= g for g in goals)
            said = ("missed", "reached", "moonshot")[met]
        moonshot = "" if row.moonshot is None else f"{row.moonshot:g}{row.unit}"
        goal = f"{row.goal:g}{row.unit}"
        lines.append(f"| {row.what} | {row.against} | {measured} | {goal} | {moonshot} | {said} |")
    return "\n".join(lines)


def details(name: str, record: Mapping[str, Any]) -> str:
    """Markdown: n, medians and ratios of one record's sides, and where it was made."""
    machine = record["machine"]
    versions = ", ".join(
        f"{package} {version}"
        for package, version in machine["versions"].items()
        if version != "not installed"
    )
    lines = [
        f"## {name}",
        "",
        f"{machine['hardware']}, {machine['threads']} threads; {versions}; {machine['allocator']};",
        f"commit {machine['commit']}, {machine['date']}, load at the end {machine['load']}.",
        "",
        "| side | n | median, s | fastest, s | time over ours |",
        "|---|---|---|---|---|",
    ]
    for side, found in sides(record):
        numbers = f"{found['median']:.4g} | {found['fastest']:.4g}"
        lines.append(f"| {side} | {found['n']} | {numbers} | {found['ratio']:.2f}x |")
    return "\n".join(lines)


def sides(record: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every side of a record that was timed, at any depth, with the names above it."""
    if isinstance(record, list):
        for entry in (e for e in record if isinstance(e, dict)):
            words = [f"{entry[key]}" for key in ("network", "shape", "case") if key in entry]
            yield from sides(entry, (*place, *words))
    elif isinstance(record, dict) and {"median", "ratio"} <= record.keys():
        yield ", ".join(place), record
    elif isinstance(record, dict):
        for name, value in record.items():
            yield from sides(value, place if name in GROUPS else (*place, name))


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes FOLDER.md from the records in FOLDER."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    hardware = next(iter(records.values()))["machine"]["hardware"]
    said = (
        "Written by `python -m benchmarks.report` (the last step of `make bench`) from the JSON "
        "files in the folder of the same name. "
        "Ratios are medians over rounds in which the sides took turns; above 1x bn_jax is faster "
        "(memory: below 1x it needs less)."
    )
    parts = [
        f"# Benchmarks on {hardware}",
        said,
        table(records),
        *(details(name, record) for name, record in records.items() if any(sides(record))),
    ]
    out = folder.with_suffix(".md")
    out.write_text("\n\n".join(parts) + "\n")
    return out


def main() -> None:
    """Writes the page of every machine that has records."""
    root = pathlib.Path(os.environ.get("BN_JAX_BENCH_OUT", fair.RESULTS))
    folders = [f for f in sorted(root.glob("*")) if f.is_dir() and any(f.glob("*.json"))]
    if not folders:
        raise SystemExit(f"no records in {root}: run `make bench`")
    for folder in folders:
        print(write(folder))


if __name__ == "__main__":
    main()
