"""Devices, hosts and shardings: the only file that knows how many there are.

Data parallelism is one mesh axis, `data`: batches are cut along their first axis, everything else
is replicated. `jax.jit` with these shardings inserts the collectives; what a step computes does
not depend on the number of devices (statistic groups are keyed to an example's place).
"""

import contextlib
import math
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bn_jax.errors import ConfigError


def initialize() -> None:
    """Joins the other processes of this run, if there are any.

    Recognised are SLURM, Open MPI, GKE's TPUs and Cloud TPU multislice by their own variables; any
    processes are named by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID. A Cloud TPU
    slice of several hosts shows nothing in the environment: only where BN_JAX_CLUSTER is set (by
    launch/tpu_host.sh to 1; any value) are they joined, by jax, which asks the metadata server.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        missing = {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} - env.keys()
        if missing:
            raise ConfigError(
                f"JAX_COORDINATOR_ADDRESS is set but not {' and '.join(sorted(missing))}: "
                "set all three, or none for a single process"
            )
        processes, process = _whole(env, "JAX_NUM_PROCESSES", 1), _whole(env, "JAX_PROCESS_ID", 0)
        if process >= processes:
            raise ConfigError(
                f"JAX_PROCESS_ID={process}: not below JAX_NUM_PROCESSES={processes}; "
                "processes are numbered from 0"
            )
        if not re.fullmatch(r".+:\d+", env["JAX_COORDINATOR_ADDRESS"]):
            raise ConfigError(
                f"JAX_COORDINATOR_ADDRESS={env['JAX_COORDINATOR_ADDRESS']}: not HOST:PORT; "
                "name a free port of the host of process 0"
            )
        jax.distributed.initialize(
            env["JAX_COORDINATOR_ADDRESS"],
            num_processes=processes,
            process_id=process,
        )
    elif cluster_has_many_hosts(env):
        jax.distributed.initialize()


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes, in JAX_COMPILATION_CACHE_DIR or ~/.cache/bn_jax.

    An empty JAX_COMPILATION_CACHE_DIR turns it off. A folder that cannot be written is no error.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = str(pathlib.Path(base) / "bn_jax" / "xla")
    if folder:
        with contextlib.suppress(OSError):
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def cluster_has_many_hosts(env) -> bool:
    """Whether the environment is that of a multi-process job which jax can detect by itself."""
    hosts = env["TPU_WORKER_HOSTNAMES"].split(",") if "TPU_WORKER_HOSTNAMES" in env else []
    in_task = "SLURM_PROCID" in env and "SLURM_NTASKS" in env
    slurm_tasks = _whole(env, "SLURM_NTASKS", 1) if in_task else 1
    mpi_size = _whole(env, "OMPI_COMM_WORLD_SIZE", 1) if "OMPI_COMM_WORLD_SIZE" in env else 1
    # A Cloud TPU VM's environment says nothing: jax asks the metadata server (launch/tpu_host.sh).
    named = "MEGASCALE_COORDINATOR_ADDRESS" in env or "BN_JAX_CLUSTER" in env
    return len(hosts) > 1 or slurm_tasks > 1 or mpi_size > 1 or named


def _whole(env, name: str, low: int) -> int:
    """A variable of the environment as a number. Raises ConfigError if it is none from `low` on."""
    text = env[name]
    if not text.isascii() or not text.isdecimal() or int(text) < low:
        raise ConfigError(f"{name}={text}: not a whole number from {low}; correct the environment")
    return int(text)


def make(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices of all processes (or of `devices`), each process's in one piece."""
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    # Auto: `jax.make_mesh` defaults to Explicit axes, on which Linen and optax fail.
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters, statistics and metrics."""
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of a batch: cut along `axis` over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def check_batch(batch_size: int, devices: int, group_size: int | None) -> None:
    """Raises ConfigError unless every device gets the same number of examples, at least one.

    What it proposes holds whole statistic groups of `group_size` examples, too.
    """
    if batch_size < devices:
        raise ConfigError(
            f"batch_size={batch_size} is smaller than the {devices} devices: use the scale `:pod` "
            "(ImageNet, 32 examples a device), a larger batch or fewer devices"
        )
    if batch_size % devices:
        step = math.lcm(devices, group_size or 1)
        near = max(step, batch_size // step * step)
        raise ConfigError(
            f"batch_size={batch_size} is not divisible by the {devices} devices: "
            f"use a multiple of {step}, such as {near}, or fewer devices"
        )


def rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that the devices of this process hold."""
    slices = along_batch(mesh).addressable_devices_indices_map((batch_size,)).values()
    bounds = [s[0].indices(batch_size) for s in slices if s is not None]
    return slice(min(b[0] for b in bounds), max(b[1] for b in bounds))


def put_batch(mesh: Mesh, batch: Any, batch_size: int) -> Any:
    """This process's rows, a tree of arrays [rows, ...], as global arrays [batch_size, ...]."""
    sharding = along_batch(mesh)

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))

    return jax.tree.map(put, batch)


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """A tree of host values, equal on every process, as arrays replicated over the mesh."""
    return put(replicated(mesh), tree)


def put(sharding: NamedSharding, tree: Any) -> Any:
    """A tree of whole host values, equal on every process, as arrays of the given sharding."""

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def describe(mesh: Mesh) -> dict[str, Any]:
    """What a record says of the hardware."""
    device = mesh.devices.flat[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": mesh.size,
        "processes": jax.process_count(),
    }
