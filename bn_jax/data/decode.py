"""Encoded image -> RGB pixels: JPEG by simplejpeg, PNG, BMP and WebP by OpenCV.

The header is read first: an image whose decoding would need more than MAX_BYTES is refused before
any of it is unpacked. Pixels are as stored: an EXIF orientation is ignored, as tf.io.decode_jpeg
and torchvision do. Grey, palette, 16-bit, CMYK and transparent images become 8-bit RGB.
"""

import struct
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from bn_jax.data.crops import Box

cv2.setNumThreads(0)  # the pipeline has its own threads, one a batch

MAX_BYTES = 256 * 2**20  # of pixels and coefficients of one image: 89 megapixels of 8-bit RGB
# Complaints of libjpeg about files whose pixels are nevertheless all there. Any other is an error.
HARMLESS = ("extraneous bytes", "unknown JFIF", "Invalid SOS", "Unknown Adobe")


class BadImageError(ValueError):
    """An image that cannot be decoded; the message says why."""


class Frame(NamedTuple):
    """What the header says. `bytes_per_pixel`: memory that decoding takes."""

    kind: str
    height: int
    width: int
    components: int = 3
    bytes_per_pixel: int = 3


def frame(data: bytes) -> Frame:
    """Reads the header. Raises BadImageError for unknown, damaged and oversized images."""
    try:
        found = _frame(data)
    except (struct.error, IndexError):
        raise BadImageError("the header is cut") from None
    if found.height < 1 or found.width < 1:
        raise BadImageError(f"it has no pixels: {found.height} x {found.width}")
    need = found.height * found.width * found.bytes_per_pixel
    if need > MAX_BYTES:
        raise BadImageError(
            f"{found.height} x {found.width} pixels unpack to {need >> 20} MiB, "
            f"the limit is {MAX_BYTES >> 20} MiB"
        )
    return found


def _frame(data: bytes) -> Frame:
    if data[:2] == b"\xff\xd8":
        return _jpeg_frame(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        width, height, depth = struct.unpack_from(">IIB", data, 16)
        if data[12:16] != b"IHDR":
            raise BadImageError("PNG without a header")
        return Frame("png", height, width, bytes_per_pixel=11 if depth == 16 else 7)
    if data[:2] == b"BM":
        width, height = struct.unpack_from("<ii", data, 18)
        return Frame("bmp", abs(height), width, bytes_per_pixel=7)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_frame(data)
    raise BadImageError(f"not a JPEG, PNG, BMP or WebP image: it starts with {bytes(data[:4])!r}")


def _jpeg_frame(data: bytes) -> Frame:
    """Walks the markers to the frame header (ITU T.81, B.2.2)."""
    at = 2
    while True:
        if data[at] != 0xFF:
            raise BadImageError("JPEG without a frame header")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            if precision != 8:
                raise BadImageError(f"JPEG of {precision} bits a sample")
            # A progressive image keeps all its coefficients, two bytes each, until it is complete.
            progressive = marker in (0xC2, 0xC6, 0xCA, 0xCE)
            return Frame("jpeg", height, width, components, (3 if progressive else 1) * components)
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]


def _webp_frame(data: bytes) -> Frame:
    chunk = data[12:16]
    if chunk == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif chunk == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        width, height = 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    return Frame("webp", height, width, bytes_per_pixel=7)


def pixels(data: bytes, found: Frame, *, reduce: int = 1, exact: bool = True) -> np.ndarray:
    """uint8 [height/reduce, width/reduce, 3], rounded up, of the image whose header is `found`.

    reduce: 1, 2, 4 or 8; a JPEG is reduced while it is decoded, which is cheaper and averages.
    exact: the accurate inverse DCT, 5% slower than the fast one (which is off by a level or two).
    Raises BadImageError.
    """
    if found.kind != "jpeg":
        image = _by_opencv(data, found)
        if reduce > 1:
            size = (-(-found.width // reduce), -(-found.height // reduce))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return image
    options = {
        "fastdct": not exact,
        "min_factor": reduce,
        "min_height": -(-found.height // reduce),
        "min_width": -(-found.width // reduce),
    }
    if found.components == 4:
        return _rgb_from_cmyk(_by_simplejpeg(data, colorspace="CMYK", **options), data)
    return _by_simplejpeg(data, colorspace="RGB", **options)


def _by_simplejpeg(data: bytes, **options) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, **options)
    except ValueError as e:
        reason = str(e)
    if not any(word in reason for word in HARMLESS) or b"\xff\xd9" not in data:
        raise BadImageError(reason)
    try:
        return simplejpeg.decode_jpeg(data, strict=False, **options)
    except ValueError as e:
        raise BadImageError(str(e)) from None


def _rgb_from_cmyk(cmyk: np.ndarray, data: bytes) -> np.ndarray:
    """RGB of ink values. Adobe's files (all known ones) store them inverted: 255 is no ink."""
    inks = cmyk if b"Adobe" in data[:65536] else 255 - cmyk
    product = inks[..., :3].astype(np.uint16) * inks[..., 3:]
    return ((product + 127) // 255).astype(np.uint8)


def _by_opencv(data: bytes, found: Frame) -> np.ndarray:
    if found.kind == "png" and b"IEND" not in data[-64:]:
        raise BadImageError("PNG is cut: its end is missing")
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as e:
        raise BadImageError(f"OpenCV: {e.err}") from None
    if image is None or image.shape[:2] != (found.height, found.width):
        raise BadImageError(f"damaged {found.kind.upper()}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def reduction(box: Box, size: int) -> int:
    """The largest of 1, 2, 4, 8 by which a crop can be reduced and still be at least `size`
    pixels."""
    return next((f for f in (8, 4, 2) if min(box[2:]) >= f * size), 1)


def resized_crop(image: np.ndarray, box: Box, reduce: int, out: np.ndarray) -> None:
    """Writes a crop of an image into `out` [S, S, 3]. `box` is in pixels of the unreduced image.

    Bilinear without antialiasing, as tf.image.resize; after `reduction` the crop is less than twice
    as large as the output (or eight times reduced already), so nothing is skipped over.
    """
    top, left, height, width = (round(x / reduce) for x in box)
    height, width = max(height, 1), max(width, 1)
    top, left = min(top, image.shape[0] - height), min(left, image.shape[1] - width)
    part = image[top : top + height, left : left + width]
    cv2.resize(part, out.shape[1::-1], dst=out, interpolation=cv2.INTER_LINEAR)
