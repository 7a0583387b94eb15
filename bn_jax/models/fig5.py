"""Fig. 5 as a table, and how its published readings differ."""

from typing import NamedTuple


class Row(NamedTuple):
    """One row of Fig. 5: numbers of filters. `one` 0: no 1x1 branch. `project` 0: pass-through."""

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
    Row("3a", 64, 64, 64, 64, 96, "avg", 32),
    Row("3b", 64, 64, 96, 64, 96, "avg", 64),
    Row("3c", 0, 128, 160, 64, 96, "max", 0, 2),
    Row("4a", 224, 64, 96, 96, 128, "avg", 128),
    Row("4b", 192, 96, 128, 96, 128, "avg", 128),
    Row("4c", 160, 128, 160, 128, 160, "avg", 128),
    Row("4d", 96, 128, 192, 160, 192, "avg", 128),
    Row("4e", 0, 128, 192, 192, 256, "max", 0, 2),
    Row("5a", 352, 192, 320, 160, 224, "avg", 128),
    Row("5b", 352, 192, 320, 192, 224, "max", 128),
)


class Variant(NamedTuple):
    """What differs between the published forms of the network.

    project_4cd: filters of the pool projection in 4c and 4d. Fig. 5 prints 128 and an output of
    576; its branches sum to 608, and 576 takes 96. separable_stem: the first convolution is a 7x7
    depthwise one of multiplier 8 and a 1x1 one (Fig. 5), not a plain 7x7. symmetric: Caffe's
    padding (as much before as after, none in the stem's pools) and average over the padded window.
    mean, scale: of the
    pixels, (x - mean) / scale in RGB order.
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
