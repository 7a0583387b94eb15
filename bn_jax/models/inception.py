"""The Inception network of section 4.2: Fig. 5 as a table, and the module that each row describes.

The maps have these heights and widths, for two sizes of image:

    image                        224    28
    conv1_7x7 (stride 2)         112    14
    pool1 (stride 2)              56     7
    conv2_3x3                     56     7
    pool2 (stride 2)              28     -    dropped below 64 px
    3a, 3b                        28     7
    3c (stride 2), 4a-4d          14     4
    4e (stride 2), 5a, 5b          7     2
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bn_jax import ops
from bn_jax.layers import ConvBN, LocalResponseNorm
from bn_jax.models.initializers import Gaussian, PooledInit
from bn_jax.ops import mixed


class Fig5Row(NamedTuple):
    """One row of Fig. 5: numbers of filters. 0 means no 1x1 branch (`one`), no `project`ion."""

    name: str
    one: int
    three_reduce: int
    three: int
    double_reduce: int
    double: int
    pool: str
    project: int
    stride: int = 1


TABLE = (
    #         1x1  3x3red 3x3  d3x3red d3x3  pool   proj stride
    Fig5Row("3a", 64, 64, 64, 64, 96, "avg", 32),
    Fig5Row("3b", 64, 64, 96, 64, 96, "avg", 64),
    Fig5Row("3c", 0, 128, 160, 64, 96, "max", 0, 2),
    Fig5Row("4a", 224, 64, 96, 96, 128, "avg", 128),
    Fig5Row("4b", 192, 96, 128, 96, 128, "avg", 128),
    Fig5Row("4c", 160, 128, 160, 128, 160, "avg", 128),
    Fig5Row("4d", 96, 128, 192, 160, 192, "avg", 128),
    Fig5Row("4e", 0, 128, 192, 192, 256, "max", 0, 2),
    Fig5Row("5a", 352, 192, 320, 160, 224, "avg", 128),
    Fig5Row("5b", 352, 192, 320, 192, 224, "max", 128),
)


class Variant(NamedTuple):
    """What differs between the published forms of the network.

    Attributes:
      project_4cd: filters of the pool projection in 4c and 4d. Fig. 5 prints 128, and an output of
        576 channels; but with 128 the branches sum to 608, and 576 needs 96.
      separable_stem: whether the first convolution is separable, a depthwise 7x7 of multiplier 8
        and a 1x1 (Fig. 5), and not a plain 7x7.
      symmetric: whether padding is Caffe's (as much before as after, none in the stem's pools), and
        average pools divide by the size of the padded window.
      mean, scale: of the pixels in RGB order, which become (x - mean) / scale.
    """

    project_4cd: int
    separable_stem: bool
    symmetric: bool
    mean: tuple[float, float, float]
    scale: float


VARIANTS = {
    "paper": Variant(128, True, False, (127.5, 127.5, 127.5), 127.5),  # Fig. 5's filters
    "caffe": Variant(128, False, True, (128.0, 117.0, 104.0), 1.0),  # Caffe, MXNet, Cadene's torch
    "slim": Variant(96, True, False, (127.5, 127.5, 127.5), 127.5),  # TF-slim inception_v2
}


SMALLEST_FOR_POOL2 = 64  # pixels: at 32 px the maps of stage 5 would have a single position


class Block(nn.Module):
    """One Inception module: four branches over the same input, concatenated over channels.

    The branches have these layers: conv_1x1; conv_3x3_reduce, conv_3x3; double_3x3_reduce,
    double_3x3_1, double_3x3_2; pool_proj. The row's stride is that of the last 3x3 of each branch
    and of the pool.

    Attributes:
      row: the numbers of filters.
      conv: makes a layer, as `layers.ConvBN` does.
      width: multiplies the numbers of filters.
      symmetric: see `Variant`.
    """

    row: Fig5Row
    conv: Callable[..., Any]
    width: float
    symmetric: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Maps [N, H, W, C] to [N, H/stride, W/stride, one + three + double + project (or C)]."""
        row = self.row
        last = strided_3x3(row.stride, self.symmetric)

        def layer(name: str, features: int, kernel: int, **options: Any) -> ConvBN:
            filters = scaled(features, self.width)
            return self.conv(filters, (kernel, kernel), name=name, **options)

        def run(layer: ConvBN, x: jax.Array) -> jax.Array:
            return layer(x, train=train, mask=mask)

        # The layers that read x itself.
        conv_1x1 = layer("conv_1x1", row.one, 1) if row.one else None
        conv_3x3_reduce = layer("conv_3x3_reduce", row.three_reduce, 1)
        double_3x3_reduce = layer("double_3x3_reduce", row.double_reduce, 1)
        pool_proj = layer("pool_proj", row.project, 1) if row.project else None
        averaged = pool_proj if row.pool == "avg" else None
        readers = []
        for reader in (conv_1x1, conv_3x3_reduce, double_3x3_reduce, averaged):
            if reader is not None:
                readers.append(reader)
        parallel = Parallel1x1(x, readers, train=train, mask=mask)

        branches = []
        if conv_1x1 is not None:
            branches.append(parallel(conv_1x1))

        y = parallel(conv_3x3_reduce)
        y = run(layer("conv_3x3", row.three, 3, **last), y)
        branches.append(y)

        y = parallel(double_3x3_reduce)
        y = run(layer("double_3x3_1", row.double, 3), y)
        y = run(layer("double_3x3_2", row.double, 3, **last), y)
        branches.append(y)

        if averaged is not None:
            branches.append(parallel(averaged, pool=self._average))
        else:
            y = ops.max_pool(x, row.stride)
            if pool_proj is not None:
                y = run(pool_proj, y)
            branches.append(y)

        return jnp.concatenate(branches, axis=-1)

    def _average(self, x: jax.Array) -> jax.Array:
        """Averages 3x3 windows, with stride 1."""
        y = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=self.symmetric)
        return y.astype(x.dtype)  # Flax divides by float32 numbers of cells, which widens it


class Parallel1x1:
    """The 1x1 layers of a Block that read its input x [N, H, W, C]; one product if that is faster.

    The kernels stay the layers' own parameters, which are concatenated here.
    """

    def __init__(self, x: jax.Array, layers: Sequence[ConvBN], **call: Any):
        self._x = x
        self._call = call
        self._products: dict[str | None, jax.Array] = {}
        if ops.hand_tuned("products") and not layers[0].is_initializing():
            kernels = [layer.kernel() for layer in layers]
            products = ops.products(x, kernels, layers[0].precision)
            names = [layer.name for layer in layers]
            self._products = dict(zip(names, products, strict=True))

    def __call__(
        self,
        layer: ConvBN,
        pool: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> jax.Array:
        """Computes a layer of pool(x), g(BN(W pool(x))). pool: linear, and keeps the shape."""
        if layer.name in self._products:
            # Both are linear, so pool(W x) is W pool(x), and pools fewer channels.
            product = pool(self._products[layer.name])
            return layer.from_product(product, **self._call)
        return layer(pool(self._x), **self._call)


class AuxiliaryHead(nn.Module):
    """GoogLeNet's auxiliary classifier (its section 5).

    It consists of an average pool 5x5/3, a 1x1 convolution, a dense layer of 1024 units and 70%
    dropout. The convolution has a bias and no BN, because the paper does not mention such heads.
    """

    num_classes: int
    conv: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array]
    width: float
    kernel_init: Any
    dtype: Any
    precision: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to logits float32 [N, num_classes]; it is only used in training."""
        examples, height, width, _ = x.shape
        window = (min(5, height), min(5, width))  # small images have smaller maps
        x = nn.avg_pool(x, window, (3, 3), "VALID")
        conv_1x1 = self.conv(scaled(128, self.width), (1, 1), norm=None, name="conv_1x1")
        x = conv_1x1(x, train=True)

        dense = mixed.Dense(
            scaled(1024, self.width),
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            precision=self.precision,
            name="dense",
        )
        x = dense(x.reshape(examples, -1))
        x = self.activation(x.astype(self.dtype))
        x = nn.Dropout(0.7, deterministic=False)(x)

        logits = classifier(self.num_classes, self.dtype, self.precision)(x)
        return logits.astype(jnp.float32)


class Inception(PooledInit):
    """The network of Fig. 5, from pixels to logits.

    Attributes:
      width: multiplies every number of filters (1 in the paper).
      variant: one of VARIANTS.
      norm: as in `layers.ConvBN`, or None.
      dropout: share of features dropped before the classifier.
      lrn: whether local response normalization follows pool1 and conv2_3x3 (GoogLeNet).
      aux: whether there are two auxiliary heads, after 4a and 4d (GoogLeNet).
      per_activation: names of modules ("inception_5b") whose BN has a scale and an offset for each
        activation instead of each feature map (4.2.3).
      kernel_init: of the convolutions, and of the auxiliary heads' hidden layers without its gain.
      dtype: of the computation; parameters are float32.
      precision: of every product and convolution, as lax takes it.
    """

    num_classes: int
    width: float = 1.0
    variant: str = "paper"
    norm: Callable[..., Any] | None = None
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dropout: float = 0.0
    lrn: bool = False
    aux: bool = False
    per_activation: tuple[str, ...] = ()
    kernel_init: Any = Gaussian(rule="he")
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> Any:
        """Maps images [N, H, W, C] in 0..255 to logits [N, num_classes], float32 or wider.

        In training with `aux` it returns (logits, (logits of head 1, of head 2)). mask: bool [N];
        rows that are False do not enter batch statistics.
        """
        variant = VARIANTS[self.variant]
        conv = partial(
            ConvBN,
            norm=self.norm,
            activation=self.activation,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            precision=self.precision,
        )

        x = self._pixels(images)
        x = self._stem(x, conv, train=train, mask=mask)

        aux = []
        for row in TABLE:
            name = f"inception_{row.name}"
            if row.name in ("4c", "4d"):
                row = row._replace(project=variant.project_4cd)
            local = conv
            if name in self.per_activation and self.norm is not None:
                local = partial(conv, norm=partial(self.norm, axis=(1, 2, 3)))
            block = Block(row, local, self.width, variant.symmetric, name=name)
            x = block(x, train=train, mask=mask)

            if self.aux and train and row.name in ("4a", "4d"):
                head = AuxiliaryHead(
                    self.num_classes,
                    conv,
                    self.activation,
                    self.width,
                    self.kernel_init._replace(gain=1.0),  # `init_scale` is for convolutions
                    self.dtype,
                    self.precision,
                    name=f"aux_{row.name}",
                )
                aux.append(head(x))

        x = jnp.mean(x, axis=(1, 2))  # Fig. 5's average pool covers the whole map
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = classifier(self.num_classes, self.dtype, self.precision)(x)
        logits = logits.astype(jnp.promote_types(jnp.float32, self.dtype))
        if aux:
            return logits, tuple(aux)
        return logits

    def _pixels(self, images: jax.Array) -> jax.Array:
        """Preprocesses images in 0..255: subtracts the mean and divides by the scale."""
        variant = VARIANTS[self.variant]
        wide = jnp.promote_types(jnp.float32, self.dtype)
        mean: Any = variant.mean
        if images.shape[-1] != 3:  # grey images have the mean of the three colours
            mean = sum(variant.mean) / 3
        centered = images.astype(wide) - jnp.array(mean, wide)
        return (centered / variant.scale).astype(self.dtype)

    def _stem(self, x, conv, *, train, mask):
        """Maps [N, H, W, C] to [N, H/8, W/8, 192], or H/4 and W/4 below 64 px."""
        variant = VARIANTS[self.variant]
        keep_pool2 = min(x.shape[1:3]) >= SMALLEST_FOR_POOL2

        def run(features: int, kernel: int, name: str, x: jax.Array, **options: Any) -> jax.Array:
            filters = scaled(features, self.width)
            layer = conv(filters, (kernel, kernel), name=name, **options)
            return layer(x, train=train, mask=mask)

        def pool(x: jax.Array) -> jax.Array:
            if variant.symmetric:
                return ops.max_pool_unpadded(x)
            return ops.max_pool(x, 2)

        stride_2: dict[str, Any] = {
            "strides": (2, 2),
            "padding": [(3, 3), (3, 3)] if variant.symmetric else "SAME",
        }
        if variant.separable_stem:
            channels = x.shape[-1]
            depthwise = mixed.Conv(
                8 * channels,
                (7, 7),
                **stride_2,
                feature_group_count=channels,
                use_bias=False,
                kernel_init=self.kernel_init,
                dtype=self.dtype,
                precision=self.precision,
                conv_general_dilated=ops.conv,
                name="conv1_7x7_depthwise",
            )
            x = depthwise(x)
            x = run(64, 1, "conv1_7x7", x)
        else:
            x = run(64, 7, "conv1_7x7", x, **stride_2)
        x = pool(x)
        if self.lrn:
            x = LocalResponseNorm()(x)

        x = run(64, 1, "conv2_3x3_reduce", x)
        x = run(192, 3, "conv2_3x3", x)
        if self.lrn:
            x = LocalResponseNorm()(x)
        if keep_pool2:
            x = pool(x)
        return x


def scaled(features: int, width: float) -> int:
    """Multiplies a number of filters by the width; the result is at least 1."""
    return max(1, round(features * width))


def strided_3x3(stride: int, symmetric: bool) -> dict[str, Any]:
    """Returns strides and padding of a 3x3 convolution; the paddings differ only at stride 2."""
    return {
        "strides": (stride, stride),
        "padding": [(1, 1), (1, 1)] if symmetric else "SAME",
    }


def classifier(num_classes: int, dtype: Any, precision: Any) -> nn.Module:
    """Makes the last layer, linear with a bias; its parameters are called `classifier`.

    No nonlinearity follows it, so its initial weights are Glorot's.
    """
    return mixed.Dense(
        num_classes,
        kernel_init=Gaussian(),
        dtype=dtype,
        precision=precision,
        name="classifier",
    )
