"""The training step with the same bits on 1, 2, 4, ... CPU devices (`config.reproducible`).

On GPUs it needs what `config.deterministic` sets, which it implies; it was not run on them.

What a compiled program rounds depends on its shapes, and on whether it was compiled for one device
or for several. So every device runs programs of one device, with shapes that do not depend on the
number of devices; one program alone knows of the others, and only adds:

    cut        the device's rows into their statistic groups: copies
    group      gradient, metrics and running estimates of one group
    add        the sums of two groups, pairwise: the lower levels of a binary tree over the groups
    butterfly  the upper levels: device i adds what device i XOR 2^r holds, for r = 0, 1, ...
    update     of the device's copy of the state

a + b and b + a are the same bits, so both devices of a pair get the same sum, and the tree is the
same wherever its leaves lie. Groups are separate calls: within one program, XLA may merge what
several groups do, and on CPU convolutions in a loop are several times slower.
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
    group. Call it after `lower(...)` and `compile()`. State and metrics (with a leading axis of 1)
    are replicated; the state is donated.
    """

    def __init__(self, exp: Experiment):
        self.mesh = exp.mesh
        self.model = exp.model
        self.size = exp.config.bn.group_size
        self.batch_size = exp.config.batch_size
        self.groups = self.batch_size // self.size // self.mesh.size  # on each device

        devices = enumerate(exp.mesh.devices.flat)
        mine = [(i, d) for i, d in devices if d.process_index == jax.process_index()]
        self.devices = [d for _, d in mine]
        # Places of this process's groups in the batch, whose rows lie on devices in mesh order.
        self.numbers = [
            [jax.device_put(np.int32(i * self.groups + j), d) for j in range(self.groups)]
            for i, d in mine
        ]

        self._cut = jax.jit(self.cut)
        self._add = jax.jit(jnp.add, donate_argnums=0)
        self._unravel: Any = None  # the vector of sums as a tree, known once `group` is traced
        self._group: list[Any] = []
        self._update: list[Any] = []
        self._butterfly: Any = None
        self._held: tuple[Any, list] = (None, [])  # the last state and its copies on the devices

    def lower(self, state: Any, batch: dict, hyper: Any, seed: Any) -> "Step":
        """Traces for arguments like these; as a jitted function's, `compile` comes next.

        XLA compiles a program again for another device: `group` and `update` for every device of
        this process, so once where each process has one.
        """
        group = jax.jit(self.group)
        update = jax.jit(self.update, donate_argnums=0)
        for device in self.devices:
            here = SingleDeviceSharding(device)

            def like(x, shape, here=here):
                return jax.ShapeDtypeStruct(shape, x.dtype, sharding=here)

            part = jax.tree.map(lambda x, like=like: like(x, (self.size, *x.shape[1:])), batch)
            state_, hyper_, seed_, number = jax.tree.map(
                lambda x, like=like: like(x, x.shape), (state, hyper, seed, self.numbers[0][0])
            )
            variables = state_.params, state_.batch_stats, state_.step
            self._group.append(group.lower(*variables, seed_, part, number))
            sums = self._group[0].out_info
            self._update.append(update.lower(state_, like(sums, sums.shape[1:]), hyper_))

        along = mesh.along_batch(self.mesh)
        self._sums = jax.ShapeDtypeStruct(
            (self.mesh.size, *sums.shape[1:]), sums.dtype, sharding=along
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
        """One step."""
        # The state of the step before is already there device by device.
        copies = self._held[1] if state is self._held[0] else self._copies(state)

        numbers = zip(copies, self._copies(batch), self._copies(seed), strict=True)
        sums = [
            self._tree(self._group[i], copy, rows, key, self.numbers[i])
            for i, (copy, rows, key) in enumerate(numbers)
        ]

        total = self._butterfly(
            jax.make_array_from_single_device_arrays(self._sums.shape, self._sums.sharding, sums)
        )

        rest = zip(copies, self._copies(total), self._copies(hyper), strict=True)
        results = [self._update[i](*args) for i, args in enumerate(rest)]
        state, metrics = jax.tree.map(self._join, *results)
        self._held = state, [copy for copy, _ in results]
        return state, metrics

    def _tree(self, group: Any, state: Any, rows: dict, seed: Any, numbers: list) -> jax.Array:
        """The sum over a device's groups, pairwise; as a binary counter, to keep few of them."""
        waiting: list[tuple[int, jax.Array]] = []
        for part, number in zip(self._cut(rows), numbers, strict=True):
            sums = group(state.params, state.batch_stats, state.step, seed, part, number)
            level = 0
            while waiting and waiting[-1][0] == level:
                sums = self._add(waiting.pop()[1], sums)
                level = level + 1
            waiting.append((level, sums))
        return waiting[0][1]

    def _copies(self, tree: Any) -> list:
        """What each device of this process holds of a tree of arrays."""
        leaves, structure = jax.tree.flatten(tree)
        found = [{s.device: s.data for s in x.addressable_shards} for x in leaves]
        return [jax.tree.unflatten(structure, [x[d] for x in found]) for d in self.devices]

    def _join(self, *copies: jax.Array) -> jax.Array:
        """One replicated array from its copies on the devices."""
        everywhere = mesh.replicated(self.mesh)
        return jax.make_array_from_single_device_arrays(copies[0].shape, everywhere, copies)

    # What each program does, on one device.

    def cut(self, batch: dict) -> list[dict]:
        """A device's rows as batches of one group each."""
        starts = range(0, self.groups * self.size, self.size)
        return [jax.tree.map(lambda x, i=i: x[i : i + self.size], batch) for i in starts]

    def group(self, params, batch_stats, step, seed, batch, number) -> jax.Array:
        """The sums of one group, a vector [1, values]; number: int32, its place in the batch.

        What `step.gradients` gives for the group is a mean, or a running estimate of which the
        batch's is a mean over the groups: each is weighted by the values that it stands for.
        """
        key = jax.random.fold_in(dropout_key(seed, step), number)
        values: dict[tuple[str, ...], int] = {}

        def note(call, args, kwargs, context):
            if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
                values[context.module.path] = math.prod(args[0].shape[1:])
            return call(*args, **kwargs)

        # Notes how many values of an example each BN layer sees.
        with nn.intercept_methods(note):
            grads, means, updated = gradients(params, batch_stats, batch, key, model=self.model)

        n = jnp.sum(batch.get("mask", jnp.ones(self.size, bool)), dtype=jnp.float32)
        flat_stats = traverse_util.flatten_dict(updated)
        layers = {}
        for path, count in values.items():
            mean, var = (flat_stats[*path, name] for name in ("mean", "var"))
            m = n * (count // mean.size)  # values behind a statistic
            freedom = jnp.where(m < 2, 0, m - 1)  # as in BN, such a group counts for nothing
            examples = jnp.where(m < 2, 0, n)
            layers["/".join(path)] = (mean * examples, var * freedom, examples, freedom)

        weighted = jax.tree.map(lambda x: x * n, (grads, means))
        flat, self._unravel = ravel_pytree((*weighted, n, layers))
        return flat[None]

    def butterfly(self, sums: jax.Array) -> jax.Array:
        """The sum over the devices, on each of them. [1, values] -> [values]."""
        total = sums[0]
        devices = self.mesh.size
        for r in range(devices.bit_length() - 1):
            pairs = [(i, i ^ (1 << r)) for i in range(devices)]
            total = total + lax.ppermute(total, "data", pairs)
        return total

    def update(self, state, total, hyper) -> tuple[Any, dict]:
        """The next state and metrics from the sums over the batch, [values]."""
        grads, means, n, layers = self._unravel(total)
        grads, means = jax.tree.map(lambda x: x / jnp.maximum(n, 1), (grads, means))

        batch_stats = traverse_util.flatten_dict(state.batch_stats, sep="/")
        for path, (mean, var, examples, freedom) in layers.items():
            old = {name: batch_stats[f"{path}/{name}"] for name in ("mean", "var", "count")}
            new = {
                "mean": jnp.where(examples > 0, mean / examples, old["mean"]),
                "var": jnp.where(freedom > 0, var / freedom, old["var"]),
                "count": old["count"] + (freedom > 0),
            }
            batch_stats |= {f"{path}/{name}": value for name, value in new.items()}
        batch_stats = traverse_util.unflatten_dict(batch_stats, sep="/")

        state, metrics = update(state, grads, means, batch_stats, hyper, self.batch_size)
        return state, jax.tree.map(lambda m: m[None], metrics)
