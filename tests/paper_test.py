"""The published numbers: rates, schedules, the shape of every module, parameters, cost.

Shapes come from `jax.eval_shape`: nothing is compiled. Sources are sections of arXiv 1502.03167v3.
"""

import functools
import importlib
import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from bn_jax import models, optim
from bn_jax.experiment.config import settled
from bn_jax.layers import BatchNorm
from bn_jax.models import inception
from bn_jax.models.inception import Inception

INCEPTION = {"learning_rate": 0.0015, "dropout": 0.4, "l2": 0.001, "decay": 1, "lrn": True}
MODIFIED = {"dropout": 0.0, "l2": 0.0002, "decay": 6, "lrn": False, "shuffle": "within_shard"}
# 4.2.2 and the list of 4.2.1; L2's absolute values are the brief's, the factor of 5 is the paper's
NETWORKS = {
    "inception": {**INCEPTION, "norm": "none", "shuffle": "none", "activation": "relu"},
    "bn_baseline": {**INCEPTION, "norm": "batch_norm", "shuffle": "none", "activation": "relu"},
    "bn_x5": {**MODIFIED, "learning_rate": 0.0075, "activation": "relu"},
    "bn_x30": {**MODIFIED, "learning_rate": 0.045, "activation": "relu"},
    "bn_x5_sigmoid": {**MODIFIED, "learning_rate": 0.0075, "activation": "sigmoid"},
}


def load(name, *scale):
    return importlib.import_module(f"configs.{name}").get_config(*scale)


@pytest.mark.parametrize("scale", ["imagenet", "digits", "mnist", "tiny40", "folder", "synthetic"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_five_networks(name, scale):
    config, facts = load(name, scale), dict(NETWORKS[name])
    assert config.batch_size == config.bn.group_size == 32
    assert config.momentum == 0.9
    assert config.decay_rate == 0.96
    assert config.decay_epochs == pytest.approx(8 / facts.pop("decay"), rel=1e-12)
    assert config.data.shuffle == facts.pop("shuffle")
    assert {key: config[key] for key in facts} == facts
    assert config.norm == ("none" if name == "inception" else "batch_norm")
    modified = name not in ("inception", "bn_baseline")
    assert (config.data.distortion < 1) == modified


def test_rates_are_the_multiples_that_name_the_networks():
    base = load("inception").learning_rate
    assert load("bn_x5").learning_rate == pytest.approx(5 * base, rel=1e-12)
    assert load("bn_x30").learning_rate == pytest.approx(30 * base, rel=1e-12)
    assert load("bn_x5").l2 == pytest.approx(load("inception").l2 / 5, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "steps", "factor"),
    [
        ("inception", 320_292, 0.96),
        ("bn_x5", 53_382, 0.96),
        ("inception", 31_000_000, 0.0192),
        ("bn_x30", 2_100_000, 0.2007),
        ("bn_x30", 6_000_000, 0.0102),
    ],
)
def test_decay(name, steps, factor):
    """x0.96 every 8 epochs, 6 times faster in the modified networks; check values of the factor."""
    config = settled(load(name), 1_281_167)
    hyper = optim.Hyper(1.0, config.decay_rate, config.decay_examples, config.l2, config.momentum)
    got = float(optim.decayed_rate(hyper, jnp.int32(steps), config.batch_size))
    # The table has 4 digits; 0.96 is checked at a whole number of steps.
    assert got == pytest.approx(factor, abs=5e-5 if factor != 0.96 else 1e-6)


def test_mnist_experiment():
    """4.1: binary 28x28 input, three hidden layers of 100 sigmoid units, 50,000 steps of 60."""
    for name in ("mnist", "mnist_bn"):
        config = load(name)
        assert config.total_steps == 50_000
        assert config.batch_size == config.bn.group_size == 60
        assert config.model.widths == (100, 100, 100)
        assert (config.activation, config.image_size) == ("sigmoid", 28)
        sizes = sizes_of(models.build(config, 10), 28, 1)
        dense = [784 * 100, 100 * 100, 100 * 100]
        extra = 200 if name == "mnist_bn" else 100  # scale and offset, or a bias
        for i, weights in enumerate(dense):
            assert sizes[f"dense_{i}"] == weights + extra
        assert sizes["classifier"] == 100 * 10 + 10


@functools.cache
def variables(model, size, channels):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.uint8)
    return jax.eval_shape(lambda x: model.init(keys, x, train=True), images)


def sizes_of(model, size=224, channels=3):
    """Number of parameters by top-level module."""
    params = variables(model, size, channels)["params"]
    return {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}


def map_shapes(model, size):
    """Shape [H, W, features] of every nonlinearity's input, by path."""
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8)
    _, sown = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False, mutable=["activations"]),
        variables(model, size, 3),
        images,
    )
    flat = traverse_util.flatten_dict(sown["activations"], sep="/")
    return {
        path.removesuffix("/input"): x[0].shape[1:] for path, x in flat.items() if "/input" in path
    }


@pytest.fixture(autouse=True)
def slim_with_a_plain_stem(monkeypatch):
    plain = inception.VARIANTS["slim"]._replace(separable_stem=False)
    monkeypatch.setitem(inception.VARIANTS, "slim_plain", plain)


def network(**options):
    return Inception(1000, norm=options.pop("norm", BatchNorm), **options)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"variant": "caffe"}, 11_285_224),  # 608 channels, plain 7x7
        ({"variant": "paper"}, 11_278_528),  # 608, separable
        ({"variant": "slim_plain"}, 11_194_984),  # 576, plain
        ({"variant": "slim"}, 11_188_288),  # 576, separable
    ],
)
def test_parameters(options, parameters):
    """Of the four readings of Fig. 5; the paper's 13.6e6 fits none of them."""
    total = sum(sizes_of(network(**options)).values())
    assert total == parameters
    assert abs(total - 13.6e6) > 2e6


def test_auxiliary_heads():
    """GoogLeNet's: 3,197,032 parameters each where the input has 576 channels; none by default."""
    sizes = sizes_of(network(variant="slim", aux=True))
    assert sizes["aux_4a"] == sizes["aux_4d"] == 3_197_032
    sizes = sizes_of(network(variant="paper", aux=True))
    assert sizes["aux_4a"] == 3_197_032
    assert sizes["aux_4d"] == 3_197_032 + 32 * 128  # 4d has 608 channels
    assert not load("inception").model.aux


# Fig. 5: filters of 1x1, 3x3 reduce, 3x3, double 3x3 reduce, double 3x3, pool projection; map size
FIG_5 = {
    "3a": ((64, 64, 64, 64, 96, 32), 28),
    "3b": ((64, 64, 96, 64, 96, 64), 28),
    "3c": ((None, 128, 160, 64, 96, None), 14),
    "4a": ((224, 64, 96, 96, 128, 128), 14),
    "4b": ((192, 96, 128, 96, 128, 128), 14),
    "4c": ((160, 128, 160, 128, 160, 128), 14),
    "4d": ((96, 128, 192, 160, 192, 128), 14),
    "4e": ((None, 128, 192, 192, 256, None), 7),
    "5a": ((352, 192, 320, 160, 224, 128), 7),
    "5b": ((352, 192, 320, 192, 224, 128), 7),
}
OUTPUTS = {"3a": 256, "3b": 320, "3c": 576, "4a": 576, "4b": 576, "5a": 1024, "5b": 1024}
OUTPUTS_608 = OUTPUTS | {"4c": 608, "4d": 608, "4e": 1056}
OUTPUTS_576 = OUTPUTS | {"4c": 576, "4d": 576, "4e": 1024}
BRANCHES = (
    "conv_1x1",
    "conv_3x3_reduce",
    "conv_3x3",
    "double_3x3_reduce",
    "double_3x3_2",
    "pool_proj",
)


def test_every_module_of_fig_5():
    seen = map_shapes(network(), 224)
    for name, (filters, size) in FIG_5.items():
        before = 2 * size if name in ("3c", "4e") else size  # the reductions precede the stride
        for branch, features in zip(BRANCHES, filters, strict=True):
            shape = seen.get(f"inception_{name}/{branch}")
            side = before if branch.endswith("reduce") else size
            assert shape == (None if features is None else (side, side, features)), (name, branch)
        assert seen[f"inception_{name}/double_3x3_1"] == (before, before, filters[4])
    assert seen["conv1_7x7"] == (112, 112, 64)
    assert seen["conv2_3x3_reduce"] == (56, 56, 64)
    assert seen["conv2_3x3"] == (56, 56, 192)
    assert len(seen) == 69  # convolutions


@pytest.mark.parametrize(("variant", "outputs"), [("paper", OUTPUTS_608), ("slim", OUTPUTS_576)])
def test_outputs_of_modules(variant, outputs):
    """By the inputs of the next module's first convolution; 4c and 4d print 576, sum to 608."""
    params = variables(network(variant=variant), 224, 3)["params"]
    names = [f"inception_{row}" for row in FIG_5]
    for name, following in itertools.pairwise(names):
        inputs = params[following]["conv_3x3_reduce"]["conv"]["kernel"].shape[2]
        assert inputs == outputs[name.removeprefix("inception_")]
    assert params["classifier"]["kernel"].shape == (1024, 1000)
    assert params["inception_3a"]["conv_3x3_reduce"]["conv"]["kernel"].shape[2] == 192


@pytest.mark.parametrize(
    ("options", "gmac"),
    [
        ({"variant": "caffe"}, 2.03),
        ({"variant": "slim_plain"}, 2.02),
        ({"variant": "paper"}, 1.95),  # the separable stem saves 0.084
    ],
)
def test_forward_cost_of_an_image(options, gmac):
    """Multiplications of a 224 px image, in units of 1e9: 2.02 to 2.03 with the plain stem."""
    model = network(**options)
    params = traverse_util.flatten_dict(variables(model, 224, 3)["params"], sep="/")
    maps = map_shapes(model, 224) | {"conv1_7x7_depthwise": (112, 112, 24), "classifier": (1, 1)}
    cost = 0
    for path, leaf in params.items():
        if path.endswith("/kernel"):
            height, width = maps[path.removesuffix("/kernel").removesuffix("/conv")][:2]
            cost += height * width * math.prod(leaf.shape)
    assert round(cost / 1e9, 2) == gmac


def test_maps_of_digits():
    """At 28 px the second stem pool is dropped: stage 3 at 7x7, 4 at 4x4, 5 at 2x2."""
    seen = map_shapes(network(width=0.125), 28)
    assert seen["conv2_3x3"] == (7, 7, 24)
    for name, side in (("3a", 7), ("4a", 4), ("5b", 2)):
        assert seen[f"inception_{name}/conv_1x1"][:2] == (side, side)
    assert len(seen) == 69
    assert map_shapes(network(width=0.125), 64)["inception_3a/conv_1x1"][:2] == (8, 8)
