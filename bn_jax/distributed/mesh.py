"""Places arrays on devices: the mesh, its shardings, and bytes between the processes of a run.

Data parallelism is one mesh axis, `data`: batches are cut along their first axis, everything else
is replicated. `jax.jit` with these shardings inserts the collectives. The result of a step does not
depend on the number of devices (up to rounding), since a statistic group is a range of places in
the global batch.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make(devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of `devices`, by default all devices of all processes.

    The devices of one process stand side by side, so that it holds one range of a batch's rows.
    """
    devices = list(devices or jax.devices())
    devices.sort(key=lambda device: (device.process_index, device.id))

    # Auto, because Linen and optax fail on the Explicit axes that `jax.make_mesh` makes by default.
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def describe(mesh: Mesh) -> dict[str, Any]:
    """Returns what run.json records of the hardware."""
    device = mesh.devices.flat[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": mesh.size,
        "processes": jax.process_count(),
    }


# Shardings and batches.


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of parameters, statistics and metrics."""
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding of a batch that is cut along `axis` over all devices."""
    whole = [None] * axis  # the axes before it
    return NamedSharding(mesh, PartitionSpec(*whole, "data"))


def rounded_up(mesh: Mesh, size: int) -> int:
    """Returns the smallest batch of at least `size` examples that divides over the devices."""
    return math.ceil(size / mesh.size) * mesh.size


def rows(mesh: Mesh, batch_size: int) -> slice:
    """Returns the rows of a global batch that the devices of this process hold."""
    indices = along_batch(mesh).addressable_devices_indices_map((batch_size,))
    starts = []
    stops = []
    for index in indices.values():
        if index is not None:
            start, stop, _ = index[0].indices(batch_size)
            starts.append(start)
            stops.append(stop)
    return slice(min(starts), max(stops))


# From the host to the devices.


def put_batch(mesh: Mesh, batch: Any, batch_size: int) -> Any:
    """Makes global arrays [batch_size, ...] from this process's rows, a tree of arrays [rows, ...].

    The rows are those of `rows`; each process gives its own.
    """
    sharding = along_batch(mesh)

    def place(x: np.ndarray) -> jax.Array:
        shape = (batch_size, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(place, batch)


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Replicates a tree of host values, equal in every process, on the mesh."""
    return put(replicated(mesh), tree)


def put(sharding: NamedSharding, tree: Any) -> Any:
    """Places a tree of whole host values, equal in every process, with this sharding."""

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


# From the devices to the host.


def to_host(tree: list[jax.Array]) -> list[np.ndarray]:
    """Returns copies of whole arrays in this process's memory.

    All processes must call it: an array that lies in pieces on several of them is gathered.
    """
    for leaf in tree:
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            leaf.copy_to_host_async()
    return [_copy(leaf) for leaf in tree]


def _copy(leaf: jax.Array) -> np.ndarray:
    whole: Any
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        whole = leaf
    elif leaf.is_fully_replicated:
        whole = leaf.addressable_data(0)
    else:
        whole = multihost_utils.process_allgather(leaf, tiled=True)

    # On CPU np.asarray(jax.Array) is a view of a buffer that is donated to the next step, which may
    # write into it. So the copy is explicit.
    return np.array(whole, copy=True)


# Between processes. The training step itself needs none of this.

_CHUNK = 1 << 26  # bytes in one broadcast: restoring takes no more than 64 MiB of device memory


def wait_for_all(point: str) -> None:
    """Returns once all processes have called it; `point` is the same in all, for error messages."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)


def gather(rows: np.ndarray) -> np.ndarray:
    """Returns the rows of all processes [rows, ...], those of process 0 first, in every process.

    All processes must call it. Their numbers of rows may differ.
    """
    if jax.process_count() == 1:
        return rows

    own = np.array(len(rows), np.int32)
    counts = np.ravel(multihost_utils.process_allgather(own))

    # Arrays of one shape are gathered, in which the rows come first.
    most = counts.max()
    padded = np.zeros((most, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    gathered = np.asarray(multihost_utils.process_allgather(padded))

    parts = []
    for part, count in zip(gathered, counts, strict=True):
        parts.append(part[:count])
    return np.concatenate(parts)


def broadcast(data: bytes | None) -> bytes:
    """Returns the `data` of process 0 in every process. All processes must call it.

    Arrays are sent as raw bytes, because jax broadcasts floating-point numbers as a sum with zeros,
    which turns -0.0 into 0.0.
    """
    if jax.process_count() == 1:
        assert data is not None
        return data

    # The other processes do not know the size yet.
    size = 0 if data is None else len(data)
    sizes = multihost_utils.broadcast_one_to_all(np.array([size], np.uint32))
    total = int(sizes[0])

    parts = []
    for start in range(0, total, _CHUNK):
        count = min(_CHUNK, total - start)
        if jax.process_index() == 0:
            part = np.frombuffer(data or b"", np.uint8, count, offset=start)
        else:
            part = np.zeros(count, np.uint8)
        part = multihost_utils.broadcast_one_to_all(part)
        parts.append(np.asarray(part, np.uint8).tobytes())
    return b"".join(parts)
