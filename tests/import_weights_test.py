"""Imported networks give the logits of the implementations that their weights come from."""

import functools
import importlib.util
import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import models, ops, step
from bn_jax.data import crops, decode
from bn_jax.experiment.config import load
from bn_jax.weights import importing, mapping
from bn_jax.weights.tensor_files import TensorFile
from configs import bn_x30
from tests.support.slim_reference import Slim
from tests.support.small_networks import variables

# Of the largest logit. Rounding of sums over 70 layers: up to 9.0e-7 and 1.9e-15 (docs/weights.md).
TOLERANCES = {"float32": 1e-4, "float64": 1e-10}


def config(variant):
    return importing.published(variant, load(importing.DEFAULT_CONFIG))


def ours(variant, tensors, images, dtype, *, background=False):
    """Logits of the imported network, computed in `dtype` from pixels to logits."""
    settings = config(variant)
    file = TensorFile({name: t.astype(dtype) for name, t in tensors.items()}, {}, "")
    with jax.enable_x64(dtype == "float64"):
        found, _ = importing.variables(file, variant, settings, background=background)
        found = jax.tree.map(lambda a: jnp.asarray(a, dtype), found)
        settings = settings.copy_and_resolve_references().unlock()
        settings.dtype = dtype
        model = models.build(settings, found["params"]["classifier"]["bias"].size)
        logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(found, images)
        assert logits.dtype == dtype
        return np.asarray(logits)


def require_equal(got, want, dtype):
    largest = np.abs(want).max()
    assert np.abs(want[0] - want[1]).max() > 100 * TOLERANCES["float32"] * largest  # not constant
    assert np.abs(got - want).max() <= TOLERANCES[dtype] * largest


def noise(size, n=2):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@functools.cache
def reference():
    """TF-slim's network in NumPy, the images, and its logits."""
    slim, images = Slim(seed=0), noise(150)  # odd maps on the way: 75, 38, 19, 10, 5
    return slim.tensors, images, slim(images)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_slim(dtype):
    tensors, images, want = reference()
    assert len(tensors) == 277 and want.shape == (2, 1001)
    require_equal(ours("slim", tensors, images, dtype, background=True), want, dtype)


def test_slim_without_the_background_class():
    tensors, _, _ = reference()
    file = TensorFile(tensors, {}, "")
    kept, _ = importing.variables(file, "slim", config("slim"), background=True)
    dropped, _ = importing.variables(file, "slim", config("slim"), background=False)
    for leaf in ("kernel", "bias"):
        one, other = (v["params"].pop("classifier")[leaf] for v in map(_shallow, (kept, dropped)))
        np.testing.assert_array_equal(one[..., 1:], other)
    jax.tree.map(np.testing.assert_array_equal, _rest(kept), _rest(dropped))


def _shallow(found):
    return {"params": dict(found["params"])}


def _rest(found):
    return {k: v for k, v in found["params"].items() if k != "classifier"}


def test_slim_with_bn_in_the_stem_and_scales():
    """As networks trained by other scripts have it: BN everywhere, and gamma."""
    tensors = dict(reference()[0])
    stem, other = "InceptionV2/Conv2d_1a_7x7", "InceptionV2/Conv2d_2c_3x3"
    del tensors[f"{stem}/biases"]
    for name, value in (("beta", 0.1), ("moving_mean", 0.2), ("moving_variance", 0.3)):
        tensors[f"{stem}/BatchNorm/{name}"] = np.full(64, value)
    tensors[f"{other}/BatchNorm/gamma"] = np.full(192, 0.7)
    found, _ = importing.variables(
        TensorFile(tensors, {}, ""), "slim", config("slim"), background=False
    )
    bn = found["params"]["conv1_7x7"]["bn"] | found["batch_stats"]["conv1_7x7"]["bn"]
    assert [float(bn[k].flat[0]) for k in ("scale", "bias", "mean", "var")] == [1, 0.1, 0.2, 0.3]
    assert np.unique(found["params"]["conv2_3x3"]["bn"]["scale"]) == [0.7]


@functools.cache
def bninception():
    """Cadene's module in double precision, with weights and statistics far from the initial ones.

    Loaded by itself: the package's other networks need torchvision.
    """
    torch = pytest.importorskip("torch")
    package = importlib.util.find_spec("pretrainedmodels")
    if package is None:
        pytest.skip("needs the package pretrainedmodels")
    assert package.submodule_search_locations is not None
    path = pathlib.Path(package.submodule_search_locations[0]) / "models" / "bninception.py"
    spec = importlib.util.spec_from_file_location("bninception", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.bninception(pretrained=None).double().eval()
    draw = torch.Generator().manual_seed(0)
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2, generator=draw)
            part.running_var.uniform_(0.5, 1.5, generator=draw)
            part.weight.data.uniform_(0.5, 1.5, generator=draw)
            part.bias.data.normal_(0, 0.2, generator=draw)
        elif hasattr(part, "weight"):
            fan_in = part.weight[0].numel()
            part.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=draw)
            part.bias.data.normal_(0, 0.2, generator=draw)
    return net


def torch_logits(net, images):
    """As pretrained_settings has it: BGR, 0..255, less the mean 104, 117, 128."""
    torch = pytest.importorskip("torch")
    pixels = images[..., ::-1].astype(np.float64) - [104, 117, 128]
    with torch.no_grad():
        return net(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).numpy()


def state_dict(net):
    return {name: tensor.numpy() for name, tensor in net.state_dict().items()}


@pytest.fixture
def photographs(test_data):
    """Four ImageNet photographs, uint8 [4, 224, 224, 3]: the centre crop of evaluation."""
    images = []
    with tarfile.open(test_data / "fullres.tar") as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".JPEG"))
        for name in names[::40]:
            member = tar.extractfile(name)
            assert member is not None
            data = member.read()
            found = decode.frame(data)
            out = np.empty((224, 224, 3), np.uint8)
            box = crops.center_box(found.height, found.width)
            decode.resized_crop(decode.pixels(data, found), box, 1, out)
            images.append(out)
    assert len(images) == 4
    return np.stack(images)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_caffe_agrees_with_torch_on_photographs(dtype, photographs):
    net = bninception()
    want = torch_logits(net, photographs)
    require_equal(ours("caffe", state_dict(net), photographs, dtype), want, dtype)


def test_caffe_agrees_with_torch_where_pools_round_up():
    """At 229 px the stem's first pool sees 115 pixels: Caffe starts at the first, SAME before."""
    net, images = bninception(), noise(229)
    want = torch_logits(net, images)
    require_equal(ours("caffe", state_dict(net), images, "float64"), want, "float64")


@pytest.mark.parametrize("height, width", [(14, 15), (15, 14), (3, 4), (9, 9)])
def test_unpadded_pool(height, width):
    """Windows from the first pixel on; the last one is cut where it reaches past the edge."""
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    want = [
        [x[:, i : i + 3, j : j + 3].max((1, 2)) for j in range(0, width - 1, 2)]
        for i in range(0, height - 1, 2)
    ]
    np.testing.assert_array_equal(
        ops.max_pool_unpadded(jnp.asarray(x)), np.moveaxis(np.array(want), 2, 0)
    )


def cadene_names(found):
    """Cadene's state dict of our variables: without torch, what maps names and axes is undone."""
    tensors = {"last_linear.weight": found["params"]["classifier"]["kernel"].T}
    tensors["last_linear.bias"] = found["params"]["classifier"]["bias"]
    layers = {"conv1_7x7_s2": ("conv1_7x7",)}
    layers |= {name: (name,) for name in ("conv2_3x3_reduce", "conv2_3x3")}
    for block in (b for b in found["params"] if b.startswith("inception_")):
        for name in found["params"][block]:
            layers[f"{block}_{name.removeprefix('conv_')}"] = (block, name)
    for name, path in layers.items():
        params, stats = found["params"], found["batch_stats"]
        for part in path:
            params, stats = params[part], stats[part]
        kernel = params["conv"]["kernel"]
        kernel = kernel[:, :, ::-1] if name == "conv1_7x7_s2" else kernel
        tensors[f"{name}.weight"] = kernel.transpose(3, 2, 0, 1)
        tensors[f"{name}.bias"] = np.full_like(stats["bn"]["mean"], 0.25)
        tensors[f"{name}_bn.running_mean"] = stats["bn"]["mean"] + np.float32(0.25)
        tensors[f"{name}_bn.running_var"] = stats["bn"]["var"]
        tensors[f"{name}_bn.weight"] = params["bn"]["scale"]
        tensors[f"{name}_bn.bias"] = params["bn"]["bias"]
        tensors[f"{name}_bn.num_batches_tracked"] = np.int64(3)
    return tensors


def test_caffe_fills_every_variable():
    settings = bn_x30.get_config("digits")
    settings.model.variant = "caffe"
    found = variables(settings, 5, (28, 28, 3))
    back = mapping.caffe(cadene_names(found), found)
    # The bias is added to the mean and taken off again, in float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), dict(back), found)


def test_flax_without_counts_is_converged():
    settings = bn_x30.get_config("digits")
    found = variables(settings, 5, (28, 28, 1))
    from flax import traverse_util

    flat = traverse_util.flatten_dict(found, sep="/")
    plain = {name: leaf for name, leaf in flat.items() if not name.endswith("/count")}
    assert len(plain) < len(flat)
    back, shape = importing.variables(TensorFile(plain, {}, ""), "flax", settings, background=False)
    assert shape == (28, 28, 1)
    jax.tree.map(np.testing.assert_array_equal, back, found)
    like = jax.eval_shape(lambda: step.init_state(models.build(settings, 5), 0, shape))
    assert jax.tree.structure(back["params"]) == jax.tree.structure(like.params)
