"""Every config differs from its parent in exactly the keys that its sentence names."""

import importlib
import pathlib

import pytest
from ml_collections import ConfigDict

from bn_jax.experiment.config import check
from configs import inception, mnist

X5_CHANGES = {
    "learning_rate": 0.0075,
    "dropout": 0.0,
    "l2": 0.0002,
    "decay_epochs": 8 / 6,
    "lrn": False,
    "data.shuffle": "within_shard",
    "data.distortion": 0.5,
}
ENSEMBLE_BN = {"bn.per_activation": ("inception_5b",)}
# config: (parent, every key that differs with its value; the name always differs)
DELTAS = {
    "bn_baseline": ("inception", {"norm": "batch_norm"}),
    "bn_x5": ("bn_baseline", X5_CHANGES),
    "bn_x30": ("bn_x5", {"learning_rate": 0.045}),
    "bn_x1": ("bn_x5", {"learning_rate": 0.0015}),
    "bn_x5_sigmoid": ("bn_x5", {"activation": "sigmoid"}),
    "bn_x5_with_dropout": ("bn_x5", {"dropout": 0.4}),
    "bn_x5_with_lrn": ("bn_x5", {"lrn": True}),
    "bn_x5_full_l2": ("bn_x5", {"l2": 0.001}),
    "bn_x5_no_l2": ("bn_x5", {"l2": 0.0}),
    "bn_x5_slow_decay": ("bn_x5", {"decay_epochs": 8.0}),
    "bn_x5_unshuffled": ("bn_x5", {"data.shuffle": "none"}),
    "bn_x5_full_distortion": ("bn_x5", {"data.distortion": 1.0}),
    "bn_x30_unshuffled": ("bn_x30", {"data.shuffle": "none"}),
    "bn_x5_without_bn": ("bn_x5", {"norm": "none"}),
    "bn_best": ("bn_baseline", {}),
    "inception_best": ("inception", {}),
    "inception_glorot": ("inception", {"model.init": "glorot"}),
    "inception_x5": ("inception", {"learning_rate": 0.0075}),
    "inception_sigmoid": ("inception", {"activation": "sigmoid"}),
    "inception_sigmoid_best": ("inception_sigmoid", {}),
    "inception_strong_l2": ("inception", {"l2": 0.005}),
    "ensemble_1": ("bn_x30", {"seed": 100, "model.init_scale": 1.5}),
    "ensemble_2": ("bn_x30", {"seed": 200, "dropout": 0.05}),
    "ensemble_3": ("bn_x30", {"seed": 300, "dropout": 0.1}),
    "ensemble_4": ("bn_x30", {"seed": 400, **ENSEMBLE_BN}),
    "ensemble_5": ("bn_x30", {"seed": 500, "model.init_scale": 1.5, "dropout": 0.05}),
    "ensemble_6": (
        "bn_x30",
        {"seed": 600, "model.init_scale": 1.5, "dropout": 0.1, **ENSEMBLE_BN},
    ),
    "mnist_bn": ("mnist", {"norm": "batch_norm"}),
}
FOLDER = pathlib.Path(inception.__file__).parent
CASES = [
    (name, scale)
    for name in DELTAS
    for scale in (mnist if name.startswith("mnist") else inception).SCALES
]


def load(name: str, scale: str) -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(scale)


def flat(config: ConfigDict) -> dict:
    def walk(tree: dict, prefix: str):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(config.to_dict(), ""))


def test_table_names_every_config_file():
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "inception", "mnist"}
    assert files == DELTAS.keys()


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_delta_changes_exactly_its_keys(name, scale):
    parent, changes = DELTAS[name]
    module = importlib.import_module(f"configs.{name}")
    expected = {"name": name, **changes, **getattr(module, "TUNED", {}).get(scale, {})}
    if name == "bn_x5" and scale in ("imagenet", "pod"):
        expected["total_steps"] = 6_000_000
    before, after = flat(load(parent, scale)), flat(load(name, scale))
    assert before.keys() == after.keys()
    differing = {key: after[key] for key in before if before[key] != after[key]}
    assert differing == expected


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_config_is_locked_valid_and_knows_itself(name, scale):
    config = load(name, scale)
    assert config.is_locked
    assert (config.name, config.scale) == (name, scale)
    check(config)
    with pytest.raises(AttributeError, match="learning_rat"):
        config.learning_rat = 0.1
    with pytest.raises(KeyError, match="group_sise"):
        config.bn["group_sise"] = 4


@pytest.mark.parametrize("root", [inception, mnist])
def test_unknown_scale_is_refused_with_the_list(root):
    with pytest.raises(ValueError, match=r"'huge' is none of .*digits, .*synthetic"):
        root.get_config("huge")


@pytest.mark.parametrize("root", [inception, mnist])
def test_every_field_of_a_root_has_a_comment(root):
    source = pathlib.Path(root.__file__).read_text()
    body = source[source.index("config = ConfigDict()") : source.index("SCALES[scale](config)")]
    for line in body.splitlines():
        if "config." in line and "ConfigDict()" not in line and "config.scale" not in line:
            assert "  # " in line, line


@pytest.mark.parametrize("name", DELTAS)
def test_delta_is_a_page_with_command_and_expectation(name):
    source = (FOLDER / f"{name}.py").read_text()
    doc = importlib.import_module(f"configs.{name}").__doc__
    assert f"python -m bn_jax.main --config=configs/{name}.py" in doc
    assert "Expected: " in doc
    changes = source[source.index("config.name") : source.index("return config")]
    assert len(changes.splitlines()) <= 12


def test_scales_change_data_image_width_and_length_only():
    """Decay, L2 and other modifications of the paper hold at every scale; rates but at `pod`."""
    scaled = ["scale", "image_size", "model.width", "total_steps", "eval_every", "log_every"]
    scaled += ["eval_batch_size", "statistics_batches", "checkpoint_every", "data.name"]
    scaled += ["data.crop", "data.mirror", "data.shift", "record.activation_every"]
    scaled += ["record.activation_examples", "data.dir", "data.holdout", "eval_early"]
    pod = ["scale", "batch_per_device", "dtype", "write_seconds"]
    pod += ["learning_rate_scaling", "warmup_examples"]
    reference = flat(inception.get_config())
    for scale in inception.SCALES:
        here = flat(inception.get_config(scale))
        changed = {key for key in here if here[key] != reference[key]}
        assert changed <= set(pod if scale == "pod" else scaled), scale


def test_a_pod_run_writes_to_its_workdir_at_most_every_30_seconds():
    for name, scale in CASES:
        assert load(name, scale).write_seconds == (30 if scale == "pod" else 0), (name, scale)


def test_configs_read_no_device(monkeypatch):
    """A config is made before the hosts of a run have found each other."""
    import jax

    def fail(*unused):
        raise AssertionError("a config asked for devices")

    for name in ("devices", "device_count", "local_device_count", "default_backend"):
        monkeypatch.setattr(jax, name, fail)
    for name, scale in CASES:
        load(name, scale)
