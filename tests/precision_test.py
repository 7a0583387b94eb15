"""The field `precision` reaches every product and convolution, and exports are at the highest."""

import contextlib
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from bn_jax import import_weights, models, ops, step
from bn_jax.optim import Hyper
from bn_jax.weights import exporting, importing, network, tensor_files
from configs import bn_x30, inception, mnist_bn
from tests.support.small_networks import variables

HYPER = Hyper(*[np.float32(1)] * len(Hyper._fields))
OPERATION = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*")
# An experiment, channels of its images, and changes: all ways in which layers are called.
NETWORKS = {
    "Inception with auxiliary heads": (inception, 3, {"model.aux": True}),
    "Inception in bfloat16": (bn_x30, 1, {"dtype": "bfloat16"}),
    "Caffe's Inception": (bn_x30, 3, {"model.variant": "caffe"}),
    "MLP": (mnist_bn, 1, {}),
    "MLP in bfloat16": (mnist_bn, 1, {"dtype": "bfloat16"}),
}


def operations(text: str) -> list[str]:
    """The products and convolutions of a program, a line each."""
    return OPERATION.findall(text)


def programs(config, channels: int) -> list[str]:
    """The training step and the evaluation step of a small network, as StableHLO."""
    model = models.build(config, 5)
    shape = (config.image_size, config.image_size, channels)
    state = jax.eval_shape(lambda: step.init_state(model, 0, shape))
    batch = {
        "image": jax.ShapeDtypeStruct((64, *shape), jnp.uint8),
        "label": jax.ShapeDtypeStruct((64,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((64,), jnp.bool_),
    }
    train = jax.jit(functools.partial(step.train_step, model=model))
    evaluate = jax.jit(functools.partial(step.eval_step, model=model))
    return [
        train.lower(state, batch, HYPER, np.uint32(0)).as_text(),
        evaluate.lower(state.params, state.batch_stats, batch).as_text(),
    ]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("forms", ["hand-tuned", "plain"])
def test_every_product_and_convolution_has_the_precision_of_the_config(name, forms):
    root, channels, changes = NETWORKS[name]
    config = root.get_config("digits")
    config.bn.group_size = 32
    if config.model.name == "inception":
        changes = {"model.width": 1 / 16, **changes}
    config.update_from_flattened_dict(changes)
    layers = 3 if config.model.name == "mlp" else 40

    for precision, written in (("default", "DEFAULT"), ("high", "HIGH"), ("highest", "HIGHEST")):
        config.precision = precision
        with ops.plain() if forms == "plain" else contextlib.nullcontext():
            for text in programs(config, channels):
                found = operations(text)
                assert len(found) > layers
                assert [
                    x
                    for x in found
                    if x.count(f"precision {written}>") != 2 and f"[{written}, {written}]" not in x
                ] == []


def imported(workdir, precision: str) -> None:
    """An untrained run with weights, made as bn_jax.import_weights makes one."""
    config = mnist_bn.get_config("digits")
    config.model.widths = (6, 5)
    config.precision, config.record.tensorboard = precision, False
    shape = (28, 28, 1)
    found = variables(config, 10, shape)
    origin = {"file": "weights.npz", "sha256": "0", "variant": "flax", "background": "none"}
    importing.write(workdir, config, found, shape, origin, [])


@pytest.mark.parametrize("precision", ["default", "high"])
def test_a_network_is_exported_and_compared_at_the_highest_precision(tmp_path, precision):
    pytest.importorskip("flatbuffers")
    imported(tmp_path / "run", precision)
    net = network.load(tmp_path / "run", None, None)
    assert net.config.precision == "highest"
    images = network.examples(net, 2)
    compared = jax.jit(net.logits).lower(images).as_text()
    written = jax.export.deserialize(bytearray(exporting.write_stablehlo(net, 2))).mlir_module()
    for text in (compared, written):
        assert len(operations(text)) >= 3
        assert all("HIGHEST" in x and "DEFAULT" not in x for x in operations(text))


def test_a_file_from_before_the_field_can_be_imported(tmp_path):
    imported(tmp_path / "run", "default")
    net = network.folded(network.load(tmp_path / "run", None, None))
    texts = net.texts()
    config = json.loads(texts["config"])
    del config["precision"]
    texts["config"] = json.dumps(config)
    flat = traverse_util.flatten_dict(net.variables, sep="/")
    path = tmp_path / "net.safetensors"
    path.write_bytes(tensor_files.safetensors_bytes(flat, texts))

    import_weights.main([f"--from={path}", "--variant=flax", f"--workdir={tmp_path / 'again'}"])
    again = json.loads((tmp_path / "again" / "run.json").read_text())
    assert again["config"]["precision"] == "default"
