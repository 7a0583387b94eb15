"""Statistic groups and masks on 1, 2, 4 and 8 devices: a number of examples, never of devices."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bn_jax import batch_norm

SHAPE = (32, 2, 2, 3)
COLLECTIVE = re.compile(r"= \S+ (all-reduce|all-gather|all-to-all|collective|reduce-scatter)")
normalize = functools.partial(batch_norm.normalize, train=True, epsilon=1e-3, momentum=0.9)


def devices(n):
    return jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])


def compiled(n, *, group_size, masked, gradient=True):
    """A compiled step on n devices, with x [32, ...] and the mask sharded over examples."""
    rows, whole = (NamedSharding(devices(n), spec) for spec in (P("data"), P()))
    stats = batch_norm.init_stats((3,))

    def forward(x, gamma, beta, mask):
        mask = mask if masked else None
        return normalize(x, gamma, beta, stats, group_size=group_size, mask=mask)

    def step(x, gamma, beta, mask):
        if not gradient:
            return forward(x, gamma, beta, mask)[0]
        loss = lambda *a: (jnp.sum(jnp.sin(forward(*a, mask)[0])), forward(*a, mask))  # noqa: E731
        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, gamma, beta)
        return out, grads

    shapes = [(SHAPE, rows), ((3,), whole), ((3,), whole)]
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=where) for s, where in shapes]
    arguments.append(jax.ShapeDtypeStruct((32,), bool, sharding=rows))
    outputs = ((rows, whole), (rows, whole, whole)) if gradient else rows
    return jax.jit(step, out_shardings=outputs).lower(*arguments).compile(), rows, whole


def run(n, **options):
    step, rows, whole = compiled(n, **options)
    rng = np.random.default_rng(0)
    x, gamma, beta = (np.float32(rng.normal(1, 2, s)) for s in (SHAPE, (3,), (3,)))
    mask = np.arange(32) % 8 < np.repeat([8, 8, 8, 2], 8)  # unequal valid counts, 2 on the last
    x[~mask] = np.nan if options["masked"] else x[~mask]
    put = [jax.device_put(a, where) for a, where in ((x, rows), (gamma, whole), (beta, whole))]
    return jax.device_get(step(*put, jax.device_put(mask, rows))), x, mask


# 4: fits every device; 16: spans devices from 4 on; None: the global batch.
@pytest.mark.parametrize(("group_size", "masked"), [(4, True), (16, False), (None, True)])
def test_any_number_of_devices_gives_the_same(group_size, masked):
    """Outputs, gradients, running estimates. Flax ignores axis_index_groups under jit, and averages
    its devices' means whatever their valid counts.
    """
    want, x, mask = run(1, group_size=group_size, masked=masked)
    used = np.float64(x[mask] if masked else x)
    if group_size is None:
        np.testing.assert_allclose(want[0][1].mean, used.mean((0, 1, 2)), rtol=1e-6)
    for n in (2, 4, 8):
        got, *_ = run(n, group_size=group_size, masked=masked)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            # Reordered float32 sums of up to 128 values near 1: measured up to 2e-6.
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_groups_that_fit_a_device_need_no_collective(masked):
    """In the forward pass; a training step adds only sums of [features]-sized vectors."""
    step, *_ = compiled(8, group_size=4, masked=masked, gradient=False)
    assert not COLLECTIVE.findall(step.as_text())
    step, *_ = compiled(8, group_size=4, masked=masked)
    for line in step.as_text().splitlines():
        if COLLECTIVE.search(line):
            sizes = re.findall(r"f32\[([\d,]*)\]", line.split("(%")[0])
            assert all(np.prod([int(d) for d in s.split(",") if d]) <= 3 for s in sizes), line
    spanning, *_ = compiled(8, group_size=16, masked=masked, gradient=False)
    assert COLLECTIVE.findall(spanning.as_text())  # the search can find one


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    """Each shard normalizes its groups; gradients of gamma and beta sum over shards."""
    rng = np.random.default_rng(0)
    x, gamma, beta = (np.float32(rng.normal(1, 2, s)) for s in ((8, 3), (3,), (3,)))

    def loss(x, gamma, beta):
        y, _ = normalize(x, gamma, beta, batch_norm.init_stats((3,)), group_size=4)
        return jnp.sum(jnp.sin(y))

    def local(x, gamma, beta):
        grads = jax.grad(loss, (0, 1, 2))(x, gamma, beta)
        return grads if check_vma else (grads[0], *jax.lax.psum(grads[1:], "data"))

    specs = (P("data"), P(), P())
    sharded = jax.jit(
        jax.shard_map(local, mesh=devices(2), in_specs=specs, out_specs=specs, check_vma=check_vma)
    )
    for a, b in zip(
        sharded(x, gamma, beta), jax.grad(loss, (0, 1, 2))(x, gamma, beta), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # float32 reordering


def three_layers(norm, masked):
    """What three layers in a data-parallel step on 8 devices send: kinds, and floats of each."""
    features, layers = 5, 3
    rows, whole = (NamedSharding(devices(8), spec) for spec in (P("data"), P()))

    def loss(params, x, w, mask):
        stats = []
        for scale, offset in params:
            y, new = norm(x, scale, offset, mask if masked else None)
            stats.append(new)
            x = jnp.sin(y * w)
        return jnp.sum(x), stats

    vector = jax.ShapeDtypeStruct((features,), jnp.float32, sharding=whole)
    x = jax.ShapeDtypeStruct((64, 4, 4, features), jnp.float32, sharding=rows)
    mask = jax.ShapeDtypeStruct((64,), bool, sharding=rows)
    step = jax.jit(
        jax.value_and_grad(loss, (0, 1), has_aux=True),
        out_shardings=((None, whole), ([(whole, whole)] * layers, rows)),
    )
    program = step.lower([(vector, vector)] * layers, x, x, mask).compile().as_text()
    found = []
    for shapes, kind in re.findall(SENT, program):
        sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
        found.append((kind, sum(math.prod(int(d) for d in s.split(",") if d) for s in sizes)))
    return found, sum(n for _, n in found) / (layers * features)


SENT = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def ours(group_size):
    stats = batch_norm.init_stats((5,))
    return lambda x, scale, offset, mask: normalize(
        x, scale, offset, stats, group_size=group_size, mask=mask
    )


def flax(x, scale, offset, mask):
    variables = {
        "params": {"scale": scale, "bias": offset},
        "batch_stats": {"mean": jnp.zeros(5), "var": jnp.ones(5)},
    }
    mask = None if mask is None else mask[:, None, None, None]
    module = nn.BatchNorm(use_running_average=False)
    return module.apply(variables, x, mask=mask, mutable=["batch_stats"])


@pytest.mark.parametrize("masked", [False, True])
def test_collectives_of_a_step(masked):
    """No more than Flax's 6: one a layer forward and one backward, of 11 floats a feature.

    Groups in a device: one in all, of running estimates and gradients. Groups over two devices are
    normalized as they are, which takes more: the counts are what there is now.
    """
    theirs, _ = three_layers(flax, masked)
    found, floats = three_layers(ours(None), masked)
    assert len(theirs) == len(found) == 6
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert floats <= 16
    within, _ = three_layers(ours(8), masked)
    assert len(within) == 1
    across, _ = three_layers(ours(16), masked)
    assert len(across) <= (49 if masked else 33)
    assert max(n for _, n in across) <= 64 * 5  # never examples: at most some rows of the sample


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("n", [3, 6])
def test_a_mesh_of_some_of_the_devices_cuts_the_batch_to_fit(n, kind):
    """3 or 6 of 8: sums of features only, and the values of one device."""
    mesh = jax.make_mesh((n,), ("data",), axis_types=(kind,), devices=jax.devices()[:n])
    x = np.float32(np.random.default_rng(0).normal(1, 2, (4 * n, 2, 2, 5)))
    layer = functools.partial(normalize, scale=None, offset=None, stats=batch_norm.init_stats((5,)))

    def loss(x):
        return jnp.sum(jnp.sin(layer(x)[0]))

    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    step = jax.jit(jax.grad(loss)).lower(sharded).compile()
    assert {kind for _, kind in SENT.findall(step.as_text())} == {"all-reduce"}
    # Float32 sums of up to 96 values near 1 in another order.
    np.testing.assert_allclose(step(sharded), jax.grad(loss)(x), rtol=1e-5, atol=1e-5)
