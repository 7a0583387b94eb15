"""Reads files of named tensors: safetensors, npz and Flax's msgpack. Nothing is unpickled."""

import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import serialization, traverse_util

from bn_jax.errors import ConfigError

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
PICKLES = (".pth", ".pt", ".pkl", ".pickle", ".bin", ".tar")
TENSORFLOW = (".ckpt", ".index", ".meta", ".h5", ".keras", ".pb")

FROM_TORCH = (
    "import torch; from safetensors.torch import save_file; "
    "save_file({{k: v.contiguous() for k, v in torch.load({0!r}, weights_only=True).items()}}, "
    "{1!r})"
)
FROM_TENSORFLOW = (
    "import numpy, tensorflow as tf; r = tf.train.load_checkpoint({0!r}); "
    "numpy.savez({1!r}, **{{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()}})"
)


class TensorFile(NamedTuple):
    """A file's tensors by name ('a/b' in nested trees), its texts, and its own SHA-256."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    sha256: str


def read(path: pathlib.Path) -> TensorFile:
    """Reads a file by its suffix: .safetensors, .npz or .msgpack.

    Raises ConfigError if it is absent, damaged, a pickle, or of another kind. For a pickle the
    message has the lines that convert it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; give --from a file that exists"
        ) from None
    refuse_stand_ins(path, data)
    refuse_pickles(path, data)
    if path.suffix == ".safetensors":
        tensors, metadata = _safetensors(path, data)
    elif path.suffix == ".npz":
        tensors = _npz(path, data)
        metadata = {}
    elif path.suffix == ".msgpack":
        tensors = _msgpack(path, data)
        metadata = {}
    else:
        raise ConfigError(
            f"{path}: files end in .safetensors, .npz or .msgpack (flax.serialization); "
            "docs/weights.md has the lines that write them"
        )
    return TensorFile(tensors, metadata, hashlib.sha256(data).hexdigest())


def refuse_stand_ins(path: pathlib.Path, data: bytes) -> None:
    """Raises ConfigError for files that are often found in place of a large one."""
    start = data[:200].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{path} is a pointer of Git LFS, not the file: run git lfs pull")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ConfigError(
            f"{path} is a web page, perhaps of a login or of an error: fetch the file again"
        )


def refuse_pickles(path: pathlib.Path, data: bytes) -> None:
    """Raises ConfigError, with the lines that convert it, for a pickle or a TensorFlow file."""
    zipped = data[:2] == b"PK" and b"/data.pkl" in data  # torch.save since 1.6
    # Pickle's protocols 2 to 5. A safetensors file may begin so, too, but then a brace follows.
    plain = data[:1] == b"\x80" and data[1:2] in b"\2\3\4\5" and data[8:9] != b"{"
    if zipped or plain or path.suffix in PICKLES:
        code = FROM_TORCH.format(str(path), str(path.with_suffix(".safetensors")))
        raise ConfigError(
            f"{path} is a pickle, which can run any code when it is read: it is not opened. "
            f'Convert it with your own torch: python -c "{code}"'
        )
    if path.suffix in TENSORFLOW or ".data-" in path.suffix:
        name = str(path).split(".ckpt")[0] + ".ckpt" if ".ckpt" in str(path) else str(path)
        code = FROM_TENSORFLOW.format(name, f"{path.with_name(path.name.split('.')[0])}.npz")
        raise ConfigError(
            f"{path} is TensorFlow's own format: convert it with your own TensorFlow: "
            f'python -c "{code}"'
        )


def _safetensors(path: pathlib.Path, data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        tensors = {
            name: np.frombuffer(found["data"], DTYPES[found["dtype"]]).reshape(found["shape"])
            for name, found in safetensors.deserialize(data)
        }
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, header.get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError) as error:
        raise ConfigError(f"{path} is not a safetensors file: {error}") from None
    except KeyError as error:
        raise ConfigError(f"{path}: tensors of dtype {error} cannot be read") from None


def _npz(path: pathlib.Path, data: bytes) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            tensors = {name: archive[name] for name in archive.files}
    except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0].replace("allow_pickle=False", "which is not opened")
        raise ConfigError(f"{path} is not an npz file of plain arrays: {reason}") from None

    return {name: _known(path, name, tensor) for name, tensor in tensors.items()}


def _known(path: pathlib.Path, name: str, tensor: np.ndarray) -> np.ndarray:
    """Restores the number format of an npz file's tensor, which numpy drops for bfloat16."""
    if tensor.dtype == np.dtype("V2"):  # the only format of two bytes that numpy has no name for
        return tensor.view(ml_dtypes.bfloat16)
    if tensor.dtype.kind not in "fiub":
        raise ConfigError(
            f"{path}: {name} has dtype {tensor.dtype}, which is not a number: save it as float32"
        )
    return tensor


def _msgpack(path: pathlib.Path, data: bytes) -> dict[str, np.ndarray]:
    try:
        tree = serialization.msgpack_restore(data)
        flat: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    except Exception as error:  # msgpack, flax and numpy each have their own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{path} is not a tree of flax.serialization: {reason}") from None
    for name, leaf in flat.items():
        if not hasattr(leaf, "dtype"):
            raise ConfigError(
                f"{path}: {name} is of type {type(leaf).__name__}, not an array: save params and "
                "batch_stats alone, not a whole train state"
            )
    return {name: np.asarray(leaf) for name, leaf in flat.items()}


def safetensors_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Makes a safetensors file. Raises KeyError for a dtype that the format does not have."""
    return safetensors.numpy.save(
        {name: np.ascontiguousarray(t).reshape(np.shape(t)) for name, t in tensors.items()},
        dict(metadata) or None,
    )
