"""Converts the tensors of other implementations to the variables of our network.

* `caffe`: the state dict of `bninception` (Cadene's pretrained-models.pytorch, ported from Caffe).
  Kernels [out, in, h, w], pixels in BGR order, each convolution with a bias before its BN.
* `slim`: TF-slim's `inception_v2`. Kernels [h, w, in, out], BN without a scale, a bias and no BN in
  the stem's first convolution. Class 0 is 'background'.
* `flax`: our own names, as `flax.serialization` or `bn_jax.export` write them.

Every tensor of the file must be used once, and every variable be filled.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from bn_jax.batch_norm import CONVERGED
from bn_jax.errors import ConfigError
from bn_jax.models.inception import TABLE

EPSILON = {"caffe": 1e-5, "slim": 1e-3}  # of BN in the published networks
SLIM = "InceptionV2"
SLIM_LOGITS = f"{SLIM}/Logits/Conv2d_1c_1x1"
SLIM_BLOCKS = {  # in TF-slim the pooling modules 3c and 4e belong to the next stage
    "3a": "3b", "3b": "3c", "3c": "4a", "4a": "4b", "4b": "4c",
    "4c": "4d", "4d": "4e", "4e": "5a", "5a": "5b", "5b": "5c",
}  # fmt: skip
SLIM_BRANCHES = {
    1: {
        "conv_1x1": "Branch_0/Conv2d_0a_1x1",
        "conv_3x3_reduce": "Branch_1/Conv2d_0a_1x1",
        "conv_3x3": "Branch_1/Conv2d_0b_3x3",
        "double_3x3_reduce": "Branch_2/Conv2d_0a_1x1",
        "double_3x3_1": "Branch_2/Conv2d_0b_3x3",
        "double_3x3_2": "Branch_2/Conv2d_0c_3x3",
        "pool_proj": "Branch_3/Conv2d_0b_1x1",
    },
    2: {
        "conv_3x3_reduce": "Branch_0/Conv2d_0a_1x1",
        "conv_3x3": "Branch_0/Conv2d_1a_3x3",
        "double_3x3_reduce": "Branch_1/Conv2d_0a_1x1",
        "double_3x3_1": "Branch_1/Conv2d_0b_3x3",
        "double_3x3_2": "Branch_1/Conv2d_1a_3x3",
    },
}
SLIM_STEM = {
    "conv1_7x7": "Conv2d_1a_7x7",
    "conv2_3x3_reduce": "Conv2d_2b_1x1",
    "conv2_3x3": "Conv2d_2c_3x3",
}


# DataParallel, Lightning, torch.compile and a saved checkpoint put these before every name.
PREFIXES = ("module.", "model.", "_orig_mod.", "state_dict.")
GOOGLENET = "inception3a.branch1.conv.weight"  # of torchvision and timm: another network
SHOWN = 5  # names in a message; the rest are counted


def common_prefix(names: Iterable[str]) -> str:
    """Finds a prefix that a program put before all names, such as `module.`; '' without one."""
    names = list(names)

    def before_all(prefix: str) -> bool:
        return all(name.startswith(prefix) for name in names)

    found = ""
    while names:
        longer = [found + prefix for prefix in PREFIXES if before_all(found + prefix)]
        if not longer:
            break
        found = longer[0]
    return found


class Source:
    """The tensors of a file; it collects what does not fit, for one message.

    A prefix that is common to all names (`common_prefix`) is removed. Raises ConfigError for the
    GoogLeNet of torchvision and timm, which is often mistaken for this network.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        skipped = len(common_prefix(tensors))
        self.tensors = {name[skipped:]: tensor for name, tensor in tensors.items()}
        self._used: set[str] = set()
        self._missing: list[str] = []
        self._wrong: list[str] = []

        if GOOGLENET in self.tensors:
            raise ConfigError(
                f"the file holds {GOOGLENET}: it is GoogLeNet of torchvision or timm, which has "
                "5x5 branches and other widths, not BN-Inception; see docs/weights.md for files "
                "that fit"
            )

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Takes a tensor of that shape, in floating point; zeros if there is none.

        Axes of length 1 do not count: older files have BN vectors of shape [1, C].
        """
        if name not in self.tensors:
            self._missing.append(name)
            return np.zeros(shape, np.float32)

        self._used.add(name)
        found = self.tensors[name]
        if _squeezed(found.shape) != _squeezed(shape):
            self._wrong.append(f"{name} has shape {list(found.shape)}, not {list(shape)}")
            return np.zeros(shape, np.float32)

        if found.dtype.kind in "iub" and not name.endswith("/count"):
            self._wrong.append(f"{name} has dtype {found.dtype}: it is quantized or not a weight")
            return np.zeros(shape, np.float32)

        dtype = np.promote_types(found.dtype, np.float32)
        found = found.reshape(shape).astype(dtype)
        negative = name.endswith("var") and found.min() < 0
        usable = np.isfinite(found).all() and not negative
        if not usable and not name.endswith("/count"):
            self._wrong.append(f"{name} has values that are not finite, or variances below 0")
        return found

    def optional(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Takes a tensor that a file may lack; returns None if it does."""
        if name not in self.tensors:
            return None
        return self.take(name, shape)

    def finish(self, ignored: Callable[[str], bool]) -> None:
        """Raises ConfigError if tensors are missing, left over or of the wrong shape.

        The message says how many there are of each kind, and names the first of them.
        """
        if not self._used:
            raise ConfigError(
                f"the file has none of the network's {len(self._missing)} tensors, such as "
                f"{_named(self._missing)}. It has {len(self.tensors)}: "
                f"{_named(sorted(self.tensors))}. Does it need another --variant?"
            )

        unused = sorted(self.tensors.keys() - self._used)
        found = {
            "missing": self._missing,
            "extra": [name for name in unused if not ignored(name)],
            "wrong": self._wrong,
        }
        parts = []
        for kind, names in found.items():
            if names:
                parts.append(f"{len(names)} {kind}: {_named(names)}")
        if parts:
            raise ConfigError(f"tensors do not fit the network: {'; '.join(parts)}")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def _named(names: Sequence[str]) -> str:
    """Lists the first names, and says how many more there are."""
    shown = ", ".join(names[:SHOWN])
    more = len(names) - SHOWN
    if more <= 0:
        return shown
    return f"{shown} and {more} more"


def num_classes(tensors: Mapping[str, np.ndarray], name: str, otherwise: int) -> int:
    """Returns the classes of a file's last layer, whose bias is `name`; `otherwise` without it."""
    if name not in tensors or tensors[name].ndim != 1:
        return otherwise
    return len(tensors[name])


def caffe(tensors: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, Any]:
    """Makes our variables from `bninception`'s state dict.

    like: `params` and `batch_stats` of our network, arrays or their shapes. The convolution's bias
    is subtracted from BN's mean, which is equivalent: (W u + b) - m = W u - (m - b). Our network
    gets RGB pixels, so the first kernel's input channels are reversed. The `caffe` variant itself
    subtracts Caffe's means, 128, 117 and 104 of R, G and B.
    """
    source = Source(tensors)
    out = _Variables()
    for path, kernel in _convolutions(like):
        name = _caffe_name(path)
        height, width, inputs, outputs = kernel
        features = (outputs,)

        weight = source.take(f"{name}.weight", (outputs, inputs, height, width))
        weight = weight.transpose(2, 3, 1, 0)
        if path == ("conv1_7x7",):
            weight = weight[:, :, ::-1]
        out.params[*path, "conv", "kernel"] = weight

        bias = source.optional(f"{name}.bias", features)
        if bias is None:  # some ports leave out the bias, which BN's mean cancels
            bias = np.zeros(features, np.float32)
        mean = source.take(f"{name}_bn.running_mean", features)
        out.bn(
            path,
            scale=source.take(f"{name}_bn.weight", features),
            bias=source.take(f"{name}_bn.bias", features),
            mean=mean - bias,
            var=source.take(f"{name}_bn.running_var", features),
        )

    inputs, classes = like["params"]["classifier"]["kernel"].shape
    weight = source.take("last_linear.weight", (classes, inputs))
    out.params["classifier", "kernel"] = weight.T
    out.params["classifier", "bias"] = source.take("last_linear.bias", (classes,))
    source.finish(lambda name: name.endswith("_bn.num_batches_tracked"))
    return out.tree()


def _caffe_name(path: tuple[str, ...]) -> str:
    """Converts a path to Caffe's name: ('inception_3a', 'conv_3x3') to 'inception_3a_3x3'."""
    if path == ("conv1_7x7",):
        return "conv1_7x7_s2"
    return "_".join(path).replace("_conv_", "_")


def slim(
    tensors: Mapping[str, np.ndarray],
    like: Mapping[str, Any],
    *,
    background: bool,
) -> dict[str, Any]:
    """Makes our variables from TF-slim's `inception_v2`, of `like`'s shapes.

    background: whether to keep class 0, 'background'; else our class k is their k + 1. BN has no
    scale (`gamma`) in the published checkpoint; one is taken if the file has it. The first
    convolution has a bias and no BN there; our BN then multiplies by 1 and adds that bias.
    """
    source = Source(tensors)
    out = _Variables()

    stem = f"{SLIM}/{SLIM_STEM['conv1_7x7']}"
    depthwise = like["params"]["conv1_7x7_depthwise"]["kernel"].shape
    height, width, _, outputs = depthwise  # [7, 7, 1, 3 * 8]
    weight = source.take(f"{stem}/depthwise_weights", (height, width, 3, outputs // 3))
    out.params["conv1_7x7_depthwise", "kernel"] = weight.reshape(depthwise)

    for path, kernel in _convolutions(like):
        name = f"{SLIM}/{_slim_name(path)}"
        features = kernel[-1:]
        if path == ("conv1_7x7",):
            weight = source.take(f"{name}/pointwise_weights", kernel)
            bias = source.optional(f"{name}/biases", features)
        else:
            weight = source.take(f"{name}/weights", kernel)
            bias = None
        out.params[*path, "conv", "kernel"] = weight

        if bias is not None:  # there is no BN: ours multiplies by 1 and adds the bias
            var = np.ones(features)
            out.bn(
                path,
                scale=np.sqrt(var + EPSILON["slim"]),
                bias=bias,
                mean=np.zeros(features),
                var=var,
            )
            continue

        scale = source.optional(f"{name}/BatchNorm/gamma", features)
        if scale is None:
            scale = np.ones(features)
        out.bn(
            path,
            scale=scale,
            bias=source.take(f"{name}/BatchNorm/beta", features),
            mean=source.take(f"{name}/BatchNorm/moving_mean", features),
            var=source.take(f"{name}/BatchNorm/moving_variance", features),
        )

    inputs, classes = like["params"]["classifier"]["kernel"].shape
    first = 0 if background else 1
    weight = source.take(f"{SLIM_LOGITS}/weights", (1, 1, inputs, classes + first))
    out.params["classifier", "kernel"] = weight[0, 0, :, first:]
    bias = source.take(f"{SLIM_LOGITS}/biases", (classes + first,))
    out.params["classifier", "bias"] = bias[first:]
    source.finish(lambda name: name == "global_step")
    return out.tree()


def _slim_name(path: tuple[str, ...]) -> str:
    """Converts a path to TF-slim's name, such as 'Mixed_3b/Branch_0/Conv2d_0a_1x1'."""
    if len(path) == 1:
        (name,) = path
        return SLIM_STEM[name]

    block, name = path
    (row,) = [row for row in TABLE if f"inception_{row.name}" == block]
    branch = SLIM_BRANCHES[row.stride][name]
    return f"Mixed_{SLIM_BLOCKS[row.name]}/{branch}"


def flax(tensors: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, Any]:
    """Makes variables from our own names, `params/...` and `batch_stats/...`, of `like`'s shapes.

    Statistics without `count`, as in plain Flax, are treated as converged.
    """
    source = Source(tensors)
    filled: dict[str, np.ndarray] = {}
    wanted = traverse_util.flatten_dict(dict(like), sep="/")
    for path, leaf in wanted.items():
        if path.endswith("/count") and path not in source.tensors:
            filled[path] = np.full((), CONVERGED, np.float32)
        else:
            filled[path] = source.take(path, tuple(leaf.shape))
    source.finish(lambda name: False)
    return {"batch_stats": {}, **traverse_util.unflatten_dict(filled, sep="/")}


class _Variables:
    """Collects leaves by path."""

    def __init__(self) -> None:
        self.params: dict[tuple[str, ...], np.ndarray] = {}
        self.stats: dict[tuple[str, ...], np.ndarray] = {}

    def bn(self, path: tuple[str, ...], *, scale, bias, mean, var) -> None:
        self.params[*path, "bn", "scale"] = scale
        self.params[*path, "bn", "bias"] = bias
        self.stats[*path, "bn", "mean"] = mean
        self.stats[*path, "bn", "var"] = var
        self.stats[*path, "bn", "count"] = np.full((), CONVERGED, np.float32)

    def tree(self) -> dict[str, Any]:
        return {
            "params": traverse_util.unflatten_dict(self.params),
            "batch_stats": traverse_util.unflatten_dict(self.stats),
        }


def _convolutions(like: Mapping[str, Any]) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Lists the paths of ConvBN modules, with the shapes [h, w, in, out] of their kernels."""
    flat = traverse_util.flatten_dict(dict(like["params"]))
    found = []
    for path, leaf in flat.items():
        *module, layer, name = path
        if (layer, name) == ("conv", "kernel"):
            found.append((tuple(module), leaf.shape))
    return found
