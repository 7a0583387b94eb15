"""What all benchmarks share: sides that run in turn, one warm allocator, the machine's description.

A benchmark checks first that its sides compute the same, then times them interleaved in one run, so
that a busy machine slows all of them, and gives medians and paired ratios with their n.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bn_jax.distributed.cpus import usable_cpus

MALLOC = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=20000000000:glibc.malloc.arena_max=1"
PACKAGES = ("jax", "flax", "optax", "numpy", "torch", "torchvision", "pretrainedmodels")
RESULTS = pathlib.Path(__file__).resolve().parent.parent / "results" / "bench"


def warm_allocator(module: str) -> None:
    """Starts the benchmark `module` anew under a glibc malloc that keeps what it got from Linux.

    Both sides then run without the page faults of freshly mapped arrays. Elsewhere than on Linux
    with glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc" and os.environ.get("GLIBC_TUNABLES") != MALLOC:
        os.environ["GLIBC_TUNABLES"] = MALLOC
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def arguments(module: str, description: str) -> argparse.Namespace:
    """Reads --smoke and --steps of the benchmark `module`, under the warm allocator."""
    parser = argparse.ArgumentParser(f"python -m {module}", description=description.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a toy network: that it runs")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each side (9)")
    args = parser.parse_args()
    warm_allocator(module)
    return args


def use_threads(count: int) -> None:
    """Keeps this process, jax's and torch's pools on the last `count` cores; before jax starts."""
    os.environ["NPROC"] = str(count)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])


def interleave(
    sides: Mapping[str, Callable[[], Any]],
    n: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of `n` calls of every side, in rounds; `warmup` rounds before them are not counted.

    Every round has another order: a side that always came after the same one would be measured
    with what that one leaves in the caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    shuffle = random.Random(0).shuffle
    for i in range(n + warmup):
        for name in order:
            start = clock()
            sides[name]()
            if i >= warmup:
                seconds[name].append(clock() - start)
        shuffle(order)
    return seconds


def compare(seconds: Mapping[str, Sequence[float]], ours: str) -> dict[str, dict[str, float]]:
    """For each side: n, median and fastest in seconds, and `ratio`, the median over the rounds of
    its time divided by ours in the same round (above 1: ours is faster)."""
    return {
        name: {
            "n": len(times),
            "median": statistics.median(times),
            "fastest": min(times),
            "ratio": statistics.median(t / o for t, o in zip(times, seconds[ours], strict=True)),
        }
        for name, times in seconds.items()
    }


def processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware() -> str:
    """This machine in a few words."""
    return f"{processor()}, {os.cpu_count()} cores"


def machine() -> dict[str, Any]:
    """Hardware, versions, allocator, commit and load, as every record carries them."""
    from bn_jax.workdir import provenance  # it imports jax, which reads what use_threads has set

    tuned = os.environ.get("GLIBC_TUNABLES") == MALLOC
    return {
        "hardware": hardware(),
        "threads": usable_cpus(),
        "system": platform.platform(terse=True),
        "versions": provenance.versions(PACKAGES),
        "allocator": f"{platform.libc_ver()[0] or 'system'} malloc" + (", warm" if tuned else ""),
        "commit": commit(),
        "load": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def commit() -> str:
    """The checkout's commit, with a + where files were changed after it."""
    from bn_jax.workdir import provenance

    source = provenance.source()
    return source.get("commit", "unknown")[:12] + ("+" if source.get("dirty") else "")


def slug(hardware: str) -> str:
    """A folder's name for a machine: amd-epyc-2-cores."""
    return re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")


def record_path(name: str) -> pathlib.Path:
    """Where this machine's record is kept: results/bench/MACHINE/NAME.json.

    $BN_JAX_BENCH_OUT is another folder than results/bench.
    """
    out = pathlib.Path(os.environ.get("BN_JAX_BENCH_OUT", RESULTS))
    return out / slug(hardware()) / f"{name}.json"


def write(name: str, record: Mapping[str, Any], *, smoke: bool) -> None:
    """Prints the record and keeps it in `record_path`; a smoke run keeps none."""
    record = {"benchmark": name, "machine": machine(), **record}
    print(json.dumps(record, indent=1))
    if smoke:
        return
    path = record_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")
