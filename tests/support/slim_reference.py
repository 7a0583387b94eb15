"""TF-slim's inception_v2 in NumPy, from its published list of layers; shares no code with ours.

tensorflow/models, research/slim/nets/inception_v2.py and inception_utils.py: scopes, kernels,
strides; padding SAME; after every convolution but the separable one BN with beta, no gamma and
epsilon 0.001, then ReLU; averages over the pixels inside the image; preprocessing of
inception_preprocessing.py, 2 * (pixel / 255 - 0.5).
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# Of a module: filters of Branch_0, of Branch_1 (two), of Branch_2 (two; its third as its second),
# of Branch_3's projection, whose pool is named. Mixed_4a and 5a: filters of Branch_0 and Branch_1.
MODULES = {
    "Mixed_3b": (64, (64, 64), (64, 96), 32, "avg"),
    "Mixed_3c": (64, (64, 96), (64, 96), 64, "avg"),
    "Mixed_4a": ((128, 160), (64, 96)),
    "Mixed_4b": (224, (64, 96), (96, 128), 128, "avg"),
    "Mixed_4c": (192, (96, 128), (96, 128), 128, "avg"),
    "Mixed_4d": (160, (128, 160), (128, 160), 96, "avg"),
    "Mixed_4e": (96, (128, 192), (160, 192), 96, "avg"),
    "Mixed_5a": ((128, 192), (192, 256)),
    "Mixed_5b": (352, (192, 320), (160, 224), 128, "avg"),
    "Mixed_5c": (352, (192, 320), (192, 224), 128, "max"),
}


class Slim:
    """The network; its tensors are made as the layers ask for them, by name, in `tensors`."""

    def __init__(self, seed: int, classes: int = 1001):
        self.random = np.random.default_rng(seed)
        self.classes = classes
        self.tensors: dict[str, np.ndarray] = {}

    def variable(self, name, shape, std=0.0, low=None):
        """Normal, or uniform in low..low + 1. In float32, the precision of a checkpoint."""
        name = f"InceptionV2/{name}"
        if name not in self.tensors:
            values = std * self.random.normal(size=shape)
            if low is not None:
                values = low + self.random.random(shape)
            self.tensors[name] = values.astype(np.float32)
        return self.tensors[name].astype(np.float64)

    def conv(self, x, scope, features, size, stride=1):
        shape = (size, size, x.shape[-1], features)
        kernel = self.variable(f"{scope}/weights", shape, std=np.sqrt(2 / np.prod(shape[:3])))
        y = convolve(x, kernel, stride)
        mean = self.variable(f"{scope}/BatchNorm/moving_mean", (features,), std=0.2)
        var = self.variable(f"{scope}/BatchNorm/moving_variance", (features,), low=0.5)
        beta = self.variable(f"{scope}/BatchNorm/beta", (features,), std=0.2)
        return np.maximum((y - mean) / np.sqrt(var + 0.001) + beta, 0)

    def __call__(self, images):
        """Pixels [N, H, W, 3] in 0..255 to logits float64 [N, classes]."""
        x = 2 * (images.astype(np.float64) / 255 - 0.5)
        scope = "Conv2d_1a_7x7"
        depthwise = self.variable(f"{scope}/depthwise_weights", (7, 7, 3, 8), std=0.15)
        # tf.nn.separable_conv2d: channel c gives the outputs 8 c .. 8 c + 7
        parts = [convolve(x[..., c : c + 1], depthwise[:, :, c : c + 1], 2) for c in range(3)]
        pointwise = self.variable(f"{scope}/pointwise_weights", (1, 1, 24, 64), std=0.3)
        biases = self.variable(f"{scope}/biases", (64,), std=0.2)
        x = np.maximum(convolve(np.concatenate(parts, -1), pointwise, 1) + biases, 0)
        x = pool(x, 2, np.max)
        x = self.conv(x, "Conv2d_2b_1x1", 64, 1)
        x = self.conv(x, "Conv2d_2c_3x3", 192, 3)
        x = pool(x, 2, np.max)
        for name, filters in MODULES.items():
            layer = self.reduction if len(filters) == 2 else self.module
            x = layer(x, name, *filters)
        x = x.mean(axis=(1, 2))
        name = "Logits/Conv2d_1c_1x1"
        weights = self.variable(f"{name}/weights", (1, 1, 1024, self.classes), std=0.03)
        return x @ weights[0, 0] + self.variable(f"{name}/biases", (self.classes,), std=0.1)

    def module(self, x, name, zero, one, two, three, kind):
        a = self.conv(x, f"{name}/Branch_0/Conv2d_0a_1x1", zero, 1)
        b = self.conv(x, f"{name}/Branch_1/Conv2d_0a_1x1", one[0], 1)
        b = self.conv(b, f"{name}/Branch_1/Conv2d_0b_3x3", one[1], 3)
        c = self.conv(x, f"{name}/Branch_2/Conv2d_0a_1x1", two[0], 1)
        c = self.conv(c, f"{name}/Branch_2/Conv2d_0b_3x3", two[1], 3)
        c = self.conv(c, f"{name}/Branch_2/Conv2d_0c_3x3", two[1], 3)
        d = pool(x, 1, np.max if kind == "max" else np.nanmean)
        d = self.conv(d, f"{name}/Branch_3/Conv2d_0b_1x1", three, 1)
        return np.concatenate([a, b, c, d], -1)

    def reduction(self, x, name, zero, one):
        a = self.conv(x, f"{name}/Branch_0/Conv2d_0a_1x1", zero[0], 1)
        a = self.conv(a, f"{name}/Branch_0/Conv2d_1a_3x3", zero[1], 3, stride=2)
        b = self.conv(x, f"{name}/Branch_1/Conv2d_0a_1x1", one[0], 1)
        b = self.conv(b, f"{name}/Branch_1/Conv2d_0b_3x3", one[1], 3)
        b = self.conv(b, f"{name}/Branch_1/Conv2d_1a_3x3", one[1], 3, stride=2)
        return np.concatenate([a, b, pool(x, 2, np.max)], -1)


def windows(x, size, stride, fill):
    """[N, H', W', C, size, size] of x [N, H, W, C], padded as TensorFlow's SAME."""
    edges = []
    for n in x.shape[1:3]:
        out = -(-n // stride)
        total = max((out - 1) * stride + size - n, 0)
        edges.append((total // 2, total - total // 2))
    padded = np.pad(x, ((0, 0), *edges, (0, 0)), constant_values=fill)
    return sliding_window_view(padded, (size, size), axis=(1, 2))[:, ::stride, ::stride]


def convolve(x, kernel, stride):
    """x [N, H, W, C] with kernel [h, w, C, F]."""
    x = windows(x, kernel.shape[0], stride, 0.0)
    return np.einsum("nhwcij,ijcf->nhwf", x, kernel, optimize=True)


def pool(x, stride, reduce):
    """3x3; averages leave out what lies outside."""
    fill = -np.inf if reduce is np.max else np.nan
    return reduce(windows(x, 3, stride, fill), axis=(-2, -1))
