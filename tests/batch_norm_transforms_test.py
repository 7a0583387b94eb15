"""Every transformation and mesh that Flax's own layers work under: Linen and NNX, ours and Flax's.

Each test compares what a layer gives under a transformation with what the same layer gives without
it. Flax's layers are run beside ours: where they fail a test, ours need not pass it either.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bn_jax.nnx
from bn_jax import batch_norm, layers

N, C = 16, 4
# Sums of 64 float32 values near 1 in another order: measured up to 1.2e-5, for second derivatives.
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=3e-5)


def draw(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(1, 2, shape))


X, W, SCALE = draw(N, C), draw(N, C, seed=1), draw(C, seed=2)


def linen(cls, **options):
    """(x, scale, stats) -> (y, new stats) of a Linen layer in training, and its first stats."""
    layer = cls(use_running_average=False, **options)
    first = cls().init(jax.random.key(0), X, use_running_average=True)["batch_stats"]

    def apply(x, scale, stats, **call):
        params = {"scale": scale, "bias": jnp.zeros_like(scale)}
        variables = {"params": params, "batch_stats": stats}
        y, updates = layer.apply(variables, x, mutable=["batch_stats"], **call)
        return y, updates["batch_stats"]

    return apply, first


def of_nnx(cls, **options):
    """The same of an NNX layer."""
    graph, params, first = nnx.split(cls(C, rngs=nnx.Rngs(0), **options), nnx.Param, nnx.BatchStat)

    def apply(x, scale, stats, **call):
        layer = nnx.merge(graph, params, stats, copy=True)
        layer.scale[...] = scale
        y = layer(x, **call)
        return y, nnx.state(layer, nnx.BatchStat)

    return apply, first


LAYERS = {
    "linen": functools.partial(linen, layers.BatchNorm),
    "nnx": functools.partial(of_nnx, bn_jax.nnx.BatchNorm),
    "flax.linen": functools.partial(linen, nn.BatchNorm),
    "flax.nnx": functools.partial(of_nnx, nnx.BatchNorm),
}


def cases(*groups):
    """Our layers with these group sizes, Flax's with None."""
    return [(name, g) for name in LAYERS for g in groups if g is None or "flax" not in name]


def make(name, group_size=None, **options):
    """The layer, its first statistics, and a loss (x, scale) -> (loss, new statistics)."""
    if "flax" not in name:
        options["group_size"] = group_size
    apply, first = LAYERS[name](**options)

    def loss(x, scale, w=W, stats=first):
        y, stats = apply(x, scale, stats)
        return jnp.sum(jnp.sin(y) * w), stats

    return apply, first, loss


def value(loss):
    return lambda x, scale: loss(x, scale)[0]


@pytest.fixture(params=cases(None, 4), ids=lambda p: f"{p[0]}-{p[1]}")
def loss(request):
    """value(x, scale) of every layer."""
    return value(make(*request.param)[2])


class TestDerivatives:
    def test_forward_mode_is_the_transpose_of_reverse_mode(self, loss):
        by_x, by_scale = jax.grad(loss, (0, 1))(X, SCALE)
        _, along = jax.jvp(loss, (X, SCALE), (W, SCALE))
        close(along, jnp.sum(by_x * W) + jnp.sum(by_scale * SCALE), rtol=1e-5)
        close(jax.jacfwd(loss)(X, SCALE), by_x)
        close(jax.jit(jax.jacfwd(loss, 1))(X, SCALE), by_scale)
        out, tangent = jax.linearize(loss, X, SCALE)
        close(tangent(W, SCALE), along)
        close(out, loss(X, SCALE))

    def test_hessian(self, loss, request):
        old = jax.__version_info__ < (0, 11)
        if old and "flax" in request.node.callspec.params["loss"][0]:
            pytest.skip("jaxlib 0.10 computes a sum in it wrongly on CPUs (jax issue 39103)")
        along = jax.jvp(lambda x: jax.grad(loss)(x, SCALE), (X,), (W,))[1]
        for hessian in (
            jax.hessian(loss),
            jax.jacfwd(jax.jacfwd(loss)),
            jax.jacrev(jax.grad(loss)),
        ):
            full = jax.jit(hessian)(X, SCALE)
            close(jnp.einsum("abcd,cd->ab", full, W), along, rtol=1e-4)

    def test_remat(self, loss):
        close(jax.jit(jax.grad(jax.checkpoint(loss)))(X, SCALE), jax.grad(loss)(X, SCALE))

    @pytest.mark.parametrize("jit", [False, True])
    def test_vmap_inside_and_outside_of_derivatives(self, loss, jit):
        wrap = jax.jit if jit else lambda f: f
        batch = jnp.stack([X, 2 * X + 1, -X])
        want = jnp.stack([jax.grad(loss)(x, SCALE) for x in batch])
        want_scale = sum(jax.grad(loss, 1)(x, SCALE) for x in batch)
        close(wrap(jax.vmap(jax.grad(loss), (0, None)))(batch, SCALE), want)

        def total(batch, scale):
            return jnp.sum(jax.vmap(loss, (0, None))(batch, scale))

        by_x, by_scale = wrap(jax.grad(total, (0, 1)))(batch, SCALE)
        close(by_x, want)
        close(by_scale, want_scale)
        _, along = wrap(lambda: jax.jvp(total, (batch, SCALE), (batch, SCALE)))()
        close(along, jnp.sum(want * batch) + jnp.sum(want_scale * SCALE), rtol=1e-5)

    def test_debug_nans_and_infs(self, loss):
        with jax.debug_nans(True), jax.debug_infs(True):
            jax.grad(loss)(X, SCALE)
            jax.jit(jax.grad(loss))(X, SCALE)

    def test_strict_promotion_of_dtypes_and_ranks(self, loss):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            jax.grad(lambda x: loss(x, SCALE.reshape(C)))(X)
            jax.jvp(loss, (X, SCALE), (W, SCALE))


@pytest.mark.parametrize(("name", "group_size"), cases(None, 4))
class TestLoops:
    def test_scan_over_steps_keeps_the_tree_and_donates_it(self, name, group_size):
        apply, first, _ = make(name, group_size)
        batches = jnp.stack([X, 2 * X])

        def step(stats, x):
            y, stats = apply(x, SCALE, stats)
            return stats, y

        stats = first
        for x in batches:
            stats, y = step(stats, x)
        carried, ys = jax.jit(lambda s: jax.lax.scan(step, s, batches), donate_argnums=0)(
            jax.tree.map(jnp.copy, first)
        )
        assert jax.tree.structure(carried) == jax.tree.structure(first)
        jax.tree.map(close, carried, stats)
        close(ys[-1], y)

    def test_scan_over_layers(self, name, group_size):
        apply, first, _ = make(name, group_size)
        scales = jnp.stack([SCALE, 2 * SCALE, -SCALE])
        stacked = jax.tree.map(lambda a: jnp.stack([a] * 3), first)

        def body(x, layer):
            y, stats = apply(x, layer[0], layer[1])
            return jnp.sin(y), stats

        def loss(x, scan):
            return jnp.sum(W * scan(body, x, (scales, stacked))[0])

        def loop(body, x, xs):
            for i in range(3):
                x, _ = body(x, jax.tree.map(lambda a, i=i: a[i], xs))
            return x, None

        close(jax.grad(loss)(X, jax.lax.scan), jax.grad(loss)(X, loop), rtol=1e-4, atol=1e-4)

    def test_export_with_a_symbolic_batch(self, name, group_size):
        _, _, loss = make(name, group_size)
        batch = jax.export.symbolic_shape("b" if group_size is None else "4*b")
        shape = jax.ShapeDtypeStruct((*batch, C), jnp.float32)
        step = jax.jit(jax.grad(lambda x: loss(x, SCALE, w=1.0)[0]))
        exported = jax.export.deserialize(jax.export.export(step)(shape).serialize())
        close(exported.call(X), step(X), rtol=1e-4)

    def test_traced_momentum_and_epsilon(self, name, group_size):
        def run(momentum, epsilon):
            options = {"momentum": momentum, "epsilon": epsilon}
            _, _, loss = make(name, group_size, **options)
            return loss(X, SCALE)

        for momentum in (0.0, 0.9, 1.0):
            got, want = jax.jit(run)(momentum, 0.1), run(momentum, 0.1)
            jax.tree.map(close, got, want)
        rise = (run(0.9, 0.11)[0] - run(0.9, 0.09)[0]) / 0.02
        slope = jax.grad(lambda e: run(0.9, e)[0])(0.1)
        np.testing.assert_allclose(slope, rise, rtol=2e-2)  # a finite difference
        np.testing.assert_allclose(jax.jacfwd(lambda e: run(0.9, e)[0])(0.1), slope, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_of_training_with_images_of_any_size(dtype):
    """Height and width are symbols, too, on which the size of BN's sample depends."""
    stats = batch_norm.init_stats((C,))

    def step(x):
        y, updated = batch_norm.normalize(
            x, None, None, stats, train=True, group_size=4, epsilon=1e-3, momentum=0.9
        )
        return y, updated.var

    sizes = jax.export.symbolic_shape(f"4*b, h, w, {C}")
    exported = jax.export.export(jax.jit(step), platforms=("cpu", "cuda"))(
        jax.ShapeDtypeStruct(sizes, dtype)
    )
    for height, width in ((1, 1), (9, 70)):
        x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (8, height, width, C)), dtype)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        for got, want in zip(exported.call(x), step(x), strict=True):
            close(np.float32(got), np.float32(want), rtol=tolerance, atol=tolerance)


def devices(n, kind):
    return jax.make_mesh((n,), ("d",), axis_types=(kind,), devices=jax.devices()[:n])


# Groups of 4 of 16 examples: within a device, all of it on 4, over two of 8; of 8: over two of 4.
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize(("name", "group_size"), cases(None, 4, 8))
def test_jit_on_a_mesh(name, group_size, n, kind):
    """Values, gradients and statistics as on one device; x stays where it is."""
    mesh = devices(n, kind)
    rows, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    _, _, loss = make(name, group_size)
    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    x, w, scale = (jax.device_put(a, s) for a, s in ((X, rows), (W, rows), (SCALE, whole)))
    with jax.set_mesh(mesh):
        got = jax.jit(step)(x, scale, w)
    assert got[1][0].sharding.spec[0] == "d"
    jax.tree.map(lambda a, b: close(np.asarray(a), b), got, step(X, SCALE, W))


def parts(axis_name, group_size):
    """Which layer without axis_name gives on the whole batch what one with it gives on 4 parts."""
    return group_size if axis_name is None or group_size is not None else N


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("axis_name", [None, "d"])
@pytest.mark.parametrize(("name", "group_size"), cases(None, 2))
def test_shard_map(name, group_size, axis_name, kind, check_vma):
    """Gradients of the sum over shards; with axis_name the statistics come out replicated."""
    mesh = devices(4, kind)
    _, _, loss = make(name, group_size, axis_name=axis_name)

    def local(x, w, scale):
        (by_x, by_scale), stats = jax.grad(loss, (0, 1), has_aux=True)(x, scale, w)
        by_scale = by_scale if check_vma else jax.lax.psum(by_scale, "d")
        stats = stats if axis_name else jax.tree.map(lambda a: a[None], stats)
        return by_x, by_scale, stats

    specs = {"in_specs": (P("d"), P("d"), P()), "check_vma": check_vma}
    specs["out_specs"] = P("d"), P(), P() if axis_name else P("d")
    rows, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    x, w, scale = (jax.device_put(a, s) for a, s in ((X, rows), (W, rows), (SCALE, whole)))
    by_x, by_scale, stats = jax.jit(jax.shard_map(local, mesh=mesh, **specs))(x, w, scale)
    want = whole_batch(name, group_size, axis_name)
    close(by_x, want[0])
    close(by_scale, want[1])
    if axis_name:
        jax.tree.map(close, stats, want[2])


def whole_batch(name, group_size, axis_name):
    """Gradients and statistics without devices: over the whole batch, in groups, or in 4 parts."""
    _, _, loss = make(name, group_size)
    if axis_name or group_size:
        (by_x, by_scale), stats = jax.grad(loss, (0, 1), has_aux=True)(X, SCALE, W)
        return by_x, by_scale, stats
    pieces = zip(jnp.split(X, 4), jnp.split(W, 4), strict=True)
    found = [jax.grad(loss, (0, 1), has_aux=True)(x, SCALE, w)[0] for x, w in pieces]
    by_x, by_scale = zip(*found, strict=True)
    return jnp.concatenate(by_x), sum(by_scale), None


@pytest.mark.parametrize("how", ["pmap", "vmap", "jit of vmap", "grad of vmap"])
@pytest.mark.parametrize("axis_name", [None, "d"])
@pytest.mark.parametrize(("name", "group_size"), cases(None, 2))
def test_pmap_and_vmap(name, group_size, axis_name, how):
    _, _, loss = make(name, group_size, axis_name=axis_name)
    x, w = X.reshape(4, 4, C), W.reshape(4, 4, C)
    local = jax.grad(lambda x, w, scale: loss(x, scale, w), (0, 2), has_aux=True)
    stats = None
    if how == "grad of vmap":

        def total(x, scale):
            one = lambda x, w: loss(x, scale, w)[0]  # noqa: E731
            return jnp.sum(jax.vmap(one, axis_name="d")(x, w))

        by_x, by_scale = jax.grad(total, (0, 1))(x, SCALE)
        _, along = jax.jvp(total, (x, SCALE), (w, SCALE))
        close(along, jnp.sum(by_x * w) + jnp.sum(by_scale * SCALE), rtol=1e-5)
    else:
        over = {"axis_name": "d", "in_axes": (0, 0, None)}
        if how == "pmap":
            run = jax.pmap(local, devices=jax.devices()[:4], **over)
        else:
            run = jax.vmap(local, **over)
            run = jax.jit(run) if "jit" in how else run
        (by_x, by_scale), stats = run(x, w, SCALE)
        by_scale = jnp.sum(by_scale, 0)
    want = whole_batch(name, group_size, axis_name)
    close(np.reshape(by_x, (N, C)), want[0])
    close(by_scale, want[1])
    if axis_name and stats is not None:
        for i in range(4):
            jax.tree.map(lambda a, b, i=i: close(a[i], b), stats, want[2])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize(("name", "group_size"), cases(None, 4))
def test_other_dtypes(name, group_size, dtype):
    """Against float64: to the rounding of the values that go in and come out."""
    with jax.enable_x64(dtype == "float64"):
        apply, first, _ = make(name, group_size, dtype=jnp.dtype(dtype))
        x = jnp.asarray(X, dtype)
        y, stats = apply(x, jnp.ones(C, jnp.float32), first)
        assert y.dtype == dtype
        rows = np.float64(x).reshape(-1, group_size or N, C)
        want = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-5)
        limit = 2e-6 if dtype == "float64" else 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.float64(y), want.reshape(N, C), atol=limit)
        if "flax" not in name:
            assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(stats))


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_a_group_over_shards_is_refused_under_shard_map(name):
    _, _, loss = make(name, 8, axis_name="d")
    local = jax.shard_map(
        lambda x: jax.lax.psum(loss(x, SCALE, 1.0)[0], "d"),
        mesh=devices(4, AxisType.Auto),
        in_specs=P("d"),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match="group_size is 8.*batch of 4.*larger groups need jit"):
        local(X)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_index_groups_are_refused(name):
    with pytest.raises(ValueError, match="axis_index_groups=.*not supported; set group_size"):
        apply, first, _ = make(name, axis_name="d", axis_index_groups=[[0], [1]])
        apply(X, SCALE, first)
