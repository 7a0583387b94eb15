"""The formats of `bn_jax.export`: a network to a file's bytes, and a file run again.

Each `write` takes a network and a batch (None: any) and returns bytes; each `run` takes the file
and images uint8 [N, H, W, C] and returns logits [N, classes].
"""

import argparse
import contextlib
import importlib
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization, traverse_util
from jax import export

from bn_jax import models, ops
from bn_jax.errors import ConfigError, UserError
from bn_jax.layers import LocalResponseNorm
from bn_jax.models.inception import SMALLEST_FOR_POOL2, TABLE, VARIANTS, Fig5Row
from bn_jax.weights import importing, network, tensor_files
from bn_jax.weights.network import Network, folded
from bn_jax.workdir import files

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # what a StableHLO file can be run on


class Format(NamedTuple):
    """A kind of file: its suffix, how it is written and run, packages of the extra [export]."""

    suffix: str
    write: Callable[[Network, int | None], bytes]
    run: Callable[[pathlib.Path, np.ndarray], np.ndarray]
    packages: tuple[str, ...] = ()


def write_stablehlo(network: Network, batch: int | None) -> bytes:
    """`jax.export`'s serialization, for any of PLATFORMS; read by `jax.export.deserialize`."""
    network = folded(network)
    size: Any = export.symbolic_shape("batch")[0] if batch is None else batch
    images = jax.ShapeDtypeStruct((size, *network.image_shape), np.uint8)
    with ops.plain():  # hand-tuned forms are for this machine's CPU
        exported = export.export(jax.jit(network.logits), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def run_stablehlo(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """The file, through `jax.export`, on this machine's device."""
    return np.asarray(export.deserialize(bytearray(path.read_bytes())).call(images))


def write_onnx(network: Network, batch: int | None) -> bytes:
    """An ONNX model with input `images` and output `logits`."""
    network = folded(network)
    return model(network, batch, network.texts())


def run_onnx(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """The file, through onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"images": images})[0])


def write_safetensors(network: Network, batch: int | None) -> bytes:
    """Kernels and biases by path, [h, w, in, out]; config and preprocessing as metadata."""
    network = folded(network)
    flat = traverse_util.flatten_dict(network.variables, sep="/")
    return tensor_files.safetensors_bytes(flat, network.texts())


def run_safetensors(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """The file, read as `bn_jax.import_weights --variant=flax` reads it."""
    file = tensor_files.read(path)
    return _run_tensors(file, importing.recorded_config(path, file), images)


def write_flax(network: Network, batch: int | None) -> bytes:
    """`params` and `batch_stats` (not folded) as plain Flax has them, by flax.serialization."""
    flat = traverse_util.flatten_dict(network.variables)
    plain = {path: leaf for path, leaf in flat.items() if path[-1] != "count"}
    return serialization.to_bytes(traverse_util.unflatten_dict(plain))


def _run_tensors(file: tensor_files.TensorFile, config: Any, images: np.ndarray) -> np.ndarray:
    variables, _ = importing.variables(file, "flax", config, background=False)
    classes = variables["params"]["classifier"]["bias"].size
    model = models.build(config, classes)

    def logits(images: jax.Array) -> Any:
        return model.apply(variables, images, train=False)

    return np.asarray(jax.jit(logits)(images))


def formats(network: Network | None = None) -> dict[str, Format]:
    """By name. `network`: whose config the plain Flax file, which carries none, is run with."""

    def run_flax(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
        assert network is not None
        return _run_tensors(tensor_files.read(path), network.config, images)

    return {
        "stablehlo": Format(".stablehlo", write_stablehlo, run_stablehlo, ("flatbuffers",)),
        "onnx": Format(".onnx", write_onnx, run_onnx, ("onnx", "onnxruntime")),
        "safetensors": Format(".safetensors", write_safetensors, run_safetensors),
        "flax": Format(".msgpack", write_flax, run_flax),
    }


def require(name: str) -> None:
    """Raises ConfigError that names the extra unless the format's packages can be imported."""
    packages = formats()[name].packages
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"--format={name} needs {' and '.join(packages)} ({error}): "
                "pip install 'bn_jax[export]'"
            ) from None


# An inference network as an ONNX graph, written layer by layer with `onnx.helper`.
#
# The walk is that of models/inception.py and models/mlp.py; `bn_jax.export` runs the file and
# compares before it keeps it. Maps are [N, C, H, W] inside, as ONNX wants them.


OPSET = 17
IR_VERSION = 8  # of that opset's time: newer ones are refused by older runtimes
ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid"}

Pads = tuple[int, int]  # cells before and after, of an axis


class Map(NamedTuple):
    """A tensor of the graph: its name, channels, and height and width."""

    name: str
    channels: int
    size: tuple[int, int]


class Writer:
    """Collects nodes and constants of one graph."""

    def __init__(self, network: Network):
        from onnx import helper, numpy_helper  # an extra: [export]

        self._node = helper.make_node
        self._tensor = numpy_helper.from_array
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.network = network
        self.config = network.config
        self.activation = ACTIVATIONS[self.config.activation]

    def add(self, operation: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output; its name."""
        name = f"{operation.lower()}_{len(self.nodes)}"
        self.nodes.append(self._node(operation, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """An initializer; its name."""
        name = f"constant_{len(self.constants)}"
        array = np.ascontiguousarray(np.asarray(value, dtype))
        self.constants.append(self._tensor(array.reshape(np.shape(value)), name))
        return name

    def leaf(self, collection: str, *path: str) -> dict[str, Any]:
        """A subtree of the variables; {} where there is none."""
        tree: dict[str, Any] = self.network.variables.get(collection, {})
        for part in path:
            tree = tree.get(part, {})
        return tree

    def conv(self, x: Map, kernel: Any, bias: Any, stride: int, pads: Callable, group: int) -> Map:
        """A convolution; kernel [h, w, in, out]."""
        edges = [pads(n, kernel.shape[0], stride) for n in x.size]
        inputs = [x.name, self.constant(np.transpose(kernel, (3, 2, 0, 1)))]
        name = self.add(
            "Conv",
            *inputs,
            *([] if bias is None else [self.constant(bias)]),
            kernel_shape=list(kernel.shape[:2]),
            strides=[stride, stride],
            pads=_flat(edges),
            group=group,
        )
        return Map(name, kernel.shape[3], _size(x.size, edges, kernel.shape[0], stride))

    def conv_bn(self, x: Map, path: tuple[str, ...], stride: int, pads: Callable) -> Map:
        """layers.ConvBN: convolution, BN where it could not be folded, nonlinearity."""
        conv = self.leaf("params", *path, "conv")
        stats = self.leaf("batch_stats", *path, "bn")
        if not stats:
            y = self.conv(x, conv["kernel"], conv["bias"], stride, pads, 1)
            return y._replace(name=self.add(self.activation, y.name))
        bn = self.leaf("params", *path, "bn")
        gain = bn["scale"] / np.sqrt(stats["var"] + self.config.bn.epsilon)
        shift = bn["bias"] - stats["mean"] * gain
        if gain.ndim == 1:
            y = self.conv(x, conv["kernel"] * gain, shift, stride, pads, 1)
        else:
            y = self.conv(x, conv["kernel"], None, stride, pads, 1)
            gain, shift = (self.constant(np.transpose(v, (2, 0, 1))) for v in (gain, shift))
            y = y._replace(name=self.add("Add", self.add("Mul", y.name, gain), shift))
        return y._replace(name=self.add(self.activation, y.name))

    def pool(self, operation: str, x: Map, stride: int, pads: Callable, **attributes: Any) -> Map:
        """A 3x3 pool."""
        edges = [pads(n, 3, stride) for n in x.size]
        name = self.add(
            operation,
            x.name,
            kernel_shape=[3, 3],
            strides=[stride, stride],
            pads=_flat(edges),
            **attributes,
        )
        return Map(name, x.channels, _size(x.size, edges, 3, stride))

    def dense(self, x: str, params: dict[str, Any]) -> str:
        """x W + b."""
        return self.add("Gemm", x, *(self.constant(params[name]) for name in ("kernel", "bias")))


def model(network: Network, batch: int | None, metadata: dict[str, str]) -> bytes:
    """The serialized model: images uint8 [batch, H, W, C] to logits [batch, classes].

    batch: None leaves it open. Raises ImportError without the package onnx.
    """
    import onnx
    from onnx import TensorProto, helper

    writer = Writer(network)
    walk = _mlp if network.config.model.name == "mlp" else _inception
    walk(writer)
    size: Any = "batch" if batch is None else batch
    graph = helper.make_graph(
        writer.nodes,
        "bn_jax",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [size, *network.image_shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [size, network.classes])],
        writer.constants,
    )
    made = helper.make_model(
        graph,
        producer_name="bn_jax",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
        doc_string=network.preprocessing(),
    )
    helper.set_model_props(made, metadata)
    onnx.checker.check_model(made, full_check=True)
    return made.SerializeToString()


def _mlp(writer: Writer) -> None:
    """models/mlp.py."""
    config = writer.config
    pixels = writer.add("Cast", "images", to=1)  # float
    bright = writer.add("Greater", pixels, writer.constant(config.model.threshold * 255))
    x = writer.add("Flatten", writer.add("Cast", bright, to=1), axis=1)
    for i in range(len(config.model.widths)):
        x = writer.add(
            writer.activation, writer.dense(x, writer.leaf("params", f"dense_{i}")["dense"])
        )
    _classifier(writer, x)


def _classifier(writer: Writer, x: str) -> None:
    logits = writer.dense(x, writer.leaf("params", "classifier"))
    writer.nodes[-1].output[0] = "logits"
    assert writer.nodes[-1].name == logits


def _inception(writer: Writer) -> None:
    """models/inception.py, in evaluation."""
    variant = VARIANTS[writer.config.model.variant]
    x = _stem(writer, symmetric=variant.symmetric)
    for row in TABLE:
        x = _block(writer, x, row, symmetric=variant.symmetric)
    _classifier(writer, writer.add("Flatten", writer.add("GlobalAveragePool", x.name), axis=1))


def _stem(writer: Writer, *, symmetric: bool) -> Map:
    config = writer.config
    (height, width, channels) = writer.network.image_shape
    variant = VARIANTS[config.model.variant]
    mean = variant.mean if channels == 3 else [sum(variant.mean) / 3] * channels
    pixels = writer.add("Cast", "images", to=1)
    centered = writer.add("Sub", pixels, writer.constant(mean))
    scaled = writer.add("Div", centered, writer.constant(variant.scale))
    x = Map(writer.add("Transpose", scaled, perm=[0, 3, 1, 2]), channels, (height, width))
    keep_pool2 = min(x.size) >= SMALLEST_FOR_POOL2
    seven: Callable = (lambda n, window, stride: (3, 3)) if symmetric else same
    depthwise = writer.leaf("params", "conv1_7x7_depthwise")
    if depthwise:
        x = writer.conv(x, depthwise["kernel"], None, 2, seven, channels)
        x = writer.conv_bn(x, ("conv1_7x7",), 1, same)
    else:
        x = writer.conv_bn(x, ("conv1_7x7",), 2, seven)
    x = writer.pool("MaxPool", x, 2, unpadded if symmetric else same)
    x = _lrn(writer, x) if config.lrn else x
    x = writer.conv_bn(x, ("conv2_3x3_reduce",), 1, same)
    x = writer.conv_bn(x, ("conv2_3x3",), 1, same)
    x = _lrn(writer, x) if config.lrn else x
    return writer.pool("MaxPool", x, 2, unpadded if symmetric else same) if keep_pool2 else x


def _lrn(writer: Writer, x: Map) -> Map:
    norm = LocalResponseNorm()
    name = writer.add("LRN", x.name, size=norm.size, alpha=norm.alpha, beta=norm.beta, bias=norm.k)
    return x._replace(name=name)


def _block(writer: Writer, x: Map, row: Fig5Row, *, symmetric: bool) -> Map:
    block = f"inception_{row.name}"
    pads: Callable = (lambda n, window, stride: (1, 1)) if symmetric else same

    def conv(name: str, x: Map, stride: int = 1) -> Map:
        return writer.conv_bn(x, (block, name), stride, same if stride == 1 else pads)

    branches = [conv("conv_1x1", x)] if row.one else []
    branches.append(conv("conv_3x3", conv("conv_3x3_reduce", x), row.stride))
    double = conv("double_3x3_1", conv("double_3x3_reduce", x))
    branches.append(conv("double_3x3_2", double, row.stride))
    if row.pool == "max":
        pooled = writer.pool("MaxPool", x, row.stride, same)
    else:
        pooled = writer.pool("AveragePool", x, 1, same, count_include_pad=int(symmetric))
    branches.append(conv("pool_proj", pooled) if row.project else pooled)
    name = writer.add("Concat", *(branch.name for branch in branches), axis=1)
    return Map(name, sum(branch.channels for branch in branches), branches[0].size)


def same(n: int, window: int, stride: int) -> Pads:
    """XLA's and TensorFlow's SAME: ceil(n / stride) outputs, the odd cell after."""
    total = max((-(-n // stride) - 1) * stride + window - n, 0)
    return total // 2, total - total // 2


def unpadded(n: int, window: int, stride: int) -> Pads:
    """Caffe's pools in the stem (ops.max_pool_unpadded): nothing before, one after an even n."""
    return (0, 0) if n % 2 else (0, 1)


def _size(size: tuple[int, int], edges: list[Pads], window: int, stride: int) -> tuple[int, int]:
    height, width = (
        (n + sum(edge) - window) // stride + 1 for n, edge in zip(size, edges, strict=True)
    )
    return height, width


def _flat(edges: list[Pads]) -> list[int]:
    """ONNX lists what comes before on every axis, then what comes after."""
    return [edge[0] for edge in edges] + [edge[1] for edge in edges]


TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order differ by some 1e-6


def largest_difference(got: np.ndarray, want: np.ndarray) -> float:
    """max |got - want| / max |want|; infinity if the shapes differ or a value is not finite."""
    if got.shape != want.shape or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    return float(np.abs(got - want).max() / np.abs(want).max())


def export_run(net: network.Network, name: str, batch: int | None, out: pathlib.Path) -> float:
    """Writes the network to `out` in one of the formats; returns the largest difference found.

    Raises UserError, and leaves no file, if what was written gives other logits than the network.
    """
    kind = formats(net)[name]
    scratch = out.with_name(f".{out.name}.{os.getpid()}{kind.suffix}")
    data = kind.write(net, batch)
    try:
        with files.reported(out, "cannot write"):
            out.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(data)
        sizes = (3, 1) if batch is None else (batch,)
        images = network.examples(net, sizes[0])
        want = np.asarray(jax.jit(net.logits)(images))
        worst = max(
            largest_difference(kind.run(scratch, images[:size]), want[:size]) for size in sizes
        )
        if not worst <= TOLERANCE:
            raise UserError(
                f"{out} is not written: run again as {name}, its logits differ from the network's "
                f"by {worst:.1e} of the largest one, the limit is {TOLERANCE:g}; please report it"
            )
        with files.reported(out, "cannot write"):
            scratch.replace(out)
            files.sync_directory(out.parent)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
    return worst


def batch_size(text: str) -> int | None:
    """'any' to None, else a positive number."""
    if text == "any":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'any' nor a number from 1 on")
    return int(text)
