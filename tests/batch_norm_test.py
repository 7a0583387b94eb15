"""batch_norm.normalize against the paper's formulas in float64, under every transformation.

"Flax" is flax.linen.BatchNorm with its defaults; docs/batch_norm.md has the measured failures.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import batch_norm
from tests.support.algorithm_1 import TOLERANCE, draw, normalize, ours, paper


@pytest.fixture(params=["here", "cuda"])
def platform(request, monkeypatch):
    """Runs a test with the forms for this platform and with those for NVIDIA GPUs."""

    def cuda_form(*args, default, **forms):
        return forms.get("cuda", default)(*args)

    if request.param == "cuda":
        monkeypatch.setattr(batch_norm.lax, "platform_dependent", cuda_form)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
@pytest.mark.parametrize("group_size", [None, 4])
def test_forward_and_backward_are_the_papers(wrap, group_size):
    """Statistic groups: Flax, Haiku, Equinox and Keras have none under jit."""
    x, dy, gamma, beta = draw(8, 3, 3, 5), draw(8, 3, 3, 5, seed=1), draw(5), draw(5, seed=2)
    got, _ = ours(*map(np.float32, (x, gamma, beta, dy)), group_size=group_size, wrap=wrap)
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


@pytest.mark.usefixtures("platform")
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


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_statistics_of_16_bit_values_are_those_of_float64(dtype, masked):
    """Far from 0, too, and beside values that are not finite in examples that do not count."""
    x = jnp.asarray(draw(8, 5, 4, 3) + np.array([0, 100, -300]), dtype)
    mask = None
    counts = np.full(8, True)
    if masked:
        counts[[0, 1, 6, 7]] = False
        mask = jnp.asarray(counts)
        x = jnp.where(jnp.expand_dims(mask, (1, 2, 3)), x, jnp.nan)

    stats = batch_norm.init_stats((3,))
    y, stats = normalize(x, None, None, stats, train=True, group_size=4, mask=mask)

    groups = np.split(np.asarray(x, np.float64), 2)
    valid = [g[c].reshape(-1, 3) for g, c in zip(groups, np.split(counts, 2), strict=True)]
    means = np.stack([g.mean(0) for g in valid])
    variances = np.stack([g.var(0, ddof=1) for g in valid])
    np.testing.assert_allclose(stats.mean, means.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats.var, variances.mean(0), rtol=1e-4)
    assert np.isfinite(y).all()


@pytest.mark.usefixtures("platform")
def test_statistics_of_16_bit_values_without_a_valid_one():
    """The first group has only NaN and no valid example: the other one alone counts."""
    constant = jnp.array([3.5, -2.25], "bfloat16")
    x = jnp.full((8, 2), jnp.nan, "bfloat16").at[4:].set(constant)
    mask = jnp.arange(8) >= 4
    stats = batch_norm.init_stats((2,))
    y, stats = normalize(x, None, None, stats, train=True, group_size=4, mask=mask)
    np.testing.assert_array_equal(stats.mean, [3.5, -2.25])  # exactly, as they are constant
    np.testing.assert_array_equal(stats.var, [0, 0])
    np.testing.assert_array_equal(y, 0)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("place", [0, 8])
def test_one_odd_16_bit_value_does_not_spoil_the_variance(place):
    """All values are 0 but one, wherever it lies: at worst it is the one that sums start from."""
    x = jnp.zeros((64, 16, 1), "bfloat16").at[0, place].set(512)
    _, stats = normalize(x, None, None, batch_norm.init_stats((1,)), train=True)
    number = x.size
    np.testing.assert_allclose(stats.var[0], 512**2 / number, rtol=2 * number * 2**-24)


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
    """Values, statistics and gradients as in a Python loop."""
    x, gamma, beta = np.float32(draw(4, 6, 3)), np.float32(draw(3)), np.float32(draw(3, seed=1))
    weights = np.float32(draw(4, 6, 3, seed=2))
    fresh = batch_norm.init_stats((3,))

    def step(gamma, stats, x):
        return normalize(x, gamma, beta, stats, train=True)[::-1]

    def looped(gamma, x):
        stats, ys = fresh, []
        for row in x:
            stats, y = step(gamma, stats, row)
            ys.append(y)
        return stats, jnp.stack(ys)

    def scanned(gamma, x):
        return jax.lax.scan(functools.partial(step, gamma), fresh, x)

    def mapped(gamma, x):
        return None, jax.vmap(lambda row: step(gamma, fresh, row)[1])(x)

    def loss(gamma, x, form):
        """Through y and, where they are handed on, through the running estimates."""
        stats, y = form(gamma, x)
        return jnp.sum(weights * y) + (0 if stats is None else jnp.sum(stats.mean + stats.var))

    (want_stats, want), (stats, y) = looped(gamma, x), jax.jit(scanned)(gamma, x)
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=TOLERANCE)
    np.testing.assert_allclose(mapped(gamma, x)[1], want, rtol=2e-5, atol=TOLERANCE)
    np.testing.assert_allclose(stats.var, want_stats.var, rtol=1e-6)  # float32 reordering
    for form, reference in ((scanned, looped), (mapped, lambda *a: (None, looped(*a)[1]))):
        got, wanted = (jax.grad(loss, (0, 1))(gamma, x, f) for f in (form, reference))
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


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
