"""Inception: wiring, variants, options, small enough to run (28 px, width 1/16)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax import models
from bn_jax.experiment.config import settled
from bn_jax.layers import BatchNorm, ConvBN
from bn_jax.models import inception
from bn_jax.models.inception import Inception
from bn_jax.models.initializers import Gaussian
from configs import bn_x30, ensemble_1, ensemble_4
from configs import inception as plain

KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
SMALL = {"num_classes": 5, "width": 1 / 16}


def images(n=4, size=28, channels=3):
    shape = (n, size, size, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def abstract(model, x):
    return jax.eval_shape(lambda x: model.init(KEYS, x, train=True), x)


@functools.cache
def initialized(**options):
    model = Inception(**SMALL, **options)
    return model, jax.jit(lambda x: model.init(KEYS, x, train=True))(images())


def test_module_paths():
    params = abstract(Inception(**SMALL, norm=BatchNorm), images())["params"]
    stem = {"conv1_7x7_depthwise", "conv1_7x7", "conv2_3x3_reduce", "conv2_3x3"}
    blocks = {f"inception_{row.name}" for row in inception.TABLE}
    assert params.keys() == stem | blocks | {"classifier"}
    reduce = {"conv_3x3_reduce", "conv_3x3", "double_3x3_reduce", "double_3x3_1", "double_3x3_2"}
    for row in inception.TABLE:
        extra = set() if row.stride == 2 else {"conv_1x1", "pool_proj"}
        assert params[f"inception_{row.name}"].keys() == reduce | extra
    assert params["inception_3a"]["conv_3x3_reduce"]["conv"].keys() == {"kernel"}
    assert params["inception_3a"]["conv_3x3_reduce"]["bn"].keys() == {"scale", "bias"}
    without = abstract(Inception(**SMALL), images())
    assert without.keys() == {"params"}
    assert without["params"]["inception_5b"]["pool_proj"]["conv"].keys() == {"kernel", "bias"}


def test_block_is_the_four_branches_of_fig_5():
    """One module against the same convolutions written out with lax."""
    row = inception.Fig5Row("x", 2, 3, 4, 5, 6, "avg", 7)
    conv = functools.partial(ConvBN, norm=None, activation=nn.relu, dtype=jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6, 3)), jnp.float32)
    for symmetric in (False, True):
        block = inception.Block(row, conv, 1.0, symmetric)
        variables = block.init(jax.random.key(0), x, train=False)

        def layer(name, x, params=variables["params"]):
            leaf = params[name]["conv"]
            y = jax.lax.conv_general_dilated(
                x, leaf["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jax.nn.relu(y + leaf["bias"])

        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        inside = np.pad(np.ones((1, 5, 6, 1)), ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = [
            (slice(None), slice(i, i + 5), slice(j, j + 6)) for i in range(3) for j in range(3)
        ]
        average = sum(padded[w] for w in windows)
        average /= 9 if symmetric else sum(inside[w] for w in windows)
        want = [
            layer("conv_1x1", x),
            layer("conv_3x3", layer("conv_3x3_reduce", x)),
            layer("double_3x3_2", layer("double_3x3_1", layer("double_3x3_reduce", x))),
            layer("pool_proj", jnp.float32(average)),
        ]
        got = block.apply(variables, x, train=False)
        np.testing.assert_allclose(got, jnp.concatenate(want, -1), atol=1e-5)  # float32 sums


def test_strides_and_padding():
    """Caffe pads as much before as after; XLA's SAME starts later by one at stride 2."""
    row = inception.Fig5Row("x", 0, 1, 1, 1, 1, "max", 0, 2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 2)), jnp.float32)
    outputs = []
    for symmetric in (False, True):
        conv = functools.partial(
            ConvBN,
            norm=None,
            activation=lambda x: x,
            kernel_init=nn.initializers.ones,
        )
        block = inception.Block(row, conv, 1.0, symmetric)
        outputs.append(np.asarray(block.init_with_output(KEYS, x, train=False)[0]))
        assert outputs[-1].shape == (1, 4, 4, 1 + 1 + 2)
    total = np.pad(np.asarray(x).sum(-1)[0], 1)
    same = total[1:4, 1:4].sum(), total[0:3, 0:3].sum()  # the window of the first output
    np.testing.assert_allclose([o[0, 0, 0, 0] for o in outputs], same, rtol=1e-5)
    np.testing.assert_array_equal(outputs[0][..., 2:], outputs[1][..., 2:])  # pass-through
    np.testing.assert_array_equal(outputs[0][0, 0, 0, 2:], np.asarray(x)[0, :3, :3].max((0, 1)))


def test_pixels_by_variant():
    grey, colour = images(2, channels=1), images(2)
    wanted = {"paper": (colour - 127.5) / 127.5, "caffe": colour - [128.0, 117, 104]}
    for variant, want in wanted.items():
        got = Inception(**SMALL, variant=variant)._pixels(jnp.asarray(colour))
        np.testing.assert_allclose(got, want, atol=1e-5)
    got = Inception(**SMALL)._pixels(jnp.asarray(grey))
    assert got.shape == grey.shape
    assert float(jnp.abs(got).max()) <= 1


def test_uint8_and_float_images_are_the_same():
    model, variables = initialized()
    apply = jax.jit(lambda x: model.apply(variables, x, train=False))
    logits = apply(images())
    assert logits.shape == (4, 5)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, apply(images().astype(np.float32)))


def test_lrn_sits_after_pool1_and_after_the_second_convolution(monkeypatch):
    shapes = []

    class Spy(nn.Module):
        def __call__(self, x):
            shapes.append(x.shape)
            return x

    monkeypatch.setattr(inception, "LocalResponseNorm", Spy)
    for lrn in (True, False):
        abstract(Inception(num_classes=5, lrn=lrn), images(1, 224))
    assert shapes == [(1, 56, 56, 64), (1, 56, 56, 192)]


def test_dropout_is_before_the_classifier_and_in_training_only():
    model = Inception(**SMALL, dropout=0.4)
    dropped = []

    def spy(following, arguments, keywords, context):
        out = following(*arguments, **keywords)
        if isinstance(context.module, nn.Dropout):
            dropped.append((arguments[0].shape, context.module.deterministic))
        return out

    variables = abstract(model, images())
    for train in (True, False):
        with nn.intercept_methods(spy):
            jax.eval_shape(
                lambda v, train=train: model.apply(v, images(), train=train, rngs=KEYS), variables
            )
    assert dropped == [((4, 64), False), ((4, 64), True)]


def test_auxiliary_heads_exist_in_training_only():
    model = Inception(**SMALL, aux=True)
    variables = abstract(model, images())
    assert {"aux_4a", "aux_4d"} <= variables["params"].keys()

    def run(train):
        return jax.eval_shape(lambda v: model.apply(v, images(), train=train, rngs=KEYS), variables)

    logits, heads = run(True)
    assert logits.shape == (4, 5)
    assert [head.shape for head in heads] == [(4, 5)] * 2
    assert run(False).shape == (4, 5)


def test_auxiliary_heads_drop_70_percent_and_the_network_its_own_share():
    """GoogLeNet, section 5."""
    model = Inception(**SMALL, aux=True, dropout=0.4)
    rates = []

    def spy(following, arguments, keywords, context):
        if isinstance(context.module, nn.Dropout):
            rates.append(context.module.rate)
        return following(*arguments, **keywords)

    with nn.intercept_methods(spy):
        abstract(model, images())
    assert rates == [0.7, 0.7, 0.4]


@pytest.mark.parametrize(("size", "side"), [(28, 7), (63, 16), (64, 8), (224, 28)])
def test_the_second_pool_is_there_from_64_pixels_on(size, side):
    shapes = []

    def spy(following, arguments, keywords, context):
        if isinstance(context.module, inception.Block):
            shapes.append(arguments[0].shape[1:3])
        return following(*arguments, **keywords)

    with nn.intercept_methods(spy):
        abstract(Inception(**SMALL), images(1, size))
    assert shapes[0] == (side, side)  # what inception_3a gets


def test_per_activation_bn_of_an_ensemble_member():
    """4.2.3: one scale and offset per activation, [H, W, C], in the modules the config names."""
    params = abstract(models.build(ensemble_4.get_config("digits"), 10), images(1, channels=1))
    params = params["params"]
    assert params["inception_5b"]["conv_1x1"]["bn"]["scale"].shape == (2, 2, 44)
    assert params["inception_5b"]["double_3x3_2"]["bn"]["bias"].shape == (2, 2, 28)
    assert params["inception_5a"]["conv_1x1"]["bn"]["scale"].shape == (44,)


def test_init_scale_multiplies_the_convolutions_only():
    def kernels(config):
        model = models.build(config, 10)
        return jax.jit(lambda: model.init(KEYS, images(1, channels=1), train=True)["params"])()

    base, larger = kernels(bn_x30.get_config("digits")), kernels(ensemble_1.get_config("digits"))
    for name in ("conv1_7x7", "conv2_3x3"):
        a, b = base[name]["conv"]["kernel"], larger[name]["conv"]["kernel"]
        np.testing.assert_allclose(b, 1.5 * a, rtol=1e-6)
    np.testing.assert_array_equal(base["classifier"]["kernel"], larger["classifier"]["kernel"])
    kernel = base["inception_5b"]["conv_3x3"]["conv"]["kernel"]
    want = (4 / (9 * (24 + kernel.shape[-1]))) ** 0.5  # sqrt(2) times Glorot's
    assert abs(float(jnp.std(kernel)) - want) < 5 * want / (2 * kernel.size) ** 0.5


@pytest.mark.parametrize(
    ("init", "activation", "rule"),
    [
        ("auto", "relu", "glorot_relu"),
        ("auto", "sigmoid", "glorot"),
        ("he", "sigmoid", "he"),
        ("glorot", "relu", "glorot"),
    ],
)
def test_initial_weights_by_the_nonlinearity(init, activation, rule):
    config = plain.get_config("digits")
    config.model.init = init
    config.activation = activation
    assert models.build(config, 10).kernel_init.rule == rule
    assert settled(config, 4000).model.init == rule


def test_the_factor_for_relu_lets_a_signal_reach_the_last_module_and_glorot_alone_does_not():
    """Standard deviation of the input of a nonlinearity in 5b, without BN: why the rule matters."""

    def deviation(rule):
        model = Inception(**SMALL, kernel_init=Gaussian(rule=rule))

        def inputs():
            x = jax.random.uniform(jax.random.key(1), (8, 28, 28, 3), maxval=255)
            variables = model.init(KEYS, x, train=False)
            _, sown = model.apply(variables, x, train=False, mutable=["activations"])
            return sown["activations"]["inception_5b"]["conv_1x1"]["input"][0]

        return float(jnp.std(jax.jit(inputs)()))

    assert deviation("he") > 0.1 and deviation("glorot_relu") > 0.1
    assert deviation("glorot") < 0.02


def test_auxiliary_heads_follow_the_rule_but_not_the_scale():
    config = ensemble_1.get_config("digits")
    config.model.aux = True
    params = jax.jit(
        lambda: models.build(config, 10).init(KEYS, images(1, channels=1), train=True)["params"]
    )()
    kernel = params["aux_4a"]["dense"]["kernel"]
    want = (4 / sum(kernel.shape)) ** 0.5
    assert abs(float(jnp.std(kernel)) - want) < 5 * want / (2 * kernel.size) ** 0.5


def test_build_takes_every_field_of_the_config():
    config = bn_x30.get_config("digits")
    config.update_from_flattened_dict(
        {
            "activation": "sigmoid",
            "dropout": 0.25,
            "lrn": True,
            "dtype": "bfloat16",
            "model.aux": True,
            "model.variant": "slim",
            "bn.group_size": 16,
            "bn.epsilon": 0.5,
            "bn.momentum": 0.75,
        }
    )
    model = models.build(config, 7)
    assert (model.num_classes, model.width, model.variant) == (7, 0.125, "slim")
    assert (model.dropout, model.lrn, model.aux) == (0.25, True, True)
    assert model.dtype == jnp.bfloat16
    assert model.activation is nn.sigmoid
    norm = model.norm()
    assert (norm.group_size, norm.epsilon, norm.momentum) == (16, 0.5, 0.75)
    assert models.build(plain.get_config("digits"), 10).norm is None


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_statistics():
    model = Inception(
        **SMALL, norm=functools.partial(BatchNorm, dtype=jnp.bfloat16), dtype=jnp.bfloat16
    )
    variables = abstract(model, images())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, updates = jax.eval_shape(
        lambda v: model.apply(
            v, images(), train=True, mutable=["batch_stats", "activations"], rngs=KEYS
        ),
        variables,
    )
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(updates["activations"])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(updates["batch_stats"])} == {jnp.dtype("float32")}


@pytest.mark.parametrize("size", [28, 32, 63, 64, 65, 100])
def test_odd_sizes_have_a_last_map(size):
    model = Inception(**SMALL, norm=BatchNorm)
    logits = jax.eval_shape(
        lambda x: model.init_with_output(KEYS, x, train=True)[0], images(1, size)
    )
    assert logits.shape == (1, 5)
