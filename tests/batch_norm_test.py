"""batch_norm.normalize against the paper's formulas in float64, and where the peers fail.

"Flax" is flax.linen.BatchNorm with its defaults; docs/batch_norm.md has the measured failures.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import batch_norm

normalize = functools.partial(batch_norm.normalize, epsilon=1e-3, momentum=0.9)
# Float32 results differ from float64 by rounding (6e-8 relative) grown by sums of some 100 values.
TOLERANCE = 2e-6


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(2, 3, shape)


def paper(x, gamma, beta, dy, epsilon):
    """Algorithm 1 and its backward pass, line by line, for one group; x is [m, features]."""
    m = len(x)
    mean, var = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    x_hat = (x - mean) / np.sqrt(var + epsilon)
    dx_hat = dy * gamma
    dvar = (dx_hat * (x - mean)).sum(0) * -0.5 * (var + epsilon) ** -1.5
    dmean = -dx_hat.sum(0) / np.sqrt(var + epsilon) + dvar * (-2 * (x - mean)).sum(0) / m
    dx = dx_hat / np.sqrt(var + epsilon) + dvar * 2 * (x - mean) / m + dmean / m
    return gamma * x_hat + beta, dx, (dy * x_hat).sum(0), dy.sum(0)


def ours(x, gamma, beta, dy, **options):
    """The same four results, by normalize and its gradient, and the new statistics."""
    features = np.shape(gamma)
    stats = batch_norm.init_stats(features, x.dtype)

    def f(x, gamma, beta):
        return normalize(x, gamma, beta, stats, train=True, **options)

    def both(x, gamma, beta, dy):
        y, vjp, stats = jax.vjp(f, x, gamma, beta, has_aux=True)
        return (y, *vjp(dy)), stats

    return jax.jit(both)(x, gamma, beta, dy)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
@pytest.mark.parametrize("group_size", [None, 4])
def test_forward_and_backward_are_the_papers(wrap, group_size):
    """Statistic groups: Flax, Haiku, Equinox and Keras have none under jit."""
    x, dy, gamma, beta = draw(8, 3, 3, 5), draw(8, 3, 3, 5, seed=1), draw(5), draw(5, seed=2)
    got, _ = wrap(functools.partial(ours, group_size=group_size))(
        *map(np.float32, (x, gamma, beta, dy))
    )
    groups = 8 // (group_size or 8)
    want = [
        paper(a.reshape(-1, 5), gamma, beta, b.reshape(-1, 5), 1e-3)
        for a, b in zip(np.split(x, groups), np.split(dy, groups), strict=True)
    ]
    y, dx, dgamma, dbeta = zip(*want, strict=True)
    for a, b in zip(got, (np.stack(y), np.stack(dx), sum(dgamma), sum(dbeta)), strict=True):
        np.testing.assert_allclose(
            a, b.reshape(a.shape), rtol=2e-5, atol=TOLERANCE * np.abs(b).max()
        )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_finite_differences_in_float64(relu, masked):
    """Through y and through the statistics, of which the gradient is exact too."""
    with jax.enable_x64(True):
        x, dy, gamma, beta = draw(6, 2, 3), draw(6, 2, 3, seed=1), draw(3), draw(3, seed=2)
        mask = jnp.arange(6) != 1 if masked else None
        weights = draw(3, seed=5)

        def loss(x, gamma, beta):
            stats = batch_norm.init_stats((3,), jnp.float64)
            y, stats = normalize(
                x, gamma, beta, stats, train=True, group_size=3, mask=mask, relu=relu
            )
            return jnp.sum(y * dy) + jnp.sum(weights * (stats.mean + stats.var))

        arguments = tuple(map(jnp.asarray, (x, gamma, beta)))
        gradients = jax.grad(loss, (0, 1, 2))(*arguments)
        for i in range(3):
            way = draw(*arguments[i].shape, seed=7)
            move = lambda h, i=i, way=way: loss(  # noqa: E731
                *(a + h * way if i == j else a for j, a in enumerate(arguments))
            )
            # Central differences at 1e-6: error h^2 plus rounding / h, both below 1e-8.
            want = (move(1e-6) - move(-1e-6)) / 2e-6
            np.testing.assert_allclose(jnp.sum(gradients[i] * way), want, rtol=1e-7)


def test_invariants_of_section_3():
    """BN((aW)u) = BN(Wu), its derivatives, and the identity by gamma = std, beta = mean."""
    with jax.enable_x64(True):
        u, w, dy, a = draw(16, 4), draw(4, 3, seed=1), draw(16, 3, seed=2), 7.0
        stats = batch_norm.init_stats((3,), jnp.float64)
        run = functools.partial(normalize, train=True, epsilon=0.0)
        bn = lambda w, u: run(u @ w, None, None, stats)[0]  # noqa: E731
        (y, vjp), (ya, vjpa) = jax.vjp(bn, w, u), jax.vjp(bn, a * w, u)
        (dw, du), (dwa, dua) = vjp(dy), vjpa(dy)
        # 1e-12: float64 rounding (1e-16) times the condition of these sums.
        np.testing.assert_allclose(ya, y, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(dua, du, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(dwa, dw / a, rtol=1e-12, atol=1e-12)
        same, _ = run(u, u.std(0), u.mean(0), batch_norm.init_stats((4,), jnp.float64))
        np.testing.assert_allclose(same, u, rtol=1e-12, atol=1e-12)


def test_vmap_and_scan():
    x, gamma, beta = np.float32(draw(4, 6, 3)), np.float32(draw(3)), np.float32(draw(3, seed=1))
    step = lambda s, x: normalize(x, gamma, beta, s, train=True)[::-1]  # noqa: E731
    fresh = batch_norm.init_stats((3,))
    each = [step(fresh, row)[1] for row in x]
    many = jax.vmap(lambda x: step(fresh, x)[1])(x)
    np.testing.assert_allclose(many, each, rtol=2e-5, atol=TOLERANCE)
    scanned, ys = jax.lax.scan(step, fresh, x)
    looped = fresh
    for row in x:
        looped, _ = step(looped, row)
    np.testing.assert_allclose(ys, each, rtol=2e-5, atol=TOLERANCE)
    np.testing.assert_allclose(scanned.var, looped.var, rtol=1e-6)  # float32 reordering
    gradient = jax.grad(lambda g: jnp.sum(jax.lax.scan(step, fresh, x)[1] * g[None, None]))
    assert np.isfinite(gradient(gamma)).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 1.0])
def test_running_estimate_is_right_after_any_number_of_steps(momentum):
    """Closed form after k = 1, 2, 10, 100. Flax, Keras and PyTorch are wrong by their initial 0 and
    1; Haiku and Equinox are debiased, but all except PyTorch hold the biased variance.
    """
    with jax.enable_x64(True):
        x = draw(100, 8, 3)
        update = jax.jit(lambda s, x: normalize(x, None, None, s, train=True, momentum=momentum)[1])
        stats = batch_norm.init_stats((3,), jnp.float64)
        for k in range(1, 101):
            stats = update(stats, x[k - 1])
            if k in (1, 2, 10, 100):
                w = momentum ** np.arange(k - 1, -1, -1.0)
                w /= w.sum()
                # 1e-12: float64 rounding over 100 updates.
                np.testing.assert_allclose(stats.mean, w @ x[:k].mean(1), rtol=1e-12)
                np.testing.assert_allclose(stats.var, w @ x[:k].var(1, ddof=1), rtol=1e-12)
                assert stats.count == k


def test_inference_is_right_after_one_step():
    x = np.float32(draw(256, 4))
    _, stats = normalize(x, None, None, batch_norm.init_stats((4,)), train=True, momentum=0.99)
    y, same = normalize(x, None, None, stats, train=False)
    np.testing.assert_allclose(y.std(0), 1, atol=3e-3)  # m/(m-1) at 256, and epsilon over 9
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    assert same is stats


def test_algorithm_2_is_the_merge_of_single_batches():
    """In any order, as a stream; a batch without values adds nothing. No peer has Algorithm 2."""
    with jax.enable_x64(True):
        x = draw(5, 8, 2, 3)
        fresh = batch_norm.init_stats((3,), jnp.float64)
        one = lambda x, **kw: normalize(x, None, None, fresh, train=True, **kw)[1]  # noqa: E731
        batches = [one(b, group_size=4) for b in x]
        want_mean = x.mean((0, 1, 2))
        biased = x.reshape(10, 8, 3).var(1)  # 10 mini-batches of 4 examples, m = 8 values
        want_var = 8 / 7 * biased.mean(0)
        empty = one(x[0], mask=jnp.zeros(8, bool))
        assert empty.count == 0
        for order in (batches, [empty, *reversed(batches), empty], [fresh, *batches]):
            got = batch_norm.population(order)
            np.testing.assert_allclose(got.mean, want_mean, rtol=1e-13)
            np.testing.assert_allclose(got.var, want_var, rtol=1e-13)
            assert got.count == 5
        pair = batch_norm.merge(
            batch_norm.population(batches[:2]), batch_norm.population(batches[2:])
        )
        np.testing.assert_allclose(pair.var, want_var, rtol=1e-13)


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("garbage", [0.0, 1e30, np.nan])
def test_masked_values_take_no_part(group_size, garbage):
    """What a padded example holds is irrelevant, NaN included (Flax's gradient is NaN then)."""
    x, dy = np.float32(draw(8, 3, 4)), np.float32(draw(8, 3, 4, seed=1))
    gamma, beta = np.float32(draw(4)), np.float32(draw(4, seed=2))
    mask = np.array([0, 1, 1, 1, 1, 0, 1, 0], bool)
    x[~mask] = garbage
    got, stats = ours(x, gamma, beta, dy, mask=mask, group_size=group_size)
    total = dgamma = dbeta = squares = weight = 0
    for rows in np.split(np.arange(8), 8 // (group_size or 8)):
        rows = rows[mask[rows]]
        flat = np.float64(x[rows]).reshape(-1, 4)
        y, dx, g, b = paper(flat, gamma, beta, np.float64(dy[rows]).reshape(-1, 4), 1e-3)
        for mine, wanted in ((got[0], y), (got[1], dx)):
            np.testing.assert_allclose(
                mine[rows], wanted.reshape(-1, 3, 4), rtol=2e-5, atol=4 * TOLERANCE
            )
        dgamma, dbeta = dgamma + g, dbeta + b
        total, weight = total + flat.sum(0), weight + len(flat)
        squares = squares + ((flat - flat.mean(0)) ** 2).sum(0)
    freedom = weight - 8 // (group_size or 8)
    np.testing.assert_allclose(got[2], dgamma, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[3], dbeta, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.mean, total / weight, rtol=1e-5)
    np.testing.assert_allclose(stats.var, squares / freedom, rtol=1e-5)
    assert not np.any(got[0][~mask])
    assert not np.any(got[1][~mask])


def test_groups_of_fewer_than_two_values_leave_the_estimate():
    """Valid examples 2, 1, 0: normalized with what they have; only the first is learnt from."""
    x = np.float32(draw(6, 3))
    mask = np.array([1, 1, 1, 0, 0, 0], bool)
    y, stats = normalize(
        x, None, None, batch_norm.init_stats((3,)), train=True, group_size=2, mask=mask
    )
    np.testing.assert_allclose(stats.mean, x[:2].mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.var, x[:2].var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(y[2:], 0)
    old = batch_norm.Stats(jnp.ones(3), jnp.ones(3) * 2, jnp.float32(5))
    _, new = normalize(x, None, None, old, train=True, mask=np.arange(6) == 3)
    assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))


def test_mask_may_broadcast_to_x_like_flax():
    x = np.float32(draw(2, 5, 3))
    mask = np.arange(5)[None, :, None] < np.array([3, 5])[:, None, None]  # sequence lengths
    y, stats = normalize(x, None, None, batch_norm.init_stats((3,)), train=True, mask=mask)
    values = x[np.broadcast_to(mask, x.shape)].reshape(-1, 3)
    np.testing.assert_allclose(stats.mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.var, values.var(0, ddof=1), rtol=1e-5)
    assert not np.any(y[0, 3:])


@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_variance_of_a_far_off_mean(ratio):
    """Relative error <= 1e-3 in float32, which Flax's and Haiku's E[x^2] - E[x]^2 is far from."""
    x = np.float32(np.random.default_rng(0).normal(ratio, 1, (32, 8, 8, 16)))
    _, stats = jax.jit(
        lambda x: normalize(x, None, None, batch_norm.init_stats((16,)), train=True)
    )(x)
    want = np.float64(x).var((0, 1, 2), ddof=1)  # of the rounded values: their rounding is not ours
    assert np.max(np.abs(stats.var / want - 1)) < 1e-3


def test_variance_when_the_first_value_is_the_outlier():
    x = np.float32(draw(64, 6, 2))
    x[0] = 1e6
    _, stats = normalize(x, None, None, batch_norm.init_stats((2,)), train=True)
    # The shift lies sqrt(64) deviations off the mean: 64 times the rounding of a sum of 128, 2e-6.
    np.testing.assert_allclose(stats.var, np.float64(x).var((0, 1), ddof=1), rtol=1.3e-4)


@pytest.mark.parametrize("value", [3.1, 1e4 + 0.1, -7e6])
@pytest.mark.parametrize("mask", [None, np.arange(48) > 2])
def test_constant_channel_gives_beta_and_no_noise(value, mask):
    """Exactly, whatever the rounding of sums: PyTorch gives 1 deviation at 1e4."""
    x = np.full((48, 7, 7, 2), value, np.float32)
    beta = np.float32([0.5, -2])
    for compiled in (lambda f: f, jax.jit):
        y, stats = compiled(
            lambda x: normalize(
                x, np.float32([1, 3]), beta, batch_norm.init_stats((2,)), train=True, mask=mask
            )
        )(x)
        assert np.array_equal(np.unique(y[5:]), np.unique(beta))
        assert np.all(stats.mean == np.float32(value))


def test_bfloat16_inputs_have_float32_statistics():
    x = jnp.asarray(draw(64, 4, 4, 8) + 100, jnp.bfloat16)
    (y, dx, dgamma, _), stats = ours(x, np.float32(draw(8)), np.float32(draw(8)), x)
    assert (y.dtype, dx.dtype, dgamma.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    fresh = batch_norm.init_stats((8,))
    _, stats = normalize(x, None, None, fresh, train=True)
    assert stats.mean.dtype == stats.var.dtype == jnp.float32
    np.testing.assert_allclose(stats.var, np.float64(x).var((0, 1, 2), ddof=1), rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, (-1, 1), (1, 2, 3)])
def test_feature_axes_anywhere(axis):
    """Equal to the last-axis form of the transposed array; all axes but 0 are per-activation BN."""
    x = np.float32(draw(6, 4, 2, 4))
    features = sorted(a % 4 for a in (axis if isinstance(axis, tuple) else (axis,)))
    order = [a for a in range(4) if a not in features] + features
    shape = tuple(x.shape[a] for a in features)
    gamma, beta = np.float32(draw(*shape)), np.float32(draw(*shape, seed=1))
    dy = np.float32(draw(*x.shape, seed=2))
    (y, dx, *rest), stats = ours(x, gamma, beta, dy, axis=axis, group_size=2)

    def flat(v):
        v = v.transpose(order)
        return v.reshape(*v.shape[: 4 - len(features)], -1)

    (y2, dx2, *rest2), stats2 = ours(flat(x), gamma.ravel(), beta.ravel(), flat(dy), group_size=2)
    np.testing.assert_allclose(flat(np.asarray(y)), y2, rtol=1e-5, atol=TOLERANCE)
    np.testing.assert_allclose(flat(np.asarray(dx)), dx2, rtol=1e-4, atol=2e-5)
    for a, b in zip((*rest, *stats[:2]), (*rest2, *stats2[:2]), strict=True):
        np.testing.assert_allclose(np.ravel(a), b, rtol=1e-5, atol=2e-5)


def test_frozen_statistics_and_optional_parameters():
    x, gamma = np.float32(draw(4, 3)), np.float32(draw(3))
    stats = batch_norm.Stats(jnp.float32(draw(3)), jnp.float32(draw(3) ** 2), jnp.float32(7))
    f = lambda x: normalize(x, gamma, None, stats, train=False)[0]  # noqa: E731
    np.testing.assert_allclose(
        f(x), gamma * (x - stats.mean) / np.sqrt(stats.var + 1e-3), rtol=1e-5, atol=1e-6
    )
    slope = jax.grad(lambda x: f(x).sum())(x)  # an affine map: no term through the statistics
    np.testing.assert_allclose(slope[0], gamma / np.sqrt(stats.var + 1e-3), rtol=1e-6)
    zero, _ = normalize(x, jnp.zeros(3), jnp.ones(3), stats, train=True)
    assert np.all(zero == 1)
    for kept in ((gamma, None), (None, gamma), (None, None)):
        y, _ = normalize(x, *kept, stats, train=True)
        full, _ = normalize(
            x,
            *(
                d if k is None else k
                for k, d in zip(kept, (jnp.ones(3), jnp.zeros(3)), strict=True)
            ),
            stats,
            train=True,
        )
        np.testing.assert_allclose(y, full, rtol=1e-6, atol=1e-6)


def test_fused_relu_equals_relu_after_bn():
    x, dy = np.float32(draw(8, 5, 3)), np.float32(draw(8, 5, 3, seed=1))
    gamma, beta = np.float32(draw(3)), np.float32(draw(3, seed=2))
    stats = batch_norm.init_stats((3,))
    for train in (True, False):
        run = functools.partial(normalize, stats=stats, train=train)
        fused = lambda *a, run=run: run(*a, relu=True)[0]  # noqa: E731
        apart = lambda *a, run=run: jax.nn.relu(run(*a)[0])  # noqa: E731
        y, vjp = jax.vjp(fused, x, gamma, beta)
        want, want_vjp = jax.vjp(apart, x, gamma, beta)
        assert np.array_equal(y, want)
        for a, b in zip(vjp(dy), want_vjp(dy), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_backward_keeps_x_and_no_normalized_copy():
    """Residuals of x's size: x alone. Plain autodiff of the same formulas keeps two more."""
    x = jnp.ones((16, 8, 8, 4))

    def f(x):
        return normalize(
            x, jnp.ones(4), jnp.ones(4), batch_norm.init_stats((4,)), train=True, relu=True
        )[0]

    kept = [a for a in jax.tree.leaves(jax.vjp(f, x)[1]) if np.size(a) >= x.size]
    assert len(kept) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fold(dtype):
    """One dense layer; a convolution and whole networks are in layers_test.py."""
    with jax.enable_x64(dtype == "float64"):
        u, w, b, gamma, beta = (
            jnp.asarray(draw(*s, seed=i), dtype)
            for i, s in enumerate([(16, 6), (6, 3), (3,), (3,), (3,)])
        )
        stats = batch_norm.Stats(u.mean() * w.sum(0), jnp.square(gamma) + 1, jnp.float32(1))
        for bias, scale, offset in ((b, gamma, beta), (None, None, None)):
            x = u @ w + (0 if bias is None else bias)
            want, _ = normalize(x, scale, offset, stats, train=False)
            kernel, shift = batch_norm.fold(w, bias, scale, offset, stats, epsilon=1e-3)
            limit = 1e-5 if dtype == "float32" else 1e-12
            assert np.max(np.abs(u @ kernel + shift - want)) <= limit * np.max(np.abs(want))
        with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
            batch_norm.fold(w, b, None, None, batch_norm.init_stats((2, 3)), epsilon=1e-3)


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((1, 3), {}, ValueError, "1 value a statistic.*at least 2"),  # Flax gives zeros
        ((4, 3), {"group_size": 1}, ValueError, "1 value a statistic.*at least 2"),
        ((10, 3), {"group_size": 4}, ValueError, "group_size is 4.*batch of 10"),
        ((10, 3), {"group_size": 0}, ValueError, "group_size is 0.*batch of 10"),
        ((4, 3), {"group_size": 8}, ValueError, "group_size is 8.*batch of 4"),
        ((0, 3), {}, ValueError, r"\(0, 3\) is empty"),
        ((0, 3), {"group_size": 32}, ValueError, r"\(0, 3\) is empty"),
        ((4, 3), {"dtype": jnp.int32}, TypeError, "int32.*floating point"),
        ((4, 3), {"dtype": jnp.complex64}, TypeError, "complex64.*floating point"),
        ((4, 2), {}, ValueError, r"scale has shape \(3,\).*\(2,\)"),
        ((4, 3), {"mask": jnp.ones(5, bool)}, ValueError, r"mask has shape \(5,\).*\(4,\)"),
        ((4, 3), {"axis": 2}, ValueError, "axes are 2.*up to 1"),
        ((4, 3), {"axis": (0, 1)}, ValueError, "one must be left"),
        ((4, 3), {"epsilon": -1.0}, ValueError, "epsilon=-1.0 must be >= 0"),
        ((4, 3), {"momentum": 1.5}, ValueError, "momentum=1.5 within 0..1"),
    ],
)
def test_errors_name_value_and_limit(shape, options, error, message):
    options = dict(options)
    x = jnp.ones(shape, options.pop("dtype", jnp.float32))
    stats = batch_norm.init_stats((3,))
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda x: normalize(x, jnp.ones(3), None, stats, train=True, **options), x)
