"""A training step with the same bits on 1, 2, 4, ... CPU devices (`config.reproducible`).

On GPUs it also needs what `config.deterministic` sets, and sets it. It was not run on GPUs.

How a compiled program rounds depends on its shapes, and on whether it was compiled for one device
or for several. Therefore every device runs programs that are compiled for one device, with shapes
that do not depend on the number of devices. Only `butterfly` spans several devices, and it only
adds. A step runs these programs, in this order:

    cut        copies the device's rows into their statistic groups
    group      computes gradient, metrics and running estimates of one group
    add        adds the sums of two groups: the lower levels of a binary tree over all groups
    butterfly  the upper levels: device i adds what device i XOR 2^r holds, for r = 0, 1, ...
    update     updates the device's copy of the state

a + b and b + a have the same bits. So both devices of a pair get the same sum, and the tree is the
same wherever its leaves lie. Every group is a separate call: in one program XLA might merge the
work of several groups, and on CPU convolutions in a loop are several times slower.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec, SingleDeviceSharding

from bn_jax.distributed import mesh
from bn_jax.experiment.build import Experiment
from bn_jax.layers import BatchNorm
from bn_jax.step import dropout_key, gradients, update


class Step:
    """The training step of an experiment: (state, batch, hyper, seed) -> (state, metrics).

    It differs from `step.train_step` in rounding, and in dropout, whose masks are drawn group by
    group. Call `lower(...)` and `compile()` first. State and metrics are replicated; metrics have a
    leading axis of 1. The state that is passed in is donated.
    """

    def __init__(self, exp: Experiment):
        self.mesh = exp.mesh
        self.model = exp.model
        self.size = exp.config.bn.group_size
        self.batch_size = exp.config.batch_size
        self.groups = self.batch_size // self.size // self.mesh.size  # on each device

        # The devices of this process, and for each of them the places of its groups in the global
        # batch. The rows of the batch lie on the devices in the order of the mesh.
        self.devices: list[jax.Device] = []
        self.numbers: list[list[jax.Array]] = []
        for place, device in enumerate(exp.mesh.devices.flat):
            if device.process_index != jax.process_index():
                continue
            first = place * self.groups
            numbers = [np.int32(first + j) for j in range(self.groups)]
            self.devices.append(device)
            self.numbers.append([jax.device_put(number, device) for number in numbers])

        # The programs; `group` and `update` are compiled for each device.
        self._cut = jax.jit(self.cut)
        self._add = jax.jit(jnp.add, donate_argnums=0)
        self._group: list[Any] = []
        self._update: list[Any] = []
        self._butterfly: Any = None

        # Turns the vector of sums into a tree. It is known once `group` is traced.
        self._unravel: Any = None

        # The state that the last step returned, and its copies on the devices.
        self._last_state: Any = None
        self._last_copies: list[Any] = []

    def lower(self, state: Any, batch: dict, hyper: Any, seed: Any) -> "Step":
        """Traces the programs for arguments like these. `compile` comes next.

        A program of one device must be compiled again for another. So `group` and `update` are
        compiled for every device of this process.
        """
        group = jax.jit(self.group)
        update = jax.jit(self.update, donate_argnums=0)

        for device in self.devices:
            state_here = _like(state, device)
            rows_here = _like(batch, device, rows=self.size)
            seed_here = _like(seed, device)
            hyper_here = _like(hyper, device)
            number_here = _like(self.numbers[0][0], device)

            lowered = group.lower(
                state_here.params,
                state_here.batch_stats,
                state_here.step,
                seed_here,
                rows_here,
                number_here,
            )
            self._group.append(lowered)

            # The sums of a group are [1, values], and `update` takes [values].
            sums = lowered.out_info
            values = sums.shape[1:]
            here = SingleDeviceSharding(device)
            total = jax.ShapeDtypeStruct(values, sums.dtype, sharding=here)
            self._update.append(update.lower(state_here, total, hyper_here))

        # The butterfly reads one vector of sums from each device.
        self._sums = jax.ShapeDtypeStruct(
            (self.mesh.size, *values), sums.dtype, sharding=mesh.along_batch(self.mesh)
        )
        butterfly = jax.shard_map(
            self.butterfly,
            mesh=self.mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec(),
            check_vma=False,  # it cannot know that all devices end with the same sum
        )
        self._butterfly = jax.jit(butterfly).lower(self._sums)
        return self

    def compile(self) -> "Step":
        """Compiles what `lower` has traced."""
        self._group = [lowered.compile() for lowered in self._group]
        self._update = [lowered.compile() for lowered in self._update]
        self._butterfly = self._butterfly.compile()
        return self

    def __call__(self, state: Any, batch: dict, hyper: Any, seed: Any) -> tuple[Any, dict]:
        """Takes one step."""
        # The copies of the state that the last step returned are kept, so they need not be taken.
        at_hand = state is self._last_state
        states = self._last_copies if at_hand else self._copies(state)
        rows = self._copies(batch)
        seeds = self._copies(seed)
        hypers = self._copies(hyper)

        # The lower levels of the tree, on each device.
        sums = []
        for i in range(len(self.devices)):
            sums.append(self._device_sum(i, states[i], rows[i], seeds[i]))

        # The upper levels, over all devices.
        everywhere = jax.make_array_from_single_device_arrays(
            self._sums.shape, self._sums.sharding, sums
        )
        totals = self._copies(self._butterfly(everywhere))

        results = []
        for i in range(len(self.devices)):
            results.append(self._update[i](states[i], totals[i], hypers[i]))

        state, metrics = jax.tree.map(self._join, *results)
        self._last_state = state
        self._last_copies = [state_here for state_here, _ in results]
        return state, metrics

    def _device_sum(self, i: int, state: Any, rows: dict, seed: Any) -> jax.Array:
        """Sums over the groups of this process's device number i, pairwise, as a binary tree."""
        # This works like a binary counter: two sums of the same level become one of the next. So
        # few sums are held at once.
        waiting: list[tuple[int, jax.Array]] = []
        for part, number in zip(self._cut(rows), self.numbers[i], strict=True):
            sums = self._group[i](state.params, state.batch_stats, state.step, seed, part, number)
            level = 0
            while waiting and waiting[-1][0] == level:
                _, other = waiting.pop()
                sums = self._add(other, sums)
                level = level + 1
            waiting.append((level, sums))

        # The number of groups is a power of two, so one sum remains.
        [(_, total)] = waiting
        return total

    def _copies(self, tree: Any) -> list:
        """Returns, for each device of this process, its part of a tree of arrays."""
        leaves, structure = jax.tree.flatten(tree)
        parts = []
        for leaf in leaves:
            parts.append({shard.device: shard.data for shard in leaf.addressable_shards})

        copies = []
        for device in self.devices:
            here = [part[device] for part in parts]
            copies.append(jax.tree.unflatten(structure, here))
        return copies

    def _join(self, *copies: jax.Array) -> jax.Array:
        """Makes one replicated array of its copies on the devices."""
        replicated = mesh.replicated(self.mesh)
        return jax.make_array_from_single_device_arrays(copies[0].shape, replicated, copies)

    # What each program does, on one device.

    def cut(self, batch: dict) -> list[dict]:
        """Cuts a device's rows into batches of one group each."""
        parts = []
        for j in range(self.groups):
            rows = slice(j * self.size, (j + 1) * self.size)
            parts.append({name: x[rows] for name, x in batch.items()})
        return parts

    def group(self, params, batch_stats, step, seed, batch, number) -> jax.Array:
        """Computes the sums of one group, [1, values]. number: int32, its place in the batch.

        `step.gradients` returns means and running estimates of a group; those of the batch are
        weighted means over its groups. So each is multiplied here by the number of values behind
        it, and `update` divides the sum of these products by the sum of the numbers.
        """
        key = jax.random.fold_in(dropout_key(seed, step), number)

        # How many values of an example each BN layer sees, by the layer's path.
        values: dict[tuple[str, ...], int] = {}

        def note(call, args, kwargs, context):
            if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
                values[context.module.path] = math.prod(args[0].shape[1:])
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            grads, means, updated = gradients(params, batch_stats, batch, key, model=self.model)

        valid = batch.get("mask", jnp.ones(self.size, bool))
        n = jnp.sum(valid, dtype=jnp.float32)

        flat_stats = traverse_util.flatten_dict(updated)
        layers = {}
        for path, count in values.items():
            mean = flat_stats[*path, "mean"]
            var = flat_stats[*path, "var"]
            m = n * (count // mean.size)  # values behind a statistic

            # As in BN, a group of fewer than two values does not count. `examples` weights the
            # mean, and `freedom` (m - 1) the unbiased variance.
            too_few = m < 2
            examples = jnp.where(too_few, 0, n)
            freedom = jnp.where(too_few, 0, m - 1)
            layers["/".join(path)] = (mean * examples, var * freedom, examples, freedom)

        weighted = jax.tree.map(lambda x: x * n, (grads, means))
        flat, self._unravel = ravel_pytree((*weighted, n, layers))
        return flat[None]

    def butterfly(self, sums: jax.Array) -> jax.Array:
        """Sums over the devices, with the result on each of them: [1, values] to [values]."""
        devices = self.mesh.size
        rounds = devices.bit_length() - 1  # log2 of a power of two
        total = sums[0]
        for r in range(rounds):
            distance = 1 << r
            pairs = [(i, i ^ distance) for i in range(devices)]
            other = lax.ppermute(total, "data", pairs)
            total = total + other
        return total

    def update(self, state, total, hyper) -> tuple[Any, dict]:
        """Computes the next state, and the metrics, from the sums over the batch, [values]."""
        grads, means, n, layers = self._unravel(total)
        # If no example is valid, the sums are 0.
        grads, means = jax.tree.map(lambda x: x / jnp.maximum(n, 1), (grads, means))

        # Where no group counted, a statistic keeps its value.
        stats = traverse_util.flatten_dict(state.batch_stats, sep="/")
        for path, (mean, var, examples, freedom) in layers.items():
            old_mean = stats[f"{path}/mean"]
            old_var = stats[f"{path}/var"]
            old_count = stats[f"{path}/count"]

            counted = freedom > 0
            stats[f"{path}/mean"] = jnp.where(examples > 0, mean / examples, old_mean)
            stats[f"{path}/var"] = jnp.where(counted, var / freedom, old_var)
            stats[f"{path}/count"] = old_count + counted
        batch_stats = traverse_util.unflatten_dict(stats, sep="/")

        state, metrics = update(state, grads, means, batch_stats, hyper, self.batch_size)
        return state, jax.tree.map(lambda m: m[None], metrics)


def _like(tree: Any, device: jax.Device, rows: int | None = None) -> Any:
    """Returns a tree's shapes and types on one device; `rows` replaces the first axis."""
    here = SingleDeviceSharding(device)

    def like(x: Any) -> jax.ShapeDtypeStruct:
        shape = x.shape if rows is None else (rows, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=here)

    return jax.tree.map(like, tree)
