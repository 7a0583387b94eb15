"""Exported files give the network's logits, whatever its variant, and bad ones are not kept."""

import datetime
import functools
import json
import re
import sys

import jax
import numpy as np
import pytest

from bn_jax import export
from bn_jax.errors import ConfigError, UserError
from bn_jax.weights import exporting
from bn_jax.weights import network as networks
from bn_jax.weights.network import Network, examples
from configs import bn_x30, ensemble_4, inception, mnist, mnist_bn
from tests.support.small_networks import network

# What the walk to ONNX has to get right, all of it at width 1/16.
NETWORKS = {
    # SAME pads 28 -> 14 -> 7 and 72 -> 36 -> 18 by more after than before.
    "paper": (bn_x30, 1, {}),
    # Maps of 35 and 17 before the stem's pools, where Caffe's differ from SAME; no BN but LRN.
    "caffe": (inception, 3, {"image_size": 70, "model.variant": "caffe", "model.aux": True}),
    "slim": (ensemble_4, 3, {"image_size": 72, "model.variant": "slim"}),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs run once here: half the time to compile matters more than the time to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def made(name: str) -> Network:
    root, channels, changes = NETWORKS[name]
    config = root.get_config("digits")
    config.update_from_flattened_dict({"model.width": 1 / 16, **changes})
    return network(config, 5, channels)


@functools.cache
def mlp() -> Network:
    config = mnist_bn.get_config("digits")
    config.model.widths = (6, 5)
    return network(config, 10, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    net = made(name)
    out = tmp_path / "net.onnx"
    assert exporting.export_run(net, "onnx", None, out) <= exporting.TOLERANCE
    logits = exporting.run_onnx(out, examples(net, 2))
    # The image matters a hundred times more than the tolerance.
    assert np.abs(logits[0] - logits[1]).max() > 0.01 * np.abs(logits).max()
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    model = onnx.load(out)
    size = model.graph.input[0].type.tensor_type.shape.dim[0]
    assert size.dim_param == "batch"
    texts = {prop.key: prop.value for prop in model.metadata_props}
    assert "images uint8" in texts["preprocessing"] and texts["step"] == "7"
    # BN is in the file only where it has a pair for each place of the map (inception_5b).
    operations = [node.op_type for node in model.graph.node]
    assert operations.count("Mul") == (7 if name == "slim" else 0)
    assert "BatchNormalization" not in operations
    assert operations.count("LRN") == (2 if name == "caffe" else 0)


def test_a_wrong_graph_is_noticed_and_leaves_no_file(tmp_path, monkeypatch):
    """Caffe's pools written as SAME: one of the mistakes that the check is there for."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(exporting, "unpadded", exporting.same)
    with pytest.raises(UserError, match=r"not written.*of the largest logit"):
        exporting.export_run(made("caffe"), "onnx", None, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_stablehlo_takes_any_batch_and_says_how_long_it_is_read(tmp_path):
    """(The file carried the word "logits" alone: nobody could see that it was about to expire.)"""
    pytest.importorskip("flatbuffers")
    net = made("paper")
    out = tmp_path / "net.stablehlo"
    assert exporting.export_run(net, "stablehlo", None, out) <= exporting.TOLERANCE
    found = jax.export.deserialize(bytearray(out.read_bytes()))
    assert set(found.platforms) == {"cpu", "cuda", "rocm", "tpu"}
    assert str(found.in_avals[0]) == "uint8[batch,28,28,1]"

    label = found.fun_name
    today = datetime.date.today()
    assert re.match(r"logits of \w+, step 7, exported ", label)
    written, until = map(datetime.date.fromisoformat, re.findall(r"\d{4}-\d\d-\d\d", label))
    assert today - datetime.timedelta(days=1) <= written <= today
    assert datetime.timedelta(days=180) <= until - written <= datetime.timedelta(days=184)
    assert f"by jax {jax.__version__};" in label and "6 months" in label


@pytest.mark.parametrize("name", ["stablehlo", "onnx", "safetensors", "flax"])
def test_every_format_takes_the_mlp_and_a_fixed_batch(name, tmp_path):
    kind = exporting.formats()[name]
    for package in kind.packages:
        pytest.importorskip(package)
    net = mlp()
    for batch in (None, 2):
        out = tmp_path / f"net{kind.suffix}"
        assert exporting.export_run(net, name, batch, out) <= exporting.TOLERANCE
    images = examples(net, 3)
    if name in ("stablehlo", "onnx"):
        with pytest.raises(Exception, match=r"(?i)2.*3|3.*2|expected"):
            exporting.formats()[name].run(out, images)


def test_folding_keeps_per_activation_bn_and_networks_without_bn():
    slim, plain = made("slim"), made("caffe")
    assert networks.folded(slim) is slim and networks.folded(plain) is plain
    folded = networks.folded(mlp())
    assert "batch_stats" not in folded.variables and folded.config.norm == "none"
    assert folded.variables["params"]["dense_0"]["dense"].keys() == {"kernel", "bias"}


def test_safetensors_say_what_they_hold(tmp_path):
    from bn_jax.weights import tensor_files

    out = tmp_path / "net.safetensors"
    exporting.export_run(mlp(), "safetensors", None, out)
    file = tensor_files.read(out)
    assert file.tensors["params/classifier/kernel"].shape == (5, 10)
    assert json.loads(file.metadata["config"])["norm"] == "none"
    assert "a pixel above 127.5 is 1" in file.metadata["preprocessing"]


def test_preprocessing_in_words():
    assert "(pixel - (128, 117, 104)) / 1" in made("caffe").preprocessing()
    assert "RGB; inside the network: (pixel - (127.5, 127.5, 127.5)) / 127.5" in (
        made("slim").preprocessing()
    )


def test_differences_that_are_not_numbers_are_infinite():
    one = np.ones((1, 2))
    assert exporting.largest_difference(one, np.ones((2, 2))) == float("inf")
    assert exporting.largest_difference(one * np.nan, one) == float("inf")
    assert exporting.largest_difference(one * 1.5, one * 2) == 0.25


def test_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    def refused(*words):
        with pytest.raises((ConfigError, SystemExit)) as error:
            export.main([f"--workdir={tmp_path / 'none'}", *words])
        return str(error.value) + capsys.readouterr().err

    assert "no run.json" in refused("--format=flax")
    assert "neither 'any' nor a number" in refused("--format=flax", "--batch=0")
    assert "must end in .onnx" in refused("--format=onnx", f"--out={tmp_path / 'x.txt'}")
    assert "is a folder" in refused("--format=stablehlo", f"--out={tmp_path}")
    for name, package in (("onnx", "onnx"), ("stablehlo", "flatbuffers")):
        monkeypatch.setitem(sys.modules, package, None)
        assert re.match(
            rf"--format={name} needs {package}.*pip install 'bn_jax\[export\]'$",
            refused(f"--format={name}"),
        )


def test_without_bn_there_are_no_statistics(tmp_path):
    config = mnist.get_config("digits")
    config.model.widths = (4,)
    net = network(config, 10, 1)
    assert exporting.export_run(net, "flax", None, tmp_path / "net.msgpack") <= exporting.TOLERANCE


@pytest.mark.parametrize("n", [7, 8, 35, 56, 112, 113])
def test_the_stems_pools_have_as_many_outputs_as_caffes(n):
    """floor(n / 2), of even maps (as at 224 px) and of odd ones."""
    before, after = exporting.unpadded(n, 3, 2)
    assert before == 0 and (n + after - 3) // 2 + 1 == n // 2
