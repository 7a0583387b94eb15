"""Defines the formats of `bn_jax.export`: writes a network to a file, and runs the file again.

Each `write` takes a network and a batch size (None: any) and returns the bytes of a file. Each
`run` takes a file and images uint8 [N, H, W, C] and returns logits [N, classes].
"""

import argparse
import contextlib
import datetime
import importlib
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization, traverse_util
from jax import export, lax

from bn_jax import models, ops
from bn_jax.errors import ConfigError, UserError
from bn_jax.layers import LocalResponseNorm
from bn_jax.models.inception import SMALLEST_FOR_POOL2, TABLE, VARIANTS, Fig5Row
from bn_jax.weights import importing, network, tensor_files
from bn_jax.weights.network import Network, folded
from bn_jax.workdir import files

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # what a StableHLO file can be run on
READABLE = datetime.timedelta(days=181)  # six months, by jax's promise


class Format(NamedTuple):
    """A kind of file.

    Attributes:
      suffix: of its name.
      write: the file's bytes from a network and a batch size.
      run: the logits of images, computed from the file.
      packages: those of the extra [export] that it needs.
    """

    suffix: str
    write: Callable[[Network, int | None], bytes]
    run: Callable[[pathlib.Path, np.ndarray], np.ndarray]
    packages: tuple[str, ...] = ()


def stablehlo_label(network: Network) -> str:
    """Returns the text in a StableHLO file: network, date, jax's version, how long it can be read.

    A version of jax promises to read files of versions released at most six months before it.
    """
    today = datetime.date.today()
    return (
        f"logits of {network.config.name}, step {network.about.get('step', '?')}, exported {today} "
        f"by jax {jax.__version__}; read by jax versions released up to 6 months after that one: "
        f"export again before {today + READABLE}"
    )


def write_stablehlo(network: Network, batch: int | None) -> bytes:
    """Serializes the network with `jax.export`, for all PLATFORMS.

    `jax.export.deserialize` reads it, and its `fun_name` is then `stablehlo_label`.
    """
    label = stablehlo_label(network)
    network = folded(network)

    size: Any = batch
    if batch is None:
        (size,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((size, *network.image_shape), np.uint8)

    def logits(images: Any) -> Any:
        return network.logits(images)

    logits.__name__ = label  # the only text that the format keeps
    with ops.plain():  # hand-tuned forms would be those of this machine's backend
        exported = export.export(jax.jit(logits), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def run_stablehlo(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """Runs the file by `jax.export` on this machine's device."""
    exported = export.deserialize(bytearray(path.read_bytes()))
    return np.asarray(exported.call(images))


def write_onnx(network: Network, batch: int | None) -> bytes:
    """Writes an ONNX model with input `images` and output `logits`."""
    network = folded(network)
    return model(network, batch, network.texts())


def run_onnx(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """Runs the file by onnxruntime on the CPU."""
    import onnxruntime  # an extra: [export]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images})
    return np.asarray(logits)


def write_safetensors(network: Network, batch: int | None) -> bytes:
    """Writes kernels [h, w, in, out] and biases by path; metadata say config and preprocessing."""
    network = folded(network)
    flat = traverse_util.flatten_dict(network.variables, sep="/")
    return tensor_files.safetensors_bytes(flat, network.texts())


def run_safetensors(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """Runs the network of the file, read as `bn_jax.import_weights --variant=flax` reads it."""
    file = tensor_files.read(path)
    config = importing.recorded_config(path, file)
    return _run_tensors(file, config, images)


def write_flax(network: Network, batch: int | None) -> bytes:
    """Writes `params` and `batch_stats`, not folded, in the form of flax.linen.BatchNorm."""
    flat = traverse_util.flatten_dict(network.variables)
    plain = {path: leaf for path, leaf in flat.items() if path[-1] != "count"}
    tree = traverse_util.unflatten_dict(plain)
    return serialization.to_bytes(tree)


def _run_tensors(file: tensor_files.TensorFile, config: Any, images: np.ndarray) -> np.ndarray:
    """Runs the network of a config with the variables of a file."""
    variables, _ = importing.variables(file, "flax", config, background=False)
    classes = variables["params"]["classifier"]["bias"].size
    model = models.build(config, classes)

    def logits(images: jax.Array) -> Any:
        return model.apply(variables, images, train=False)

    return np.asarray(jax.jit(logits)(images))


def formats(network: Network | None = None) -> dict[str, Format]:
    """Returns the formats by name.

    Args:
      network: its config is used to run a plain Flax file, which does not hold one.
    """

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
    """Raises a ConfigError that names the extra if a package of the format cannot be imported."""
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
# The layers are those of models/inception.py and models/mlp.py, in their order. Maps are
# [N, C, H, W] in the graph, as ONNX has them. The graph is run and compared with the network before
# the file is kept (`export_run`).


OPSET = 17
IR_VERSION = 8  # as old as that opset: older runtimes refuse newer ones
FLOAT = 1  # onnx.TensorProto.FLOAT
ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid"}

Pads = tuple[int, int]  # cells before and after an axis


class Map(NamedTuple):
    """A tensor [N, C, H, W] of the graph: its name, its channels, and (height, width)."""

    name: str
    channels: int
    size: tuple[int, int]


class Writer:
    """Collects the nodes and constants of one graph."""

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
        """Adds a node with one output, and returns the name of the two."""
        name = f"{operation.lower()}_{len(self.nodes)}"
        node = self._node(operation, list(inputs), [name], name=name, **attributes)
        self.nodes.append(node)
        return name

    def constant(self, value: Any) -> str:
        """Adds an initializer in float32, and returns its name."""
        name = f"constant_{len(self.constants)}"
        array = np.ascontiguousarray(np.asarray(value, np.float32))
        array = array.reshape(np.shape(value))  # a scalar stays one
        self.constants.append(self._tensor(array, name))
        return name

    def leaf(self, collection: str, *path: str) -> dict[str, Any]:
        """Returns a subtree of the variables, or {} if there is none."""
        tree: dict[str, Any] = self.network.variables.get(collection, {})
        for part in path:
            tree = tree.get(part, {})
        return tree

    def conv(self, x: Map, kernel: Any, bias: Any, stride: int, pads: Callable, group: int) -> Map:
        """Adds a convolution with a square kernel [h, w, in, out], and a bias or None."""
        window, _, _, channels = kernel.shape
        edges = [pads(n, window, stride) for n in x.size]

        inputs = [x.name, self.constant(np.transpose(kernel, (3, 2, 0, 1)))]
        if bias is not None:
            inputs.append(self.constant(bias))

        name = self.add(
            "Conv",
            *inputs,
            kernel_shape=[window, window],
            strides=[stride, stride],
            pads=_flat(edges),
            group=group,
        )
        return Map(name, channels, _size(x.size, edges, window, stride))

    def conv_bn(self, x: Map, path: tuple[str, ...], stride: int, pads: Callable) -> Map:
        """Adds a layers.ConvBN: convolution, BN if it could not be folded, nonlinearity."""
        conv = self.leaf("params", *path, "conv")
        kernel = conv["kernel"]
        stats = self.leaf("batch_stats", *path, "bn")

        if not stats:  # BN is folded into the convolution
            y = self.conv(x, kernel, conv["bias"], stride, pads, 1)
            return y._replace(name=self.add(self.activation, y.name))

        bn = self.leaf("params", *path, "bn")
        gain = bn["scale"] / np.sqrt(stats["var"] + self.config.bn.epsilon)
        shift = bn["bias"] - stats["mean"] * gain
        if gain.ndim == 1:
            y = self.conv(x, kernel * gain, shift, stride, pads, 1)
        else:  # per activation, [H, W, C]
            y = self.conv(x, kernel, None, stride, pads, 1)
            gain_name = self.constant(np.transpose(gain, (2, 0, 1)))
            shift_name = self.constant(np.transpose(shift, (2, 0, 1)))
            scaled = self.add("Mul", y.name, gain_name)
            y = y._replace(name=self.add("Add", scaled, shift_name))
        return y._replace(name=self.add(self.activation, y.name))

    def pool(self, operation: str, x: Map, stride: int, pads: Callable, **attributes: Any) -> Map:
        """Adds a 3x3 pool."""
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
        """Adds a dense layer, x W + b."""
        kernel = self.constant(params["kernel"])
        bias = self.constant(params["bias"])
        return self.add("Gemm", x, kernel, bias)


def model(network: Network, batch: int | None, metadata: dict[str, str]) -> bytes:
    """Makes and serializes the model: images uint8 [batch, H, W, C] to logits [batch, classes].

    With a batch of None any size will do. Raises ImportError without the package onnx.
    """
    import onnx
    from onnx import TensorProto, helper

    writer = Writer(network)
    if network.config.model.name == "mlp":
        _mlp(writer)
    else:
        _inception(writer)

    size: Any = "batch" if batch is None else batch
    images = helper.make_tensor_value_info(
        "images", TensorProto.UINT8, [size, *network.image_shape]
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [size, network.classes])
    graph = helper.make_graph(writer.nodes, "bn_jax", [images], [logits], writer.constants)

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
    """Writes the network of models/mlp.py."""
    model = writer.config.model
    pixels = writer.add("Cast", "images", to=FLOAT)
    bright = writer.add("Greater", pixels, writer.constant(model.threshold * 255))
    binary = writer.add("Cast", bright, to=FLOAT)
    x = writer.add("Flatten", binary, axis=1)

    for i in range(len(model.widths)):
        layer = writer.leaf("params", f"dense_{i}")
        x = writer.dense(x, layer["dense"])
        x = writer.add(writer.activation, x)
    _classifier(writer, x)


def _classifier(writer: Writer, x: str) -> None:
    """Writes the last layer, whose output is the graph's."""
    name = writer.dense(x, writer.leaf("params", "classifier"))
    last = writer.nodes[-1]
    assert last.name == name
    last.output[0] = "logits"


def _inception(writer: Writer) -> None:
    """Writes the network of models/inception.py, in evaluation."""
    variant = VARIANTS[writer.config.model.variant]
    x = _stem(writer, symmetric=variant.symmetric)
    for row in TABLE:
        x = _block(writer, x, row, symmetric=variant.symmetric)

    pooled = writer.add("GlobalAveragePool", x.name)
    flat = writer.add("Flatten", pooled, axis=1)
    _classifier(writer, flat)


def _stem(writer: Writer, *, symmetric: bool) -> Map:
    config = writer.config
    height, width, channels = writer.network.image_shape
    keep_pool2 = min(height, width) >= SMALLEST_FOR_POOL2
    pool_pads = unpadded if symmetric else same
    conv1_pads = three if symmetric else same

    # Preprocessing; grey images have the mean of the three colours.
    variant = VARIANTS[config.model.variant]
    mean = variant.mean if channels == 3 else [sum(variant.mean) / 3] * channels
    pixels = writer.add("Cast", "images", to=FLOAT)
    centered = writer.add("Sub", pixels, writer.constant(mean))
    scaled = writer.add("Div", centered, writer.constant(variant.scale))
    name = writer.add("Transpose", scaled, perm=[0, 3, 1, 2])
    x = Map(name, channels, (height, width))

    depthwise = writer.leaf("params", "conv1_7x7_depthwise")
    if depthwise:
        x = writer.conv(x, depthwise["kernel"], None, 2, conv1_pads, channels)
        x = writer.conv_bn(x, ("conv1_7x7",), 1, same)
    else:
        x = writer.conv_bn(x, ("conv1_7x7",), 2, conv1_pads)

    x = writer.pool("MaxPool", x, 2, pool_pads)
    if config.lrn:
        x = _lrn(writer, x)
    x = writer.conv_bn(x, ("conv2_3x3_reduce",), 1, same)
    x = writer.conv_bn(x, ("conv2_3x3",), 1, same)
    if config.lrn:
        x = _lrn(writer, x)
    if keep_pool2:
        x = writer.pool("MaxPool", x, 2, pool_pads)
    return x


def _lrn(writer: Writer, x: Map) -> Map:
    norm = LocalResponseNorm()
    name = writer.add("LRN", x.name, size=norm.size, alpha=norm.alpha, beta=norm.beta, bias=norm.k)
    return x._replace(name=name)


def _block(writer: Writer, x: Map, row: Fig5Row, *, symmetric: bool) -> Map:
    block = f"inception_{row.name}"

    def conv(name: str, x: Map, stride: int = 1) -> Map:
        pads = one if symmetric and stride > 1 else same
        return writer.conv_bn(x, (block, name), stride, pads)

    branches = []
    if row.one:
        branches.append(conv("conv_1x1", x))

    reduced = conv("conv_3x3_reduce", x)
    branches.append(conv("conv_3x3", reduced, row.stride))

    reduced = conv("double_3x3_reduce", x)
    double = conv("double_3x3_1", reduced)
    branches.append(conv("double_3x3_2", double, row.stride))

    if row.pool == "max":
        pooled = writer.pool("MaxPool", x, row.stride, same)
    else:
        pooled = writer.pool("AveragePool", x, 1, same, count_include_pad=int(symmetric))
    if row.project:
        pooled = conv("pool_proj", pooled)
    branches.append(pooled)

    names = [branch.name for branch in branches]
    channels = sum(branch.channels for branch in branches)
    return Map(writer.add("Concat", *names, axis=1), channels, branches[0].size)


# The padding of an axis of n cells, for a window and a stride.


def same(n: int, window: int, stride: int) -> Pads:
    """Pads as SAME of XLA and TensorFlow: ceil(n / stride) outputs, and an odd cell after."""
    [pads] = lax.padtype_to_pads((n,), (window,), (stride,), "SAME")
    return pads


def unpadded(n: int, window: int, stride: int) -> Pads:
    """Pads as Caffe's pools in the stem (ops.max_pool_unpadded): one cell after an even n."""
    return (0, 0) if n % 2 else (0, 1)


def one(n: int, window: int, stride: int) -> Pads:
    """Pads as Caffe's 3x3 convolutions: one cell on both sides."""
    return 1, 1


def three(n: int, window: int, stride: int) -> Pads:
    """Pads as Caffe's 7x7 convolution: three cells on both sides."""
    return 3, 3


def _size(size: tuple[int, int], edges: list[Pads], window: int, stride: int) -> tuple[int, int]:
    """Returns the size of a map after a convolution or pool."""

    def outputs(n: int, pads: Pads) -> int:
        return (n + sum(pads) - window) // stride + 1

    return outputs(size[0], edges[0]), outputs(size[1], edges[1])


def _flat(edges: list[Pads]) -> list[int]:
    """Orders paddings as ONNX does: before on every axis, then after on every axis."""
    before = [edge[0] for edge in edges]
    after = [edge[1] for edge in edges]
    return before + after


# Writing a file, and checking it.


TOLERANCE = 1e-4  # of the largest logit; float32 sums in another order differ by about 1e-6


def largest_difference(got: np.ndarray, want: np.ndarray) -> float:
    """Returns max |got - want| / max |want|; infinity if shapes differ or a value is not finite."""
    if got.shape != want.shape:
        return float("inf")
    if not np.isfinite(got).all() or not np.isfinite(want).all():
        return float("inf")

    difference = np.abs(got - want).max()
    largest = np.abs(want).max()
    return float(difference / largest)


def export_run(net: network.Network, name: str, batch: int | None, out: pathlib.Path) -> float:
    """Writes the network to `out` in one of the formats; returns the largest difference found.

    Raises UserError, and leaves no file, if what was written gives other logits than the network.
    """
    kind = formats(net)[name]
    data = kind.write(net, batch)
    scratch = out.with_name(f".{out.name}.{os.getpid()}{kind.suffix}")
    try:
        with files.reported(out, "cannot write"):
            out.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(data)

        # The file is run before it has its name.
        sizes = (3, 1) if batch is None else (batch,)
        images = network.examples(net, sizes[0])
        want = np.asarray(jax.jit(net.logits)(images))
        differences = []
        for size in sizes:
            got = kind.run(scratch, images[:size])
            differences.append(largest_difference(got, want[:size]))
        worst = max(differences)

        if not worst <= TOLERANCE:
            raise UserError(
                f"{out} was not written: the {name} file's logits differ from the network's by "
                f"{worst:.1e} of the largest logit, and the limit is {TOLERANCE:g}; please report "
                "this"
            )

        with files.reported(out, "cannot write"):
            scratch.replace(out)
            files.sync_directory(out.parent)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
    return worst


def batch_size(text: str) -> int | None:
    """Parses --batch: None for 'any', else a positive number."""
    if text == "any":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither 'any' nor a number of images, 1 or more"
        )
    return int(text)
