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
    found = ""
    while names:
        longer = [found + prefix for prefix in PREFIXES]
        longer = [prefix for prefix in longer if all(name.startswith(prefix) for name in names)]
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

        found = found.reshape(shape).astype(np.promote_types(found.dtype, np.float32))
        finite = np.isfinite(found).all() and not (name.endswith("var") and found.min() < 0)
        if not (finite or name.endswith("/count")):
            self._wrong.append(f"{name} has values that are not finite, or variances below 0")
        return found

    def optional(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Takes a tensor that a file may lack; returns None if it does."""
        return self.take(name, shape) if name in self.tensors else None

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

        extra = sorted(n for n in self.tensors if n not in self._used and not ignored(n))
        found = [("missing", self._missing), ("extra", extra), ("wrong", self._wrong)]
        parts = [f"{len(names)} {kind}: {_named(names)}" for kind, names in found if names]
        if parts:
            raise ConfigError(f"tensors do not fit the network: {'; '.join(parts)}")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def _named(names: Sequence[str]) -> str:
    """Lists the first names, and says how many more there are."""
    shown = ", ".join(names[:SHOWN])
    more = len(names) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def num_classes(tensors: Mapping[str, np.ndarray], name: str, otherwise: int) -> int:
    """Returns the classes of a file's last layer, whose bias is `name`; `otherwise` without it."""
    return tensors[name].shape[0] if name in tensors and tensors[name].ndim == 1 else otherwise


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
        features = kernel[-1:]
        weight = source.take(f"{name}.weight", (*kernel[:1:-1], *kernel[:2]))
        weight = weight.transpose(2, 3, 1, 0)
        out.params[*path, "conv", "kernel"] = (
            weight[:, :, ::-1] if path == ("conv1_7x7",) else weight
        )
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
    out.params["classifier", "kernel"] = source.take("last_linear.weight", (classes, inputs)).T
    out.params["classifier", "bias"] = source.take("last_linear.bias", (classes,))
    source.finish(lambda name: name.endswith("_bn.num_batches_tracked"))
    return out.tree()


def _caffe_name(path: tuple[str, ...]) -> str:
    """Converts a path to Caffe's name: ('inception_3a', 'conv_3x3') to 'inception_3a_3x3'."""
    return "conv1_7x7_s2" if path == ("conv1_7x7",) else "_".join(path).replace("_conv_", "_")


def slim(
    tensors: Mapping[str, np.ndarray], like: Mapping[str, Any], *, background: bool
) -> dict[str, Any]:
    """Makes our variables from TF-slim's `inception_v2`, of `like`'s shapes.

    background: whether to keep class 0, 'background'; else our class k is their k + 1. BN has no
    scale (`gamma`) in the published checkpoint; one is taken if the file has it. The first
    convolution has a bias and no BN there; our BN then multiplies by 1 and adds that bias.
    """
    source = Source(tensors)
    out = _Variables()
    stem = f"{SLIM}/{SLIM_STEM['conv1_7x7']}"
    depthwise = like["params"]["conv1_7x7_depthwise"]["kernel"].shape  # [7, 7, 1, 3 * 8]
    weight = source.take(f"{stem}/depthwise_weights", (*depthwise[:2], 3, depthwise[3] // 3))
    out.params["conv1_7x7_depthwise", "kernel"] = weight.reshape(depthwise)
    for path, kernel in _convolutions(like):
        name = f"{SLIM}/{_slim_name(path)}"
        features = kernel[-1:]
        weights = "pointwise_weights" if path == ("conv1_7x7",) else "weights"
        out.params[*path, "conv", "kernel"] = source.take(f"{name}/{weights}", kernel)
        bias = source.optional(f"{name}/biases", features) if path == ("conv1_7x7",) else None
        if bias is not None:
            one = np.ones(features, np.float64)
            zero = np.zeros(features)
            out.bn(path, scale=one * np.sqrt(1 + EPSILON["slim"]), bias=bias, mean=zero, var=one)
            continue
        scale = source.optional(f"{name}/BatchNorm/gamma", features)
        out.bn(
            path,
            scale=np.ones(features) if scale is None else scale,
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
    if len(path) == 1:
        return SLIM_STEM[path[0]]
    row = next(row for row in TABLE if f"inception_{row.name}" == path[0])
    return f"Mixed_{SLIM_BLOCKS[row.name]}/{SLIM_BRANCHES[row.stride][path[1]]}"


def flax(tensors: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, Any]:
    """Makes variables from our own names, `params/...` and `batch_stats/...`, of `like`'s shapes.

    Statistics without `count`, as in plain Flax, are treated as converged.
    """
    source = Source(tensors)
    filled: dict[str, np.ndarray] = {}
    for path, leaf in traverse_util.flatten_dict(dict(like), sep="/").items():
        if path.endswith("/count"):
            found = source.optional(path, ())
            filled[path] = np.full((), CONVERGED, np.float32) if found is None else found
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
    return [
        (path[:-2], leaf.shape) for path, leaf in flat.items() if path[-2:] == ("conv", "kernel")
    ]
