"""Where an image is cropped, as boxes (top, left, height, width) in pixels."""

import math
from collections import Counter
from typing import NamedTuple

Box = tuple[int, int, int, int]

ASPECT = (3 / 4, 4 / 3)  # width / height of a random crop (GoogLeNet, sec. 6)
CENTER = 0.875  # side of the centre crop / shorter side: 224 of 256, the usual single crop
SIDES = (256, 288, 320, 352)  # shorter sides of multicrop evaluation at 224 px (GoogLeNet, sec. 7)


def random_box(height: int, width: int, draws: tuple[float, ...], min_area: float) -> Box:
    """Draws a crop of min_area..1 of the image's area, of aspect 3/4..4/3 (GoogLeNet, sec. 6).

    Differs from the paper: a box that does not fit is cut to the image and then to the allowed
    aspects, so that it is a pure function of four numbers; other implementations draw again
    (TF-slim up to 100 times), and GoogLeNet does not say what it does.

    Args:
      height, width: of the image, in pixels.
      draws: four numbers in [0, 1): area (uniform), aspect (log-uniform), top, left.
      min_area: the smallest area as a share of the image.
    """
    area = (min_area + (1 - min_area) * draws[0]) * height * width
    narrow, wide = ASPECT
    low = math.log(narrow)
    high = math.log(wide)
    aspect = math.exp(low + (high - low) * draws[1])

    # The box has at least one pixel, and is cut to the image.
    w = max(round(math.sqrt(area * aspect)), 1)
    h = max(round(math.sqrt(area / aspect)), 1)
    w = min(w, width)
    h = min(h, height)

    # It is then cut to the allowed aspects.
    tallest = max(math.floor(w / narrow), 1)
    h = min(h, tallest)
    widest = max(math.floor(h * wide), 1)
    w = min(w, widest)

    # All positions of the box in the image have the same probability.
    top = int(draws[2] * (height - h + 1))
    left = int(draws[3] * (width - w + 1))
    return top, left, h, w


def center_box(height: int, width: int) -> Box:
    """Returns the centre square of 87.5% of the shorter side.

    Resized to 224, it is the centre 224 of an image whose shorter side was resized to 256.
    """
    side = max(round(CENTER * min(height, width)), 1)
    top = (height - side) // 2
    left = (width - side) // 2
    return top, left, side, side


class Crop(NamedTuple):
    """One of the crops of multicrop evaluation.

    Attributes:
      square: a box of the image, which is resized to `side` pixels.
      side: pixels of the resized square.
      corner: (top, left) in the resized square, where the network's input is cut from it. None: the
        input is the whole square, resized again.
      mirror: whether the input is mirrored.
    """

    square: Box
    side: int
    corner: tuple[int, int] | None
    mirror: bool


def views(height: int, width: int, crops: int, size: int, mirror: bool) -> Counter[Crop]:
    """Lists GoogLeNet's 144 crops of an image (its section 7), or AlexNet's 10 (its section 4.1).

    For 144 crops the shorter side is resized to four lengths (`SIDES` at 224 px, and in this ratio
    at any `size`). At each length there are three squares: left, centre and right, or top, centre
    and bottom. Each square gives six crops of `size` pixels: its four corners, its centre, and the
    whole square resized. Each crop is also mirrored.

    The 10 crops are the corners and the centre of the centre square at the smallest size, and their
    mirror images.

    The counter holds how often a crop occurs: the three squares of a square image coincide, so each
    of its crops has the count 3. The counts sum to `crops`, or to half of it without `mirror`.
    """
    squares = _squares(height, width)
    scales: tuple[int, ...] = SIDES
    if crops != 144:
        squares = squares[1:2]
        scales = scales[:1]

    found: Counter[Crop] = Counter()
    for scale in scales:
        side = round(scale * size / 224)
        low = side - size
        middle = low // 2
        corners: list[tuple[int, int] | None]
        corners = [(0, 0), (0, low), (low, 0), (low, low), (middle, middle)]
        if crops == 144:
            corners.append(None)
        for square in squares:
            for corner in corners:
                found[Crop(square, side, corner, False)] += 1
                if mirror:
                    found[Crop(square, side, corner, True)] += 1
    return found


def _squares(height: int, width: int) -> list[Box]:
    """Returns the squares of the shorter side at the start, centre and end of the longer one."""
    side = min(height, width)
    spare = abs(height - width)
    places = (0, spare // 2, spare)
    if height > width:
        return [(place, 0, side, side) for place in places]
    return [(0, place, side, side) for place in places]
