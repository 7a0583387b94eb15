"""Where the time of a training step goes, by kind of kernel: jax's profiler, read back."""

import collections
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax

# The first that matches a kernel's name. cuDNN's and cuBLAS' names are not documented: what
# matches nothing is listed by name.
KINDS = (
    ("copies between devices and host", r"^(memcpy|memset)"),
    ("convolution, filter gradient", r"wgrad"),
    ("convolution, input gradient", r"dgrad"),
    ("convolution, forward or not said", r"fprop|conv|implicit|cudnn"),
    ("layout of a convolution's operands", r"nchwtonhwc|nhwctonchw|tensor_transform"),
    ("product", r"gemm|cutlass|nvjet|dot"),
    ("pooling's gradient", r"select_and_scatter|select-and-scatter|scatter"),
    ("reduction", r"reduce"),
    ("transposition", r"transpose"),
    ("concatenation", r"concatenate"),
    ("elementwise", r"fusion|loop|add|multiply|select|convert|copy|wrapped"),
)


def kind(name: str) -> str:
    """The kind of a kernel by its name."""
    lower = name.lower()
    for found, pattern in KINDS:
        if re.search(pattern, lower):
            return found
    return "other"


def trace(take: Callable[[int], None], steps: int, folder: pathlib.Path) -> dict[str, Any]:
    """Profiles some steps; milliseconds a step by kind, and the ten longest kernels.

    `busy` is the sum over all kernels, `span` from the first one's start to the last one's end:
    what the span has above the sum is time in which nothing ran.
    """
    with jax.profiler.trace(folder):
        take(steps)
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise RuntimeError(f"the profiler has left nothing in {folder}")
    events = list(kernels(files[-1]))
    if not events:
        raise RuntimeError("the profile has no kernels")
    return summary(events, steps)


def kernels(file: pathlib.Path) -> Iterable[tuple[str, float, float]]:
    """(name, start, nanoseconds) of every kernel; on a CPU, of every operation of XLA's threads."""
    data = jax.profiler.ProfileData.from_file(str(file))
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    if not devices and jax.default_backend() != "cpu":
        return  # the driver lets nobody look
    for plane in devices or planes:
        for line in plane.lines:
            # A GPU's other lines repeat its streams' kernels by module, operation and step.
            if devices and not line.name.startswith("Stream"):
                continue
            if not devices and "XLA" not in line.name and "Eigen" not in line.name:
                continue
            for event in line.events:
                yield event.name, event.start_ns, event.duration_ns


def summary(events: list[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Milliseconds and kernels a step, by kind; the ten names that take longest."""
    by_kind: dict[str, list[float]] = collections.defaultdict(list)
    by_name: dict[str, list[float]] = collections.defaultdict(list)
    for name, _, duration in events:
        by_kind[kind(name)].append(duration)
        by_name[name].append(duration)
    first = min(start for _, start, _ in events)
    last = max(start + duration for _, start, duration in events)

    def figures(durations: list[float]) -> dict[str, float]:
        return {
            "milliseconds": sum(durations) / steps / 1e6,
            "kernels": len(durations) / steps,
        }

    def ordered(found: dict[str, list[float]]) -> list[str]:
        return sorted(found, key=lambda name: -sum(found[name]))

    return {
        "steps": steps,
        "busy_milliseconds": sum(duration for _, _, duration in events) / steps / 1e6,
        "span_milliseconds": (last - first) / steps / 1e6,
        "kinds": {name: figures(by_kind[name]) for name in ordered(by_kind)},
        "longest": {name[:120]: figures(by_name[name]) for name in ordered(by_name)[:10]},
    }


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The rows of the table."""
    busy = result["busy_milliseconds"]
    found = [["kernels of a step", f"{busy:.2f} ms busy, {result['span_milliseconds']:.2f} in all"]]
    for name, figures in result["kinds"].items():
        share = 100 * figures["milliseconds"] / busy
        figure = f"{figures['milliseconds']:.2f} ms, {share:.0f}%, {figures['kernels']:.0f} kernels"
        found.append([name, figure])
    return found
