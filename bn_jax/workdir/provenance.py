"""Records what a result was made with: versions, commit, hardware.

Of the environment only a few named variables are recorded: others may hold secrets.
"""

import importlib.metadata
import os
import pathlib
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bn_jax.distributed.cpus import pool_size

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")
_VARIABLES = ("NPROC", "XLA_FLAGS", "JAX_PLATFORMS")  # they change the bits of a result


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Returns the versions of Python and of packages, by default those that results depend on."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def source() -> dict[str, Any]:
    """Returns the package's version, and its commit if it runs from a git checkout."""
    try:
        found: dict[str, Any] = {"version": importlib.metadata.version("bn_jax")}
    except importlib.metadata.PackageNotFoundError:
        found = {"version": "not installed"}

    here = pathlib.Path(__file__).resolve()
    # An environment inside some other project's checkout must not name that project's commit.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None:
        found["commit"] = _git(here.parent, "rev-parse", "HEAD")
        # Published results are tracked, too, but changing them does not change a computation.
        changed = ("status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)results")
        found["dirty"] = bool(_git(here.parent, *changed))
    return found


def _git(directory: pathlib.Path, *arguments: str) -> str | None:
    """Runs git and returns what it prints; None if it is absent or fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """Returns the run's devices and processes, and the size of XLA's CPU thread pool."""
    device = jax.devices()[0]
    return {
        "host": socket.gethostname(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu": cpu_model(),
        "cpu_threads": cpu_threads(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def origin() -> dict[str, Any]:
    """Returns what run.json records of an attempt: `source`, `versions` and `hardware`."""
    return {"source": source(), "versions": versions(), "hardware": hardware()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Says what differs in source or versions: 'jax 0.10.2, now 0.10.3; ...', or ''."""
    found = []
    for part in ("source", "versions"):
        for name in sorted(before[part].keys() | now[part].keys()):
            one = str(before[part].get(name, "unknown"))
            other = str(now[part].get(name, "unknown"))
            if one != other:
                label = "bn_jax" if name == "version" else name
                found.append(f"{label} {one}, now {other}")
    return "; ".join(found)


def cpu_model() -> str:
    """Returns the processor's name, on which the bits of CPU runs depend; 'unknown' off Linux."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def cpu_threads() -> int:
    """Returns the threads of XLA's CPU backend in this process.

    The bits of a CPU run depend on them, since threads share a sum over an array.
    """
    devices = jax.local_device_count() if jax.default_backend() == "cpu" else 1
    return pool_size(devices)
