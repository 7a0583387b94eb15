"""Distorts training images: mirrors, shifts and colours (crops are in crops.py).

What happens to an example depends only on its row of uniform draws (order.uniforms), whose columns
are named by `Draw`. The geometry follows GoogLeNet (sec. 6), the colours follow Howard (2013, arXiv
1312.5402) and Krizhevsky et al. (2012, PCA lighting).
"""

import enum
import itertools
from dataclasses import dataclass

import cv2
import numpy as np

# At strength 1 brightness, contrast and saturation are multiplied by U[1 - 0.5, 1 + 0.5].
FACTOR = 0.5
LIGHTING = 0.1  # standard deviation of PCA lighting at strength 1 (Krizhevsky et al.)
LUMA = np.array([0.299, 0.587, 0.114])  # weights of R, G, B in the grey of a colour (BT.601)
# Principal components of ImageNet's colours, for pixels in 0..1 (Krizhevsky et al.; the numbers are
# those of fb.resnet.torch).
PCA_VALUES = np.array([0.2175, 0.0188, 0.0045])
PCA_VECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)

# The operations on colours, and all orders of them.
BRIGHTNESS = 0
CONTRAST = 1
SATURATION = 2
ORDERS = np.array(list(itertools.permutations([BRIGHTNESS, CONTRAST, SATURATION])))


class Draw(enum.IntEnum):
    """Columns of the uniform draws of one example."""

    AREA = 0
    ASPECT = 1
    TOP = 2
    LEFT = 3
    MIRROR = 4
    SHIFT_DOWN = 5
    SHIFT_RIGHT = 6
    ORDER = 7
    FACTORS = 8  # and 9, 10
    LIGHTING = 11  # and 12, 13, 14


DRAWS = 15


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image, in the units of the config.

    Attributes:
      image_size: pixels of a side after cropping.
      crop: the smallest area of a random crop as a share of the image (1: no random crop).
      mirror: whether half of the images are mirrored.
      shift: the largest shift in pixels.
      distortion: the strength of the distortion of colours.
    """

    image_size: int
    crop: float = 1.0
    mirror: bool = False
    shift: int = 0
    distortion: float = 0.0


def augment(
    images_NHWC: np.ndarray,
    draws: np.ndarray,
    augmentation: Augmentation,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Applies all distortions but the crop. It may change the images in place.

    Args:
      images_NHWC: uint8, cropped already.
      draws: float64 [N, DRAWS].
      augmentation: which distortions, and how strong.
      mask: bool [N]; where it is False the image is empty and stays empty.
    """
    if augmentation.mirror:
        images_NHWC = mirror(images_NHWC, draws)
    if augmentation.shift:
        images_NHWC = shift(images_NHWC, draws, augmentation.shift)
    return photometric(images_NHWC, draws, augmentation.distortion, mask)


def mirror(images_NHWC: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mirrors, in place, the images whose draw is below one half."""
    mirrored = draws[:, Draw.MIRROR] < 0.5
    for row in np.flatnonzero(mirrored):
        image = images_NHWC[row]
        cv2.flip(image, 1, dst=image)
    return images_NHWC


def shift(images_NHWC: np.ndarray, draws: np.ndarray, most: int) -> np.ndarray:
    """Shifts each image by up to `most` pixels up or down and left or right; what enters is 0."""
    n, height, width, _ = images_NHWC.shape
    edge = (most, most)
    padded = np.pad(images_NHWC, ((0, 0), edge, edge, (0, 0)))

    # Where the window of each image begins in the padded one.
    places = 2 * most + 1
    top = (draws[:, Draw.SHIFT_DOWN] * places).astype(np.int64)
    left = (draws[:, Draw.SHIFT_RIGHT] * places).astype(np.int64)

    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    shifted_NCHW = windows[np.arange(n), top, left]
    return np.ascontiguousarray(shifted_NCHW.transpose(0, 2, 3, 1))


def color_maps(means_NC: np.ndarray, draws: np.ndarray, strength: float) -> np.ndarray:
    """Returns the affine map of colours that distorts each image, float64 [N, C, C + 1].

    The operations are brightness x*f, contrast (x - grey mean)*f + grey mean, and saturation
    (x - grey)*f + grey, in a random order, each f from U[1 - strength/2, 1 + strength/2]; PCA
    lighting follows. `means_NC` are the images' mean colours. All operations are affine in the
    colour, and contrast needs only the mean, which maps like any colour. So they compose into one
    map, and clipping to 0..255 happens once, after it. Grey images (C = 1) have neither saturation
    nor lighting.
    """
    n, channels = means_NC.shape
    identity = np.eye(channels)
    luma = LUMA if channels == 3 else np.ones(1)
    grey = np.broadcast_to(luma, (channels, channels))  # of a colour, in every channel

    spread = 2 * draws[:, Draw.FACTORS : Draw.FACTORS + 3] - 1
    factors = 1 + strength * FACTOR * spread
    permutation = (draws[:, Draw.ORDER] * len(ORDERS)).astype(np.int64)
    operations = ORDERS[permutation]  # [N, 3]

    # So far a colour becomes matrix @ colour + offset. Each operation is applied to the result.
    matrix = np.broadcast_to(identity, (n, channels, channels))
    offset = np.zeros((n, channels))
    for place in range(3):
        operation = operations[:, place]
        f = factors[np.arange(n), operation]

        # Saturation moves a pixel towards its own grey.
        to_grey = np.where(operation == SATURATION, 1 - f, 0)
        step = f[:, None, None] * identity + to_grey[:, None, None] * grey

        # Contrast moves a pixel towards the grey of the mean colour, as changed by the operations
        # before this one.
        mean = np.einsum("nij,nj->ni", matrix, means_NC) + offset
        to_mean = np.where(operation == CONTRAST, 1 - f, 0)
        added = to_mean * (mean @ luma)

        matrix = step @ matrix
        offset = np.einsum("nij,nj->ni", step, offset) + added[:, None]

    if channels == 3:
        offset = offset + lighting(draws, strength)
    return np.concatenate([matrix, offset[:, :, None]], axis=2)


def lighting(draws: np.ndarray, strength: float) -> np.ndarray:
    """Returns the colour that PCA lighting adds to each image, float64 [N, 3], in 0..255."""
    u = draws[:, Draw.LIGHTING : Draw.LIGHTING + 4]

    # Box-Muller: two normal numbers from draws 0 and 2, one from draws 1 and 3.
    radius = np.sqrt(-2 * np.log1p(-u[:, [0, 0, 1]]))
    angle = 2 * np.pi * u[:, [2, 2, 3]]
    second = np.arange(3) == 1
    normal = radius * np.where(second, np.sin(angle), np.cos(angle))

    return 255 * strength * LIGHTING * (normal * PCA_VALUES) @ PCA_VECTORS.T


def photometric(
    images_NHWC: np.ndarray, draws: np.ndarray, strength: float, mask: np.ndarray | None = None
) -> np.ndarray:
    """Distorts the colours of uint8 images (see color_maps), rounded and clipped to 0..255.

    RGB images are changed in place. Rows where the mask is False stay as they are.
    """
    if not strength:
        return images_NHWC

    if images_NHWC.shape[-1] == 1:
        means = images_NHWC.mean(axis=(1, 2), dtype=np.float32)
        maps = color_maps(means, draws, strength).astype(np.float32)
        gain = maps[:, None, None, :, 0]
        offset = maps[:, None, None, :, 1]
        distorted = images_NHWC * gain + offset
        return np.clip(np.rint(distorted), 0, 255).astype(np.uint8)

    means = np.array([cv2.mean(image)[:3] for image in images_NHWC])
    maps = color_maps(means.reshape(-1, 3), draws, strength)
    for row, image in enumerate(images_NHWC):
        if mask is None or mask[row]:
            cv2.transform(image, maps[row], dst=image)
    return images_NHWC
