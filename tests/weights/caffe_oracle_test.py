"""Caffe's network as the `onnx` package ships it, run by onnxruntime: a reference without torch.

`light_inception_v2.onnx` is Caffe2's export of this very network, with constants for weights. Here
it gets random ones and statistics, and what Caffe does and the file does not say: a padded average
pool divides by its whole window.
"""

import functools
import pathlib

import jax
import numpy as np
import pytest

from bn_jax import step
from bn_jax.layers import BatchNorm
from bn_jax.models.inception import VARIANTS, Inception
from bn_jax.weights import mapping

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

MODEL = "backend/test/data/light/light_inception_v2.onnx"
BRANCHES = {"double3x3_reduce": "double_3x3_reduce", "double3x3a": "double_3x3_1",
            "double3x3b": "double_3x3_2"}  # fmt: skip


def reference():
    """The graph with random weights, its tensors by name, and the name of the logits."""
    model = onnx.load(pathlib.Path(onnx.__file__).parent / MODEL)
    graph = model.graph
    shapes = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    random = np.random.default_rng(0)
    tensors = {}

    def fill(name, shape):
        if name.endswith(("bn_scale_0", "bn_var_0", "sc_w_0")):
            value = random.uniform(0.7, 1.3, shape)
        elif name.endswith("_w_0"):
            value = random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        else:
            value = random.normal(0, 0.2, shape)
        tensors[name] = np.float32(value)

    nodes = []
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            fill(node.output[0], tuple(shapes[node.input[0]]))
            continue
        if node.op_type == "AveragePool":
            node.attribute.append(onnx.helper.make_attribute("count_include_pad", 1))
        nodes.append(node)
    for node in nodes:
        for name in node.input:
            if name in shapes and name not in tensors and shapes[name].dtype == np.float32:
                fill(name, shapes[name].shape)
    used = {name for node in nodes for name in node.input}
    kept = [i for i in graph.initializer if i.name in used - tensors.keys()]
    made = [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()]
    data = next(i for i in graph.input if i.name == "data_0")
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.input.append(data)
    graph.node.extend(nodes)
    graph.initializer.extend(kept + made)
    [logits] = [node.output[0] for node in nodes if node.op_type == "Gemm"]
    graph.output.append(onnx.helper.make_tensor_value_info(logits, onnx.TensorProto.FLOAT, None))
    return model, tensors, logits


def as_bninception(tensors):
    """The names of `mapping.caffe`; BN's own scale and offset and those after it in one."""
    found = {"last_linear.weight": tensors.pop("loss3/classifier_w_0"),
             "last_linear.bias": tensors.pop("loss3/classifier_b_0")}  # fmt: skip
    for name in [n.removesuffix("_w_0") for n in tensors if n.endswith("_w_0") and "/bn/" not in n]:
        take = lambda part, name=name: tensors.pop(f"{name}{part}")  # noqa: E731
        block, branch = name.split("/")
        to = f"{block}_{BRANCHES.get(branch, branch)}"
        gain = take("/bn/sc_w_0")
        found[f"{to}.weight"] = take("_w_0")
        found[f"{to}_bn.weight"] = take("/bn_scale_0") * gain
        found[f"{to}_bn.bias"] = take("/bn_bias_0") * gain + take("/bn/sc_b_0")
        found[f"{to}_bn.running_mean"] = take("/bn_mean_0")
        found[f"{to}_bn.running_var"] = take("/bn_var_0")
    assert not tensors  # every weight of the file is used
    return found


def test_logits_are_those_of_caffe(unoptimized, monkeypatch):
    graph, tensors, name = reference()
    image = np.random.default_rng(1).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    x = np.float32(image[..., ::-1]) - np.float32([104, 117, 128])  # B, G, R
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    [want] = session.run([name], {"data_0": np.ascontiguousarray(x.transpose(0, 3, 1, 2)) / 64})

    norm = functools.partial(BatchNorm, epsilon=1e-5)
    # The file has the 576 channels that Fig. 5 prints after 4c and 4d; Caffe's weights have 608.
    monkeypatch.setitem(VARIANTS, "caffe", VARIANTS["caffe"]._replace(project_4cd=96))
    model = Inception(1000, variant="caffe", norm=norm, precision="highest")
    like = jax.eval_shape(lambda: step.init_state(model, 0, (224, 224, 3)))
    tensors = as_bninception(tensors)
    tensors["conv1_7x7_s2.weight"] = tensors["conv1_7x7_s2.weight"] / 64  # pixels go up to 255
    like = {"params": like.params, "batch_stats": like.batch_stats}
    variables = mapping.caffe(tensors, like)
    got = jax.jit(lambda v, i: model.apply(v, i, train=False))(variables, image)
    largest = np.abs(want).max()
    assert 0.1 < largest < 1e3 and np.std(want) > 0.05
    assert np.max(np.abs(got - want)) <= 1e-4 * largest
