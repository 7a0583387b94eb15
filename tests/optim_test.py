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
from configs import bn_baseline, bn_x5, bn_x30

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


def pod(devices, root=bn_x30, **changes):
    config = root.get_config("pod")
    config.update(changes)
    return build.for_devices(config, devices)


UNSCALED = {"learning_rate_scaling": "none", "warmup_examples": 0.0}


@pytest.mark.parametrize("devices", [8, 64])
def test_scale_pod_scales_by_the_devices_that_it_finds(devices):
    config = pod(devices)
    check(config)
    got = optim.Hyper.from_config(config)
    assert (config.batch_size, config.bn.group_size) == (32 * devices, 32)
    assert got.learning_rate == np.float32(0.045 * devices)
    assert got.learning_rate * got.warmup_from == pytest.approx(0.045)
    assert got.warmup_examples == np.float32(5 * EPOCH)  # examples, not steps
    # Written into run.json and read again (a resume) it is the same: nothing is scaled twice.
    again = build.for_devices(ConfigDict(json.loads(config.to_json())).lock(), devices)
    assert optim.Hyper.from_config(again) == got


def test_scale_pod_can_have_the_papers_rate():
    config = pod(64, **UNSCALED)
    check(config)
    numbers = optim.Hyper.from_config(config)
    assert numbers.learning_rate == np.float32(0.045)
    assert numbers.warmup_from == 1


def test_one_device_has_the_papers_rate_at_every_step():
    numbers = optim.Hyper.from_config(settled(pod(1), EPOCH))
    plain = optim.Hyper.from_config(settled(bn_x30.get_config("imagenet"), EPOCH))
    for step in (0, 1, 1000, 200_180, 1_000_000):
        rates = [optim.decayed_rate(n, jnp.int32(step), 32) for n in (numbers, plain)]
        assert rates[0] == rates[1]


def sum_of_rates(numbers: optim.Hyper, steps: int, batch: int) -> float:
    """Sums the rates of a run's steps in float64, a million steps at a time."""
    total = 0.0
    for first in range(0, steps, 10**6):
        examples = batch * np.arange(first, min(first + 10**6, steps), dtype=np.float64)
        rates = numbers.learning_rate * 0.96 ** (examples / np.float64(numbers.decay_examples))
        if numbers.warmup_examples:
            warmed = np.minimum(1, examples / np.float64(numbers.warmup_examples))
            rates *= numbers.warmup_from + (1 - numbers.warmup_from) * warmed
        total += float(rates.sum())
    return total


def test_the_sum_of_rates_is_that_of_the_schedule():
    """The sum below is that of the rates that steps use, in the warm-up (3,128 steps) and after."""
    numbers = optim.Hyper.from_config(settled(pod(64), EPOCH))
    rates = jax.vmap(lambda step: optim.decayed_rate(numbers, step, 2048))(jnp.arange(6000))
    for steps in (1000, 6000):
        total = np.asarray(rates[:steps], np.float64).sum()
        # as for optax's above
        np.testing.assert_allclose(sum_of_rates(numbers, steps, 2048), total, rtol=2e-5)


@pytest.mark.parametrize("devices", [1, 8, 64, 128, 256, 512])
def test_the_documented_sums_of_rates(devices):
    """A row of the table of docs/experiments.md, from the configs."""
    text = (pathlib.Path(__file__).parent.parent / "docs" / "experiments.md").read_text()
    batch = 32 * devices
    cells = [f"{devices}", f"{batch:,}"]
    for root in (bn_baseline, bn_x30):
        steps = round(root.get_config("imagenet").total_steps / devices)
        for changes in (UNSCALED, {"learning_rate_scaling": "sqrt"}, {}):
            numbers = optim.Hyper.from_config(settled(pod(devices, root, **changes), EPOCH))
            total = sum_of_rates(numbers, steps, batch)
            cells.append(f"{numbers.learning_rate:.3g} / {total:,.0f}")
    row = "| " + " | ".join(cells)
    row += " (refused) |" if devices == 512 else " |"
    assert row in text


@pytest.mark.parametrize("root", [bn_baseline, bn_x5, bn_x30])
@pytest.mark.parametrize("devices", [8, 64, 128, 256])
def test_scale_pod_trains_on_up_to_256_devices_as_it_is(root, devices):
    check(pod(devices, root))


def test_linear_scaling_ends_where_it_is_known_to_work():
    """On 512 devices; what the error tells to do is accepted."""
    check(pod(512, bn_baseline))
    with pytest.raises(ConfigError, match=r"16,384 would have the rate 3.84, and above 8,192"):
        check(pod(512, bn_x5))
    with pytest.raises(ConfigError, match=r"the rate 23,.*LARS") as refused:
        check(pod(512))
    remedy = "set it to sqrt, or to none with warmup_examples=0 and a learning_rate of your choice"
    assert remedy in str(refused.value)
    check(pod(512, learning_rate_scaling="sqrt"))
    check(pod(512, learning_rate=1.5, **UNSCALED))
    with pytest.raises(ConfigError, match="set warmup_examples=0"):
        check(pod(512, learning_rate_scaling="none"))


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
