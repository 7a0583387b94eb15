"""The training and evaluation steps as pure functions, without jit, mesh or flags."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax import layers, optim, step
from bn_jax.layers import BatchNorm
from bn_jax.models.mlp import Mlp

train_step = jax.jit(step.train_step, static_argnames="model")  # compiled: 60 s faster
train_steps = jax.jit(step.train_steps, static_argnames=("model", "image_shape"))
eval_step = jax.jit(step.eval_step, static_argnames="model")
HYPER = optim.Hyper(*map(np.float32, (0.1, 0.96, 1000, 0.01, 0.9)))
SEED = 3


def model(dropout=0.0):
    norm = partial(BatchNorm, momentum=0.9, epsilon=1e-3)
    return Mlp(num_classes=3, widths=(5, 4), norm=norm, dropout=dropout)


def batch(n=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, 4, 4, 1), np.uint8),
        "label": rng.integers(0, 3, n).astype(np.int32),
        "mask": np.ones(n, bool),
    }


def test_one_step_is_the_gradient_step_written_out():
    net, data = model(), batch()
    state = step.init_state(net, 0, (4, 4, 1))

    def loss(params):
        logits, _ = net.apply(
            {"params": params, "batch_stats": state.batch_stats},
            data["image"],
            train=True,
            mutable=["batch_stats"],
        )
        log_p = jax.nn.log_softmax(logits)[np.arange(8), data["label"]]
        kernels = [params[f"dense_{i}"]["dense"]["kernel"] for i in (0, 1)]
        kernels.append(params["classifier"]["kernel"])
        return -jnp.mean(log_p) + 0.005 * sum(jnp.sum(k**2) for k in kernels)

    value, grads = jax.value_and_grad(loss)(state.params)
    after, metrics = train_step(state, data, HYPER, SEED, model=net)
    np.testing.assert_allclose(
        metrics["loss"], value, rtol=1e-6
    )  # float32, another summation order
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params, expected)
    assert int(after.step) == 1
    assert float(after.batch_stats["dense_0"]["bn"]["count"]) == 1.0
    square = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(np.sum(metrics["gradient_square"]), square, rtol=1e-5)


@pytest.mark.parametrize("junk", [0, 255])
def test_a_masked_row_changes_nothing_whatever_it_holds(junk):
    net, data = model(), batch()
    data["mask"][5] = False
    state = step.init_state(net, 0, (4, 4, 1))
    spoilt = {**data, "image": data["image"].copy(), "label": data["label"].copy()}
    spoilt["image"][5], spoilt["label"][5] = junk, 2
    a, metrics_a = train_step(state, data, HYPER, SEED, model=net)
    b, metrics_b = train_step(state, spoilt, HYPER, SEED, model=net)
    jax.tree.map(np.testing.assert_array_equal, (a, metrics_a), (b, metrics_b))
    seven = {k: np.delete(v, 5, axis=0) for k, v in data.items()}
    c, metrics_c = train_step(state, seven, HYPER, SEED, model=net)
    np.testing.assert_allclose(metrics_a["loss"], metrics_c["loss"], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a.params, c.params)


class Logits(nn.Module):
    """A network whose logits are its pixels, and in training twice as much in an auxiliary head."""

    @nn.compact
    def __call__(self, images, *, train, mask=None):
        scale = self.param("scale", nn.initializers.ones, ())
        logits = scale * images[:, 0, 0].astype(jnp.float32)
        return (logits, (2 * logits,)) if train else logits


def test_a_masked_row_takes_no_part_in_the_auxiliary_losses():
    rng = np.random.default_rng(0)
    data = {
        "image": rng.normal(size=(4, 1, 1, 3)).astype(np.float32),
        "label": np.array([0, 2, 1, 1]),
        "mask": np.array([True, False, True, True]),
    }
    params = {"scale": jnp.float32(1)}
    grads, means, _ = step.gradients(params, {}, data, jax.random.key(0), model=Logits())

    valid = data["image"][data["mask"], 0, 0]
    picked = data["label"][data["mask"]]

    def cross_entropy(logits):
        return -np.mean(jax.nn.log_softmax(logits)[np.arange(3), picked])

    main, aux = cross_entropy(valid), cross_entropy(2 * valid)
    np.testing.assert_allclose(means["cross_entropy"], main, rtol=1e-6)
    np.testing.assert_allclose(means["loss"], main + 0.3 * aux, rtol=1e-6)  # GoogLeNet's weight
    spoilt = {**data, "image": data["image"].copy()}
    spoilt["image"][1] = 100
    again, _, _ = step.gradients(params, {}, spoilt, jax.random.key(0), model=Logits())
    np.testing.assert_array_equal(grads["scale"], again["scale"])


def test_top5_counts_the_first_five_places():
    """The true class of row k has place k among seven logits; the last row is masked."""
    logits = np.tile(np.arange(7.0, 0, -1, np.float32), (8, 1))
    batch = {
        "image": logits[:, None, None],
        "label": np.array([0, 1, 2, 3, 4, 5, 6, 0]),
        "mask": np.arange(8) < 7,
    }
    sums = step.eval_step({"scale": jnp.float32(1)}, {}, batch, model=Logits())
    assert {name: int(sums[name]) for name in ("top1", "top5", "examples")} == {
        "top1": 1, "top5": 5, "examples": 7
    }  # fmt: skip


def test_without_a_mask_all_rows_count():
    net, data = model(dropout=0.4), batch()
    state = step.init_state(net, 0, (4, 4, 1))
    bare = {k: v for k, v in data.items() if k != "mask"}
    stats = layers.fresh_stats(state.batch_stats)

    def results(data):
        total = step.statistics_step(state.params, state.batch_stats, stats, data, 0, model=net)
        return train_step(state, data, HYPER, SEED, model=net), total

    # float32, another order of sums
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *map(results, (data, bare))
    )


def test_no_l2_is_l2_of_0():
    net, data = model(), batch()
    state = step.init_state(net, 0, (4, 4, 1))
    none, zero = (
        train_step(state, data, HYPER._replace(l2=l2), SEED, model=net) for l2 in (None, 0.0)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), none, zero)


def test_dropout_depends_on_step_and_key_only():
    net, data = model(dropout=0.5), batch()
    state = step.init_state(net, 0, (4, 4, 1))
    losses = [
        float(train_step(s, data, HYPER, k, model=net)[1]["loss"])
        for s, k in (
            (state, SEED),
            (state, SEED),
            (state._replace(step=jnp.int32(1)), SEED),
            (state, 4),
        )
    ]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_several_steps_in_one_dispatch_are_the_same_steps():
    net, data = model(), batch(n=20)
    indices = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [19, 0, 8, 2]], np.int32)
    state = one = step.init_state(net, 0, (4, 4, 1))
    images = jnp.asarray(step.as_words(data["image"]))
    many, metrics = train_steps(
        state,
        images,
        jnp.asarray(data["label"]),
        jnp.asarray(indices),
        HYPER,
        SEED,
        model=net,
        image_shape=(4, 4, 1),
    )
    for k, index in enumerate(indices):
        rows = {
            "image": data["image"][index],
            "label": data["label"][index],
            "mask": np.ones(4, bool),
        }
        one, alone = train_step(one, rows, HYPER, SEED, model=net)
        np.testing.assert_allclose(metrics["loss"][k], alone["loss"], rtol=1e-5)
    # three steps in another program: rounding of float32
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), many.params, one.params)


def test_images_are_kept_as_words_or_as_bytes():
    even = np.arange(2 * 4 * 5 * 1, dtype=np.uint8).reshape(2, 4, 5, 1)
    odd = np.arange(2 * 5 * 5 * 1, dtype=np.uint8).reshape(2, 5, 5, 1)
    assert step.as_words(even).dtype == np.uint32
    assert step.as_words(odd).dtype == np.uint8
    for images in (even, odd):
        rows = step.as_words(images)
        assert len(rows) == 2
        assert rows.tobytes() == images.tobytes()


def test_rank_of_the_label_breaks_ties_and_refuses_nan():
    logits = jnp.array([[0.0, 0.0, 0.0], [1.0, 3.0, 2.0], [jnp.nan, 1.0, 2.0], [2.0, 2.0, 9.0]])
    ranks = step.label_rank(logits, jnp.array([2, 2, 2, 1]))
    # A constant row is no hit; equal logits go to the lower class; a row with NaN is not among the
    # first five, of three classes either.
    np.testing.assert_array_equal(ranks, [2, 1, 5, 2])


def test_evaluation_sums_over_valid_rows():
    net, data = model(), batch(n=10)
    state = step.init_state(net, 0, (4, 4, 1))
    whole = eval_step(state.params, state.batch_stats, data, model=net)
    parts = []
    for rows in (slice(0, 6), slice(4, 10)):
        part = {k: v[rows].copy() for k, v in data.items()}
        if rows.start:
            part["mask"][:2] = False  # already counted
        parts.append(eval_step(state.params, state.batch_stats, part, model=net))
    assert int(whole["examples"]) == 10 == sum(int(p["examples"]) for p in parts)
    for name in ("top1", "top5"):
        assert int(whole[name]) == sum(int(p[name]) for p in parts)
    total = sum(float(p["cross_entropy"]) for p in parts)
    np.testing.assert_allclose(whole["cross_entropy"], total, rtol=1e-6)


def test_initial_weights_depend_on_the_seed():
    a, b, c = (step.init_state(model(), seed, (4, 4, 1)).params for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert np.any(a["classifier"]["kernel"] != c["classifier"]["kernel"])
