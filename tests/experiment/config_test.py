"""A table of configs that cannot be trained, each refused with field, value and remedy."""

import importlib
import math
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from bn_jax.errors import ConfigError
from bn_jax.experiment.config import OPTIONAL, check, fields, read

# config:scale, the wrong values, what the one line must say
WRONG = [
    ("bn_x30:digits", {"learning_rate": -0.1}, "learning_rate=-0.1: must be in (0, inf)"),
    ("bn_x30:digits", {"learning_rate": 0.0}, "learning_rate=0.0"),
    ("bn_x30:digits", {"learning_rate": math.nan}, "learning_rate=nan"),
    ("bn_x30:digits", {"learning_rate": math.inf}, "learning_rate=inf"),
    ("bn_x30:digits", {"momentum": 1.0}, "momentum=1.0: must be in [0, 1)"),
    ("bn_x30:digits", {"momentum": -0.9}, "momentum=-0.9"),
    ("bn_x30:digits", {"momentum": math.nan}, "momentum=nan"),
    ("bn_x30:digits", {"decay_rate": 0.0}, "decay_rate=0.0: must be in (0, 1]"),
    ("bn_x30:digits", {"decay_rate": 1.01}, "decay_rate=1.01"),
    ("bn_x30:digits", {"decay_epochs": 0.0}, "decay_epochs=0.0: decay_examples=0, and one of the"),
    ("bn_x30:digits", {"decay_epochs": -8.0}, "decay_epochs=-8.0: must be in [0, inf)"),
    ("bn_x30:digits", {"decay_examples": 1e6}, "set decay_epochs=8 and decay_examples=0"),
    ("bn_x30:digits", {"decay_examples": math.inf}, "decay_examples=inf: must be in [0, inf)"),
    ("bn_x30:digits", {"learning_rate_scaling": "log"}, "choose from none, linear, sqrt"),
    (
        "bn_x30:digits",
        {"learning_rate_scaling": "linear", "bn.group_size": None},
        "learning_rate_scaling='linear': bn.group_size=None",
    ),
    (
        "bn_x30:digits",
        {"warmup_examples": 1e6},
        "warmup_examples=1000000.0: warms up from the unscaled",
    ),
    (
        "bn_x30:pod",
        {"learning_rate_scaling": "sqrt", "warmup_examples": -1.0},
        "warmup_examples=-1.0: must be in [0, inf)",
    ),
    ("bn_x30:digits", {"l2": -1e-4}, "l2=-0.0001: must be in [0, inf)"),
    ("bn_x30:digits", {"l2": math.nan}, "l2=nan"),
    ("bn_x30:digits", {"batch_size": 0}, "batch_size=0: must be a whole number from 1"),
    ("bn_x30:digits", {"batch_size": -32}, "batch_size=-32"),
    ("bn_x30:digits", {"batch_size": 48}, "batch_size=48: not divisible by bn.group_size=32"),
    ("bn_x30:digits", {"batch_size": 16}, "use a multiple, such as 32"),
    ("bn_x30:pod", {"batch_per_device": -1}, "batch_per_device=-1"),
    ("bn_x30:digits", {"total_steps": 0}, "total_steps=0: must be a whole number from 1"),
    ("bn_x30:digits", {"total_steps": 2**31}, "total_steps=2147483648"),
    ("bn_x30:digits", {"seed": -1}, "seed=-1"),
    ("bn_x30:digits", {"seed": 2**31}, "seed=2147483648"),
    ("mnist:digits", {"steps_per_dispatch": 0}, "steps_per_dispatch=0"),
    ("bn_x30:digits", {"activation": "gelu"}, "activation='gelu': unknown; choose from relu"),
    ("bn_x30:digits", {"norm": "layer_norm"}, "norm='layer_norm': unknown"),
    ("bn_x30:digits", {"dtype": "float16"}, "dtype='float16': unknown"),
    ("bn_x30:digits", {"precision": "tf32"}, "choose from default, high, highest"),
    ("bn_x30:digits", {"dropout": 1.0}, "dropout=1.0: must be in [0, 1)"),
    ("bn_x30:digits", {"dropout": -0.1}, "dropout=-0.1"),
    ("bn_x30:digits", {"image_size": 8}, "image_size=8: must be a whole number from 16 to 4096"),
    ("bn_x30:digits", {"image_size": 100_000}, "image_size=100000"),
    ("mnist:digits", {"image_size": 0}, "image_size=0"),
    ("bn_x30:digits", {"model.name": "resnet"}, "model.name='resnet': unknown"),
    ("bn_x30:digits", {"model.variant": "v3"}, "choose from paper, caffe, slim"),
    ("bn_x30:digits", {"model.width": 0.0}, "model.width=0.0: must be in (0, 16]"),
    ("bn_x30:digits", {"model.init": "orthogonal"}, "choose from auto, he, glorot, glorot_relu"),
    ("bn_x30:digits", {"model.init_scale": 0.0}, "model.init_scale=0.0"),
    ("mnist:digits", {"model.widths": ()}, "model.widths=(): not one or more"),
    ("mnist:digits", {"model.widths": (100, 0)}, "model.widths=(100, 0)"),
    ("mnist:digits", {"model.init_std": -0.1}, "model.init_std=-0.1"),
    ("mnist:digits", {"model.threshold": 1.0}, "model.threshold=1.0: must be in [0, 1)"),
    ("mnist:digits", {"lrn": True}, "lrn=True: not an option of model.name='mlp'"),
    ("bn_x30:digits", {"bn.group_size": 1}, "bn.group_size=1: must be a whole number from 2"),
    ("bn_x30:digits", {"bn.group_size": 7}, "batch_size=32: not divisible by bn.group_size=7"),
    ("bn_x30:digits", {"bn.group_size": None, "batch_size": 1}, "BN needs at least 2 examples"),
    ("bn_x30:digits", {"bn.epsilon": -1e-3}, "bn.epsilon=-0.001"),
    ("bn_x30:digits", {"bn.momentum": 1.0}, "bn.momentum=1.0: must be in [0, 1)"),
    (
        "bn_x30:digits",
        {"bn.per_activation": ("5b",)},
        "'5b' is not a module; choose from inception_3a",
    ),
    ("ensemble_4:digits", {"norm": "none"}, "bn.per_activation=('inception_5b',): there is no BN"),
    ("bn_x30:digits", {"data.name": ""}, "data.name='': empty"),
    ("bn_x30:digits", {"data.shuffle": "sometimes"}, "choose from none, within_shard, global"),
    ("bn_x30:digits", {"data.crop": 0.0}, "data.crop=0.0: must be in (0, 1]"),
    ("bn_x30:digits", {"data.shift": 15}, "data.shift=15: must be a whole number from 0 to 14"),
    ("bn_x30:digits", {"data.distortion": 1.5}, "data.distortion=1.5: must be in [0, 1]"),
    ("bn_x30:digits", {"data.holdout": 1.0}, "data.holdout=1.0: must be in [0, 1)"),
    ("bn_x30:digits", {"eval_every": 0}, "eval_every=0"),
    ("bn_x30:digits", {"eval_early": -1}, "eval_early=-1: must be a whole number from 0"),
    ("bn_x30:digits", {"checkpoint_every": -5}, "checkpoint_every=-5"),
    ("bn_x30:digits", {"checkpoint_wait": -0.1}, "checkpoint_wait=-0.1: must be in [0, inf)"),
    (
        "bn_x30:digits",
        {"checkpoint_wait": float("inf")},
        "checkpoint_wait=inf: must be in [0, inf)",
    ),
    ("bn_x30:digits", {"log_every": 0}, "log_every=0"),
    ("bn_x30:digits", {"eval_batch_size": 0}, "eval_batch_size=0"),
    ("bn_x30:digits", {"statistics_batches": 0}, "statistics_batches=0"),
    ("bn_x30:digits", {"keep_last": 0}, "keep_last=0"),
    ("bn_x30:digits", {"keep_best": -1}, "keep_best=-1"),
    ("bn_x30:digits", {"record.activation_every": 0}, "record.activation_every=0"),
    ("bn_x30:digits", {"record.activation_examples": 33}, "record.activation_examples=33"),
    ("bn_x30:digits", {"record.activations": ("inception_4e/conv_3x3",)}, "end it with /input"),
    ("mnist:digits", {"record.activations": ("dense_2/pre_bn",)}, "record /input instead"),
    (
        "bn_x30:digits",
        {"reproducible": True, "batch_size": 96},
        "batch_size=96: reproducible=True needs bn.group_size=32 times a power of two; use 64",
    ),
    ("mnist:digits", {"reproducible": True, "batch_size": 180}, "use 120 or 240"),
    ("mnist:digits", {"reproducible": True, "bn.group_size": None}, "bn.group_size=None: repro"),
    ("mnist_bn:digits", {"reproducible": True}, "steps_per_dispatch=250: reproducible=True takes"),
]


@pytest.mark.parametrize(("experiment", "changes", "message"), WRONG)
def test_wrong_config_is_refused_in_one_line(experiment, changes, message):
    name, scale = experiment.split(":")
    config = importlib.import_module(f"configs.{name}").get_config(scale)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError) as caught:
        check(config)
    line = str(caught.value)
    assert message in line
    assert "\n" not in line
    assert "; " in line or "use " in line  # the remedy
    assert caught.value.exit_code == 2


def test_the_limits_themselves_are_accepted():
    config = importlib.import_module("configs.bn_x30").get_config("digits")
    config.update_from_flattened_dict(
        {
            "momentum": 0.0,
            "decay_rate": 1.0,
            "l2": 0.0,
            "total_steps": 1,
            "checkpoint_wait": 0.0,
            "keep_best": 0,
            "bn.group_size": None,
            "bn.epsilon": 0.0,
            "data.shift": 0,
            "data.distortion": 0.0,
            "record.activations": ("inception_4e/conv_3x3/pre_bn",),
        }
    )
    check(config)
    config.update_from_flattened_dict({"bn.group_size": 32, "batch_size": 128})
    check(config)
    config.norm, config.batch_size = "none", 7  # without BN no group has to divide the batch
    config.record.activations = ()
    check(config)


def device(platform="cpu"):
    return SimpleNamespace(platform=platform)


def config(experiment="bn_x30", **changes) -> ConfigDict:
    found = importlib.import_module(f"configs.{experiment}").get_config("digits")
    found.update_from_flattened_dict(changes)
    return found


@pytest.mark.parametrize(
    ("batch", "group", "devices", "said"),
    [
        (30, None, 8, "batch_size=30 is not divisible by the 8 devices.* such as 24"),
        (
            32,
            32,
            5,
            "batch_size=32 is not divisible by the 5 devices.* such as 160",
        ),  # 30: no group
        (4, 4, 8, "batch_size=4 is smaller than the 8 devices.*:pod"),
    ],
)
def test_every_device_gets_the_same_number_of_examples(batch, group, devices, said):
    wrong = config(batch_size=batch, **{"bn.group_size": group, "record.activation_examples": 32})
    check(wrong)
    check(wrong, [device()])
    with pytest.raises(ConfigError, match=said):
        check(wrong, [device()] * devices)
    check(config(), [device()] * 8)


@pytest.mark.parametrize(
    ("batch", "group", "devices", "fits"),
    [
        (256, 32, 1, True),
        (256, 32, 8, True),
        (256, 32, 16, False),  # half a group each
        (256, 32, 32, False),
        (32, 32, 1, True),
        (32, 32, 2, False),
    ],
)
def test_reproducible_devices_get_a_power_of_two_of_whole_groups(batch, group, devices, fits):
    changed = config(batch_size=batch, reproducible=True, **{"bn.group_size": group})
    if fits:
        return check(changed, [device()] * devices)
    with pytest.raises(ConfigError, match=f"on {devices} devices: batch_size={batch} in") as error:
        check(changed, [device()] * devices)
    assert error.value.exit_code == 2
    check(changed, [device()] * devices, training=False)  # it can be evaluated there


def test_reproducible_needs_a_power_of_two_of_devices():
    changed = config(batch_size=192, norm="none", reproducible=True, **{"bn.group_size": 3})
    with pytest.raises(ConfigError, match="power of two of at most 64 devices"):
        check(changed, [device()] * 3)


def test_convolutions_take_one_step_a_dispatch_on_a_cpu():
    plain = {"data.shift": 0, "data.distortion": 0.0}
    with pytest.raises(ConfigError, match="steps_per_dispatch=2: needs undistorted data"):
        check(config(steps_per_dispatch=2))
    changed = config(steps_per_dispatch=2, **plain)
    check(changed, [device("gpu")])
    check(changed, [device("cpu")], training=False)
    with pytest.raises(ConfigError, match="steps_per_dispatch=2: is only for the MLP on a CPU"):
        check(changed, [device("cpu")])


@pytest.mark.parametrize("value", ["fast", 0.5, True, None])
def test_a_field_of_another_type_is_refused(value):
    with pytest.raises(ConfigError, match="^total_steps=.*: must be of type int"):
        check(ConfigDict({**config().to_dict(), "total_steps": value}))
    check(ConfigDict({**config().to_dict(), "momentum": 0}))  # a whole number will do


def test_elements_of_another_type_are_refused():
    record = {**config().record.to_dict(), "activations": (1,)}
    with pytest.raises(
        ConfigError, match="^record.activations=.*: all elements must be of type str"
    ):
        check(ConfigDict({**config().to_dict(), "record": record}))


def test_missing_and_unknown_fields_are_refused():
    with pytest.raises(ConfigError, match="the config has no activation, batch_per_device, "):
        check(ConfigDict({"learning_rate": 0.1}))
    with pytest.raises(ConfigError, match="there is no field 'lerning_rate': did you mean 'learn"):
        check(ConfigDict({**config().to_dict(), "lerning_rate": 1.0}))


SETTINGS = [  # of the command line, and the value
    ("learning_rate", "1e-3", 0.001),
    ("learning_rate", "1", 1.0),
    ("batch_size", "64", 64),
    ("lrn", "True", True),
    ("data.mirror", "false", False),
    ("data.mirror", "1", True),
    ("data.dir", "~/a=b", "~/a=b"),
    ("bn.group_size", "None", None),
    ("bn.group_size", "16", 16),
    ("bn.per_activation", "('inception_5b',)", ("inception_5b",)),
    ("bn.per_activation", "'inception_5a','inception_5b'", ("inception_5a", "inception_5b")),
    ("record.activations", "()", ()),
]


@pytest.mark.parametrize(("field", "text", "value"), SETTINGS)
def test_a_field_is_set_on_the_command_line(field, text, value):
    found = dict(fields(read("bn_x30:digits", [f"{field}={text}"])))[field]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("optional", OPTIONAL)
def test_a_field_that_may_be_none_takes_none_and_a_value_again(optional):
    none = read("bn_x30:digits", [f"{optional}=None"])
    assert dict(fields(none))[optional] is None
    again = read("bn_x30:digits", [f"{optional}=None", f"{optional}=32"])
    assert dict(fields(again))[optional] == 32


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("learning_rat=1", "the config has no field 'learning_rat': did you mean 'learning_rate'?"),
        ("zzz=1", "the config has no field 'zzz': --dry_run prints them all"),
        ("model=1", "the config has no field 'model'"),
        ("learning_rate=fast", "learning_rate=fast: must be of type float"),
        ("learning_rate=None", "learning_rate=None: must be of type float"),
        ("batch_size=1.5", "batch_size=1.5: must be of type int"),
        ("lrn=maybe", "lrn=maybe: must be of type bool"),
        ("record.activations=(1", "record.activations=(1: must be of type tuple"),
        ("seed", "--config.seed: write --config.seed=VALUE"),
    ],
)
def test_a_setting_that_cannot_be_read_is_refused(setting, said):
    with pytest.raises(ConfigError) as caught:
        read("bn_x30:digits", [setting])
    assert said in str(caught.value)


def test_what_is_read_is_locked_and_shortened_where_asked_for(monkeypatch):
    assert read("mnist_bn:digits").is_locked
    monkeypatch.setenv("BN_JAX_SMOKE", "1")
    short = read("mnist_bn:digits")
    assert short.is_locked and short.total_steps == 500 and short.scale == "digits_smoke"
