"""The optimizer against optax's own, and the decay against the paper's numbers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from bn_jax import optim
from bn_jax.errors import ConfigError
from bn_jax.experiment import build
from bn_jax.experiment.config import check, settled
from configs import bn_baseline, bn_x30

EPOCHS8 = 8 * 1_281_167


def hyper(decay_examples=EPOCHS8, rate=1.0):
    return optim.Hyper(np.float32(rate), np.float32(0.96), np.float32(decay_examples), 0.0, 0.9)


@pytest.mark.parametrize(
    ("examples", "steps", "factor"),
    [
        (EPOCHS8, 31_000_000, 0.0192),
        (EPOCHS8 / 6, 2_100_000, 0.2007),
        (EPOCHS8 / 6, 6_000_000, 0.0102),
    ],
)
def test_decay_factor_after_the_papers_steps(examples, steps, factor):
    got = optim.decayed_rate(hyper(examples), jnp.int32(steps), 32)
    assert abs(float(got) - factor) < 5e-5  # the factor is known to four decimals


def test_decay_is_optax_exponential_decay():
    schedule = optax.exponential_decay(0.045, EPOCHS8 / 6 / 32, 0.96)
    for step in (0, 1, 1000, 53_382, 10_000_000):
        got = optim.decayed_rate(hyper(EPOCHS8 / 6, 0.045), jnp.int32(step), 32)
        # float32 pow of an exponent of up to 187 steps of 4%: a few units in the 7th digit
        np.testing.assert_allclose(got, schedule(step), rtol=2e-5)


def test_first_step_uses_the_initial_rate():
    assert float(optim.decayed_rate(hyper(rate=0.045), jnp.int32(0), 32)) == np.float32(0.045)


EPOCH = 1_281_167


@pytest.mark.parametrize(
    ("scaling", "batch", "factor"),
    [
        ("none", 8192, 1),
        ("linear", 8192, 256),
        ("sqrt", 8192, 16),
        ("linear", 32, 1),
        ("sqrt", 64, 2**0.5),
    ],
)
def test_rate_factor(scaling, batch, factor):
    assert optim.rate_factor(scaling, batch, 32) == factor


def test_warm_up_goes_from_the_unscaled_rate_to_the_scaled_in_a_line():
    """Goyal et al. 2017: 0.1 for 256 examples, 3.2 for 8192 after 5 epochs."""
    batch, examples = 8192, 5 * EPOCH
    factor = optim.rate_factor("linear", batch, 256)
    numbers = hyper(rate=0.1 * factor)._replace(
        decay_rate=np.float32(1),
        warmup_from=np.float32(1 / factor),
        warmup_examples=np.float32(examples),
    )
    rate = jax.vmap(lambda step: optim.decayed_rate(numbers, step, batch))
    steps = np.array([0, 1, 100, 391, 781, 782, 783, 10_000, 10**8])
    line = 0.1 + (3.2 - 0.1) * np.minimum(1, steps * batch / examples)
    # a few operations in float32; exactly the scaled rate once it is reached
    np.testing.assert_allclose(rate(steps), line, rtol=1e-6)
    assert set(np.asarray(rate(steps[-3:]))) == {np.float32(0.1 * factor)}
    falling = numbers._replace(decay_rate=np.float32(0.96))
    got = jax.vmap(lambda step: optim.decayed_rate(falling, step, batch))(steps)
    decay = 0.96 ** (steps * batch / EPOCHS8)
    np.testing.assert_allclose(got[:-1], (line * decay)[:-1], rtol=2e-5)  # as for optax's below


def test_without_warm_up_the_rate_has_the_bits_of_the_plain_decay():
    numbers, steps = hyper(EPOCHS8 / 6, 0.045), jnp.arange(0, 6_000_000, 9973)
    plain = jax.jit(lambda k: jnp.power(0.96, k.astype(jnp.float32) * 32 / (EPOCHS8 / 6)) * 0.045)
    got = jax.jit(lambda n, k: optim.decayed_rate(n, k, 32))(numbers, steps)
    np.testing.assert_allclose(got, plain(steps), rtol=2e-5)
    without = jax.jit(lambda n, k: jnp.power(n.decay_rate, k.astype(jnp.float32) * 32
                      / n.decay_examples) * n.learning_rate)  # fmt: skip
    np.testing.assert_array_equal(got, without(numbers, steps))


def pod(devices, **changes):
    config = bn_x30.get_config("pod")
    config.update(changes)
    return build.for_devices(config, devices)


@pytest.mark.parametrize("devices", [8, 64])
def test_scale_pod_scales_by_the_devices_that_it_finds(devices):
    config = pod(devices, learning_rate_scaling="linear", warmup_examples=5.0 * EPOCH)
    check(config)
    got = optim.Hyper.from_config(config)
    assert (config.batch_size, config.bn.group_size) == (32 * devices, 32)
    assert got.learning_rate == np.float32(0.045 * devices)
    assert got.learning_rate * got.warmup_from == pytest.approx(0.045)
    assert got.warmup_examples == np.float32(5 * EPOCH)  # examples, not steps
    # Written into run.json and read again (a resume) it is the same: nothing is scaled twice.
    again = build.for_devices(ConfigDict(json.loads(config.to_json())).lock(), devices)
    assert optim.Hyper.from_config(again) == got
    plain = optim.Hyper.from_config(pod(devices))
    assert plain.learning_rate == np.float32(0.045) and plain.warmup_from == 1


def test_the_documented_sums_of_rates():
    """The table of docs/experiments.md, from the configs; every sum by a plain sum over steps."""
    text = (pathlib.Path(__file__).parent.parent / "docs" / "experiments.md").read_text()
    roots = {"bn_baseline": bn_baseline, "bn_x30": bn_x30}
    for devices in (1, 8, 64, 256, 512):
        cells = [f"{devices}", f"{32 * devices:,}"]
        for root in roots.values():
            for rule in ("none", "sqrt", "linear"):
                config = root.get_config("pod")
                config.learning_rate_scaling = rule
                numbers = optim.Hyper.from_config(
                    settled(build.for_devices(config, devices), EPOCH)
                )
                steps = round(root.get_config("pod").total_steps / devices)
                # A geometric series.
                factor = 0.96 ** (32 * devices / np.float64(numbers.decay_examples))
                total = float(numbers.learning_rate) * (1 - factor**steps) / (1 - factor)
                cells.append(f"{numbers.learning_rate:.3g} / {total:,.0f}")
        row = "| " + " | ".join(cells) + " |"
        assert row in text.replace(" (refused)", ""), row


def test_linear_scaling_ends_where_it_is_known_to_work():
    check(pod(256, learning_rate_scaling="linear"))
    check(pod(512, learning_rate_scaling="sqrt"))
    with pytest.raises(ConfigError, match=r"16,384 would have the rate 23.*LARS.*set it to sqrt"):
        check(pod(512, learning_rate_scaling="linear"))


def test_momentum_step_is_optax_sgd():
    key = jax.random.key(0)
    params = {"a": jax.random.normal(key, (3, 2)), "b": jnp.ones(4)}
    theirs = optax.sgd(0.1, momentum=0.9)
    velocity, reference = optim.init_velocity(params), theirs.init(params)
    p, q = params, params
    for k in range(5):
        grads = jax.tree.map(lambda x, k=k: jnp.sin(x + k), params)
        p, velocity = optim.momentum_step(grads, velocity, p, learning_rate=0.1, momentum=0.9)
        updates, reference = theirs.update(grads, reference, q)
        q = optax.apply_updates(q, updates)
    # the same operations in the same order: not a bit apart but for a fused multiply-add
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), p, q)
    assert jax.tree.structure(velocity) == jax.tree.structure(reference[0])


def test_l2_counts_kernels_only():
    params = {
        "conv": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 7.0)},
        "bn": {"scale": jnp.full(3, 5.0), "bias": jnp.ones(3)},
    }
    assert float(optim.l2_penalty(params)) == 0.5 * 6 * 4
    grad = jax.grad(optim.l2_penalty)(params)
    assert np.all(grad["conv"]["kernel"] == 2.0) and not np.any(grad["bn"]["scale"])
