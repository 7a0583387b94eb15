"""Running estimates, Algorithm 2, frozen statistics and folding, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import batch_norm
from tests.support.algorithm_1 import draw, normalize


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


def test_the_count_does_not_saturate():
    """At momentum 1, where every update counts; above 2^24 in steps that float32 has."""
    x = np.float32(draw(8, 3))
    for count in (2.0**24, 2.0**25, 1e9):
        stats = batch_norm.Stats(jnp.zeros(3), jnp.ones(3), jnp.float32(count))
        _, new = normalize(x, None, None, stats, train=True, momentum=1.0)
        assert count < new.count <= count * (1 + 2**-23)
        assert np.all(np.abs(new.mean) <= 2 * np.abs(x.mean(0)) / count)
    stats = batch_norm.Stats(jnp.zeros(3), jnp.ones(3), jnp.float32(2**24 - 1))
    _, new = normalize(x, None, None, stats, train=True, momentum=1.0)
    assert new.count == 2**24


def test_narrow_statistics_are_read_and_not_updated():
    """A whole tree cast to bfloat16: inference works; updates would be lost, and are refused."""
    x = np.float32(draw(8, 3))
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), batch_norm.init_stats((3,)))
    y, same = normalize(x, None, None, narrow, train=False)
    np.testing.assert_allclose(y, x / np.sqrt(1.001), rtol=1e-6)
    assert same is narrow
    with pytest.raises(TypeError, match="running mean has dtype bfloat16.*needs float32.*params"):
        normalize(x, None, None, narrow, train=True)
    narrow = batch_norm.init_stats((3,))._replace(count=jnp.bfloat16(0))
    with pytest.raises(TypeError, match="running count has dtype bfloat16"):
        normalize(x, None, None, narrow, train=True)


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


def test_statistics_can_be_differentiated():
    """As in jax.grad over all variables of a network; nothing depends on the count's derivative."""
    x = np.float32(draw(8, 3))

    def loss(stats):
        y, new = normalize(x, None, None, stats, train=True)
        return jnp.sum(y) + jnp.sum(new.mean) + jnp.sum(new.var)

    stats = batch_norm.init_stats((3,))._replace(count=jnp.float32(4))
    weight = 0.1 / (1 - 0.9**5)
    got = jax.grad(loss)(stats)
    np.testing.assert_allclose(got.mean, 1 - weight, rtol=1e-6)
    np.testing.assert_allclose(got.var, 1 - weight, rtol=1e-6)
    assert got.count == 0
    _, along = jax.jvp(loss, (stats,), (batch_norm.Stats(x[0], x[1], jnp.float32(1)),))
    np.testing.assert_allclose(along, (1 - weight) * (x[0] + x[1]).sum(), rtol=1e-5)
