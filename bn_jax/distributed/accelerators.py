"""Names the devices of a run, and finds an accelerator of the machine that jax does not use."""

import fnmatch
import os
import pathlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from bn_jax.errors import ConfigError


class Kind(NamedTuple):
    """A kind of accelerator.

    files: pattern of its device files. packages: those through which jax uses it, one of which
    `pip install EXTRA` installs.
    """

    name: str
    files: str
    packages: tuple[str, ...]
    extra: str


KINDS = (
    Kind(
        "an NVIDIA GPU", "/dev/nvidia*", ("jax-cuda12-plugin", "jax-cuda13-plugin"), "jax[cuda13]"
    ),
    # Not /dev/accel*, which is also the folder of other drivers, such as for the NPUs of laptops.
    Kind("a TPU", "/dev/accel[0-9]*", ("libtpu",), "jax[tpu]"),
)


def start() -> str:
    """Starts jax's backend and returns its name: cpu, gpu or tpu.

    Raises:
      ConfigError: JAX_PLATFORMS asks for devices that jax cannot start.
    """
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # AssertionError if a plugin has failed
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).partition("\n")[0] or "jax cannot start any of these"
        raise ConfigError(f"JAX_PLATFORMS={asked}: {reason}; correct or unset it") from error


def require_used(backend: str) -> None:
    """Raises ConfigError if this machine has an accelerator and jax's `backend` is the CPU."""
    if reason := unused(device_files(), packages(), backend, os.environ):
        raise ConfigError(reason)


def unused(
    files: Sequence[str], installed: Sequence[str], backend: str, environment: Mapping[str, str]
) -> str:
    """Says why a run would leave an accelerator unused, and the remedy; '' if it would not.

    Args:
      files: paths of device files.
      installed: names of packages through which jax uses accelerators.
      backend: jax's, such as cpu.
      environment: JAX_PLATFORMS=cpu in it means that the CPU is wanted.
    """
    platforms = environment.get("JAX_PLATFORMS", "").split(",")
    if backend != "cpu" or platforms[0].strip() == "cpu":
        return ""
    for kind in KINDS:
        devices = fnmatch.filter(files, kind.files)
        plugins = [name for name in kind.packages if name in installed]
        if not devices and not plugins:
            continue

        if not plugins:
            remedy = f"install jax for it, pip install '{kind.extra}'"
        elif not devices:
            remedy = f"there is no {kind.files}: check the driver and what this job may use"
        else:
            remedy = "jax could not start it: check its driver and who else is using it"
        found = ", ".join([*devices[:1], *plugins])
        return (
            f"jax uses the CPU, but this machine is made for {kind.name} ({found}): {remedy}; or "
            "set JAX_PLATFORMS=cpu to train on the CPU"
        )
    return ""


def device_files() -> list[str]:
    """Lists the device files of accelerators on this machine."""
    found = []
    for kind in KINDS:
        pattern = pathlib.PurePath(kind.files)
        found += sorted(str(path) for path in pathlib.Path(pattern.parent).glob(pattern.name))
    return found


def packages() -> list[str]:
    """Lists the installed packages through which jax uses accelerators."""
    found = []
    for name in (name for kind in KINDS for name in kind.packages):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def sentence(mesh: Mapping[str, Any]) -> str:
    """Returns the first line of a run. mesh: as `distributed.mesh.describe` gives it."""
    platform = mesh["platform"]
    kind = mesh["device_kind"]
    text = f"devices: {mesh['devices']} x {kind}"
    if kind != platform:
        text += f" ({platform})"
    if mesh["processes"] > 1:
        text += f", in {mesh['processes']} processes"
    return text


def days_on_cpu(config: ConfigDict, platform: str, steps: int, seconds: float) -> str:
    """Says how many days the remaining steps would take if a full-size network trains on a CPU.

    Args:
      config: of the run.
      platform: of its devices.
      steps: the number of remaining steps.
      seconds: the duration of a step.

    Returns '' for any other platform, and for smaller networks and images.
    """
    full = config.model.name == "inception" and config.model.width >= 1 and config.image_size >= 224
    if platform != "cpu" or not full:
        return ""
    days = steps * seconds / 86_400
    shown = f"{days:,.0f}" if days >= 10 else f"{days:.2g}"
    return (
        f"the first steps took {seconds:.1f} s each (evaluation may be compiled beside them): at "
        f"that pace the remaining {steps:,} take {shown} days on this CPU; use an accelerator"
    )
