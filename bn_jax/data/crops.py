"""Where an image is cropped: boxes (top, left, height, width) in pixels, without touching a
pixel."""

import math

Box = tuple[int, int, int, int]

ASPECT = (3 / 4, 4 / 3)  # width / height of a random crop (GoogLeNet, sec. 6)
CENTER = 0.875  # side of the centre crop / shorter side: 224 of 256, the usual single crop


def random_box(height: int, width: int, draws: tuple[float, ...], min_area: float) -> Box:
    """A random crop of min_area..1 of the image's area with an aspect of 3/4..4/3 (GoogLeNet, sec.
    6).

    `draws` are four numbers in [0, 1): area (uniform), aspect (log-uniform), top, left. A box that
    does not fit is cut to the image and then to the allowed aspects. Differs from the paper: other
    implementations draw again (TF-slim up to 100 times) and GoogLeNet does not say; one draw keeps
    the box a plain function of its numbers.
    """
    area = (min_area + (1 - min_area) * draws[0]) * height * width
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = math.exp(low + (high - low) * draws[1])
    w = min(max(round(math.sqrt(area * aspect)), 1), width)
    h = min(max(round(math.sqrt(area / aspect)), 1), height)
    h = min(h, max(math.floor(w / ASPECT[0]), 1))
    w = min(w, max(math.floor(h * ASPECT[1]), 1))
    return int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1)), h, w


def center_box(height: int, width: int) -> Box:
    """The centre square of 87.5% of the shorter side: resized to 224, the centre 224 of an image
    whose shorter side was resized to 256."""
    side = max(round(CENTER * min(height, width)), 1)
    return (height - side) // 2, (width - side) // 2, side, side
