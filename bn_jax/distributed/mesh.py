"""Devices, hosts and shardings: the only file that knows how many there are.

Data parallelism is one mesh axis, `data`: batches are cut along their first axis, everything else
is replicated. `jax.jit` with these shardings inserts the collectives; what a step computes does
not depend on the number of devices (statistic groups are keyed to an example's place).
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bn_jax.errors import ConfigError


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


# Bytes between the processes of one run: what only process 0 can read, everyone gets.
#
# Used where a few bytes must be the same everywhere; the training step itself never comes here.


_CHUNK = 1 << 26  # bytes per broadcast: bounds the extra device memory at restore to 64 MiB


def to_host(tree: list[jax.Array]) -> list[np.ndarray]:
    """Private host copies of whole arrays; collective where an array spans processes in shards."""
    for leaf in tree:
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            leaf.copy_to_host_async()
    return [_copy(leaf) for leaf in tree]


def _copy(leaf: jax.Array) -> np.ndarray:
    # On CPU np.asarray(jax.Array) is a view of a buffer that the next step may be given by
    # donation, so the copy is explicit.
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.array(leaf, copy=True)
    if leaf.is_fully_replicated:
        return np.array(leaf.addressable_data(0), copy=True)
    return np.array(multihost_utils.process_allgather(leaf, tiled=True), copy=True)


def wait_for_all(point: str) -> None:
    """Returns when all processes have come to `point` of the program; collective."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)


def broadcast(data: bytes | None) -> bytes:
    """`data` of process 0, on every process; collective, all processes must call it.

    Arrays go through it as raw bytes: a floating-point broadcast is a sum with zeros, which turns
    -0.0 into 0.0.
    """
    if jax.process_count() == 1:
        assert data is not None
        return data
    size = np.array([0 if data is None else len(data)], np.uint32)
    total = int(multihost_utils.broadcast_one_to_all(size)[0])
    parts = []
    for start in range(0, total, _CHUNK):
        stop = min(start + _CHUNK, total)
        if jax.process_index() == 0:
            part = np.frombuffer(data or b"", np.uint8, stop - start, start)
        else:
            part = np.zeros(stop - start, np.uint8)
        parts.append(np.asarray(multihost_utils.broadcast_one_to_all(part), np.uint8).tobytes())
    return b"".join(parts)
