"""The formats of `bn_jax.export`: a network to a file's bytes, and a file run again.

Each `write` takes a network and a batch (None: any) and returns bytes; each `run` takes the file
and images uint8 [N, H, W, C] and returns logits [N, classes].
"""

import importlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization, traverse_util
from jax import export

from bn_jax import import_weights, models, ops
from bn_jax.errors import ConfigError
from bn_jax.weights import onnx_graph, tensor_files
from bn_jax.weights.network import Network, folded

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
    return onnx_graph.model(network, batch, network.texts())


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
    return _run_tensors(file, import_weights.recorded_config(path, file), images)


def write_flax(network: Network, batch: int | None) -> bytes:
    """`params` and `batch_stats` (not folded) as plain Flax has them, by flax.serialization."""
    flat = traverse_util.flatten_dict(network.variables)
    plain = {path: leaf for path, leaf in flat.items() if path[-1] != "count"}
    return serialization.to_bytes(traverse_util.unflatten_dict(plain))


def _run_tensors(file: tensor_files.TensorFile, config: Any, images: np.ndarray) -> np.ndarray:
    variables, _ = import_weights.variables(file, "flax", config, background=False)
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
